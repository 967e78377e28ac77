"""Base class of the data sets for depth and segmentation."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors

from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.pair import check_tensor
from sgmim_fast.data.pairs import Pairs
from sgmim_fast.data.report import BrokenFile
from sgmim_fast.errors import UserError

SPLITS = ("train", "test")


class DensePairs(Pairs):
    """Pairs of an image and a map of the same height and width.

    The entries are a (pairs, 2) array of paths, as bytes, relative to the folders `images` and `maps`, which subclasses
    set.
    """

    task: ClassVar[str]
    kind: ClassVar[str]  # word for a map in messages
    target: ClassVar[tuple[str, torch.dtype, tuple[int, ...]]]  # key of the map in items, dtype, leading dimensions
    images: Path
    maps: Path

    def name(self, index: int) -> str:
        """Returns the path of the image relative to `images`."""
        return os.fsdecode(self._entries[index, 0])

    def _map_name(self, index: int) -> str:
        return os.path.join(self.maps, os.fsdecode(self._entries[index, 1]))

    def _image(self, index: int) -> Tensor:
        """Reads the image, (3, H, W), uint8 or float32."""
        return ImageFile(os.path.join(self.images, self.name(index))).decode()

    @abstractmethod
    def _map(self, index: int) -> Tensor:
        """Reads the map, (..., H, W)."""

    def _some_maps(self) -> Iterator[tuple[int, Tensor]]:
        """Reads the maps of some evenly spaced pairs, except broken ones, which are in the report already."""
        for index in self._sampled():
            with contextlib.suppress(BrokenFile):
                yield index, self._map(index)

    def _part(self, pixels: Tensor, index: int) -> Tensor:
        """Returns the part of an image or map that the benchmark uses; everything by default."""
        return pixels

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image, pixels = self._image(index), self._map(index)
        if image.shape[-2:] != pixels.shape[-2:]:
            (height, width), (map_height, map_width) = image.shape[-2:], pixels.shape[-2:]
            raise BrokenFile(
                self._map_name(index),
                f"{self.kind} is {map_height}×{map_width}, its image {height}×{width}; expected the same size",
            )
        # Slicing loses the tensor subclass, on which torchvision's transforms dispatch.
        return self._part(image, index), tv_tensors.wrap(self._part(pixels, index), like=pixels)

    def sizes(self) -> list[tuple[int, int]]:
        """Returns heights and widths of some evenly spaced images."""
        found = []
        for index in self._sampled():
            with contextlib.suppress(BrokenFile):  # it is in the report already
                height, width = self._read(index)[0].shape[-2:]
                found.append((height, width))
        return found

    def _item(self, tensors: Sequence[Tensor], name: str, skipped: Sequence[str]) -> dict[str, Any]:
        image, pixels = tensors
        key, dtype, channels = self.target
        check_tensor("image", image, torch.float32, (3,))
        check_tensor(key, pixels, dtype, channels)
        return {"image": image, key: pixels, "name": name, "skipped": "\n".join(skipped)}


def check_split(split: str) -> None:
    """Raises UserError unless the split is "train" or "test"."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected {' or '.join(SPLITS)}")
