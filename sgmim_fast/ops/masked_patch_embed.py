"""`masked_patch_embed`: an encoder's stem for the visible patches, the mask token elsewhere. SPEC "Encoder"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op, absent
from sgmim_fast.ops._plain import layer_norm, layer_norm_backward, wide_dtype
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward


class Stem(NamedTuple):
    """The tensors that go in, see `masked_patch_embed`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask_token: Tensor
    visible: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def masked_patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Embeds the visible patches of images and puts the mask token in the place of all others, which are never read.

    Plain PyTorch, with `mask` (B, N, 1), 1 = masked: `t = F.conv2d(x, weight, bias, stride=p).flatten(2).mT`, where
    there is a norm `t = F.layer_norm(t, (D,), norm_weight, norm_bias, eps)`, then `t * (1 - mask) + mask_token * mask`.

    Args:
        x: (B, C, H, W) images, floating point, any strides; H and W multiples of p.
        weight: (D, C, p, p).
        bias: (D,) or None.
        mask_token: (D,).
        visible: (n,) int64, distinct indices of the visible (not masked) patches among the B * (H / p) * (W / p),
            row-major.
        norm_weight, norm_bias: (D,) of the LayerNorm after the embedding, or both None where there is none.
        eps: of the LayerNorm.

    Returns:
        (B, N, D) tokens, N = (H / p) * (W / p), row-major; the autocast dtype, or that of `x`. Differentiable in all
        floating-point arguments.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    return _op(x, weight, bias, mask_token, visible, norm_weight, norm_bias, eps, None)[0]


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    _check.floating("x", x)
    _check.floating("weight", weight)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (D, C, p, p)")
    _check.cells("x", x, weight.shape[2])
    _check.index("visible", visible)
    width = weight.shape[0]
    _check.shape("weight", weight, (None, x.shape[1], None, None), "(D, channels of x, p, p)")
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} is None; expected norm_weight and norm_bias, or neither")
    vectors = {"bias": bias, "mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        _check.parameter(name, vector, (width,), "(D,)")
    _check.same_dtype("x", x, "weight", weight, dtype)


def patches(x: Tensor, weight: Tensor, visible: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The visible patches (n, C * p^2), in the dtype of the products."""
    p = weight.shape[2]
    rows = gather_patches(x.detach(), visible, cell=p, patch=p)
    return rows.to(products.compute_dtype(dtype or x.dtype, x.device))


def output_shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """(B, N, D)."""
    return x.shape[0], (x.shape[2] // weight.shape[2]) * (x.shape[3] // weight.shape[2]), weight.shape[0]


def input_gradient(dembedded: Tensor, x: Tensor, weight: Tensor, visible: Tensor) -> Tensor:
    """Gradient of the images, from that of the visible patches' embeddings."""
    drows = products.linear_input_gradient(dembedded, weight.flatten(1)).to(x.dtype)
    return gather_patches_backward(drows, visible, x.shape, weight.shape[2], weight.shape[2], False)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, list[Tensor]]:
    shape = output_shape(x, weight)
    _check.rows("visible", visible, shape[0] * shape[1])
    tokens = products.linear(patches(x, weight, visible, dtype), weight.flatten(1), bias)
    saved = []
    if norm_weight is not None:
        saved = [tokens]
        tokens, statistics = layer_norm(tokens, norm_weight, norm_bias, eps)
        saved.append(statistics)
    dtype = dtype or x.dtype
    out = mask_token.to(dtype).repeat(shape[0] * shape[1], 1)
    out[visible] = tokens.to(dtype)
    return out.view(shape), saved


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    rows = grad.reshape(-1, grad.shape[-1])
    hidden = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device).index_fill_(0, visible, False)
    wide = wide_dtype(x)
    dtoken = rows.where(hidden[:, None], 0).sum(0, dtype=wide)
    dtokens, dnorm_weight, dnorm_bias = rows[visible], None, None
    if norm_weight is not None:
        dtokens, dnorm_weight, dnorm_bias = layer_norm_backward(dtokens, *saved, norm_weight)
    stem = Stem(x, weight, bias, mask_token, visible, norm_weight, norm_bias)
    return gradients(stem, needs, dtype, dtokens, [dtoken, dnorm_weight, dnorm_bias, dtokens.sum(0, dtype=wide)])


def gradients(
    stem: Stem, needs: list[bool], dtype: torch.dtype | None, dtokens: Tensor, sums: Sequence[Tensor | None]
) -> list[Tensor]:
    """The backward's results: gradients of x, weight, bias, mask_token, norm_weight and norm_bias.

    dtokens: (n, D), of the visible patches' embeddings. sums: (D,) each, of mask_token, norm_weight, norm_bias, bias.
    """
    x, weight = stem.x, stem.weight
    dtokens = dtokens.to(products.compute_dtype(dtype or x.dtype, x.device))
    grads = [absent(x) for _ in needs]
    if needs[0]:
        grads[0] = input_gradient(dtokens, x, weight, stem.visible)
    if needs[1]:
        dweight = products.linear_weight_gradient(dtokens, patches(x, weight, stem.visible, dtype))
        grads[1] = dweight.view_as(weight).to(weight.dtype)
    dtoken, dnorm_weight, dnorm_bias, dbias = sums
    vectors = [
        (stem.bias, dbias),
        (stem.mask_token, dtoken),
        (stem.norm_weight, dnorm_weight),
        (stem.norm_bias, dnorm_bias),
    ]
    for i, (vector, grad) in enumerate(vectors, 2):
        if needs[i]:
            grads[i] = grad.to(vector.dtype, copy=True)  # results of an op must not share memory
    return grads


def _fake(x, weight, bias, mask_token, visible, norm_weight, norm_bias, eps, dtype):
    saved = []
    if norm_weight is not None:
        storage = products.compute_dtype(dtype or x.dtype, x.device)
        n = visible.shape[0]
        saved = [x.new_empty(n, weight.shape[0], dtype=storage), x.new_empty(2, n, dtype=wide_dtype(x))]
    return x.new_empty(output_shape(x, weight), dtype=dtype or x.dtype), saved


_op = Op(
    "masked_patch_embed",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor mask_token, Tensor visible, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, ScalarType? dtype) -> (Tensor, Tensor[])",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    *tensors, _, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, *results[1])


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    x, weight, bias, mask_token, visible, norm_weight, norm_bias, *saved = ctx.saved_tensors
    flags = [*needs[:4], *needs[5:7]]
    dx, dweight, dbias, dtoken, dnorm_weight, dnorm_bias = _op.backward(
        grad, x, weight, bias, mask_token, visible, norm_weight, norm_bias, saved, flags, ctx.dtype
    )
    return dx, dweight, dbias, dtoken, None, dnorm_weight, dnorm_bias


def _fake_backward(grad, x, weight, bias, mask_token, visible, norm_weight, norm_bias, saved, needs, dtype):
    inputs = (x, weight, bias, mask_token, norm_weight, norm_bias)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    ]


_op.differentiable(
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor mask_token, Tensor visible, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor[] saved, bool[] needs, ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)
