"""SG-MIM in plain PyTorch: every token, no shortcut. The executable specification that the rest is checked against.

Goes through the modules of a `sgmim_fast.SGMIM`, so that it has its weights, and calls each of them: hooks, adapters
and forwards of their own are obeyed. Follows docs/SPEC.md from top to bottom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.masking import SelectiveMask, resize

if TYPE_CHECKING:
    from sgmim_fast.guidance import CrossAttention, Mlp, PatchEmbed, PatchMerging, RelationalGuidance, StructureEncoder
    from sgmim_fast.model import SGMIM


class Losses(NamedTuple):
    """Losses of a batch, scalars."""

    total: Tensor  # image + structure
    image: Tensor
    structure: Tensor


def sgmim_losses(
    model: SGMIM,
    images: Tensor,
    structure: Tensor | None,
    mask: Tensor | SelectiveMask,
    structure_valid: Tensor | None = None,
) -> Losses:
    """The losses of `model(images, structure, mask, return_losses=True)`, computed densely.

    Args:
        model: the model; its encoder runs as it is.
        images: (B, in_chans, H, W).
        structure: (B, S, H, W); None without guidance.
        mask: (B, H / p, W / p), 1 = masked, or what `selective_mask` returned.
        structure_valid: (B, S, H, W) bool, True where the map counts; None: everywhere.
    """
    masked, shown = stem_masks(mask, images, model.patch_size)
    tokens = to_tokens(model.encoder(images, masked))
    return losses_from_features(model, tokens, images, structure, masked, shown, structure_valid)


def losses_from_features(
    model: SGMIM,
    features: Tensor,
    images: Tensor,
    structure: Tensor | None,
    masked: Tensor,
    shown: Tensor,
    structure_valid: Tensor | None = None,
) -> Losses:
    """The branch, heads and losses, from encoder features (B, N, C) and stem masks (B, H / p, W / p)."""
    stride = model.encoder_stride
    masked_pixels = pixel_mask(masked, images)
    prediction = predict(features, model.image_head, images, stride)
    image = masked_l1(prediction, images, masked_pixels)
    if model.guidance is None:
        return Losses(image, image, torch.zeros_like(image))
    if structure_valid is not None:
        structure = torch.where(structure_valid, structure, 0)
    guided = guide(model, features, structure, shown)
    prediction = predict(guided, model.structure_head, structure, stride)
    counted = 1 - masked_pixels
    if structure_valid is not None:
        counted = counted * structure_valid
    structure_loss = masked_l1(prediction, structure, counted)
    return Losses(image + structure_loss, image, structure_loss)


def guide(model: SGMIM, features: Tensor, structure: Tensor, shown: Tensor) -> Tensor:
    """Guided features, from features (B, N, C), structure (B, S, H, W) and shown (B, H / p, W / p) bool."""
    stride = model.encoder_stride
    some_shown = pool(shown, structure.shape[2] // stride, structure.shape[3] // stride).any(-1).flatten(1)
    return model.guidance(features, model.structure_encoder(structure, shown), some_shown)


def structure_tokens(encoder: StructureEncoder, structure: Tensor, shown: Tensor) -> Tensor:
    """Structure encoder: (B, S, H, W) and (B, H / p, W / p), True = the branch may read -> (B, N, C)."""
    x = encoder.patch_embed(structure)  # (B, H / e, W / e, D)
    down, across = x.shape[1:3]
    if down % shown.shape[1] or across % shown.shape[2]:  # stem patches are no union of ours: shown where all of it is
        shown = pool(resize(shown, *structure.shape[2:]), down, across).all(-1)
    x = x * resize(shown, down, across)[..., None].to(x.dtype)
    for merge in encoder.merges:
        x = merge(x)
    return x.flatten(1, 2)


def patch_embedding(embed: PatchEmbed, pixels: Tensor) -> Tensor:
    """(B, S, H, W) -> (B, H / e, W / e, D)."""
    return embed.norm(embed.proj(pixels).permute(0, 2, 3, 1))


def patch_merging(merge: PatchMerging, x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B, H / 2, W / 2, 2 D)."""
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return merge.reduction(merge.norm(x))


def relational_guidance(guidance: RelationalGuidance, features: Tensor, context: Tensor, shown: Tensor) -> Tensor:
    """Guidance block: features, context (B, N, C), shown (B, N) bool -> (B, N, C).

    `shown` matters to hidden_context="drop" only: cells of which nothing is shown are no keys there.
    """
    query, context = guidance.query_norm(features), guidance.context_norm(context)
    position = 0 if guidance.pos_embed is None else guidance.pos_embed.to(query.dtype)
    keys = shown if guidance.hidden_context == "drop" else None
    t = features + guidance.attn(query + position, context + position, context, guidance.heads, keys)
    return t + guidance.mlp(guidance.out_norm(t))


def cross_attention(
    attn: CrossAttention, query: Tensor, key: Tensor, value: Tensor, heads: int, shown: Tensor | None
) -> Tensor:
    """Attention of (B, N, C) over (B, N, C), over the shown keys (B, N) only unless that is None."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    q, k, v = split(attn.q(query)), split(attn.k(key)), split(attn.v(value))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if shown is not None:
        logits = logits.masked_fill(~shown[:, None, None], -torch.inf)
        # An image without any key attends to nothing.
        weights = torch.where(shown.any(1)[:, None, None, None], logits, 0).softmax(-1)
        weights = weights * shown[:, None, None]
    else:
        weights = logits.softmax(-1)
    return attn.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def mlp(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def predict(tokens: Tensor, head: torch.nn.Linear, like: Tensor, stride: int) -> Tensor:
    """Head and pixel shuffle: (B, N, C) -> (B, channels, H, W), the size of `like`."""
    grid = head(tokens).transpose(1, 2).unflatten(2, (like.shape[2] // stride, like.shape[3] // stride))
    return F.pixel_shuffle(grid, stride)


def masked_l1(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """sum counted * |target - prediction| / (counted pixels + 1e-5) / channels; counted: (B, 1 or channels, H, W)."""
    channels = target.shape[1]
    pixels = counted.sum() / counted.shape[1]
    return (counted * (target - prediction).abs()).sum() / (pixels + 1e-5) / channels


def pixel_mask(masked: Tensor, images: Tensor) -> Tensor:
    """(B, H / p, W / p) -> (B, 1, H, W) in the dtype of the loss, 1 = masked."""
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    return resize(masked, *images.shape[2:])[:, None].to(dtype)


def stem_masks(mask: Tensor | SelectiveMask, images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Where the image is masked and where the structure is shown, both (B, H / p, W / p) bool."""
    size = images.shape[2] // patch, images.shape[3] // patch
    if isinstance(mask, SelectiveMask):
        return resize(mask.mask, *size), resize(mask.structure, *size)
    return mask.bool(), mask.bool()


def pool(mask: Tensor, down: int, across: int) -> Tensor:
    """(B, h, w) -> (B, down, across, entries of each block)."""
    batch, height, width = mask.shape
    blocks = mask.reshape(batch, down, height // down, across, width // across)
    return blocks.transpose(2, 3).flatten(3)


def to_tokens(features: Tensor) -> Tensor:
    """(B, N, C), or (B, C, h, w) -> (B, N, C)."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
