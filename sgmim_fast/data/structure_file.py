"""Reads structure maps of one channel, such as depth, from files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from sgmim_fast.data.map_file import MapFile
from sgmim_fast.data.pair import Structure, nearest_indices
from sgmim_fast.data.report import BrokenFile

SPARSE = 16  # stride of the rows and columns that are checked first
SHAPE_TOLERANCE = 0.02  # relative, of width / height, since maps of other resolutions are rounded to whole pixels


class StructureFile(MapFile):
    """A structure map, (H, W), of integers or floating-point numbers.

    Integers are divided by 2^16 (docs/SPEC.md, "Standardising the structure map"), 8-bit integers by 2^8.

    Args:
        name: path, or a name for messages; the suffix selects the format.
        content: the file's bytes. None: the file `name` is read.
        missing: integer that marks missing values. None: no integer does. In floating-point maps NaN and infinities
            mark them.

    Raises:
        BrokenFile: the file cannot be decoded, has several channels or an unsupported dtype, or is constant.
    """

    kind = "structure map"

    def __init__(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> None:
        super().__init__(name, content)
        self.missing = missing
        self._check_values()

    def _check_values(self) -> None:
        """Raises BrokenFile if the map is constant or has no value, since nothing can be learnt from it."""
        found = [self._varies(plane) for plane in np.moveaxis(np.atleast_3d(self.pixels), 2, 0)]
        if None in found:
            return
        for value in found:
            if np.isfinite(value):
                raise BrokenFile(self.name, f"{self.kind} is {value:g} wherever it has a value: constant")
        value = "is NaN or infinite" if self.pixels.dtype.kind == "f" else f"is {self.missing:g}, missing,"
        raise BrokenFile(self.name, f"{self.kind} {value} everywhere")

    def _varies(self, plane: np.ndarray) -> float | None:
        """Returns the value of a constant plane, NaN for a plane without values, and None otherwise."""
        for pixels in (plane[::SPARSE, ::SPARSE], plane):  # a sparse grid suffices for most maps
            valid = pixels[np.isfinite(pixels) if pixels.dtype.kind == "f" else pixels != self.missing]
            if valid.size and (valid != valid[0]).any():
                return None
        return float(valid[0]) if valid.size else np.nan

    def decode(self) -> Structure:
        """Returns the whole map, (C, H, W)."""
        return self._to_structure(self.pixels)

    def resample(self, box: Sequence[float], size: int) -> Structure:
        """Resamples the box (top, left, height, width) to (C, size, size) by nearest neighbour."""
        rows, columns = nearest_indices(box, (size, size), self.size)
        return self._to_structure(self.pixels[rows].take(columns, 1))

    def check_shape(self, image: tuple[int, int]) -> None:
        """Raises BrokenFile unless an image of size (height, width) has the aspect ratio of the map."""
        (height, width), (map_height, map_width) = image, self.size
        slack = max(SHAPE_TOLERANCE, 1 / min(map_height, map_width))
        if abs(height * map_width / (width * map_height) - 1) > slack:
            raise BrokenFile(
                self.name,
                f"{self.kind} is {map_height}×{map_width}, its image {height}×{width}; expected the same shape",
            )

    def _to_structure(self, pixels: np.ndarray) -> Structure:
        return Structure(torch.from_numpy(self._values(pixels)[None]))

    def _values(self, pixels: np.ndarray) -> np.ndarray:
        """Converts to float32, with NaN at missing values."""
        values = pixels.astype(np.float32)
        if pixels.dtype.kind == "f":
            values[~np.isfinite(values)] = np.nan
        else:
            values /= 2 ** (8 * min(pixels.itemsize, 2))
            if self.missing is not None:
                values[pixels == self.missing] = np.nan
        return values
