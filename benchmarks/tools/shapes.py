"""The published recipes' shapes, shared by every benchmark. SPEC "Notation"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    name: str
    width: int  # C, of the encoder's tokens
    stride: int  # s, pixels along a token
    patch: int  # p, of the stem
    image: int  # pixels along an image
    unit: int = 32  # pixels along a mask unit
    heads: int = 8  # of the guidance
    ratio: float = 0.6  # share of masked units
    stem: int = 128  # width of the first stage
    depths: tuple[int, ...] = (2, 2, 18, 2)  # blocks of each stage
    prefix: int = 0  # tokens that are no patches
    window: int | None = None  # tokens along a window of the encoder's attention; None: the whole grid

    @property
    def grid(self) -> int:
        """Mask units along an image."""
        return self.image // self.unit

    @property
    def deepest(self) -> tuple[int, int]:
        """Patches along an image and channels in the stage that has most of the blocks."""
        stage = self.depths.index(max(self.depths))
        return self.image // (self.patch << stage), self.stem << stage

    @property
    def cells(self) -> int:
        """N, tokens of an image."""
        return (self.image // self.stride) ** 2

    @property
    def masked(self) -> int:
        """Masked cells of an image."""
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
# and timm's names and arguments for their encoders
BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_base": ("swin_base_patch4_window7_224", {"img_size": 192, "window_size": 6}),
    "swinv2_base": ("swinv2_base_window12_192", {}),
    "vit_base": ("beit_base_patch16_224", BEIT),
    "vit_plain": ("vit_base_patch16_224", {}),
}
DECODER_DEPTH = 2  # of encoders of visible patches alone
