"""The two losses of SG-MIM on every token, computed by calling the modules. SPEC "Heads and losses".

Used for partly masked cells, and for heads or modules of the branch that the ops cannot replace. `model` is an `SGMIM`.
`sgmim_fast.visible` computes the same losses on visible tokens only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast.masking import DenseMask, SelectiveMask, resize
from sgmim_fast.visible_encoder import VisibleTokens


def image_loss(
    model: nn.Module, features: Tensor | VisibleTokens, images: Tensor, mask: SelectiveMask | DenseMask
) -> Tensor:
    """Computes the image loss from encoder features (B, N, C), or from those of visible cells if there is a decoder."""
    prediction = predict(model.image_head, decoded(model, features, mask), images, model.encoder_stride)
    target = images
    if model.target == "normalized_patch":
        mean, deviation = _moments(images, model.encoder_stride)
        target = (images - mean) / deviation
    difference = target - prediction
    distance = difference.square() if model.loss == "l2" else difference.abs()
    return _masked_mean(distance, mask.mask, None, model.decoder is not None)


def decoded(model: nn.Module, features: Tensor | VisibleTokens, mask: SelectiveMask | DenseMask) -> Tensor:
    """Returns the input of the image head at every cell, (B, N, width)."""
    if model.decoder is None:
        return features
    return model.decoder(features, mask.visible.index, tuple(mask.mask.shape[1:]))


def _moments(images: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Computes mean and standard deviation of each cell over pixels and channels, repeated to (B, 1, H, W)."""
    batch, _, height, width = images.shape
    cells = images.to(_wide(images)).reshape(batch, -1, height // stride, stride, width // stride, stride)
    deviation = (cells.var((1, 3, 5)) + 1e-6).sqrt()
    return resize(cells.mean((1, 3, 5)), height, width)[:, None], resize(deviation, height, width)[:, None]


def denormalized(prediction: Tensor, images: Tensor, stride: int) -> Tensor:
    """Converts predicted normalised patches (B, C, H, W) to pixels with the moments of the given images."""
    mean, deviation = _moments(images, stride)
    return (prediction * deviation + mean).to(prediction.dtype)


def structure_loss(
    model: nn.Module,
    features: Tensor | VisibleTokens,
    structure: Tensor,
    mask: SelectiveMask | DenseMask,
    valid: Tensor | None,
) -> Tensor:
    """Computes the structure loss from features (see `image_loss`) and a map (B, S, H, W), 0 where it is not valid."""
    guided = guide(model, features, structure, mask)
    prediction = predict(model.structure_head, guided, structure, model.encoder_stride)
    return _masked_mean((structure - prediction).abs(), ~mask.mask, valid, False)


def guide(
    model: nn.Module, features: Tensor | VisibleTokens, structure: Tensor, mask: SelectiveMask | DenseMask
) -> Tensor:
    """Computes guided features (B, N, C). With a decoder, those of masked cells are meaningless."""
    if model.decoder is not None:  # the loss needs visible cells only, and the guidance treats each query separately
        cells, width = mask.mask.numel(), features.tokens.shape[1]
        everywhere = features.tokens.new_zeros(cells, width).index_copy(0, mask.visible.index, features.tokens)
        features = everywhere.unflatten(0, (mask.mask.shape[0], -1))
    height, width = structure.shape[2:]
    shown = resize(mask.structure, height // model.patch_size, width // model.patch_size)
    side = model.encoder_stride // model.patch_size  # patches along a cell
    some_shown = shown.unflatten(2, (-1, side)).unflatten(1, (-1, side)).any(4).any(2).flatten(1)
    return model.guidance(features, model.structure_encoder(structure, shown), some_shown)


def predict(head: nn.Module, tokens: Tensor, like: Tensor, stride: int) -> Tensor:
    """Applies the head and a pixel shuffle, (B, N, C) -> (B, channels, H, W) with H and W of `like`."""
    values = head(tokens).transpose(1, 2)  # (B, channels * stride^2, N)
    return F.pixel_shuffle(values.unflatten(2, (like.shape[2] // stride, like.shape[3] // stride)), stride)


def _masked_mean(distance: Tensor, counted: Tensor, valid: Tensor | None, exact: bool) -> Tensor:
    """Averages a distance (B, channels, H, W) over pixels that are `counted` (B, h, w) and `valid`, of its shape.

    exact: divide by the number of pixels, as MAE; otherwise by 1e-5 more, as published."""
    channels, dtype = distance.shape[1], _wide(distance)
    weight = resize(counted, *distance.shape[2:])[:, None].to(dtype)
    pixels = weight.sum()
    if valid is not None:
        weight = weight * valid
        pixels = weight.sum() / channels
    return (weight * distance).sum() / (pixels.clamp(min=1) if exact else pixels + 1e-5) / channels


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
