"""The checks that come before a benchmark's speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_agree(
    actual: Sequence[Tensor], dense: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Each tensor is as near to the truth, in float32, as the dense arithmetic in `dtype`: twice its error and 1e-4 of
    the norm at most. Dense results that autocast leaves in float32 are rounded to `dtype` first, as an op's are."""
    for i, (a, d, t) in enumerate(zip(actual, dense, truth, strict=True)):
        error, reference, norm = (a - t).norm(), (d.to(dtype) - t).norm(), t.norm()
        assert error <= 2 * reference + 1e-4 * norm, (
            f"result {i} is off by {error / norm:.1e}, dense {reference / norm:.1e}"
        )


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor of the truth: how far what was found is from it, by Euclidean norms."""
    return {key: ((found[key] - t).norm() / t.norm()).item() for key, t in truth.items()}
