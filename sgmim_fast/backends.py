"""Selects the backend that runs an op: the order of preference, the reasons against each, and how to force one.

A backend is one set of implementations of the ops: `cuda` (CUDA C++), `triton`, `cpu` (C++) and `torch` (plain
PyTorch, which runs anywhere and against which every other one is tested). It is selected at each call, by the device
and dtype of the tensors. The choice does not change results beyond rounding.

Environment: `SGMIM_FAST_BACKEND=torch|cpu|triton|cuda` forces one backend for the process, as `use` does for a block.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sgmim_fast import _native, tuned

NAMES = ("cuda", "triton", "cpu", "torch")
# Order of preference per device type. Other devices run plain PyTorch.
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_PRIMITIVES = {"cpu": "sgmim_fast.ops.cpu.primitives", "triton": "sgmim_fast.kernels.primitives"}
_PLAIN_PRIMITIVES = "sgmim_fast.ops._plain"


def _own(op: str, *names: str) -> dict[str, str]:
    folders = {"cpu": "sgmim_fast.ops.cpu", "triton": "sgmim_fast.kernels", "cuda": "sgmim_fast.ops.cuda"}
    return {name: f"{folders[name]}.{op}" for name in names}


# op -> backend -> module. For an op composed of primitives the module has the primitives. For any other op it has
# functions `forward`, `backward` and, if it does not support all arguments, `can_run(part, args)`.
MODULES: dict[str, dict[str, str]] = {
    **{
        name: _own(name, "cpu", "triton", "cuda")
        for name in ("gather_patches", "selective_mask", "standardize_structure")
    },
    "masked_patch_embed": _PRIMITIVES | _own("masked_patch_embed", "cuda"),
    "token_salience": _own("token_salience", "cpu", "triton"),
    "relational_guidance": _PRIMITIVES | _own("relational_guidance", "cuda"),
    **dict.fromkeys(("norm_attention", "window_attention"), _PRIMITIVES | _own("window_attention", "cuda")),
    **dict.fromkeys(("norm_linear", "norm_mlp"), _PRIMITIVES),
    **dict.fromkeys(("linear_l1", "position_bias", "structure_embed"), _PRIMITIVES),
}

# Backends of an op that were slower than another backend. They run only if they are forced, or if `sgmim_fast.tune`
# found them to be the fastest.
ASKED_FOR = {("relational_guidance", "cuda")}

OLDEST_TRITON = (3, 4)

# The ops that the model calls between the encoder's features and the loss.
BRANCH = ("structure_embed", "relational_guidance", "linear_l1")

# While `sgmim_fast.tune` watches a step, the last function is called before each choice: (op, part, device, args).
WATCHED: list[Callable[[str, str, str, Sequence[Any]], None]] = []

_plain: dict[tuple[str, str], Callable[..., Any]] = {}
_requests: dict[str, Callable[..., tuple[Any, Any]]] = {}
FORCED: contextvars.ContextVar[str | None] = contextvars.ContextVar("sgmim_fast.backend", default=None)


def register(op: str, part: str, function: Callable[..., Any], request: Callable[..., Any] | None = None) -> None:
    """Registers `part` ("forward" or "backward") of an op. Called by the op's file.

    function: the plain implementation; for a composed op, `function(primitives)` -> an implementation.
    request: for a composed op, `request(part, args)` -> the forward's arguments, and what they need of primitives.
    """
    _plain[op, part] = function
    if request is not None:
        _requests[op] = request


@functools.cache
def _environment() -> str | None:
    name = os.environ.get("SGMIM_FAST_BACKEND", "").strip().lower() or None
    if name is not None and name not in NAMES:
        raise ValueError(f"SGMIM_FAST_BACKEND is {name!r}; expected one of {', '.join(NAMES)}")
    return name


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Forces one backend inside a `with` block, for the thread or asynchronous task that enters it.

    The backward of an op called inside runs on the same forced backend, also if it runs outside of the block or in
    another thread. The exception are graphs compiled by `torch.compile`, whose backward selects its backend anew: on a
    CPU by the block in which `backward()` is called; on a GPU, where autograd runs it in its own thread, only by
    SGMIM_FAST_BACKEND.

    Args:
        name: "torch", "cpu", "triton" or "cuda".

    Raises:
        ValueError: the name is unknown. If the backend cannot run, the first op raises, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; expected one of {', '.join(NAMES)}")
    token = FORCED.set(name)
    try:
        yield
    finally:
        FORCED.reset(token)


def forced() -> str | None:
    """Returns the backend forced by `use` or by SGMIM_FAST_BACKEND, or None."""
    return FORCED.get() or _environment()


@functools.cache
def available() -> dict[str, tuple[bool, str]]:
    """Returns a dict from backend to (usable on this machine, reason if it is not)."""
    return {
        "cuda": _cuda(),
        "triton": _triton(),
        "cpu": _native.load_cpu(),
        "torch": (True, ""),
    }


def _cuda() -> tuple[bool, str]:
    """Whether the CUDA kernels run on this machine, and the reason if they do not."""
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    usable, reason = _native.load_cuda()
    if usable and (missing := _native.uncovered_gpu()):
        return False, missing
    return usable, reason


def _triton() -> tuple[bool, str]:
    """Whether the Triton kernels run on this machine, and the reason if they do not, logged once if there is a GPU."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        usable, reason = False, "triton is not installed"
    else:
        usable = tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON
        reason = "" if usable else f"triton is {version}; expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    if not torch.cuda.is_available():
        return (usable, reason) if triton_interpreted() or not usable else (False, "torch sees no CUDA device")
    if usable and torch.cuda.get_device_capability() < (8, 0):
        usable, reason = False, "the GPU is older than compute capability 8.0"
    if not usable:
        logging.getLogger("sgmim_fast").warning("the Triton backend is not available: %s", reason)
    return usable, reason


