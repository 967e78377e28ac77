"""`capture`: runs a training step as a CUDA graph.

A step of many short kernels is bound by launch overhead in Python. As a graph it is one launch, with static input and
gradient buffers. The first two calls with the same shapes, model and settings are eager training steps, the second
one under a dispatch mode that detects operations that cannot be captured; the third call is captured.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as global_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from sgmim_fast import backends
from sgmim_fast.gradients import Averaging, broadcast
from sgmim_fast.graph import Graph, watch
from sgmim_fast.masking import SelectiveMask

MOST = 8  # largest number of graphs kept, for different shapes or settings; the least recently used is dropped

_logger = logging.getLogger("sgmim_fast")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FACTS = operator.attrgetter("shape", "dtype", "requires_grad")
_END = object()


def capture(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    mask: Callable[[Tensor], SelectiveMask] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    accumulate: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> CapturedStep:
    """Wraps a training step of `model` that runs as a CUDA graph if possible, and eagerly otherwise.

    Equivalent plain PyTorch::

        with torch.autocast(device, autocast):
            loss = model(images, structure, mask=mask(images))
        loss.backward()  # and with an optimizer: clip_grad_norm_ and step, after every `accumulate` calls

    Example::

        seed = torch.tensor([0, 0], device="cuda")  # on the device: the graph increments it

        def masks(images):
            seed[1] += 1
            return sgmim_fast.selective_mask(len(images), grid=6, seed=seed)

        optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(1e-4), fused=True, capturable=True)
        step = sgmim_fast.capture(model, optimizer, mask=masks, autocast=torch.bfloat16, clip=5.0)
        for images, structure in loader:
            loss = step(images, structure)

    Replays see in-place changes of parameters and buffers (by an optimizer, `load_state_dict` or `.data`), tensors of
    the optimizer, such as a tensor learning rate, and the state of generators. Changed shapes, training mode,
    `requires_grad`, modules, their attributes, and numbers in the optimizer's groups lead to a new graph. Changes
    inside a list or dict of a module, and of other objects that functions read, are not detected.

    Steps run eagerly, with one warning that gives the reason (logger "sgmim_fast"): on CPUs, with
    DistributedDataParallel or FSDP, with hooks, and if an operation synchronises (a mask tensor, whose rows must be
    searched) or creates tensors on the host (masks with different ratios per image). With several processes pass the
    model itself and `process_group`::

        step = sgmim_fast.capture(model, optimizer, mask=masks, process_group=torch.distributed.group.WORLD)

    Args:
        model: contains all trained parameters, on one device.
        optimizer: steps after every `accumulate` calls; gradients are zeroed at the start of the next call. Captured if
            it is `capturable`, else eager. None: gradients accumulate over calls, as with `backward`, and the caller
            runs optimizer and `zero_grad`. Gradients are valid until the next call.
        loss: `loss(model, *args, **kwargs)` -> the scalar to minimise, or a tuple (or `Losses`) that begins with it.
            None: the output of the model.
        mask: draws the masks of a batch, given the first argument, inside the graph: from a seed on the device or with
            CUDA generators. Passed to the model as `mask`. None: masks are an argument of the step, if any.
        autocast: dtype of autocast around the forward; None: the caller's autocast state.
        scaler: scales the loss; with an optimizer it also unscales, steps and updates.
        clip: largest gradient norm, requires an optimizer.
        accumulate: gradient accumulation: calls per optimizer step; the loss is divided by it.
        process_group: replaces DistributedDataParallel: after every `accumulate` calls, gradients are averaged over the
            processes of this group, outside of the graph. Parameters and buffers are copied from its first process
            here; buffers that a step changes (batch norms) are not synchronised. Every process must make the same
            calls. None: no communication.

    Returns:
        `step(*args, **kwargs)` -> the result of `loss`, detached. Host tensors are copied to the device.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, its value and what is expected.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if not any(True for _ in model.parameters()):
        raise ValueError("model has no parameters; expected something to train")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; expected at least 1")
    if clip is not None and (optimizer is None or not clip > 0):
        raise ValueError(f"clip is {clip}; expected a norm above 0 and an optimizer, or None")
    if process_group is not None and any(isinstance(m, (DistributedDataParallel, FSDPModule)) for m in model.modules()):
        raise ValueError("process_group with a model that communicates itself; expected the model without a wrapper")
    return CapturedStep(model, optimizer, loss, mask, autocast, scaler, clip, accumulate, process_group)


class _ModelState(NamedTuple):
    """A model as a graph sees it."""

    objects: list[Any]  # kept alive, so that no other object has the same identity
    facts: tuple[list[Any], ...]
    number: int  # the same for the same state


class _Seen(NamedTuple):
    """A step that ran eagerly once."""

    alive: list[Any]  # objects whose identity is part of the key


