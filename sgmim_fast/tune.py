"""`tune`: times every way to compute every op of a model on this machine, and stores which one is the fastest.

`tune` runs one step of the model and intercepts its ops. When an op is called with a shape for the first time, every
implementation that can run the call does so on the step's own tensors. Each result is checked against the op in
float64, and implementations that pass are timed in turns. Only times are kept in memory. Forward and backward of an op
get the same backend, since the backward reads what the forward saved, but may get different variants (gemm tiles).
A "way" is a backend, or one of its variants ("BACKEND:VARIANT").
"""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sgmim_fast import backends, tuned
from sgmim_fast.encoders import image_size
from sgmim_fast.masking import SelectiveMask, selective_mask
from sgmim_fast.ops import standardize_structure
from sgmim_fast.ops._op import AUTOCAST_KEYS

# Tolerance of a result, in the Euclidean and in the maximum norm: twice plain PyTorch's error, plus 4 ulp, plus the
# relative error that sums over rows have in PyTorch's own float32 kernels. Plain PyTorch's error may happen to be
# small: if a result exceeds the tolerance, the largest of several draws of the arguments counts.
TIMES_PLAIN, FEW_ULP, SUMS = 2, 4, 1e-5
DRAWS = 4
ROUNDS = 25  # largest number of rounds; the minimum over rounds counts


class Winner(NamedTuple):
    """The result of tuning an op at one shape.

    Attributes:
        op: name of the op.
        part: "" for forward and backward together, else "forward" or "backward".
        key: shapes and dtype of the call, see `sgmim_fast.tuned.key`.
        backend: part ("forward", "backward") -> the fastest way to compute it; only parts that the step called.
        seconds: backend -> sum over both parts of the time of its fastest variant, the minimum of several calls.
        default: the backend that runs without tuning.
        refused: way -> why it was rejected.
    """

    op: str
    part: str
    key: tuned.Key
    backend: dict[str, str]
    seconds: dict[str, float]
    default: str
    refused: dict[str, str]

    @property
    def name(self) -> str:
        """The fastest backend."""
        return min(self.seconds, key=self.seconds.__getitem__)


@dataclass
class _Measured:
    """Measurements of one op and key."""

    default: str = ""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # part -> way -> seconds
    refused: dict[str, str] = field(default_factory=dict)