def triton_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 is set. The Triton kernels then run in NumPy, on CPU tensors, for debugging."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def can_run(op: str, backend: str, *args: Any, part: str = "forward") -> tuple[bool, str]:
    """Whether `backend` can run `op` on these arguments, and the reason if it cannot.

    Args:
        op: name of an op, e.g. "linear_l1".
        backend: "torch", "cpu", "triton" or "cuda".
        args: all arguments of the part, in the order of its schema. Without arguments only the machine is checked.
        part: "forward" or "backward".

    Raises:
        ValueError: the name of the op or of the backend is unknown.
    """
    if op not in MODULES:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(MODULES)}")
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(NAMES)}")
    if backend == "torch":
        return True, ""
    if backend not in MODULES[op]:
        return False, f"{op} has no {backend} implementation"
    usable, reason = available()[backend]
    if not usable:
        return False, reason
    device = "cpu" if backend == "cpu" or (backend == "triton" and triton_interpreted()) else "cuda"
    first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)  # all are on one device
    if first is not None and first.device.type != device:
        return False, f"the {backend} backend needs {device} tensors, got one on {first.device}"
    module = _module(op, backend)
    if not args:
        return True, ""
    if op not in _requests:
        return module.can_run(part, args) if hasattr(module, "can_run") else (True, "")
    arguments, request = _requests[op](part, args)
    if hasattr(module, "can_run"):  # primitives of one op
        return module.can_run(part, arguments)
    return module.takes(request)


@functools.cache
def _module(op: str, backend: str) -> Any:
    return importlib.import_module(_PLAIN_PRIMITIVES if backend == "torch" else MODULES[op][backend])


@functools.cache
def implementation(op: str, part: str, backend: str) -> Callable[..., Any]:
    """Returns a backend's function that computes `part` of an op. The backend must be able to run it.

    `backend` may be "BACKEND:VARIANT", with one of the names that the backend's `variants` returns (see
    `sgmim_fast.tune`).
    """
    backend, _, variant = backend.partition(":")
    if op not in _requests:
        return _plain[op, part] if backend == "torch" else getattr(_module(op, backend), part)
    module, bind = _module(op, backend), _plain[op, part]
    bound = module.varied(module, bind, variant) if variant else bind(module)
    bound.__module__ = module.__name__
    return module.guarded(bound) if hasattr(module, "guarded") else bound


def composed(op: str) -> bool:
    """Whether an op is composed of primitives. Its backward then reads what the same backend's forward saved."""
    return op in _requests


def order(op: str, device: str) -> list[str]:
    """Returns the backends that an op uses by default, the preferred one first."""
    return [name for name in ORDER.get(device, ("torch",)) if (op, name) not in ASKED_FOR]


def candidates(op: str, part: str, args: Sequence[Any]) -> list[str]:
    """Returns all backends that can run a call, each followed by its variants, as names for `implementation`."""
    found = []
    for name in NAMES:
        if can_run(op, name, *args, part=part)[0]:
            found.append(name)
            if op in _requests and hasattr(module := _module(op, name), "variants"):
                found += [f"{name}:{variant}" for variant in module.variants(_requests[op](part, args)[1])]
    return found


def state() -> Any:
    """Returns what `choose` depends on besides the arguments of a call, None while calls are being recorded."""
    return None if WATCHED else (forced(), tuned.generation)


def choose(op: str, part: str, device: str, args: Sequence[Any]) -> Callable[..., Any]:
    """Returns the function to call: that of the forced backend, else of the one that `sgmim_fast.tune` measured to be
    the fastest for such a call, else of the first one in the device's order of preference that can run.

    Raises:
        RuntimeError: the forced backend cannot run; the message has the reason.
    """
    name = forced()
    if name is not None:
        usable, reason = can_run(op, name, *args, part=part)
        if not usable:
            raise RuntimeError(f"backend {name!r} was forced but cannot run {op}: {reason}")
        return implementation(op, part, name)
    if WATCHED:
        WATCHED[-1](op, part, device, args)
    name = tuned.lookup(op, part, device, args)
    if name is not None and can_run(op, name.partition(":")[0], *args, part=part)[0]:
        return implementation(op, part, name)
    for name in order(op, device):
        if can_run(op, name, *args, part=part)[0]:
            return implementation(op, part, name)
    raise AssertionError("unreachable: the torch backend runs everything")
