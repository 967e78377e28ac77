"""`token_salience`: how much attention a token gets from all tokens of its image. SPEC "Salience-based masking"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import sum_dtype


class Arguments(NamedTuple):
    """Of the op, as of `token_salience`."""

    x: Tensor


def token_salience(x: Tensor) -> Tensor:
    """The salience of each token among those of its image, from 0 to 1 (SBAM, arXiv 2404.08327).

    Tokens attend to each other by their plain inner products, and a token is salient as far as it is attended to:
    A = softmax over j of x_i . x_j, s_j = sum over i of A_ij, brought to [0, 1] per image. A (N, N) is never written:
    memory grows with N alone.

    Plain PyTorch: `s = (x @ x.mT).softmax(-1).sum(-2)`, then `(s - s.amin(-1)) / (s.amax(-1) - s.amin(-1))`.

    Args:
        x: (B, N, D) tokens, N and D at least 1, floating point, any strides.

    Returns:
        (B, N), contiguous, float32 (float64 for float64), which products and sums are accumulated in, too. 0 throughout
        where all tokens of an image are attended to as much, as far as the dtype can tell: s_j is found as what j gets
        from the others less what it pays to them, in which its attention to itself, often close to 1, cancels before
        anything is rounded. NaN throughout for an image in which a product of tokens is not finite, and for no other.
        Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires grad; expected data: salience is not differentiable, detach() it")
    return _op(x)


def _check_arguments(a: Arguments) -> None:
    _check.floating("x", a.x)
    _check.shape("x", a.x, (None, None, None), "(B, N, D)")
    if 0 in a.x.shape[1:]:
        raise ValueError(f"x has shape {tuple(a.x.shape)}; expected (B, N, D) with at least one token and channel")


def _forward(x: Tensor) -> Tensor:
    x = x.to(sum_dtype(x.dtype)).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        # one image at a time, so that there is one (N, N) at a time
        sums = [_received_less_paid((image @ image.mT).softmax(-1)) for image in x]
    s = torch.stack(sums) if sums else x.new_empty(x.shape[:2])
    low, high = s.aminmax(dim=1, keepdim=True)
    return torch.where(low == high, 0, (s - low) / (high - low))


def _received_less_paid(attention: Tensor) -> Tensor:
    """s_j - 1: what the others pay to j less what j pays to them, without what it pays itself, which is close to 1
    where tokens are long, and would leave nothing of the rest."""
    attention.fill_diagonal_(0)
    return attention.sum(0) - attention.sum(1)


_op = Op(
    "token_salience",
    Arguments,
    _forward,
    fake=lambda a: a.x.new_empty(a.x.shape[:2], dtype=sum_dtype(a.x.dtype)),
    check=_check_arguments,
)
_op.not_differentiable()