def tune(
    model: nn.Module,
    batch: int | Sequence[Any] = 32,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seconds: float = 120.0,
    report: Callable[[str], None] | None = print,
    keep: bool = True,
) -> list[Winner]:
    """Finds the fastest implementation of each op in a model's training step, and uses it from then on.

    It runs two steps of the model. In the second it runs every backend that can compute an op at the step's shapes, in
    every variant. The choices are stored in the user's cache (see `sgmim_fast.tuned`) for this device, these versions
    and these shapes. This process and all later ones use them automatically; other shapes are not affected. Results
    change by rounding at most. Parameters, gradients, buffers and random generators are unchanged afterwards.

    Args:
        model: an `SGMIM`, an encoder or another module that accepts `batch`, on the device and in the mode (train or
            eval) in which it will be used.
        batch: for an SGMIM, the batch size, for which random inputs are generated; or the arguments of `model.forward`.
        dtype: dtype of the step, torch.float32 or the dtype of autocast.
        seconds: approximate time budget, without the two steps and compilation. Every implementation is timed at least
            once.
        report: called with each line of a table of the results; None: no report. A progress bar is shown on standard
            error if that is a terminal.
        keep: store the choices for later processes.

    Returns:
        A `Winner` for each op and shape.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value and what is expected.
        RuntimeError: a backend is forced, so that there is no choice; or SGMIM_FAST_TUNED is 0.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype}; expected torch.float32, torch.bfloat16 or torch.float16")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; expected more than 0")
    if (name := backends.forced()) is not None:
        raise RuntimeError(f"backend {name!r} is forced (backends.use or SGMIM_FAST_BACKEND): nothing is left to tune")
    if not tuned.enabled():
        raise RuntimeError("SGMIM_FAST_TUNED is 0: what is tuned would not be used")
    device = next((p.device for p in model.parameters()), torch.device("cpu")).type
    step = _step(model, batch, dtype, device)
    with _state_restored(model, device):
        calls = _Calls()
        with _watched(calls):
            step()
        meter = _Meter(device, len(calls.found), seconds)
        with _watched(meter), _Bar(len(calls.found)) as meter.bar:
            step()
    winners = [_winner(op, part, key, found) for (op, part, key), found in meter.found.items()]
    choices = {(w.op, part, w.key): name for w in winners for part, name in w.backend.items()}
    where = "for this process alone"
    if not keep:
        tuned.use(device, choices)
    else:
        try:
            where = f"in {tuned.save(device, choices)}"
        except OSError as error:
            where += f": {error.strerror}: {error.filename}; SGMIM_FAST_CACHE names another folder"
    if report is not None:
        for line in (*table(winners), f"kept {where}"):
            report(line)
    return winners


def table(winners: Sequence[Winner]) -> Iterator[str]:
    """Yields the lines of a table: op, shape, fastest way, its time, and the default's and plain PyTorch's relative to
    it."""
    yield f"{'op':24}{'shape':24}{'fastest':26}{'ms':>9}{'default':>9}{'PyTorch':>9}"
    for w in sorted(winners, key=lambda w: -w.seconds[w.name]):
        best, shape = w.seconds[w.name], "x".join(map(str, w.key[0]))
        gains = (f"{w.seconds[n] / best:8.2f}x" if n in w.seconds else f"{'-':>9}" for n in (w.default, "torch"))
        yield f"{f'{w.op} {w.part}'.strip():24.24}{shape:24.24}{w.name:26}{1e3 * best:9.3f}{''.join(gains)}"
        for name, why in w.refused.items():
            yield f"  {name} is left out: {why}"


def _step(model: nn.Module, batch: int | Sequence[Any], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Returns a function that computes the forward and, in train mode, the backward."""
    if isinstance(batch, int):
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        inputs: Callable[[], Sequence[Any]] = lambda: _inputs(model, batch, device)  # noqa: E731
        _inputs_known(model)
    elif isinstance(batch, list | tuple):
        inputs = lambda: batch  # noqa: E731
    else:
        raise TypeError(
            f"batch is a {type(batch).__name__}; expected a number of images, or the arguments of the model"
        )

    def step() -> None:
        arguments = inputs()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            result = model(*arguments)
        if model.training:
            results = [t for t in (result if isinstance(result, Sequence) else [result]) if isinstance(t, Tensor)]
            sum(t.float().square().mean() for t in results if t.requires_grad).backward()

    return step


def _inputs_known(model: nn.Module) -> tuple[int, int]:
    """Returns the image size of an SGMIM.

    Raises:
        TypeError: the model is not an SGMIM, or its image size is unknown.
    """
    size = image_size(getattr(model, "encoder", None))
    if size is None or not hasattr(model, "encoder_stride"):
        raise TypeError(
            f"batch is a number and model a {type(model).__name__}; expected an SGMIM around an encoder with `img_size`"
            ", or as batch the arguments of the model"
        )
    return size


def _inputs(model: Any, batch: int, device: str) -> tuple[Tensor, Tensor | None, SelectiveMask]:
    size = _inputs_known(model)
    images, structure = torch.randn(batch, model.in_chans, *size, device=device), None
    if model.guidance is not None:
        structure = standardize_structure(torch.rand(batch, model.structure_channels, *size, device=device))
    grid = size[0] // model.encoder_stride, size[1] // model.encoder_stride
    return images, structure, selective_mask(batch, grid, device=device)


