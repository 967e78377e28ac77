"""Images of any number of channels: multispectral, thermal, microscopy, and the like."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from sgmim_fast.data.channel_files import ChannelsFile
from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.report import BrokenFile

_UNSIGNED = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class _Channels(ChannelsFile):
    """The file, whose values are data everywhere."""

    kind = "image"

    def _check_dtype(self, pixels: np.ndarray) -> None:
        if pixels.dtype not in _UNSIGNED and pixels.dtype.kind != "f":
            raise TypeError(f"image has dtype {pixels.dtype}; expected uint8, uint16 or floating-point numbers")

    def _check_values(self) -> None:
        if self.pixels.dtype.kind == "f" and not np.isfinite(self.pixels).all():
            raise BrokenFile(self.name, "image has NaN or infinities; expected finite values")


class ChannelImage(ImageFile):
    """An image of so many channels, in any format of `ChannelsFile`: .npy, PNG of 8 or 16 bits, TIFF with a page for
    each channel or of RGB(A), EXR.

    Args:
        name: path, or what to call it; its suffix tells the format.
        content: what is in the file; None: it is read from `name`.
        channels: their number.

    Raises:
        BrokenFile: whatever is wrong with the file, such as another number of channels or another dtype.
    """

    def __init__(self, name: str | os.PathLike[str], content: bytes | None = None, *, channels: int) -> None:
        file = _Channels(name, content, channels=channels, missing=None)
        self.name, self.size, self._values = file.name, file.size, file.pixels

    @property
    def kind(self) -> str:
        """How its values are stored."""
        return f"{self._values.shape[2]} channels of {self._values.dtype}"

    def decode(self, shrink: float = 1.0) -> Tensor:
        """(C, H, W), whatever `shrink`: uint8; float32 from 0 to 1 of 16 bits, and of floating-point files as it is."""
        values = np.ascontiguousarray(np.moveaxis(self._values, 2, 0))
        if values.dtype != np.uint8:
            values = values.astype(np.float32) / _UNSIGNED.get(values.dtype, 1)
        return torch.from_numpy(values)
