"""Whether a structure map has been standardised, as far as its values tell."""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.ops import _check

# Of a standardised map at most 21 % lies beyond, however heavy its tails: a tenth at either end is cut off before mean
# and deviation are taken, and Chebyshev's inequality leaves 1 % of what is between.
BEYOND = 10
EXPECTED = "expected a map that sgmim_fast.standardize_structure returned"


def check_standardized(structure: Tensor, valid: Tensor | None) -> None:
    """Refuses a batch with infinities or NaN where it is valid, and one of which most lies beyond ±BEYOND.

    On a GPU, and where the call is recorded, by an assertion on the device, for which nothing waits.

    Args:
        structure: (B, S, H, W), detached.
        valid: (B, S, H, W) bool; None: all of it.

    Raises:
        ValueError: saying which.
    """
    if structure.device.type == "meta" or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
        return  # no values, or not those of a step
    if valid is not None:
        structure = torch.where(valid, structure, 0)
    low, high = structure.aminmax()  # NaN where there is one
    finite = low.isfinite() & high.isfinite()
    if not _on_host(structure):
        message = f"structure has infinities, NaN or values that are not standardised; {EXPECTED}"
        torch._assert_async(finite & ~_mostly_beyond(structure, valid), message)
    elif not finite:
        raise ValueError(
            f"structure has infinities or NaN; {EXPECTED}, where there are some with nonfinite='ignore', and "
            "structure_valid beside it"
        )
    elif max(-low, high) > BEYOND and _mostly_beyond(structure, valid):
        raise ValueError(f"structure is mostly beyond ±{BEYOND}, from {low:.4g} to {high:.4g}; {EXPECTED}")


def _on_host(structure: Tensor) -> bool:
    """Whether its values can be read now, without waiting for a device: not where something records or fakes them."""
    plain = type(structure).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return not torch.compiler.is_compiling() and plain and _check.readable(structure)


def _mostly_beyond(structure: Tensor, valid: Tensor | None) -> Tensor:
    known = structure.numel() if valid is None else valid.sum()
    return 2 * (structure.abs() > BEYOND).sum() > known
