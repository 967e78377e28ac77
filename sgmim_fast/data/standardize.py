"""The standardisation of a batch whose maps have missing values. SPEC "Standardising the structure map"."""

from __future__ import annotations

from torch import Tensor

from sgmim_fast.ops import standardize_structure


def standardize_valid(structure: Tensor) -> tuple[Tensor, Tensor]:
    """What the model takes, of maps as they come from a data set; on any device, without waiting for it.

    Args:
        structure: (B, S, H, W), NaN where a map has no value.

    Returns:
        The maps standardised over the values they have, and 0 where they have none, see
        `sgmim_fast.standardize_structure`; and `structure_valid` of the model, (B, S, H, W) bool, True = has a value.
    """
    return standardize_structure(structure, nonfinite="ignore"), structure.isfinite()
