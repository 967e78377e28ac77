"""The visible-only branch as a careful PyTorch user would write it: none of our kernels, gradients by autograd.

All images have the same number of masked cells, so that rows form (B, cells, C) batches. The attention is PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import SGMIM
from sgmim_fast.ops.gather_patches import patch_order
from sgmim_fast.reference import Losses


def cells_of(pixels: Tensor, side: int) -> Tensor:
    """Splits (B, C, H, W) into cells, (B, N, C * side^2); a view if possible."""
    batch, channels, height, width = pixels.shape
    cells = pixels.reshape(batch, channels, height // side, side, width // side, side)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * side * side)


def take(cells: Tensor, index: Tensor) -> Tensor:
    """Selects the cells with indices (B, k) from (B, N, C). Returns (B, k, C)."""
    return cells.gather(1, index[..., None].expand(-1, -1, cells.shape[2]))


def visible_losses(
    model: SGMIM, features: Tensor, images: Tensor, structure: Tensor, visible: Tensor, masked: Tensor
) -> Losses:
    """Computes the losses from features (B, N, C) and the indices of each image's visible and masked cells, (B, V) and
    (B, K)."""
    stride, pixels = model.encoder_stride, model.encoder_stride**2
    prediction = model.image_head(take(features, masked))
    image = (prediction - take(cells_of(images, stride), masked)).abs().sum()
    image = image / (masked.numel() * pixels + 1e-5) / model.in_chans

    loss = structure_loss(model, take(features, visible), structure, visible, masked)
    return Losses(image + loss, image, loss)


def structure_loss(model: SGMIM, features: Tensor, structure: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """Computes the structure loss from the features (B, V, C) of the visible cells."""
    stride, context = model.encoder_stride, structure_tokens(model, structure, masked)
    prediction = model.structure_head(guide(model, features, context, visible.shape[1]))
    loss = (prediction - take(cells_of(structure, stride), visible)).abs().sum()
    return loss / (visible.numel() * stride**2 + 1e-5) / model.structure_channels


def structure_tokens(model: SGMIM, structure: Tensor, masked: Tensor) -> Tensor:
    """Returns the structure tokens, (B, K + 1, C): those of the shown cells, and last the one of all hidden cells."""
    encoder = model.structure_encoder
    embed, patch = encoder.patch_embed, encoder.patch_embed.proj.weight.shape[2]
    batch, count = masked.shape
    cells = take(cells_of(structure, encoder.stride), masked).view(
        batch * count, structure.shape[1], *2 * [encoder.stride]
    )
    order = patch_order(encoder.stride // patch, True, structure.device)
    patches = cells_of(cells, patch)[:, order]
    x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    for merge in encoder.merges:
        x = merge.reduction(merge.norm(x.reshape(x.shape[0], -1, 4 * x.shape[2])))
    x = x.squeeze(1)
    return torch.cat([x[:-1].view(batch, count, -1), x[-1].expand(batch, 1, -1)], 1)


def guide(model: SGMIM, features: Tensor, context: Tensor, hidden: int) -> Tensor:
    """Guides features (B, V, C) by structure tokens (B, K + 1, C), the last of which represents `hidden` cells."""
    guidance = model.guidance
    context = guidance.context_norm(context)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (guidance.heads, -1)).transpose(1, 2)

    q = heads(guidance.attn.q(guidance.query_norm(features)))
    k, v = heads(guidance.attn.k(context)), heads(guidance.attn.v(context))
    bias = torch.zeros(1, k.shape[2], dtype=q.dtype, device=q.device)
    bias[:, -1] = torch.tensor(float(hidden)).log()
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    t = features + guidance.attn.proj(attended)
    return t + guidance.mlp.fc2(F.gelu(guidance.mlp.fc1(guidance.out_norm(t))))
