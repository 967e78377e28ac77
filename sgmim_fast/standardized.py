"""Checks from its values that a structure map has been standardised."""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.ops import _check

# At most 21 % of a standardised map lies beyond ±BEYOND: the tenth at either end, which is excluded from mean and
# deviation, and by Chebyshev's inequality at most 1 % of the rest.
BEYOND = 10
EXPECTED = "expected a map that sgmim_fast.standardize_structure returned"


def check_standardized(structure: Tensor, valid: Tensor | None) -> None:
    """Checks that all valid values are finite, and that most of them, or of one map's pixels, are not beyond ±BEYOND.

    On a GPU, and in traced calls, this is a device-side assertion, which does not synchronise.

    Args:
        structure: (B, S, H, W), detached.
        valid: (B, S, H, W) bool; None: all values are valid.

    Raises:
        ValueError: the check failed.
    """
    if structure.device.type == "meta" or torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
        return  # there are no concrete values
    if valid is not None:
        structure = torch.where(valid, structure, 0)
    low, high = structure.aminmax()  # NaN if any value is NaN
    finite = low.isfinite() & high.isfinite()
    if not _on_host(structure):
        message = f"structure has infinities, NaN or values that are not standardised; {EXPECTED}"
        batch, one = _mostly_beyond(structure, valid)
        torch._assert_async(finite & ~(batch | one), message)
    elif not finite:
        raise ValueError(
            f"structure has infinities or NaN; {EXPECTED}, where there are some with nonfinite='ignore', and "
            "structure_valid beside it"
        )
    elif max(-low, high) > BEYOND:
        batch, one = _mostly_beyond(structure, valid)
        if batch or one:
            where = "" if batch else " in some of its maps"
            raise ValueError(f"structure is mostly beyond ±{BEYOND}{where}, from {low:.4g} to {high:.4g}; {EXPECTED}")


def _on_host(structure: Tensor) -> bool:
    """Whether the values can be read without synchronising, which excludes traced and fake tensors."""
    plain = type(structure).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    return not torch.compiler.is_compiling() and plain and _check.readable(structure)


def _mostly_beyond(structure: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether most valid values of the batch are beyond ±BEYOND, and whether most pixels of some map are: a map's valid
    pixels may be few and all from its ends."""
    beyond = (structure.abs() > BEYOND).sum((2, 3))
    known = structure.numel() if valid is None else valid.sum()
    return 2 * beyond.sum() > known, (2 * beyond > structure[0, 0].numel()).any()
