"""How weights reach the gemms: in the dtype of the gemms, by one function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sgmim_fast.ops import target

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its version, and the copy that its forward made


def weights_in(dtype: torch.dtype, *weights: Tensor | None, last: bool = False) -> list[Tensor | None]:
    """Weights and biases as gemms in `dtype` read them, contiguous: as they are, or copies.

    On a GPU the forward's copies of weights are kept for the backward, which says that it is the `last` to read them.
    As under autocast, a weight that changed in between in a way that autograd does not see counts as it was. No forward
    reads a copy of an earlier one: a change through `.data`, or what FSDP gathers anew, leaves no trace to look at.
    """
    found = [None if weight is None else _as_it_is(weight, dtype, last) for weight in weights]
    missing = [i for i, weight in enumerate(weights) if weight is not None and found[i] is None]
    for i, copy in zip(missing, _copies([weights[i].detach() for i in missing], dtype), strict=True):
        found[i], weight = copy, weights[i]
        if not last and weight.ndim > 1 and weight.requires_grad and target.on_gpu(weight):
            _kept[weight] = weight._version, copy
    if last:
        for weight in weights:
            if weight is not None:
                _kept.pop(weight, None)
    return found


def _as_it_is(weight: Tensor, dtype: torch.dtype, last: bool) -> Tensor | None:
    """The weight, or for the last reader the copy that is kept; None where there has to be a new one."""
    if weight.dtype == dtype:
        return weight.detach().contiguous()
    if not last:
        return None
    version, copy = _kept.get(weight, (None, None))
    return copy if copy is not None and version == weight._version and copy.dtype == dtype else None


def _copies(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cost: 1 launch where they are enough for all multiprocessors, else 1 each: `torch._foreach_copy_` gives 65,536
    numbers to a block, and for the few of a layer it took ten times what the traffic does (H200, a Swin-B's weights
    twice: 154 launches, 2.4 ms).
    """
    if not weights or sum(w.numel() for w in weights) < target.target(weights[0].device).multiprocessors << 16:
        return [weight.to(dtype, memory_format=torch.contiguous_format) for weight in weights]
    copies = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
    torch._foreach_copy_(copies, weights)
    return copies
