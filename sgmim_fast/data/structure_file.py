"""Structure maps from PNG, TIFF, NumPy, PFM and EXR files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image

from sgmim_fast.data.pair import Structure, under_centres
from sgmim_fast.data.report import BrokenFile

SHAPE_TOLERANCE = 0.02  # in width / height: maps of another resolution are rounded to whole pixels
MAP_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".exr", ".pfm")


class StructureFile:
    """A structure map as it was stored: (H, W) of integers or floating-point numbers.

    Integers are divided by 2^16 (docs/SPEC.md, "Standardising the structure map"), those of 8 bits by 2^8.

    Args:
        name: path, or what to call it; its suffix tells the format.
        content: what is in the file; None: it is read from `name`.
        missing: the integer that means "no value"; None: none does. In floating maps NaN and infinities do.

    Raises:
        BrokenFile: whatever is wrong with the file, such as three channels or another dtype.
    """

    def __init__(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> None:
        self.name = os.fspath(name)
        self.missing = missing
        read = _READERS.get(PurePath(name).suffix.lower(), _read_pillow)
        try:
            self.pixels = _one_channel(read(self.name if content is None else io.BytesIO(content)))
        except Exception as error:  # decoders raise all kinds
            raise BrokenFile(self.name, error) from error
        self.size: tuple[int, int] = self.pixels.shape  # height, width

    def decode(self) -> Structure:
        """The whole map, (1, H, W)."""
        return self._to_structure(self.pixels)

    def resample(self, box: Sequence[float], size: int) -> Structure:
        """The box (top, left, height, width) as (1, size, size); only those pixels are converted."""
        rows, columns = under_centres(box, (size, size), self.size)
        return self._to_structure(self.pixels[rows].take(columns, 1))

    def check_shape(self, image: tuple[int, int]) -> None:
        """Raises BrokenFile unless an image of this height and width has the map's shape, whatever the resolution."""
        (height, width), (map_height, map_width) = image, self.size
        slack = max(SHAPE_TOLERANCE, 1 / min(map_height, map_width))
        if abs(height * map_width / (width * map_height) - 1) > slack:
            raise BrokenFile(
                self.name,
                f"structure map is {map_height}×{map_width}, its image {height}×{width}; expected the same shape",
            )

    def _to_structure(self, pixels: np.ndarray) -> Structure:
        values = pixels.astype(np.float32)
        if pixels.dtype.kind == "f":
            values[~np.isfinite(values)] = np.nan
        else:
            values /= 2 ** (8 * min(pixels.itemsize, 2))
            if self.missing is not None:
                values[pixels == self.missing] = np.nan
        return Structure(torch.from_numpy(values)[None])


def _one_channel(pixels: np.ndarray) -> np.ndarray:
    """(H, W) of what was stored as (H, W), (1, H, W) or (H, W, 1)."""
    if pixels.dtype.kind not in "fiu":
        raise TypeError(f"structure map has dtype {pixels.dtype}; expected integers or floating-point numbers")
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels.squeeze(0 if pixels.shape[0] == 1 else 2)
    if pixels.ndim != 2 or pixels.size == 0:
        raise ValueError(f"structure map has shape {pixels.shape}; expected one channel, (H, W)")
    return pixels


def _read_pillow(file: str | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        if image.mode == "P" or len(image.getbands()) != 1:
            raise TypeError(
                f"structure map is a colour image ({image.mode}); expected one channel, such as 16-bit grey"
            )
        return np.array(image)


def _read_numpy(file: str | io.BytesIO) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _read_exr(file: str | io.BytesIO) -> np.ndarray:
    if not isinstance(file, str):
        raise ValueError("EXR is read from folders only, not from shards")
    try:
        import OpenEXR
    except ImportError:
        raise ValueError("EXR is read by the package OpenEXR: pip install OpenEXR") from None
    with OpenEXR.File(file) as exr:
        channels = exr.channels()
        if len(channels) != 1:
            raise ValueError(f"structure map has the channels {', '.join(channels)}; expected one")
        return next(iter(channels.values())).pixels


_READERS: dict[str, Callable[[str | io.BytesIO], np.ndarray]] = {".npy": _read_numpy, ".exr": _read_exr}
