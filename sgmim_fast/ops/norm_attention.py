"""`norm_attention`: the attention branch of a transformer block, with its norm and residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.norm_linear import check_layer_scale, check_norm, fake_norm
from sgmim_fast.ops.position_bias import SCALE, check_table, fake_table, table_backward
from sgmim_fast.ops.position_bias import Arguments as PositionBias
from sgmim_fast.ops.primitives import (
    Gradients,
    Primitives,
    Request,
    Windows,
    half_input,
    half_input_backward,
    half_output,
    half_output_backward,
    result_dtype,
    rows_of,
    scaled_weight,
    storage_dtype,
    unflattened,
)
from sgmim_fast.ops.window_attention import check_windows


class Arguments(NamedTuple):
    """The operator's arguments, see `norm_attention`."""

    x: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    layer_scale: Tensor | None
    bias: Tensor | None
    index: Tensor | None
    logit_scale: Tensor | None
    coordinates: Tensor | None
    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    heads: int
    window: list[int]
    shift: list[int]
    residual: bool
    post_norm: bool
    eps: float
    dtype: torch.dtype | None

    @property
    def rows(self) -> Tensor:
        return rows_of(self.x)

    @property
    def padded(self) -> bool:
        """Whether windows stick out of the grid, over tokens whose qkv is the projection's bias."""
        sides = zip(self.x.shape[1:3], self.window, strict=True)
        return self.qkv_bias is not None and any(side % window for side, window in sides)

    def windows(self, bias: Tensor | None, pad: Tensor | None) -> Windows:
        pad = pad if self.padded else None
        return Windows(bias, self.index, self.logit_scale, pad, self.heads, self.window, self.shift)

    @property
    def position_bias(self) -> PositionBias | None:
        """The arguments of the op that computes the bias, if it is not given."""
        if self.coordinates is None:
            return None
        return PositionBias(self.coordinates, self.fc1_weight, self.fc1_bias, self.fc2_weight, SCALE)


def norm_attention(
    x: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0),
    *,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    logit_scale: Tensor | None = None,
    coordinates: Tensor | None = None,
    fc1_weight: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    residual: bool = False,
    post_norm: bool = False,
) -> Tensor:
    """LayerNorm, qkv, `window_attention`, projection and residual of a Swin, SwinV2 or ViT block.

    Plain PyTorch: `x + F.linear(window_attention(F.linear(norm(x), ...), ...), ...)`; with `post_norm`, as in SwinV2,
    `x + norm(F.linear(window_attention(F.linear(x, ...), ...), ...))`. `norm` is `F.layer_norm`.

    Args:
        x: (B, H, W, C), floating point.
        heads, window, shift, bias, index, logit_scale: see `window_attention`.
        qkv_weight, qkv_bias: (3 C, C), and (3 C,) or None. Where windows stick out of the grid, qkv of the tokens
            outside is qkv_bias.
        proj_weight, proj_bias: (C, C), and (C,) or None.
        norm_weight, norm_bias: (C,), parameters of the LayerNorm; None, both: no LayerNorm.
        eps: eps of the LayerNorm.
        layer_scale: (C,), multiplies the result before x is added; not with float16 nor `post_norm`.
        coordinates, fc1_weight, fc1_bias, fc2_weight: see `position_bias`, which then computes `bias` from them with
            SwinV2's scale of 16; all of them and `index`, or none.
        residual: whether to add x to the result.
        post_norm: whether the norm follows the projection instead of preceding qkv.

    Returns:
        (B, H, W, C) in autocast's dtype, or that of `x`; with `residual` or `layer_scale` promoted with their dtypes.
        Differentiable in every floating-point tensor.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.

    Source: Swin (arXiv 2103.14030), SwinV2 (arXiv 2111.09883).
    """
    vectors = norm_weight, norm_bias, layer_scale, bias, index, logit_scale
    position = coordinates, fc1_weight, fc1_bias, fc2_weight
    options = heads, _check.pair("window", window), _check.pair("shift", shift), residual, post_norm, eps, None
    return _op(x, qkv_weight, qkv_bias, proj_weight, proj_bias, *vectors, *position, *options)[0]


def _check_arguments(a: Arguments) -> None:
    _check.parameter("x", a.x, (None, None, None, None), "(B, H, W, channels)")
    check_norm(a)
    width = a.x.shape[3]
    _check.parameter("qkv_weight", a.qkv_weight, (3 * width, width), "(3 * channels, channels of x)")
    _check.parameter("qkv_bias", a.qkv_bias, (3 * width,), "(3 * channels of x,)")
    _check.parameter("proj_weight", a.proj_weight, (width, width), "(channels of x, the same)")
    _check.parameter("proj_bias", a.proj_bias, (width,), "(channels of x,)")
    _check.same_dtype("x", a.x, "qkv_weight", a.qkv_weight, a.dtype)
    _check.same_dtype("x", a.x, "proj_weight", a.proj_weight, a.dtype)
    check_layer_scale(a, width, "(channels of x,)")
    given = [t is not None for t in (a.coordinates, a.fc1_weight, a.fc1_bias, a.fc2_weight)]
    if any(given):
        if not all(given) or a.index is None or a.bias is not None:
            raise ValueError(
                "coordinates, fc1_weight, fc1_bias, fc2_weight: expected all or none of them, with index and without "
                "bias, which they replace"
            )
        check_table(a.position_bias)
        _check.shape("fc2_weight", a.fc2_weight, (a.heads, a.fc1_weight.shape[0]), "(heads, hidden)")
    bias = fake_table(a.position_bias)[0] if any(given) else a.bias
    check_windows(3 * width, a.windows(bias, None))


