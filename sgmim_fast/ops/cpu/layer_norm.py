"""LayerNorm with its neighbours (gather before, residuals around), csrc/cpu/layer_norm.cpp; shared by two ops."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    rows: Tensor | None = None,
    add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises x[rows], or add_to + x[rows], which then replaces the contents of `add_to`.

    Returns y (n, C) in `dtype` and the statistics (2, n): mean and 1 / sqrt(var + eps).
    """
    count = x.shape[0] if rows is None else rows.shape[0]
    y = torch.empty(count, x.shape[1], dtype=dtype)
    statistics = torch.empty(2, count)
    torch.ops.sgmim_fast_cpu.layer_norm(
        x, rows, add_to, *_vectors(weight, bias), eps, y, add_to, statistics[0], statistics[1]
    )
    return y, statistics


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    sum_dx: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx (+ residual), the forward's y again, and the column sums: of dweight, dbias and, if `sum_dx`, dx.

    residual: in the dtype of dy, which dx replaces.
    """
    y = torch.empty_like(dy)
    sums = torch.empty(3 if sum_dx else 2, dy.shape[1])
    torch.ops.sgmim_fast_cpu.layer_norm_backward(
        dy, x, rows, statistics[0], statistics[1], *_vectors(weight, bias), residual, dy, y, sums
    )
    return dy, y, sums


def _vectors(*parameters: Tensor) -> list[Tensor]:
    """As the kernels read them."""
    return [parameter.float().contiguous() for parameter in parameters]
