"""What every map-style data set of images and maps does about broken files and random numbers."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.report import BrokenFile, DataError, Report
from sgmim_fast.data.seeds import Epoch, Seeded, seeded
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.transform import Normalize, decode, transformed

SAMPLED = 8  # pairs that are read at construction
GIVE_UP = 100  # broken pairs in a row

Pair = tuple[ImageFile | Tensor] | tuple[ImageFile | Tensor, StructureFile | Tensor]


class Pairs(Seeded, Dataset, ABC):
    """Pairs of an image and a map, of which the broken ones are left out.

    Some are read at construction: what is wrong with all of them is a fault of the whole data set. A broken one that is
    met only later is replaced by the next good one, and named in the item's "skipped".

    Args:
        transform: takes (image, map) and returns both. None: normalises the image.
        seed: of the transform, whose numbers depend on (seed, epoch, index).
    """

    def __init__(self, transform: Callable[..., Sequence[Tensor]] | None, seed: int) -> None:
        super().__init__(seed)
        self.transform = Normalize() if transform is None else transform
        self.report = Report()
        # numbers or bytes in an array: worker processes share it, as they would not share Python objects
        self._entries = np.empty(0, dtype=np.int64)

    @abstractmethod
    def name(self, index: int) -> str:
        """What items call this pair."""

    @abstractmethod
    def _read(self, index: int) -> Pair:
        """Raises BrokenFile."""

    @abstractmethod
    def _item(self, tensors: Sequence[Tensor], name: str, skipped: Sequence[str]) -> Any:
        """The item of what the transform returned."""

    def _use(self, entries: np.ndarray) -> None:
        """Makes the data set of these, after reading a few.

        Raises:
            DataError: none of those can be used.
        """
        self._entries = entries
        self.report.used = len(self)
        self._try_some()

    def _sampled(self) -> list[int]:
        return np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int)).tolist()

    def _try_some(self) -> None:
        tried = self._sampled()
        faults = [broken for index in tried if (broken := self._fault(index)) is not None]
        self.report.broken.update({broken.name: broken.reason for broken in faults})
        if len(faults) == len(tried):
            raise DataError(f"none of {len(tried)} pairs tried can be used; the last: {faults[-1]}")

    def _fault(self, index: int) -> BrokenFile | None:
        """What is wrong with a pair; counts its kinds in `report`."""
        try:
            pair = self._read(index)
            decode(*pair)
        except BrokenFile as broken:
            return broken
        self.report.kinds.update(kinds(*pair))
        return None

    def verify(self) -> Iterator[int]:
        """Reads every pair, leaves out what is broken from now on, and says so in `report`. Yields the number of pairs
        read so far, for a progress bar: `for done in dataset.verify(): ...`. Call it before workers start."""
        good = np.ones(len(self), dtype=bool)
        self.report.kinds.clear()
        for index in range(len(self)):
            if (broken := self._fault(index)) is not None:
                self.report.broken[broken.name] = broken.reason
                good[index] = False
            yield index + 1
        self._entries = self._entries[good]
        self.report.used = len(self)
        if not len(self):
            raise DataError(f"none of {len(good)} pairs can be used; {self.report.summary()}")

    def part(self, indices: Sequence[int]) -> Pairs:
        """A data set of these pairs alone, of which no other one stands in for a broken one."""
        some = copy.copy(self)
        some._entries, some._epoch = self._entries[list(indices)], Epoch()
        some.report = copy.deepcopy(self.report)
        some.report.used = len(some)
        return some

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} pairs")
        index %= len(self)
        skipped: list[str] = []
        for other in range(index, index + min(GIVE_UP, len(self))):
            try:
                pair = self._read(other % len(self))
                with seeded(self.seed, self._epoch.get(), index):
                    tensors = transformed(self.transform, *pair)
                return self._item(tensors, self.name(other % len(self)), skipped)
            except BrokenFile as broken:
                skipped.append(broken.line)
                last = broken
        raise DataError(f"{len(skipped)} pairs in a row cannot be used; the last: {last}")


def kinds(*files: ImageFile | StructureFile | Tensor) -> list[str]:
    """How the files of a pair store their values."""
    return [
        f"images of {file.kind}" if isinstance(file, ImageFile) else f"{file.kind}s of {file.pixels.dtype}"
        for file in files
        if not isinstance(file, Tensor)
    ]