@contextlib.contextmanager
def _state_restored(model: nn.Module, device: str) -> Iterator[None]:
    """Restores gradients, buffers and random generators on exit."""
    grads = [(p, p.grad) for p in model.parameters()]
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    for p, _ in grads:
        p.grad = None
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextlib.contextmanager
def _watched(watch: Callable[..., None]) -> Iterator[None]:
    backends.WATCHED.append(watch)
    try:
        yield
    finally:
        backends.WATCHED.remove(watch)


class _Calls:
    """Records the ops and shapes of a step."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, tuned.Key]] = set()

    def __call__(self, op: str, part: str, device: str, args: Sequence[Any]) -> None:
        self.found.add((op, part, tuned.key(op, part, args)))


class _Meter:
    """Measures every way to compute an op, at the moment the step calls it."""

    def __init__(self, device: str, calls: int, seconds: float) -> None:
        self.device, self.each, self.bar = device, seconds / max(1, calls), lambda op: None
        self.found: dict[tuple[str, str, tuned.Key], _Measured] = {}
        self._clock = _on_gpu if device == "cuda" else _on_cpu

    def __call__(self, op: str, part: str, device: str, args: Sequence[Any]) -> None:
        key, composed = tuned.key(op, part, args), backends.composed(op)
        found = self.found.setdefault((op, "" if composed else part, key), _Measured())
        if part in found.seconds:
            return
        self.bar(op)
        ways = backends.candidates(op, part, args)
        found.default = next(name for name in backends.order(op, device) if name in ways)
        found.seconds[part] = {}
        backends.WATCHED.remove(self)  # ops called during the measurement are not part of the step
        try:
            with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
                calls = self._correct(op, part, args, ways, composed, found)
                found.seconds[part] = self._time(calls)
        finally:
            backends.WATCHED.append(self)

    def _correct(
        self, op: str, part: str, args: Sequence[Any], ways: Sequence[str], composed: bool, found: _Measured
    ) -> dict[str, Callable[[], Any]]:
        """Returns a call for each way whose results are correct. Plain PyTorch is correct by definition."""
        truth, tolerances = _bounds(op, part, args, composed)
        calls, widest = {}, None
        for way in ways:
            if way in found.refused:
                continue
            try:
                call = _prepared(op, part, way, args, composed)
                if way != "torch":
                    results = _results(call())
                    if _excess(part, results, truth, tolerances):
                        if widest is None:
                            draws = (pytree.tree_map(_redrawn, list(args)) for _ in range(DRAWS - 1))
                            others = (_bounds(op, part, draw, composed)[1] for draw in draws)
                            widest = [[*map(max, *bounds)] for bounds in zip(tolerances, *others, strict=True)]
                        if excess := _excess(part, results, truth, widest):
                            raise ArithmeticError(excess)
                calls[way] = call
            except Exception as error:  # an error of any kind rejects this way only
                found.refused[way] = f"{type(error).__name__}: {str(error)[:200]}"
        return calls

    def _time(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Times the calls in turns. Returns for each the minimum of as many rounds as the time budget allows."""
        end, best = time.perf_counter() + self.each, dict.fromkeys(calls, float("inf"))
        for number in range(ROUNDS):
            for way, call in calls.items():
                best[way] = min(best[way], self._clock(call))
            if time.perf_counter() > end or (number and len(calls) == 1):
                break
        return best


def _bounds(op: str, part: str, args: Sequence[Any], composed: bool) -> tuple[list[Tensor], list[list[float]]]:
    """Returns the results of a call in float64, and their tolerances in both norms of `_norms`."""
    exact = pytree.tree_map(_exact, list(args))
    truth = [t.double() for t in _results(_prepared(op, part, "torch", exact, composed)())]
    plain = _results(_prepared(op, part, "torch", args, composed)())
    return truth, [_tolerances(p, t) for p, t in zip(plain, truth, strict=True)]


