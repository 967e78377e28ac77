"""The reference implementation of SG-MIM in plain PyTorch, on all tokens, against which everything else is tested.

It calls the modules of a `sgmim_fast.SGMIM`, and so uses its weights and respects hooks, adapters and replaced
forwards. The modules of the branch (`sgmim_fast.guidance`) are dense in their `forward`; masks, heads and losses are
here. This file imports nothing of the model, and follows docs/SPEC.md from top to bottom.
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
    """The losses of `model(images, structure, mask, return_losses=True)`, computed densely.

    Args:
        model: the `SGMIM`; its encoder runs as it is.
        images: (B, in_chans, H, W).
        structure: (B, S, H, W); None without guidance.
        mask: (B, H / p, W / p), 1 = masked, or a `SelectiveMask`.
        structure_valid: (B, S, H, W) bool, True where the map counts; None: everywhere.
    """
    masked, shown = stem_masks(mask, images, model.patch_size)
    features = to_tokens(model.encoder(images, masked))
    stride = model.encoder_stride
    masked_pixels = pixel_mask(masked, images)
    image = masked_l1(predict(features, model.image_head, images, stride), images, masked_pixels)
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


def predict(tokens: Tensor, head: nn.Module, like: Tensor, stride: int) -> Tensor:
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
    return enlarge(masked, *images.shape[2:])[:, None].to(dtype)


def stem_masks(mask: Any, images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Where the image is masked and where the structure is shown, both (B, H / p, W / p) bool."""
    if isinstance(mask, Tensor):
        return mask.bool(), mask.bool()
    size = images.shape[2] // patch, images.shape[3] // patch
    return enlarge(mask.mask, *size), enlarge(mask.structure, *size)


def enlarge(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) -> (B, height, width), multiples of h and w, each entry repeated."""
    return mask.repeat_interleave(height // mask.shape[1], 1).repeat_interleave(width // mask.shape[2], 2)


def pool(mask: Tensor, down: int, across: int) -> Tensor:
    """(B, h, w) -> (B, down, across, entries of each block)."""
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
