"""`position_bias`: SwinV2's continuous relative position bias, a table that a small MLP computes from coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, sum_dtype

SCALE = 16.0  # the largest bias of SwinV2


class Arguments(NamedTuple):
    """The operator's arguments, see `position_bias`."""

    coordinates: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the computation and of its result."""
        return sum_dtype(self.fc2_weight.dtype)

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Returns the coordinates (entries, 2) and the first layer's features after ReLU (entries, hidden)."""
        coordinates, fc1_weight, fc1_bias = (t.to(self.dtype) for t in self[:3])
        coordinates = coordinates.reshape(-1, 2)
        return coordinates, (coordinates @ fc1_weight.mT + fc1_bias).relu_()


def position_bias(
    coordinates: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, *, scale: float = SCALE
) -> Tensor:
    """Computes the continuous relative position bias of SwinV2 (arXiv 2111.09883, section 3.3).

    Plain PyTorch: `scale * F.linear(F.relu(F.linear(coordinates, fc1_weight, fc1_bias)), fc2_weight).sigmoid()`. The
    backward recomputes the hidden features, which are never written to memory.

    Args:
        coordinates: (..., 2), floating point: the relative coordinates of each entry of the table.
        fc1_weight, fc1_bias: (hidden, 2), (hidden,).
        fc2_weight: (heads, hidden).
        scale: the largest bias.

    Returns:
        (entries, heads), the `bias` of `window_attention` and `norm_attention`, where entries is the number of
        coordinate pairs. Computed in float32, also under autocast (in float64 if `fc2_weight` is). Differentiable in
        every tensor.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    return _op(coordinates, fc1_weight, fc1_bias, fc2_weight, scale)[0]


def check_table(a: Arguments) -> None:
    _check.floating("coordinates", a.coordinates)
    if a.coordinates.ndim == 0 or a.coordinates.shape[-1] != 2:
        raise ValueError(f"coordinates has shape {tuple(a.coordinates.shape)}; expected (..., 2)")
    _check.parameter("fc1_weight", a.fc1_weight, (None, 2), "(hidden, 2)")
    hidden = a.fc1_weight.shape[0]
    _check.parameter("fc1_bias", a.fc1_bias, (hidden,), "(hidden,)")
    _check.parameter("fc2_weight", a.fc2_weight, (None, hidden), "(heads, hidden)")


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    table, slope = p.position_bias(a)
    return table, [slope]


def table_backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    grad, (slope,) = grad.contiguous(), saved
    gradients["fc1_weight"], gradients["fc1_bias"], gradients["fc2_weight"] = p.position_bias_backward(grad, slope, a)
    if "coordinates" in gradients:  # not in a model, whose coordinates are a buffer
        _, hidden = a.hidden()
        dhidden = ((grad * slope) @ a.fc2_weight.to(a.dtype)).masked_fill_(hidden <= 0, 0)
        gradients["coordinates"] = dhidden @ a.fc1_weight.to(a.dtype)


def fake_table(a: Arguments) -> list[Tensor]:
    """Returns fakes of the table and of its derivative by the logits."""
    table = a.fc2_weight.new_empty(a.coordinates.shape[:-1].numel(), a.fc2_weight.shape[0], dtype=a.dtype)
    return [table, torch.empty_like(table)]


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    table, slope = fake_table(a)
    return table, [slope]


_op = Op(
    "position_bias",
    Arguments,
    _forward,
    backward=table_backward,
    fake=_fake,
    check=check_table,
    request=lambda a: Request((a.fc2_weight.dtype,), widths=(a.fc2_weight.shape[0],)),
    saves=True,
)
