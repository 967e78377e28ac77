"""`token_salience`: the attention that each token receives within its image. SPEC "Salience-based masking"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import sum_dtype


class Arguments(NamedTuple):
    """The operator's arguments, see `token_salience`."""

    x: Tensor


def token_salience(x: Tensor) -> Tensor:
    """Computes the salience of each token among those of its image, from 0 to 1 (SBAM, arXiv 2404.08327).

    The attention is the softmax of the tokens' plain inner products, and a token's salience the attention it receives:
    A = softmax over j of x_i . x_j, s_j = sum over i of A_ij, rescaled to [0, 1] per image. A (N, N) is never stored:
    memory grows with N only.

    Plain PyTorch: `s = (x @ x.mT).softmax(-1).sum(-2)`, then `(s - s.amin(-1)) / (s.amax(-1) - s.amin(-1))`.

    Args:
        x: (B, N, D) tokens, N and D at least 1, floating point, any strides.

    Returns:
        (B, N), contiguous, float32 (float64 for float64), which is the accumulator dtype too. All 0 for an image whose
        tokens receive equal attention up to rounding: s_j is computed as the attention that j receives from the other
        tokens minus that which it pays to them, so that its attention to itself, often close to 1, cancels before
        anything is rounded. All NaN for an image in which an inner product is not finite; other images are unaffected.
        Not differentiable.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    _check.data("x", x, "salience")
    return _op(x)


def _check_arguments(a: Arguments) -> None:
    _check.floating("x", a.x)
    _check.shape("x", a.x, (None, None, None), "(B, N, D)")
    if 0 in a.x.shape[1:]:
        raise ValueError(f"x has shape {tuple(a.x.shape)}; expected (B, N, D) with at least one token and channel")


def _forward(x: Tensor) -> Tensor:
    x = x.to(sum_dtype(x.dtype)).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        # one image at a time, so that only one (N, N) exists at a time
        sums = [_received_less_paid((image @ image.mT).softmax(-1)) for image in x]
    return stretched(torch.stack(sums) if sums else x.new_empty(x.shape[:2]))


def stretched(sums: Tensor) -> Tensor:
    """Rescales the sums of each image to [0, 1]: all 0 where they are equal, all NaN if one is NaN."""
    low, high = sums.aminmax(dim=1, keepdim=True)
    return torch.where(low == high, 0, (sums - low) / (high - low))


def _received_less_paid(attention: Tensor) -> Tensor:
    """Returns s_j - 1, the attention that j receives from the others minus that which it pays to them. Its attention to
    itself is left out: for long tokens it is close to 1, and rounding would cancel the rest."""
    attention.diagonal().mul_(0)  # keeps NaN
    return attention.sum(0) - attention.sum(1)


_op = Op(
    "token_salience",
    Arguments,
    _forward,
    fake=lambda a: a.x.new_empty(a.x.shape[:2], dtype=sum_dtype(a.x.dtype)),
    check=_check_arguments,
)
_op.not_differentiable()
