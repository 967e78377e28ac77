"""Checks of results, which benchmarks make before they report a speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_agree(
    actual: Sequence[Tensor], dense: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Asserts that the error of each tensor is at most twice that of the dense result in `dtype` plus 1e-4 of the norm,
    both against the truth in float32. Dense results that autocast leaves in float32 are first rounded to `dtype`, as an
    op's results are."""
    for i, (a, d, t) in enumerate(zip(actual, dense, truth, strict=True)):
        error, reference, norm = (a - t).norm(), (d.to(dtype) - t).norm(), t.norm()
        assert error <= 2 * reference + 1e-4 * norm, (
            f"result {i} is off by {error / norm:.1e}, dense {reference / norm:.1e}"
        )


def relative_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Returns for each tensor of the truth the Euclidean norm of the error, relative to the tensor's norm."""
    return {key: ((found[key] - t).norm() / t.norm()).item() for key, t in truth.items()}
