"""Scenes in memory for `evidence.py`, and the changed structure maps of its controls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sgmim_fast
from sgmim_fast.data import Scenes

NEAREST, FARTHEST = 0.5, 10.0  # range to which depth is clamped, as a target and in predictions; walls reach 16
CLASSES = 4  # room, sphere, box, plane
SEEDS = {"pretrain": 0, "labelled": 1, "validation": 2, "test": 3}  # seeds of the sets, which share no scene


class Split(NamedTuple):
    """A set of scenes, or of crops of a photograph."""

    images: Tensor  # (N, 3, S, S) float32, normalised
    depth: Tensor  # (N, 1, S, S) float32, target of the probes, NaN = missing
    labels: Tensor  # (N, S, S) uint8; (N, 0, 0) for data without classes

    def __getitem__(self, index: object) -> Split:  # indexes the images, for instance with a slice
        return Split(*(tensor.__getitem__(index) for tensor in tuple(self)))


def make_scenes(counts: dict[str, int], size: int, workers: int) -> dict[str, Split]:
    """Creates the sets of scenes in parallel processes.

    Args:
        counts: set of `SEEDS` -> number of scenes.
    """
    made = {}
    for name, count in counts.items():
        scenes = Scenes(count, size, seed=SEEDS[name], labels=True)
        batches = list(DataLoader(scenes, 256, num_workers=workers))
        images, depth, labels = (torch.cat([b[key] for b in batches]) for key in ("image", "structure", "labels"))
        made[name] = Split(images, depth.clamp(NEAREST, FARTHEST), labels.to(torch.uint8))
    return made


def degrade(depth: Tensor, generator: torch.Generator) -> Tensor:
    """Imitates a depth estimator's maps, standardised: distorted, blurred, and wrong over large areas.

    Each map is raised to a random power, which keeps the order of depths but not their proportions, blurred over 5 × 5
    pixels, and standardised. Then a smooth error of a third of the standard deviation is added.

    Args:
        depth: (N, 1, S, S), positive.
    """
    count, size = len(depth), depth.shape[-1]
    power = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(depth**power, 5, 1, 2, count_include_pad=False)
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    error = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return sgmim_fast.standardize_structure(blurred) + error / 3


def structure_for(depth: Tensor, kind: str) -> Tensor:
    """Returns the standardised structure maps, (N, 1, S, S), of a kind: "exact", "degraded", or "other" (another
    scene's)."""
    if kind == "degraded":
        return degrade(depth, torch.Generator().manual_seed(0))
    exact = sgmim_fast.standardize_structure(depth, nonfinite="ignore")
    return exact.roll(1, 0) if kind == "other" else exact