class _Watched(NamedTuple):
    """A step that also ran eagerly under the mode that detects operations that cannot be captured."""

    alive: list[Any]
    reason: str  # reason why it cannot be captured, or ""
    generators: list[torch.Generator]


class _Recorded(NamedTuple):
    """A captured graph with its static inputs and outputs."""

    alive: list[Any]
    graph: Graph
    inputs: list[Any]
    result: Any
    grads: list[tuple[nn.Parameter, Tensor]]


class CapturedStep:
    """A training step. Created by `capture`.

    Attributes:
        captures: number of graphs captured so far.
        reasons: why calls ran eagerly, except for the two before each capture.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        loss: Callable[..., Any] | None,
        mask: Callable[[Tensor], SelectiveMask] | None,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        clip: float | None,
        accumulate: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.mask = model, optimizer, loss, mask
        self.autocast, self.scaler, self.clip, self.accumulate = autocast, scaler, clip, accumulate
        self.captures = 0
        self.reasons: list[str] = []
        self._average: Averaging | None = None
        if process_group is not None:
            buffers = (buffer for root in self._roots() for buffer in root.buffers())
            broadcast(chain(self._trained(), buffers), process_group)
            self._average = Averaging(self._trained(), process_group)
        self._calls = 0
        self._count = 0  # number of states of the model so far
        self._misses = {"backward": 0, "update": 0}  # number of successive calls with an unknown key
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []
        self._values: list[Iterable[Any]] = []  # views of the values in the modules' dictionaries
        self._hooks: list[dict[int, Any]] = []
        self._buffers: list[Tensor] = []
        self._states: list[_ModelState] = []  # the last one is that of the last call
        self._known: OrderedDict[Any, _Seen | _Watched | _Recorded] = OrderedDict()
        self._pool: Any = None
        self._written: dict[int, weakref.ref[Tensor]] = {}  # gradients that replays write
        self._sums: dict[nn.Parameter, Tensor] = {}  # gradients of several calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is not None and self._calls % self.accumulate == 0:
            self.optimizer.zero_grad(set_to_none=True)
        self.device = next(self.model.parameters()).device
        leaves, spec = pytree.tree_flatten((args, kwargs))

        def run(values: list[Any]) -> Any:
            return self._backward(*pytree.tree_unflatten(values, spec))

        if self._possible():
            alive, key = self._model_key()
            shapes = [(x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
            key = ["backward", spec, *shapes, *_first_occurrences(leaves), *_settings(self.device.type), *key]
            result, captured = self._run_or_replay(tuple(key), alive, leaves, run)
        else:
            result, captured = run(self._on_device(leaves)), False
        self._calls += 1
        last = self._calls % self.accumulate == 0
        if self._average is not None and last:
            self._average()
        if self.optimizer is not None and last:
            capturable = all(group.get("capturable", True) for group in self.optimizer.param_groups)
            if captured and capturable:  # a replay writes gradients to the same addresses as the previous call
                alive, key = self._update_key()
                self._run_or_replay(("update", *key), alive, [], lambda _: self._update())
                torch.autograd.graph.increment_version(self._parameters)  # a replay does not increment it
            else:
                self._update()
        return result

    def _roots(self) -> list[nn.Module]:
        return [x for x in (self.model, self.loss) if isinstance(x, nn.Module)]

    def _trained(self) -> list[nn.Parameter]:
        """Returns the parameters of the modules and of the optimizer."""
        parameters = [p for root in self._roots() for p in root.parameters()]
        if self.optimizer is not None:
            parameters += [p for group in self.optimizer.param_groups for p in group["params"]]
        return list(dict.fromkeys(parameters))

    def _possible(self) -> bool:
        """Whether the device and the current stream allow a capture."""
        if self.device.type != Graph.device_type:
            self._warn(f"its parameters are on {self.device}, where there are no CUDA graphs")
            return False
        return self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()  # the caller may capture

    def _model_key(self) -> tuple[list[Any], list[Any]]:
        """Returns the objects that a graph keeps alive, and the graph's key, which stands for their identities and
        properties."""
        last = self._states[-1] if self._states else None
        if last is None or not self._has(last.objects):  # a module may have been replaced
            last = None
            self._modules = list(dict.fromkeys(module for root in self._roots() for module in root.modules()))
            self._parameters = self._trained()
            # if a dictionary of a module is replaced by another one, the values of the module's `__dict__` change
            parts = ((m.__dict__, m._modules, m._parameters, m._buffers) for m in self._modules)
            self._values = [part.values() for module in parts for part in module]
            self._hooks = [getattr(m, name) for m in self._modules for name in _HOOKS]
            self._buffers = [b for m in self._modules for b in m._buffers.values() if b is not None]
        state, facts, scaling = last, self._facts(), _scaling(self.scaler)
        if state is None or facts != state.facts:
            state = next((s for s in self._states if facts == s.facts and self._has(s.objects)), None)
            if state is None:
                self._count += 1
                state = _ModelState([*self._objects()], facts, self._count)
            self._states = [*(s for s in self._states if s is not state), state][-MOST:]
        return [state.objects, *scaling], [state.number, *map(_by_identity, scaling)]

    def _facts(self) -> tuple[list[Any], ...]:
        """Returns properties that may change while the objects are the same."""
        parameters, buffers = self._parameters, self._buffers
        addresses = [*map(Tensor.data_ptr, parameters), *map(Tensor.data_ptr, buffers)]
        return [*map(len, self._hooks)], [*map(_has_hooks, parameters)], [*map(_FACTS, parameters)], addresses

    def _objects(self) -> Iterator[Any]:
        """Iterates over the modules' classes and the values of their dictionaries. The end is marked, so that none of
        two sequences that are compared may be longer."""
        return chain(map(type, self._modules), chain.from_iterable(self._values), [_END])

    def _has(self, objects: list[Any]) -> bool:
        """Whether the objects are the same as before. There are ten thousand, so nothing else is done with them."""
        return all(map(operator.is_, self._objects(), objects))

    def _update_key(self) -> tuple[list[Any], list[Any]]:
        """Returns the same as `_model_key` for the optimizer's step."""
        values: list[Any] = _scaling(self.scaler)
        for group in self.optimizer.param_groups:
            values += [value for name, value in group.items() if name != "params"]
            for p in group["params"]:
                values += (p, p.grad, *self.optimizer.state.get(p, {}).values())
        return values, [_by_identity(value) for value in values]

    def _reason(self, leaves: list[Any], what: str) -> str:
        """Returns a reason that rules out a capture and is known without running the step; or ""."""
        if what == "update":
            hooks = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
            return f"{type(self.optimizer).__name__} has hooks" if any(hooks) else ""
        others = {p.device for p in self._parameters} - {self.device}
        if others:
            return f"its parameters are on several devices, {self.device} and {others.pop()}"
        for module in self._modules:
            if isinstance(module, (DistributedDataParallel, FSDPModule)):
                return f"{type(module).__name__} communicates with other processes; see capture(process_group=...)"
            if any(getattr(module, name) for name in _HOOKS):
                return f"a {type(module).__name__} has hooks"
        if any(getattr(global_hooks, f"_global{name}") for name in _HOOKS):
            return "global module hooks are registered"
        if any(map(_has_hooks, self._parameters)):
            return "a parameter has hooks"
        if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
            return "an input requires gradients"
        return ""

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes forward and backward. Returns the detached result."""
        if self.mask is not None:
            kwargs = {**kwargs, "mask": self.mask(args[0])}
        cast = contextlib.nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(self.device.type, self.autocast)
        with cast:
            result = self.model(*args, **kwargs) if self.loss is None else self.loss(self.model, *args, **kwargs)
        total = pytree.tree_leaves(result)[0]
        if self.accumulate > 1:
            total = total / self.accumulate
        (total if self.scaler is None else self.scaler.scale(total)).backward()
        return pytree.tree_map_only(Tensor, Tensor.detach, result)

    def _update(self) -> None:
        """Clips the gradients and runs the optimizer."""
        optimizer, scaler = self.optimizer, self.scaler
        if self.clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.clip)
        with warnings.catch_warnings():  # an eager step of a capturable optimizer warns
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def _run_or_replay(
        self, key: tuple[Any, ...], alive: list[Any], leaves: list[Any], run: Callable[[list[Any]], Any]
    ) -> tuple[Any, bool]:
        """Runs `run(leaves)`, eagerly or as a graph. Returns its result, and whether a graph was replayed."""
        known = self._known.get(key)
        self._misses[key[0]] = self._misses[key[0]] + 1 if known is None else 0
        if self._misses[key[0]] == 2 * MOST:
            self._warn(
                "shapes, modules or their attributes differ at every call"
                if key[0] == "backward"
                else "numbers of the optimizer's groups are others at every step; a learning rate can be a tensor"
            )
        if known is None:
            result = run(self._on_device(leaves))
            self._remember(key, _Seen(alive))
            return result, False
        if isinstance(known, _Seen):
            reason, generators, values = self._reason(leaves, key[0]), [], self._on_device(leaves)
            if reason:
                result = run(values)
            else:
                with watch(self.device) as found:
                    result = run(values)
                reason, generators = "; ".join(found.reasons), found.generators
            if reason:
                self._warn(reason)
            self._remember(key, _Watched(alive, reason, generators))
            return result, False
        if isinstance(known, _Watched) and not known.reason:
            known = self._record(known, leaves, run, key[0] == "backward")
        self._remember(key, known)
        if isinstance(known, _Watched):
            return run(self._on_device(leaves)), False
        return self._replay(known, leaves), True

    def _record(
        self, watched: _Watched, leaves: list[Any], run: Callable[[list[Any]], Any], backward: bool
    ) -> _Recorded | _Watched:
        inputs = self._static_inputs(leaves)
        before = [p.grad for p in self._parameters]
        if backward:
            for p in self._parameters:
                p.grad = None  # so that the graph allocates its own gradients and writes them instead of accumulating
        self._pool = self._pool or Graph.pool()
        self._forget_casts()
        graph = Graph(self.device, watched.generators)
        try:
            result = graph.record(lambda: run(inputs), self._pool)
            grads = [(p, p.grad) for p in self._parameters if backward and p.grad is not None]
        except RuntimeError as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            self._warn(reason)
            # the device's generator was given a new state, which earlier graphs do not use
            self._known = OrderedDict((k, v) for k, v in self._known.items() if not isinstance(v, _Recorded))
            self._pool = None
            return watched._replace(reason=reason)
        finally:
            self._forget_casts()
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad
        self.captures += 1
        what = "forward and backward" if backward else "the optimizer's step"
        _logger.info("capture: %s, graph %d", what, self.captures)
        self._written = {i: ref for i, ref in self._written.items() if ref() is not None}
        self._written |= {id(grad): weakref.ref(grad) for _, grad in grads}
        return _Recorded(watched.alive, graph, inputs, result, grads)

    def _forget_casts(self) -> None:
        """Drops cached casts of parameters, so that none is shared between a capture and what runs around it."""
        torch.clear_autocast_cache()
        torch.autograd.graph.increment_version(self._parameters)

    def _replay(self, recorded: _Recorded, leaves: list[Any]) -> Any:
        _copy(recorded.inputs, leaves)
        kept = [(p, grad, p.grad) for p, grad in recorded.grads if p.grad is not None]
        moved = [(p, old) for p, _, old in kept if (ref := self._written.get(id(old))) is not None and ref() is old]
        if moved:  # the replay may overwrite gradients that an earlier replay wrote, so copy them
            sums = [self._sums.setdefault(p, torch.empty_like(old)) for p, old in moved]
            torch._foreach_copy_(sums, [old for _, old in moved])
            for (p, _), total in zip(moved, sums, strict=True):
                p.grad = total
        recorded.graph.replay()
        if kept:
            torch._foreach_add_([p.grad for p, _, _ in kept], [grad for _, grad, _ in kept])
        if len(kept) < len(recorded.grads):
            for p, grad in recorded.grads:
                if p.grad is None:
                    p.grad = grad
        return pytree.tree_map_only(Tensor, Tensor.clone, recorded.result)

    def _remember(self, key: tuple[Any, ...], entry: _Seen | _Watched | _Recorded) -> None:
        self._known[key] = entry
        self._known.move_to_end(key)
        if len(self._known) > MOST:
            self._known.popitem(last=False)

    def _warn(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            _logger.warning("capture leaves %s eager: %s", type(self.model).__name__, reason)

    def _on_device(self, leaves: list[Any]) -> list[Any]:
        return [x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in leaves]

    def _static_inputs(self, leaves: list[Any]) -> list[Any]:
        """Allocates static inputs with the values of the leaves; leaves that are the same object share one."""
        own = [torch.empty_like(x, device=self.device) if isinstance(x, Tensor) else x for x in leaves]
        own = [own[place] for place in _first_occurrences(leaves)]
        _copy(own, leaves)
        return own


def _copy(to: list[Any], leaves: list[Any]) -> None:
    """Copies the leaves into static inputs, each once."""
    done: set[int] = set()
    for own, leaf in zip(to, leaves, strict=True):
        if isinstance(own, Tensor) and id(own) not in done:
            done.add(id(own))
            own.copy_(leaf, non_blocking=True)


def _first_occurrences(leaves: list[Any]) -> list[int]:
    """Returns the index of each leaf's first occurrence, since a model may test whether inputs are the same object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(leaf), place) for place, leaf in enumerate(leaves)]


def _has_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks)


def _scaling(scaler: torch.amp.GradScaler | None) -> list[Any]:
    """Returns the tensors and settings of a scaler."""
    if scaler is None or not scaler.is_enabled():
        return []
    numbers = scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    return [scaler._scale, scaler._growth_tracker, *numbers]


def _by_identity(value: Any) -> Any:
    """Returns what represents a value in a key: numbers, strings and tuples themselves, the id of other objects."""
    return value if isinstance(value, (bool, int, float, str, tuple)) else id(value)


def _settings(device: str) -> tuple[Any, ...]:
    """Returns the settings of PyTorch and of this package that select kernels."""
    return (
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        backends.forced(),
    )