def _check_indices(a: Arguments) -> None:
    if a.index is not None:
        entries = len(a.bias) if a.coordinates is None else a.coordinates.shape[:-1].numel()
        _check.rows("index", a.index, entries, distinct=False)


def _recomputed(a: Arguments, storage: torch.dtype) -> bool:
    """Whether the backward recomputes the attention's result, a tenth of what a block saves, instead of saving it. In
    float32 on a CPU that costs 0.5 to 1.2 % of a step (`benchmarks/NOTES.md`)."""
    return a.x.device.type == "cpu" and storage == torch.float32


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    storage, rows = storage_dtype(a.x, a.dtype), a.rows
    y, statistics = half_input(p, a, rows, storage)
    qkv_weight, qkv_bias = p.weights_in(storage, a.qkv_weight, a.qkv_bias)
    weight, bias = p.weights_in(storage, a.proj_weight, a.proj_bias)
    qkv = p.linear(y, qkv_weight, qkv_bias).view(*a.x.shape[:3], 3 * a.x.shape[3])
    del y
    position = [] if a.coordinates is None else [*p.position_bias(a.position_bias)]
    attended = p.window_attention(qkv, a.windows(position[0] if position else a.bias, qkv_bias))
    out, saved = half_output(p, a, rows, rows_of(attended), weight, bias)
    attended = [] if _recomputed(a, storage) else [attended]
    return unflattened(out, a.x), [qkv, *position, *attended, *statistics, *saved]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    qkv, *norm = saved
    storage, again, bias = qkv.dtype, None, a.bias
    if a.coordinates is not None:
        bias, slope, *norm = norm
    gradients.scaled(a.layer_scale, "proj_weight", a.proj_weight, "proj_bias", a.proj_bias)
    attended = None if _recomputed(a, storage) else norm.pop(0)
    dout, added = half_output_backward(p, a, norm, rows_of(grad), storage, "proj_bias", gradients)
    if attended is not None:
        gradients.weight("proj_weight", dout, rows_of(attended))
    elif "proj_weight" in gradients:
        again = torch.empty(a.x.shape, dtype=storage, device=qkv.device)
    (qkv_weight,) = p.weights_in(storage, a.qkv_weight, last=True)
    dattended = p.dgrad(dout, scaled_weight(p, a.layer_scale, storage, a.proj_weight)).view(a.x.shape)
    if again is None:
        del dout
    windows = a.windows(bias, p.weights_in(storage, a.qkv_bias)[0] if a.padded else None)
    if a.coordinates is not None and not gradients.wanted.keys().isdisjoint(PositionBias._fields):
        position = a.position_bias
        gradients.computed("bias", bias, lambda dbias: table_backward(p, position, [slope], dbias, gradients))
    dqkv, sums = p.window_attention_backward(dattended, qkv, windows, {"qkv", *gradients.wanted}, again)
    del dattended
    if again is not None:
        gradients.weight("proj_weight", dout, rows_of(again))
        del dout, again
    dqkv = rows_of(dqkv)
    gradients.sums(sums)
    names = "qkv_weight", "proj_bias"
    y = half_input_backward(p, a, norm, a.rows, dqkv, qkv_weight, added, *names, gradients, storage)
    gradients.weight("qkv_weight", dqkv, y)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return a.x.new_empty(*a.x.shape[:3], width, dtype=dtype)

    storage, width = storage_dtype(a.x, a.dtype), a.x.shape[3]
    dtype = result_dtype(a.x, a.x if a.residual else None, a.dtype, a.layer_scale)
    position = [] if a.coordinates is None else fake_table(a.position_bias)
    attended = [] if _recomputed(a, storage) else [empty(width, storage)]
    return empty(width, dtype), [empty(3 * width, storage), *position, *attended, *fake_norm(a)]


def _request(a: Arguments) -> Request:
    width, position = a.x.shape[3], () if a.fc2_weight is None else (a.fc2_weight.dtype,)
    dtypes, window = (*position, a.x.dtype, a.dtype or a.x.dtype), (a.window[0] * a.window[1], width // a.heads)
    return Request(dtypes, (width,), window=window)


_op = Op(
    "norm_attention",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=_request,
    indices=_check_indices,
    saves=True,
)
