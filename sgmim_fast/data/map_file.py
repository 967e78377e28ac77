"""One channel of numbers for every pixel of an image, from PNG, TIFF, NumPy, PFM and EXR files."""

from __future__ import annotations

import io
import math
import os
from pathlib import PurePath
from typing import ClassVar

import numpy as np

from sgmim_fast.data import limits
from sgmim_fast.data.report import BrokenFile

MAP_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".exr", ".pfm")


class MapFile:
    """A map as it was stored: `pixels` (H, W) of integers or floating-point numbers, and `size`, its height and width.

    Args:
        name: path, or what to call it; its suffix tells the format.
        content: what is in the file; None: it is read from `name`.

    Raises:
        BrokenFile: whatever is wrong with the file, such as three channels or another dtype.
    """

    kind: ClassVar[str] = "map"  # what messages call it
    palette: ClassVar[bool] = False  # whether the pixels of a palette image are the map: its colours never are

    def __init__(self, name: str | os.PathLike[str], content: bytes | None = None) -> None:
        self.name = os.fspath(name)
        suffix = PurePath(name).suffix.lower()
        try:
            if suffix == ".exr":
                pixels = _read_exr(self.name, content)
            else:
                file = io.BytesIO(limits.read_file(name) if content is None else content)
                pixels = _read_numpy(file) if suffix == ".npy" else self._read_pillow(file)
            self.pixels = self._one_channel(pixels)
        except Exception as error:  # decoders raise all kinds
            raise BrokenFile(self.name, error) from error
        self.size: tuple[int, int] = self.pixels.shape  # height, width

    def _one_channel(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W) of what was stored as (H, W), (1, H, W) or (H, W, 1)."""
        if pixels.dtype.kind not in "fiu":
            raise TypeError(f"{self.kind} has dtype {pixels.dtype}; expected integers or floating-point numbers")
        if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
            pixels = pixels.squeeze(0 if pixels.shape[0] == 1 else 2)
        if pixels.ndim != 2 or pixels.size == 0:
            raise ValueError(f"{self.kind} has shape {pixels.shape}; expected one channel, (H, W)")
        return pixels

    def _read_pillow(self, file: io.BytesIO) -> np.ndarray:
        with limits.open_image(file) as image:
            if image.mode == "P" and self.palette:
                return np.array(image)
            if image.mode == "P" or len(image.getbands()) != 1:
                raise TypeError(
                    f"{self.kind} is a colour image ({image.mode}); expected one channel, such as "
                    f"{'8-bit grey or a palette' if self.palette else '16-bit grey'}"
                )
            return np.array(image)


def _read_numpy(file: io.BytesIO) -> np.ndarray:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        np.lib.format.read_magic(file), np.lib.format.read_array_header_2_0
    )
    shape, _, _ = read_header(file)
    limits.check_pixels(1, math.prod(shape))
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _read_exr(name: str, content: bytes | None) -> np.ndarray:
    if content is not None:
        raise ValueError("EXR is read from folders only, not from shards")
    try:
        import OpenEXR
    except ImportError:
        raise ValueError("EXR is read by the package OpenEXR: pip install OpenEXR") from None
    limits.read_file(name)
    with OpenEXR.File(name, header_only=True) as exr:
        first, last = exr.header()["dataWindow"]
        limits.check_pixels(int(last[1]) - int(first[1]) + 1, int(last[0]) - int(first[0]) + 1)
    with OpenEXR.File(name) as exr:
        channels = exr.channels()
        if len(channels) != 1:
            raise ValueError(f"map has the channels {', '.join(channels)}; expected one")
        return next(iter(channels.values())).pixels
