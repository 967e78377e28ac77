"""Short pre-training of small encoders for `evidence.py`. All methods have the same images, masks, flips and steps."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

import sgmim_fast
from evidence.scenes import structure_for
from sgmim_fast import Losses
from sgmim_fast.pretrain.build import create_optimizer
from sgmim_fast.pretrain.config import Optim

PATCH = 8  # pixels along each side of a patch, an output token and a mask unit
RATIO = 0.6


class Settings(NamedTuple):
    """Settings that all methods share."""

    size: int = 48
    width: int = 96
    depth: int = 4
    steps: int = 300
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05


class Method(NamedTuple):
    """Settings in which methods differ."""

    steps: bool = True  # False: no pre-training, random weights
    guidance: bool = True
    structure: str = "exact"
    shown: str | float = "masked"
    positions: bool = False
    masking: str = "random"
    ratio: float = RATIO
    weight: float = 1.0  # weight of the structure loss
    depth_head: bool = False  # predict structure from the features by one linear layer, without guidance
    decoder: bool = False  # encode visible patches alone
    target: str = "pixels"
    loss: str = "l1"
    equal_time: bool = False  # take as many steps as fit into SG-MIM's time


MAIN = {"scratch": Method(steps=False), "SimMIM": Method(guidance=False), "SG-MIM": Method()}
CONTROLS = {
    "other scene": Method(structure="other"),
    "degraded": Method(structure="degraded"),
    "nothing shown": Method(shown=1.0),  # 1.0 is the share that is hidden
    "positions": Method(positions=True),
    "salience": Method(masking="salience"),
    "shown: visible": Method(shown="visible"),
    "shown: random 40 %": Method(shown=0.6),
    "shown: all": Method(shown="all"),
}
METHODS = MAIN | CONTROLS
MAE = {"decoder": True, "target": "normalized_patch", "loss": "l2"}
VISIBLE_ONLY = {
    "visible only": Method(decoder=True),
    "visible only, time": Method(decoder=True, equal_time=True),
    "visible only 75 %, time": Method(decoder=True, ratio=0.75, equal_time=True),
    "guided MAE": Method(**MAE),
    "guided MAE, time": Method(**MAE, equal_time=True),
    "MAE": Method(guidance=False, **MAE),
    "MAE, time": Method(guidance=False, **MAE, equal_time=True),
}
REASONS = {
    **{name: CONTROLS[name] for name in ("nothing shown", "positions")},
    "structure × 1/3": Method(weight=1 / 3),
    "structure × 3": Method(weight=3.0),
    "depth, no guidance": Method(guidance=False, depth_head=True),
    "normalised patches, L2": Method(target="normalized_patch", loss="l2"),
}
EVERY = METHODS | VISIBLE_ONLY | REASONS


def create_encoder(settings: Settings, seed: int, visible_only: bool = False) -> sgmim_fast.encoders.MaskedEncoder:
    """Creates a small ViT with Xavier initialisation, positions that start as sines and cosines, and no class token."""
    torch.manual_seed(seed)
    encoder = sgmim_fast.create_encoder(
        "vit_tiny_patch16_224",
        visible_only=visible_only,
        img_size=settings.size,
        patch_size=PATCH,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.width // 32,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        weight_init="jax",  # timm's name for Xavier initialisation
    )
    grid = settings.size // PATCH
    with torch.no_grad():
        encoder.model.pos_embed.copy_(build_sincos2d_pos_embed([grid, grid], settings.width)[None])
    return encoder


class Step(NamedTuple):
    """Random numbers of a step. They depend on the seed and the step's number alone, so all methods share them."""

    indices: Tensor  # (B,), indices of the images
    flipped: bool
    mask: sgmim_fast.SelectiveMask


