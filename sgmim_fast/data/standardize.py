"""The standardisation of a batch whose maps have missing values. SPEC "Standardising the structure map"."""

from __future__ import annotations

from torch import Tensor

from sgmim_fast.ops import standardize_structure


def standardize_valid(structure: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """What the model takes, of maps as they come from a data set; on any device, without waiting for it.

    Args:
        structure: (B, S, H, W), NaN where a map has no value.
        limit: standardised values are cut off at ± this; None: nowhere. Of a map that is flat but for a few pixels,
            those lie tens of deviations away, and one such map outweighs a batch in the loss.

    Returns:
        The maps standardised over the values they have, and 0 where they have none, see
        `sgmim_fast.standardize_structure`; and `structure_valid` of the model, (B, S, H, W) bool, True = has a value.
    """
    standardized = standardize_structure(structure, nonfinite="ignore")
    if limit is not None:
        standardized = standardized.clamp_(-limit, limit)
    return standardized, structure.isfinite()
