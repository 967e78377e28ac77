"""Spectra of the outputs of every block of a timm encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sgmim_fast.fourier.spectrum import Spectrum, log_amplitude, relative


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a timm Swin, SwinV2, BEiT or ViT, in the order in which they run.

    Raises:
        TypeError: the model has no blocks.
    """
    stages = getattr(model, "layers", None) or [model]
    found = [block for stage in stages for block in getattr(stage, "blocks", ())]
    if not found:
        raise TypeError(f"model is a {type(model).__name__}; expected a timm Swin, SwinV2, BEiT or ViT with blocks")
    return found


def to_maps(tokens: Tensor, prefix: int) -> Tensor:
    """Converts the tokens of a block, (B, h, w, C) of a Swin or (B, prefix + h * h, C) of a ViT, to maps
    (B, C, h, w)."""
    if tokens.ndim == 3:
        tokens = tokens[:, prefix:]
        side = math.isqrt(tokens.shape[1])
        tokens = tokens.unflatten(1, (side, -1))
    return tokens.movedim(-1, 1)


@torch.no_grad()
def block_spectra(model: nn.Module, batches: Iterable[Tensor]) -> list[Spectrum]:
    """Computes the spectrum of the output of each block over all images, without masks.

    Args:
        model: timm Swin, SwinV2, BEiT or ViT in evaluation mode, such as `create_encoder(...).model`.
        batches: images (B, 3, H, H), normalised, on the model's device.

    Raises:
        TypeError: the model has no blocks.
        ValueError: there are no images, or they are not square.
    """
    blocks = blocks_of(model)
    sums: list[Tensor | None] = [None] * len(blocks)
    lengths = [0] * len(blocks)
    images = 0
    prefix = getattr(model, "num_prefix_tokens", 0)

    def keep(index: int, output: Tensor) -> None:
        maps = to_maps(output, prefix)
        total = log_amplitude(maps).sum(0)
        sums[index] = total if sums[index] is None else sums[index] + total
        lengths[index] = maps.shape[3]

    hooks = [
        block.register_forward_hook(lambda module, inputs, output, index=index: keep(index, output))
        for index, block in enumerate(blocks)
    ]
    try:
        for batch in batches:
            if batch.shape[-1] != batch.shape[-2]:
                raise ValueError(f"images have shape {tuple(batch.shape)}; expected square ones (B, 3, H, H)")
            model.forward_features(batch)
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        raise ValueError("batches has no images; expected at least one")
    return [relative(total / images, length) for total, length in zip(sums, lengths, strict=True)]
