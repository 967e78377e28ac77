"""How weights reach the gemms: in the dtype of the gemms, by one function."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sgmim_fast.ops import target

# id of a weight -> the weight, its version, and the copy that its forward made
_kept: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
_model: contextvars.ContextVar[_Model | None] = contextvars.ContextVar("sgmim_fast.weights", default=None)


class _Model:
    """The weights of one forward of a model, and their copies, which are made when the first one is read."""

    def __init__(self, weights: Callable[[], Iterable[Tensor]]):
        self._weights = weights
        self._copies: dict[torch.dtype, dict[int, tuple[Tensor, tuple[int, int], Tensor]]] = {}

    def copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """None for a weight that is not the model's, or has changed since."""
        if dtype not in self._copies:
            weights = [w for w in self._weights() if w.dtype == weight.dtype and w.device == weight.device]
            copies = zip(weights, _copies(weights, dtype), strict=True)
            self._copies[dtype] = {id(w): (w, _state(w), copy) for w, copy in copies}
        _, state, copy = self._copies[dtype].get(id(weight), (None, None, None))
        return copy if copy is not None and state == _state(weight) else None


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes with the values, but for a change in place through `.data`."""
    return weight._version, weight.untyped_storage()._cdata


@contextlib.contextmanager
def cast_together(weights: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Within the block, the forward of a model, its weights are cast at once where they are cast at all.

    weights: gives them, plain tensors, when the first is read. Within the block none may change in place through
    `.data`, which leaves no trace.
    """
    token = _model.set(_Model(weights))
    try:
        yield
    finally:
        _model.reset(token)


def weights_in(dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
    """Weights and biases as gemms in `dtype` read them, contiguous: as they are, or copies.

    On a GPU the forward's copies of weights are kept for the backward, which says that it is the `last` to read them.
    As under autocast, a weight that changed in between in a way that autograd does not see counts as it was. No forward
    reads a copy of an earlier one: a change through `.data`, or what FSDP gathers anew, leaves no trace to look at.
    """
    found = [None if weight is None else _as_it_is(weight, dtype, last) for weight in weights]
    missing = [i for i, weight in enumerate(weights) if weight is not None and found[i] is None]
    if missing:
        for i, copy in zip(missing, _copies([weights[i] for i in missing], dtype), strict=True):
            found[i] = copy
    if not last:
        for weight, copy in zip(weights, found, strict=True):
            if weight is not None and weight.dtype != dtype and weight.ndim > 1:
                _keep(weight, copy)
    return found


def _keep(weight: Tensor, copy: Tensor) -> None:
    """For the backward, as long as the weight is there."""
    if weight.requires_grad and target.on_gpu(weight):
        key = id(weight)
        _kept[key] = weakref.ref(weight, lambda _: _kept.pop(key, None)), weight._version, copy


def _as_it_is(weight: Tensor, dtype: torch.dtype, last: bool) -> Tensor | None:
    """The weight, or a copy that is there: for the last reader the one that is kept, for others the model's; None where
    there has to be a new one."""
    if last:
        of, version, copy = _kept.pop(id(weight), (None, None, None))
        if copy is not None and of() is weight and version == weight._version and copy.dtype == dtype:
            return copy
    if weight.dtype == dtype:
        return weight.detach().contiguous()
    model = None if last or not target.on_gpu(weight) else _model.get()
    return None if model is None else model.copy(weight, dtype)


_BLOCK = 65536  # numbers, that a block of `torch._foreach_copy_` goes through: 15 us on an H200, six launches
_SMALL = _BLOCK // 8


@torch.no_grad()
def _copies(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cost: reads the weights, writes the copies; 1 launch for all small ones, and for the others 1 or some if they
    are many, or enough for all multiprocessors, else 1 each: for the few of a layer it took ten times what the traffic
    does.
    """
    copies: dict[int, Tensor] = {}

    def copy(group: list[int], many: bool) -> None:
        if many and len(group) > 1:
            copies.update((i, torch.empty(weights[i].shape, dtype=dtype, device=weights[i].device)) for i in group)
            torch._foreach_copy_([copies[i] for i in group], [weights[i] for i in group])
        else:
            copies.update((i, weights[i].to(dtype, memory_format=torch.contiguous_format)) for i in group)

    copy([i for i, weight in enumerate(weights) if weight.numel() <= _SMALL], True)
    if large := [i for i, weight in enumerate(weights) if weight.numel() > _SMALL]:
        blocks = sum(-(-weights[i].numel() // _BLOCK) for i in large)
        copy(large, len(large) > 6 or blocks >= target.target(weights[0].device).multiprocessors)
    return [copies[i] for i in range(len(weights))]
