"""Pairs from two mirrored folder trees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from sgmim_fast.data.files import Found, find_files
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.pair import Item, make_item
from sgmim_fast.data.report import BrokenFile, DataError, Report
from sgmim_fast.data.seeding import Seeded, seeded
from sgmim_fast.data.structure_file import MAP_SUFFIXES, StructureFile
from sgmim_fast.data.transform import Normalize, decode, transformed

SAMPLED = 8  # pairs that are read at construction
GIVE_UP = 100  # broken pairs in a row


class FolderPairs(Seeded, Dataset):
    """Images and structure maps of the same relative path, but for the suffix, in two folder trees of any depth.

    What has no partner, or cannot be read, is left out, counted and named in `report`. A broken file that is met only
    while training is replaced by the next good pair, and named in the item's "skipped"; a fault of the whole data set
    is raised at construction. An image and its map may differ in resolution, but not in shape.

    Args:
        images: folder of images, in any format of `IMAGE_SUFFIXES`. They are read as RGB and turned as EXIF says.
        structure: folder of maps, in any format of `MAP_SUFFIXES`; see `StructureFile` for units and missing values.
        transform: takes (image, structure) and returns both, the image normalised, such as `PairTransform`. Its random
            numbers come from torch's CPU generator, seeded for every item from (seed, epoch, index). None: normalises.
        report: file to write `Report.write`'s list to.
        seed: of the transform.
        missing: integer that means "no value" in maps; None: none does.

    Raises:
        DataError: nothing is there, nothing pairs, or none of the pairs tried can be read.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        structure: str | os.PathLike[str],
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        report: str | os.PathLike[str] | None = None,
        seed: int = 0,
        missing: float | None = 0,
    ) -> None:
        super().__init__(seed)
        self.images, self.structure = Path(images), Path(structure)
        self.transform = Normalize() if transform is None else transform
        self.missing = missing
        self.report = Report()
        # bytes in an array: worker processes share it, as they would not share Python objects
        self._pairs = self._match(
            find_files(self.images, "images", IMAGE_SUFFIXES), find_files(self.structure, "structure", MAP_SUFFIXES)
        )
        self.report.used = len(self)
        self._try_some()
        if report is not None:
            self.report.write(report)

    def _match(self, images: Found, maps: Found) -> np.ndarray:
        pairs = []
        for stem, suffixes in images.items():
            found = maps.get(stem)
            for suffix in suffixes:
                if found is None:
                    self.report.images_without_map.append(stem + suffix)
                else:
                    pairs.append((os.fsencode(stem + suffix), os.fsencode(stem + found[0])))
        for stem, suffixes in maps.items():  # the second of two maps for one image is not used either
            unused = suffixes[1:] if stem in images else suffixes
            self.report.maps_without_image += [stem + suffix for suffix in unused]
        if not pairs:
            example = next(iter(images))
            raise DataError(
                f"no image has a structure map: {len(images)} images in {self.images}, such as "
                f"{example + images[example][0]}; {len(maps)} maps in {self.structure}, such as "
                f"{self.report.maps_without_image[0]}; expected the same relative path but for the suffix, such as "
                f"{example + MAP_SUFFIXES[0]}"
            )
        return np.array(pairs, dtype=np.bytes_)

    def _try_some(self) -> None:
        """Reads a few pairs. What is wrong with all of them is most likely wrong with the data set."""
        tried = np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int))
        for index in tried:
            if (broken := self._fault(index)) is not None:
                self.report.broken[broken.name] = broken.reason
        if len(self.report.broken) == len(tried):
            raise DataError(f"none of {len(tried)} pairs tried can be used; the last: {broken}")

    def _fault(self, index: int) -> BrokenFile | None:
        try:
            decode(*self._read(index))
        except BrokenFile as broken:
            return broken
        return None

    def verify(self) -> Iterator[int]:
        """Reads every pair, leaves out what is broken from now on, and says so in `report`. Yields the number of pairs
        read so far, for a progress bar: `for done in dataset.verify(): ...`. Call it before workers start."""
        good = np.ones(len(self), dtype=bool)
        for index in range(len(self)):
            if (broken := self._fault(index)) is not None:
                self.report.broken[broken.name] = broken.reason
                good[index] = False
            yield index + 1
        self._pairs = self._pairs[good]
        self.report.used = len(self)
        if not len(self):
            raise DataError(f"none of {len(good)} pairs can be used; {self.report.summary()}")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Item:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} pairs")
        index %= len(self)
        skipped: list[str] = []
        for other in range(index, index + min(GIVE_UP, len(self))):
            try:
                image, structure = self._read(other % len(self))
                with seeded(self.seed, self._epoch.get(), index):
                    tensors = transformed(self.transform, image, structure)
                return make_item(tensors, self.name(other % len(self)), skipped)
            except BrokenFile as broken:
                skipped.append(broken.name)
                last = broken
        raise DataError(f"{len(skipped)} pairs in a row cannot be used; the last: {last}")

    def name(self, index: int) -> str:
        """Path of an image inside the tree."""
        return os.fsdecode(self._pairs[index, 0])

    def _read(self, index: int) -> tuple[ImageFile, StructureFile]:
        image_path, map_path = (
            os.path.join(root, os.fsdecode(name))
            for root, name in zip((self.images, self.structure), self._pairs[index], strict=True)
        )
        image = ImageFile(image_path)
        structure = StructureFile(map_path, missing=self.missing)
        structure.check_shape(image.size)
        return image, structure
