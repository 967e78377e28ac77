"""`masked_patch_embed` in Triton: gather, product, norm, scatter of the visible patches; masked ones are not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.kernels import products
from sgmim_fast.kernels.launch import fits, on_device, supported
from sgmim_fast.kernels.layer_norm import Norm, NormGradient, layer_norm, layer_norm_backward
from sgmim_fast.kernels.sums import Sum, column_sums, finish
from sgmim_fast.ops import products as library
from sgmim_fast.ops._op import absent
from sgmim_fast.ops.masked_patch_embed import input_gradient, output_shape, patches


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    x, weight = args[:2] if part == "forward" else args[1:3]
    usable, reason = supported(args[-1] or x.dtype)
    return fits(weight.shape[0]) if usable else (usable, reason)


@on_device
def forward(
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
    """Cost: reads the visible patches, writes them packed, embedded and in place; at most 6 launches."""
    pixels = patches(x, weight, visible, dtype)
    w = weight.flatten(1).to(pixels.dtype).contiguous()
    tokens = products.linears([pixels], [w])[0] if bias is None else products.linear(pixels, w, bias.contiguous())
    shape, visible = output_shape(x, weight), visible.contiguous()
    out = mask_token.to(dtype or x.dtype).repeat(shape[0] * shape[1], 1)
    if norm_weight is None:
        out.index_copy_(0, visible, tokens.to(out.dtype))
        return out.view(shape), []
    norm = Norm(tokens, norm_weight.contiguous(), norm_bias.contiguous(), out, y_rows=visible)
    return out.view(shape), [tokens, *layer_norm([norm], eps)]


@on_device
def backward(
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
    """Cost: reads the gradient twice, the visible patches once; at most 11 launches."""
    compute = library.compute_dtype(dtype or x.dtype, x.device)
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    hidden = torch.ones(rows.shape[0], dtype=torch.uint8, device=rows.device).index_fill_(0, visible, 0)
    token_sum = column_sums([rows], [torch.empty_like(mask_token)], hidden)
    dtokens, norm_sums = rows[visible].to(compute), []
    if norm_weight is not None:
        tokens, statistics = saved
        dy, dtokens = dtokens, torch.empty_like(tokens)
        vectors = norm_weight.contiguous(), norm_bias.contiguous()
        gradient = NormGradient(dy, tokens, statistics, *vectors, dtokens, again=False)
        _, (norm_sums,) = layer_norm_backward([gradient])
    bias_sum: list[Sum] = [] if bias is None else column_sums([dtokens], [torch.empty_like(bias)])
    finish([*token_sum, *norm_sums, *bias_sum])
    grads = [absent(x) for _ in needs]
    if needs[0]:
        grads[0] = input_gradient(dtokens, x, weight, visible)
    if needs[1]:
        pixels = patches(x, weight, visible, dtype)
        grads[1] = products.weight_gradients([dtokens], [pixels], [weight.dtype])[0].view_as(weight)
    sums = [*(bias_sum or [None]), *token_sum, *(norm_sums or [None, None])]
    for i, total in enumerate(sums, 2):
        if needs[i]:
            grads[i] = total.out
    return grads
