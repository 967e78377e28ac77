"""The reference implementation of SG-MIM in plain PyTorch, on all tokens, against which everything else is tested.

It calls the modules of a `sgmim_fast.SGMIM`, so it uses its weights and respects hooks, adapters and replaced forwards.
The `forward` methods of the branch's modules (`sgmim_fast.guidance`) are dense; masks, heads and losses are computed
here. This file imports nothing of the package, and follows docs/SPEC.md from top to bottom.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Losses(NamedTuple):
    """Losses of a batch, scalars."""

    total: Tensor  # image + structure
    image: Tensor
    structure: Tensor


def sgmim_losses(
    model: nn.Module,
    images: Tensor,
    structure: Tensor | None,
    mask: Any,
    structure_valid: Tensor | None = None,
) -> Losses:
    """Computes the losses of `model(images, structure, mask, return_losses=True)` densely.

    Args:
        model: the `SGMIM`. Its encoder is called, except with a decoder (see `mae`).
        images: (B, in_chans, H, W).
        structure: (B, S, H, W); None without guidance.
        mask: (B, H / p, W / p), 1 = masked, or a `SelectiveMask`.
        structure_valid: (B, S, H, W) bool, True where the map counts; None: everywhere.
    """
    masked, shown = stem_masks(mask, images, model.patch_size)
    stride = model.encoder_stride
    masked_pixels = pixel_mask(masked, images)
    target = normalized_patches(images, stride) if model.target == "normalized_patch" else images
    if model.decoder is None:
        features = decoded = to_tokens(model.encoder(images, masked))
        pixels = masked_pixels.sum() + 1e-5
    else:
        features, decoded = mae(model, images, masked)
        pixels = masked_pixels.sum().clamp(min=1)
    distance = target - predict(decoded, model.image_head, images, stride)
    distance = distance**2 if model.loss == "l2" else distance.abs()
    image = (masked_pixels * distance).sum() / pixels / images.shape[1]
    if model.guidance is None:
        return Losses(image, image, torch.zeros_like(image))
    counted = 1 - masked_pixels
    if structure_valid is not None:
        structure = torch.where(structure_valid, structure, 0)
        counted = counted * structure_valid
    some_shown = pool(shown, images.shape[2] // stride, images.shape[3] // stride).any(-1).flatten(1)
    guided = model.guidance(features, model.structure_encoder(structure, shown), some_shown)
    structure_loss = masked_l1(predict(guided, model.structure_head, structure, stride), structure, counted)
    return Losses(image + structure_loss, image, structure_loss)


def mae(model: nn.Module, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Computes MAE's forward (arXiv 2111.06377), image by image, since images may keep different numbers of patches.

    Args:
        masked: (B, H / p, W / p) bool.

    Returns:
        The encoder's tokens (B, N, C), which are 0 at masked cells, and the decoder's tokens (B, N, width).
    """
    vit, decoder = model.encoder.model, model.decoder
    first = model.encoder.prefix_tokens  # class, distillation and register tokens
    seen, decoded = [], []
    tokens, rope = vit_positions(vit, vit.patch_embed(images))
    for x, hidden in zip(tokens.split(1), masked.flatten(1), strict=True):
        # shuffle: the visible patches first; ids_restore undoes it
        ids_shuffle = hidden.to(torch.uint8).argsort(stable=True)
        ids_restore, kept = ids_shuffle.argsort(), int((~hidden).sum())
        x = torch.cat([x[:, :first], x[:, first:][:, ids_shuffle[:kept]]], 1)
        if x.shape[1]:
            x = vit.norm_pre(x) if hasattr(vit, "norm_pre") else x
            for number, block in enumerate(vit.blocks):
                x = block(x, **rotary(rope, number, ids_shuffle[:kept]))
            x = vit.norm(x)
        seen.append(x.new_zeros(hidden.numel(), x.shape[2]).index_copy(0, ids_shuffle[:kept], x[0, first:]))

        y = decoder.embed(x)
        tokens = torch.cat([y[:, first:], decoder.mask_token.expand(1, hidden.numel() - kept, -1)], 1)
        y = torch.cat([y[:, :first], tokens[:, ids_restore]], 1) + decoder.pos_embed
        decoded.append(decoder.norm(decoder.blocks(y))[:, first:])
    return torch.stack(seen), torch.cat(decoded)


def vit_positions(vit: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns prefix and patch tokens with positions, and for EVA the rotary positions of all patches, else None."""
    if hasattr(vit, "_pos_embed"):
        embedded = vit._pos_embed(tokens)
        return embedded if isinstance(embedded, tuple) else (embedded, None)
    x = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], 1)  # BEiT
    return (x if vit.pos_embed is None else x + vit.pos_embed), None


def rotary(rope: Tensor | None, number: int, kept: Tensor) -> dict[str, Tensor]:
    """Returns the argument `rope` of block `number`: rotary positions (N, d) or (blocks, heads, N, d) of `kept`."""
    if rope is None:
        return {}
    return {"rope": (rope if rope.ndim == 2 else rope[number])[..., kept, :]}


def normalized_patches(images: Tensor, stride: int) -> Tensor:
    """Subtracts each cell's mean and divides by its standard deviation, as MAE's target with `norm_pix_loss`."""
    patches = F.pixel_unshuffle(images, stride)
    mean, var = patches.mean(1, keepdim=True), patches.var(1, keepdim=True)
    return F.pixel_shuffle((patches - mean) / (var + 1.0e-6) ** 0.5, stride)


def predict(tokens: Tensor, head: nn.Module, like: Tensor, stride: int) -> Tensor:
    """Applies the head and a pixel shuffle, (B, N, C) -> (B, channels, H, W) with H and W of `like`."""
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
    return enlarge(masked, *images.shape[2:])[:, None].to(dtype)


def stem_masks(mask: Any, images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Returns where the image is masked and where the structure is shown, both (B, H / p, W / p) bool."""
    if isinstance(mask, Tensor):
        return mask.bool(), mask.bool()
    size = images.shape[2] // patch, images.shape[3] // patch
    return enlarge(mask.mask, *size), enlarge(mask.structure, *size)


def enlarge(mask: Tensor, height: int, width: int) -> Tensor:
    """Repeats entries, (B, h, w) -> (B, height, width), which are multiples of h and w."""
    return mask.repeat_interleave(height // mask.shape[1], 1).repeat_interleave(width // mask.shape[2], 2)


def pool(mask: Tensor, down: int, across: int) -> Tensor:
    """Groups entries in blocks, (B, h, w) -> (B, down, across, entries of each block)."""
    batch, height, width = mask.shape
    blocks = mask.reshape(batch, down, height // down, across, width // across)
    return blocks.transpose(2, 3).flatten(3)


def to_tokens(features: Tensor) -> Tensor:
    """(B, N, C), or (B, C, h, w) -> (B, N, C)."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def __getattr__(name: str) -> Callable[..., Tensor]:
    if name not in ("structure_tokens", "relational_guidance"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"reference.{name}(module, ...) is module(...)", DeprecationWarning, stacklevel=2)
    return lambda module, *args: module(*args)