def draw_step(
    images: int, settings: Settings, seed: int, step: int, shown: str | float = "masked", ratio: float = RATIO
) -> Step:
    """Draws a step. `shown` and `ratio` only affect where structure is shown and the share that is masked."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    indices = torch.randint(0, images, (settings.batch,), generator=generator)
    flipped = bool(torch.rand(1, generator=generator) < 0.5)
    grid = settings.size // PATCH
    return Step(indices, flipped, sgmim_fast.selective_mask(settings.batch, grid, ratio, generator, shown=shown))


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """Returns the learning rate of a step: a linear warm-up over a twelfth of the steps, then half a cosine to 0."""
    warm_up = (step + 1) / max(1, steps / 12)
    return settings.lr * min(warm_up, (1 + math.cos(math.pi * step / steps)) / 2)


class DepthHead(nn.Module):
    """The symmetric model without guidance, with depth as a further target of its features."""

    def __init__(self, model: sgmim_fast.SGMIM):
        super().__init__()
        self.model, self.head = model, nn.Linear(model.encoder.num_features, PATCH**2)

    def forward(self, images: Tensor, structure: Tensor, mask: sgmim_fast.SelectiveMask, **options: Any) -> Losses:
        image = self.model(images, mask=mask)
        features, rows = self.model.encoder(images, mask).flatten(0, 1), mask.visible.index
        scale, valid = 1 / (rows.shape[0] * PATCH**2), options["structure_valid"]
        known = {"valid": valid, "scale": scale if valid is None else 1 / max(1, int(valid.sum()))}
        head = self.head.weight, self.head.bias, structure, rows
        depth = sgmim_fast.ops.linear_l1(features, *head, cell=PATCH, packed=False, **known)
        return Losses(image + depth, image, depth)


def create_model(method: Method, settings: Settings, seed: int) -> nn.Module:
    """Creates a model that is called as `SGMIM` with return_losses=True. For a seed, all methods start from the same
    encoder weights."""
    encoder = create_encoder(settings, seed, method.decoder)
    heads = max(1, settings.width // 48)
    decoder = sgmim_fast.Decoder(encoder, 2, 32 * heads, heads) if method.decoder else None
    options = {"guidance": method.guidance, "position_embedding": method.positions, "decoder": decoder}
    model = sgmim_fast.SGMIM(encoder, PATCH, **options, target=method.target, loss=method.loss)
    return DepthHead(model) if method.depth_head else model


class Training:
    """Trains a model step by step."""

    def __init__(self, method: Method, settings: Settings, images: Tensor, depth: Tensor, seed: int, steps: int):
        """images: (N, 3, S, S), normalised. depth: (N, 1, S, S), NaN = missing, from which structure maps are made."""
        self.method, self.settings, self.seed, self.steps, self.images = method, settings, seed, steps, images
        self.model = create_model(method, settings, seed)
        wanted = method.guidance or method.depth_head
        self.structure = structure_for(depth, method.structure) if wanted else None
        finite = None if self.structure is None else self.structure.isfinite()
        self.known = None if finite is None or bool(finite.all()) else finite
        options = Optim(lr=settings.lr, weight_decay=settings.weight_decay, betas=[0.9, 0.95])
        self.optimizer = create_optimizer(getattr(self.model, "model", self.model), options)
        if method.depth_head:
            self.optimizer.add_param_group({"params": list(self.model.head.parameters())})

    def step(self, number: int) -> None:
        method, settings = self.method, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, number, self.steps)
        step = draw_step(len(self.images), settings, self.seed, number, method.shown, method.ratio)
        x, y, valid = (
            tensor if tensor is None else tensor[step.indices].flip(-1) if step.flipped else tensor[step.indices]
            for tensor in (self.images, self.structure, self.known)
        )
        mask = step.mask
        if method.masking == "salience":  # with the same mean ratio as random masks
            numbers = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            grid = settings.size // PATCH
            mask = self.model.draw_mask(x, grid, masking="salience", ratio=method.ratio, generator=numbers)
        losses = self.model(x, y, mask, structure_valid=valid, return_losses=True)
        (losses.image + method.weight * losses.structure).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def pretrain(
    method: Method, settings: Settings, images: Tensor, depth: Tensor, seed: int, steps: int | None = None
) -> nn.Module:
    """Pre-trains and returns the encoder, in evaluation mode. For `images` and `depth` see `Training`. steps: None, the
    number of steps in the settings."""
    if not method.steps:
        return create_encoder(settings, seed).eval()
    steps = settings.steps if steps is None else steps
    training = Training(method, settings, images, depth, seed, steps)
    for number in range(steps):
        training.step(number)
    return getattr(training.model, "model", training.model).encoder.eval()


def step_seconds(method: Method, settings: Settings, images: Tensor, depth: Tensor, rounds: int = 12) -> float:
    """Measures the CPU seconds of a step, the minimum over some rounds."""
    training, found = Training(method, settings, images, depth, 0, rounds), []
    for number in range(rounds):
        start = time.thread_time()
        training.step(number)
        found.append(time.thread_time() - start)
    return min(found)
