"""Short pre-training of small encoders for `evidence.py`: every method on the same images, masks, flips and steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

import sgmim_fast
from evidence.scenes import structure_for
from sgmim_fast.pretrain.build import create_optimizer
from sgmim_fast.pretrain.config import Optim

PATCH = 8  # pixels along a patch, an output token and a mask unit
RATIO = 0.6


class Settings(NamedTuple):
    """The same for all methods."""

    size: int = 48
    width: int = 96
    depth: int = 4
    steps: int = 300
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05


class Method(NamedTuple):
    """What is told apart."""

    steps: bool = True  # False: random weights
    guidance: bool = True
    structure: str = "exact"
    shown: str | float = "masked"
    positions: bool = False
    masking: str = "random"


MAIN = {"scratch": Method(steps=False), "SimMIM": Method(guidance=False), "SG-MIM": Method()}
CONTROLS = {
    "other scene": Method(structure="other"),
    "degraded": Method(structure="degraded"),
    "nothing shown": Method(shown=1.0),  # the share that is hidden
    "positions": Method(positions=True),
    "salience": Method(masking="salience"),
    "shown: visible": Method(shown="visible"),
    "shown: random 40 %": Method(shown=0.6),
    "shown: all": Method(shown="all"),
}
METHODS = MAIN | CONTROLS


def create_encoder(settings: Settings, seed: int) -> sgmim_fast.encoders.MaskedEncoder:
    """A small ViT: Xavier initialisation, positions that start as sines and cosines, no class token."""
    torch.manual_seed(seed)
    encoder = sgmim_fast.create_encoder(
        "vit_tiny_patch16_224",
        img_size=settings.size,
        patch_size=PATCH,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.width // 32,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        weight_init="jax",  # timm's name for Xavier
    )
    grid = settings.size // PATCH
    with torch.no_grad():
        encoder.model.pos_embed.copy_(build_sincos2d_pos_embed([grid, grid], settings.width)[None])
    return encoder


class Step(NamedTuple):
    """What happens in a step: from the seed and the step's number alone, so the same for every method."""

    indices: Tensor  # (B,), of the images
    flipped: bool
    mask: sgmim_fast.SelectiveMask


def draw_step(images: int, settings: Settings, seed: int, step: int, shown: str | float = "masked") -> Step:
    """`shown` changes where structure is shown, and nothing else."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    indices = torch.randint(0, images, (settings.batch,), generator=generator)
    flipped = bool(torch.rand(1, generator=generator) < 0.5)
    grid = settings.size // PATCH
    return Step(indices, flipped, sgmim_fast.selective_mask(settings.batch, grid, RATIO, generator, shown=shown))


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Linear over the first twelfth, then half a cosine, to 0."""
    warm_up = (step + 1) / max(1, steps / 12)
    return settings.lr * min(warm_up, (1 + math.cos(math.pi * step / steps)) / 2)


def pretrain(method: Method, settings: Settings, images: Tensor, depth: Tensor, seed: int) -> nn.Module:
    """The encoder after pre-training, in evaluation mode.

    Args:
        images: (N, 3, S, S), normalised.
        depth: (N, 1, S, S), of which the structure maps are made; NaN where it is not known.
    """
    encoder = create_encoder(settings, seed)
    if not method.steps:
        return encoder.eval()
    model = sgmim_fast.SGMIM(encoder, PATCH, guidance=method.guidance, position_embedding=method.positions)
    structure = structure_for(depth, method.structure) if method.guidance else None
    known = None if structure is None or bool(structure.isfinite().all()) else structure.isfinite()
    optimizer = create_optimizer(model, Optim(lr=settings.lr, weight_decay=settings.weight_decay, betas=[0.9, 0.95]))
    for number in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, number, settings.steps)
        step = draw_step(len(images), settings, seed, number, method.shown)
        x, y, valid = (
            tensor if tensor is None else tensor[step.indices].flip(-1) if step.flipped else tensor[step.indices]
            for tensor in (images, structure, known)
        )
        mask = step.mask
        if method.masking == "salience":  # at the same mean ratio
            numbers = torch.Generator().manual_seed(seed * 1_000_003 + number)
            grid = settings.size // PATCH
            mask = model.draw_mask(x, grid, masking="salience", ratio=RATIO, generator=numbers)
        model(x, y, mask, structure_valid=valid).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return encoder.eval()
