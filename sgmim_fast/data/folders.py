"""Data set of pairs from two mirrored folder trees."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sgmim_fast.data.channel_image import ChannelImage
from sgmim_fast.data.files import find_files, match
from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.pair import Item, make_item
from sgmim_fast.data.pairs import Pairs
from sgmim_fast.data.stats import suffixes
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.structure_kind import DEPTH, StructureKind


class FolderPairs(Pairs):
    """Pairs of an image and a structure map that have the same relative path, except for the suffix, in two folder
    trees.

    Files without a partner and unreadable files are left out and listed in `report`. A pair that turns out to be broken
    during training is replaced by the next good one, and named in the item's "skipped". An image and its map may differ
    in resolution, but not in aspect ratio.

    Args:
        images: folder of images in any format of `IMAGE_SUFFIXES`. They are read as RGB and rotated according to EXIF.
        structure: folder of maps in any format of `MAP_SUFFIXES`; see `StructureFile` for units and missing values.
            None: images alone, for SimMIM; the transform then takes and returns no map.
        transform: callable that takes (image, structure) and returns both, the image normalised, such as
            `PairTransform`. torch's CPU generator is seeded for each item from (seed, epoch, index). None: `Normalize`.
        report: file to which `Report.write` writes its list. None: no file.
        seed: seed of the transform.
        missing: integer that marks missing values in maps. None: no integer does.
        kind: kind of the structure maps.
        channels: number of channels of the images, which are then read by `ChannelImage`. None: RGB photographs.

    Raises:
        DataError: there are no files, no pairs, or none of the pairs tried can be read.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        structure: str | os.PathLike[str] | None,
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        report: str | os.PathLike[str] | None = None,
        seed: int = 0,
        missing: float | None = 0,
        kind: StructureKind = DEPTH,
        channels: int | None = None,
    ) -> None:
        super().__init__(transform, seed)
        self.images, self.structure = Path(images), None if structure is None else Path(structure)
        self.missing, self.kind, self.channels = missing, kind, channels
        found = find_files(self.images, "images", suffixes(channels), self.report)
        if self.structure is None:
            names = [(os.fsencode(stem + end),) for stem, suffixes in found.items() for end in suffixes]
            self._use(np.array(names, dtype=np.bytes_))
        else:
            maps = find_files(self.structure, "structure", MAP_SUFFIXES, self.report)
            self._use(match(found, maps, self.images, self.structure, kind.word, self.report))
        if report is not None:
            self.report.write(report)

    def name(self, index: int) -> str:
        """Returns the path of the image relative to `images`."""
        return os.fsdecode(self._entries[index, 0])

    def _read(self, index: int) -> tuple[ImageFile] | tuple[ImageFile, StructureFile]:
        path = os.path.join(self.images, self.name(index))
        image = ImageFile(path) if self.channels is None else ChannelImage(path, channels=self.channels)
        if self.structure is None:
            return (image,)
        name = os.fsdecode(self._entries[index, 1])
        structure = self.kind.read(os.path.join(self.structure, name), missing=self.missing)
        structure.check_shape(image.size)
        return image, structure

    def _item(self, tensors: Sequence[Tensor], name: str, skipped: Sequence[str]) -> Item:
        return make_item(tensors, name, skipped, self.kind.stored, self.channels or 3)
