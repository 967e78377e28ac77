"""Casts weights to the dtype of the gemms, and caches the copies that a forward and its backward share."""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sgmim_fast.ops import target

# id of a weight -> the weight, its version when it was copied in the forward, and the copy
_kept: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
_model: contextvars.ContextVar[_Model | None] = contextvars.ContextVar("sgmim_fast.weights", default=None)


class _Model:
    """The weights of one forward of a model, and their copies, which are made when the first weight is read."""

    def __init__(self, weights: Callable[[], Iterable[Tensor]]):
        self._weights = weights
        self._copies: dict[torch.dtype, dict[int, tuple[Tensor, tuple[int, int], Tensor]]] = {}

    def copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Returns the weight's copy; None if the weight is not the model's, or has changed since it was copied."""
        if dtype not in self._copies:
            weights = [w for w in self._weights() if w.dtype == weight.dtype and w.device == weight.device]
            copies = zip(weights, _copies(weights, dtype), strict=True)
            self._copies[dtype] = {id(w): (w, _state(w), copy) for w, copy in copies}
        _, state, copy = self._copies[dtype].get(id(weight), (None, None, None))
        return copy if copy is not None and state == _state(weight) else None


def _state(weight: Tensor) -> tuple[int, int]:
    """Returns a key that changes with the values, except for a change in place through `.data`."""
    return weight._version, weight.untyped_storage()._cdata


@contextlib.contextmanager
def cast_together(weights: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """Within the block, the forward of a model, all of its weights that need a cast are cast together.

    weights: returns the weights, plain tensors; called when the first is read. Within the block no weight may change in
    place through `.data`, which cannot be detected.
    """
    token = _model.set(_Model(weights))
    try:
        yield
    finally:
        _model.reset(token)


def weights_in(dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
    """Returns weights and biases as contiguous tensors in `dtype`: unchanged if they are such already, else as copies.

    On a GPU the forward keeps its copies of weights for the backward, which passes `last`. As under autocast, the
    backward uses the forward's values if a weight changed in between without autograd's notice. A forward never reuses
    the copies of an earlier one: a change through `.data`, or a new gathering by FSDP, cannot be detected.
    """
    found = [None if weight is None else _cached(weight, dtype, last) for weight in weights]
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
    """Keeps the copy for the backward, as long as the weight exists."""
    if weight.requires_grad and target.on_gpu(weight):
        key = id(weight)
        _kept[key] = weakref.ref(weight, lambda _: _kept.pop(key, None)), weight._version, copy


def _cached(weight: Tensor, dtype: torch.dtype, last: bool) -> Tensor | None:
    """Returns the weight itself if its dtype fits, or an existing copy (with `last` the one kept for the backward, else
    the model's); None if a copy has to be made."""
    if last:
        of, version, copy = _kept.pop(id(weight), (None, None, None))
        if copy is not None and of() is weight and version == weight._version and copy.dtype == dtype:
            return copy
    if weight.dtype == dtype:
        return (weight.detach() if torch.is_grad_enabled() else weight).contiguous()
    model = None if last or not target.on_gpu(weight) else _model.get()
    return None if model is None else model.copy(weight, dtype)


_BLOCK = 65536  # elements per block of `torch._foreach_copy_`; a block takes 15 us on an H200, as long as six launches
_SMALL = _BLOCK // 8


@torch.no_grad()
def _copies(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cost: reads the weights and writes the copies. Small weights take one launch together. Large ones share it, or a
    few launches, if they are many or fill all multiprocessors; else each takes one launch: for the few weights of a
    layer the joint copy took ten times as long as its traffic.
    """
    large = [weight.numel() for weight in weights if weight.numel() > _SMALL]
    blocks = sum(-(-size // _BLOCK) for size in large)
    joint = len(large) > 6 or (large and blocks >= target.target(weights[0].device).multiprocessors)
    together = [i for i, weight in enumerate(weights) if joint or weight.numel() <= _SMALL]
    copies: dict[int, Tensor] = {}
    if len(together) > 1:
        copies = {i: torch.empty(weights[i].shape, dtype=dtype, device=weights[i].device) for i in together}
        torch._foreach_copy_(list(copies.values()), [weights[i] for i in together])
    return [
        copies[i] if i in copies else weight.to(dtype, memory_format=torch.contiguous_format)
        for i, weight in enumerate(weights)
    ]
