"""Shapes of the published recipes, shared by all benchmarks. For the symbols see docs/SPEC.md, "Notation"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder, its images and its branch."""

    name: str
    width: int  # C, channels of the encoder's output tokens
    stride: int  # s, pixels along each side of an output token
    patch: int  # p, pixels along each side of the stem's patches
    image: int  # pixels along each side of an image
    unit: int = 32  # pixels along each side of a mask unit
    heads: int = 8  # attention heads of the guidance
    ratio: float = 0.6  # share of masked units
    stem: int = 128  # channels of the first stage
    depths: tuple[int, ...] = (2, 2, 18, 2)  # number of blocks of each stage
    prefix: int = 0  # number of prefix tokens
    window: int | None = None  # tokens along each side of an attention window of the encoder; None: the whole grid

    @property
    def grid(self) -> int:
        """Number of mask units along each side of an image."""
        return self.image // self.unit

    @property
    def deepest(self) -> tuple[int, int]:
        """Patches along each side of an image, and channels, in the stage with the most blocks."""
        stage = self.depths.index(max(self.depths))
        return self.image // (self.patch << stage), self.stem << stage

    @property
    def cells(self) -> int:
        """N, number of cells of an image."""
        return (self.image // self.stride) ** 2

    @property
    def masked(self) -> int:
        """Number of masked cells of an image."""
        return math.ceil(self.ratio * self.grid**2) * (self.unit // self.stride) ** 2

    @property
    def visible(self) -> int:
        return self.cells - self.masked


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("swin_base", width=1024, stride=32, patch=4, image=192, window=6),
        Shape("swinv2_base", width=1024, stride=32, patch=4, image=192, window=12),
        Shape("vit_base", width=768, stride=16, patch=16, image=224, stem=768, depths=(12,), prefix=1),
    )
}
# timm's names and arguments of the encoders
BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_base": ("swin_base_patch4_window7_224", {"img_size": 192, "window_size": 6}),
    "swinv2_base": ("swinv2_base_window12_192", {}),
    "vit_base": ("beit_base_patch16_224", BEIT),
    "vit_plain": ("vit_base_patch16_224", {}),
}
DECODER_DEPTH = 2  # number of decoder blocks for encoders of visible patches alone
