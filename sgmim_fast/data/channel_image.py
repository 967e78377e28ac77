"""Images with any number of channels, such as multispectral, thermal and microscopy images."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgmim_fast.data.channel_files import ChannelsFile
from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.report import BrokenFile

_UNSIGNED = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}


class _Channels(ChannelsFile):
    """A file of several channels in which no value is missing. Grey of 2 and 4 bits is scaled, as in photographs."""

    kind = "image"

    def _decoded(self, image: Image.Image) -> np.ndarray:
        return np.array(image)

    def _check_dtype(self, pixels: np.ndarray) -> None:
        if pixels.dtype not in _UNSIGNED and pixels.dtype.kind != "f":
            raise TypeError(f"image has dtype {pixels.dtype}; expected uint8, uint16 or floating-point numbers")

    def _check_values(self) -> None:
        if self.pixels.dtype.kind == "f" and not np.isfinite(self.pixels).all():
            raise BrokenFile(self.name, "image has NaN or infinities; expected finite values")


class ChannelImage(ImageFile):
    """An image with a given number of channels, in any format of `ChannelsFile`: .npy, PNG of 8 or 16 bits, TIFF with
    one page per channel or with RGB(A), or EXR.

    Args:
        name: path, or a name for messages; the suffix selects the format.
        content: the file's bytes. None: the file `name` is read.
        channels: number of channels.

    Raises:
        BrokenFile: the file cannot be decoded, or has another number of channels, another dtype or non-finite values.
    """

    def __init__(self, name: str | os.PathLike[str], content: bytes | None = None, *, channels: int) -> None:
        file = _Channels(name, content, channels=channels, missing=None)
        self.name, self.size, self._values = file.name, file.size, file.pixels

    @property
    def kind(self) -> str:
        """Number of channels and stored dtype, for reports."""
        return f"{self._values.shape[2]} channels of {self._values.dtype}"

    def decode(self, shrink: float = 1.0) -> Tensor:
        """Returns (C, H, W) at full size; `shrink` is ignored. 8-bit files give uint8, 16-bit files float32 in [0, 1],
        and floating-point files float32 with unchanged values."""
        values = np.ascontiguousarray(np.moveaxis(self._values, 2, 0))
        if values.dtype != np.uint8:
            values = values.astype(np.float32) / _UNSIGNED.get(values.dtype, 1)
        return torch.from_numpy(values)
