"""SG-MIM in plain PyTorch: every token, no shortcut. The executable specification that the rest is checked against.

Reads parameters from a `sgmim_fast.SGMIM`, so both use the same weights. Follows docs/SPEC.md from top to bottom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.guidance import RelationalGuidance, StructureEncoder
from sgmim_fast.masking import SelectiveMask, resize

if TYPE_CHECKING:
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
        model: the model; its encoder runs as it is, the rest only lends its parameters.
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
    context = structure_tokens(model.structure_encoder, structure, shown)
    some_shown = pool(shown, images.shape[2] // stride, images.shape[3] // stride).any(-1).flatten(1)
    guided = relational_guidance(model.guidance, features, context, some_shown)
    prediction = predict(guided, model.structure_head, structure, stride)
    counted = 1 - masked_pixels
    if structure_valid is not None:
        counted = counted * structure_valid
    structure_loss = masked_l1(prediction, structure, counted)
    return Losses(image + structure_loss, image, structure_loss)


def structure_tokens(encoder: StructureEncoder, structure: Tensor, shown: Tensor) -> Tensor:
    """Structure encoder: (B, S, H, W) and (B, H / p, W / p), True = the branch may read -> (B, N, C)."""
    embed = encoder.patch_embed
    x = embed.proj(structure).permute(0, 2, 3, 1)  # (B, H / e, W / e, D)
    x = F.layer_norm(x, embed.norm.normalized_shape, embed.norm.weight, embed.norm.bias, embed.norm.eps)
    down, across = x.shape[1:3]
    if down % shown.shape[1] or across % shown.shape[2]:  # stem patches are no union of ours: shown where all of it is
        shown = pool(resize(shown, *structure.shape[2:]), down, across).all(-1)
    x = x * resize(shown, down, across)[..., None].to(x.dtype)
    for merge in encoder.merges:
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        x = merge.reduction(merge.norm(x))
    return x.flatten(1, 2)


def relational_guidance(guidance: RelationalGuidance, features: Tensor, context: Tensor, shown: Tensor) -> Tensor:
    """Guidance block: features, context (B, N, C), shown (B, N) bool -> (B, N, C).

    `shown` matters to hidden_context="drop" only: cells of which nothing is shown are no keys there.
    """
    query, context = guidance.query_norm(features), guidance.context_norm(context)
    position = 0 if guidance.pos_embed is None else guidance.pos_embed.to(query.dtype)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (guidance.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    q, k = heads(guidance.attn.q(query + position)), heads(guidance.attn.k(context + position))
    v = heads(guidance.attn.v(context))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if guidance.hidden_context == "drop":
        logits = logits.masked_fill(~shown[:, None, None], -torch.inf)
        # An image without any key attends to nothing.
        weights = torch.where(shown.any(1)[:, None, None, None], logits, 0).softmax(-1)
        weights = weights * shown[:, None, None]
    else:
        weights = logits.softmax(-1)
    attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    t = features + guidance.attn.proj(attended)
    return t + guidance.mlp.fc2(F.gelu(guidance.mlp.fc1(guidance.out_norm(t))))


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