def _excess(part: str, results: list[Tensor], truth: list[Tensor], tolerances: list[list[float]]) -> str:
    """Returns which result exceeds its tolerance, and by how much it is off; "" if none does."""
    for i, (r, t, tolerance) in enumerate(zip(results, truth, tolerances, strict=True)):
        if r.shape != t.shape or not all(map(operator.le, error := _norms(r.double() - t), tolerance)):
            return f"result {i} of its {part} is off by {error[0]:.2g} of {_norms(t)[0]:.2g}"
    return ""


def _prepared(op: str, part: str, way: str, args: Sequence[Any], composed: bool) -> Callable[[], Any]:
    """Returns a call of one way. For a composed op's backward it first runs the forward, for the tensors it saves."""
    function = backends.implementation(op, part, way)
    if not composed or part == "forward":
        return lambda: function(*args)
    grad, *rest, saved, needs = args
    forward = backends.implementation(op, "forward", way)(*rest)
    saved = forward[1] if isinstance(forward, tuple) else []
    return lambda: function(grad, *rest, saved, needs)


def _exact(arg: Any) -> Any:
    """Converts a tensor to float64. A dtype argument becomes None, so that the result has the inputs' dtype."""
    if isinstance(arg, torch.dtype):
        return None
    return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _redrawn(arg: Any) -> Any:
    """Returns a tensor with other numbers of about the same size."""
    floating = isinstance(arg, Tensor) and arg.is_floating_point()
    return arg * (1 + 0.1 * torch.randn_like(arg)) if floating else arg


def _results(result: Any) -> list[Tensor]:
    """Returns the tensors to compare, without what a forward saves for its backward and without empty results."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], list):
        result = result[0]
    results = [result] if isinstance(result, Tensor) else list(result)
    return [t for t in results if t.numel()]


def _norms(t: Tensor) -> tuple[float, float]:
    """Returns the Euclidean norm and the largest magnitude."""
    return torch.linalg.vector_norm(t).item(), torch.linalg.vector_norm(t, torch.inf).item()


def _tolerances(plain: Tensor, truth: Tensor) -> list[float]:
    """Returns the tolerances in both norms of `_norms`; integers must be equal."""
    if not plain.is_floating_point():
        return [0.0, 0.0]
    relative = FEW_ULP * torch.finfo(plain.dtype).eps + SUMS
    pairs = zip(_norms(plain.double() - truth), _norms(truth), strict=True)
    return [TIMES_PLAIN * error + relative * norm for error, norm in pairs]


def _on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Callable[[], Any]) -> float:
    """Returns the device time of a call, with a flushed L2, and without launch overhead: the device first sleeps."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(1 << 25, device="cuda").zero_()
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _winner(op: str, part: str, key: tuned.Key, found: _Measured) -> Winner:
    """Selects the fastest variant of each part for every backend, and then the fastest backend."""
    right = [way for way in found.seconds[next(iter(found.seconds))] if way not in found.refused]
    right = [way for way in right if all(way in seconds for seconds in found.seconds.values())]
    chosen: dict[str, dict[str, str]] = {}
    for base in dict.fromkeys(way.partition(":")[0] for way in right):
        ways = [way for way in right if way.partition(":")[0] == base]
        chosen[base] = {p: min(ways, key=seconds.__getitem__) for p, seconds in found.seconds.items()}
    total = {base: sum(found.seconds[p][way] for p, way in parts.items()) for base, parts in chosen.items()}
    best = min(total, key=total.__getitem__)
    return Winner(op, part, key, chosen[best], total, found.default, found.refused)


class _Bar:
    """Progress bar: one line that is overwritten, shown if standard error is a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def __enter__(self) -> _Bar:
        return self

    def __call__(self, op: str) -> None:
        self.done += 1
        if sys.stderr.isatty():
            filled = 30 * self.done // max(self.total, self.done)
            bar = f"[{'=' * filled}{' ' * (30 - filled)}] {self.done}/{max(self.total, self.done)}"
            print(f"\r\033[K{time.perf_counter() - self.start:4.0f} s {bar} {op}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: Any) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
