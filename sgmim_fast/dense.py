"""The two losses of SG-MIM on every token, through the modules as they are. SPEC "Heads and losses".

For partly masked cells, and for heads or modules of the branch that the ops cannot replace.
`model` is an `SGMIM`, which imports this. `sgmim_fast.visible` has the same on visible tokens only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast.masking import DenseMask, SelectiveMask, resize


def image_loss(model: nn.Module, features: Tensor, images: Tensor, mask: SelectiveMask | DenseMask) -> Tensor:
    """From encoder features (B, N, C)."""
    prediction = predict(model.image_head, features, images, model.encoder_stride)
    return _masked_l1(prediction, images, mask.mask, None)


def structure_loss(
    model: nn.Module, features: Tensor, structure: Tensor, mask: SelectiveMask | DenseMask, valid: Tensor | None
) -> Tensor:
    """From encoder features (B, N, C) and a map (B, S, H, W) that is 0 where it is not valid."""
    guided = guide(model, features, structure, mask)
    prediction = predict(model.structure_head, guided, structure, model.encoder_stride)
    return _masked_l1(prediction, structure, ~mask.mask, valid)


def guide(model: nn.Module, features: Tensor, structure: Tensor, mask: SelectiveMask | DenseMask) -> Tensor:
    """Guided features (B, N, C)."""
    height, width = structure.shape[2:]
    shown = resize(mask.structure, height // model.patch_size, width // model.patch_size)
    side = model.encoder_stride // model.patch_size  # patches along a cell
    some_shown = shown.unflatten(2, (-1, side)).unflatten(1, (-1, side)).any(4).any(2).flatten(1)
    return model.guidance(features, model.structure_encoder(structure, shown), some_shown)


def predict(head: nn.Module, tokens: Tensor, like: Tensor, stride: int) -> Tensor:
    """Head and pixel shuffle: (B, N, C) -> (B, channels, H, W), the size of `like`."""
    values = head(tokens).transpose(1, 2)  # (B, channels * stride^2, N)
    return F.pixel_shuffle(values.unflatten(2, (like.shape[2] // stride, like.shape[3] // stride)), stride)


def _masked_l1(prediction: Tensor, target: Tensor, counted: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of |target - prediction| over the pixels that are `counted` (B, h, w) and `valid` (B, channels, H, W)."""
    channels, dtype = target.shape[1], torch.float64 if target.dtype == torch.float64 else torch.float32
    weight = resize(counted, *target.shape[2:])[:, None].to(dtype)
    pixels = weight.sum()
    if valid is not None:
        weight = weight * valid
        pixels = weight.sum() / channels
    return (weight * (target - prediction).abs()).sum() / (pixels + 1e-5) / channels
