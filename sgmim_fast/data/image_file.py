"""An image file whose decoding waits until it is known how much of it is needed."""

from __future__ import annotations

import io
import math
import os
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sgmim_fast.data import limits
from sgmim_fast.data.report import BrokenFile

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jfif")
ORIENTATION = 0x0112  # tag of EXIF
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes of grey with more than 8 bits
OF_16_BITS = ("PNG", "PPM")  # formats whose integers Pillow may give as 32 bits
FOUR_INKS = ("CMYK", "YCCK")
SMALLEST_SHRINK = 2.0  # libjpeg-turbo takes longer for 5/8 to 7/8 of the size than for all of it


class ImageFile:
    """An image in any format of `IMAGE_SUFFIXES`. Of an upright JPEG only the header is looked at until `decode`.

    Args:
        name: path, or what to call it.
        content: what is in the file; None: it is read from `name`.

    Raises:
        BrokenFile: here or in `decode`, whatever is wrong with the file.
    """

    def __init__(self, name: str | os.PathLike[str], content: bytes | None = None):
        self.name = os.fspath(name)
        self.size: tuple[int, int]  # height, width
        try:
            content = limits.read_file(name) if content is None else content
            self._content = content
            self._pixels = None if _is_upright_jpeg(content) else _decode_all(content)
            if self._pixels is None:
                self.size = simplejpeg.decode_jpeg_header(content, strict=False)[:2]
                limits.check_pixels(*self.size)
            else:
                self.size = self._pixels.shape[:2]
        except Exception as error:  # decoders raise all kinds
            raise BrokenFile(self.name, error) from error

    @property
    def kind(self) -> str:
        """How its values were stored."""
        return "8 bits" if self._pixels is None or self._pixels.dtype == np.uint8 else "16 bits or float, grey"

    def decode(self, shrink: float = 1.0) -> Tensor:
        """(3, h, w) RGB, upright as EXIF says; h and w are at least `shrink` times the full height and width. uint8, or
        float32 from 0 to 1 of an image of more than 8 bits."""
        pixels = self._pixels
        try:
            if pixels is None:
                pixels = _decode_jpeg(self._content, *[math.ceil(length * shrink) for length in self.size])
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except Exception as error:
            raise BrokenFile(self.name, error) from error


def _is_upright_jpeg(content: bytes) -> bool:
    """Whether it is a JPEG in colour or grey that EXIF does not turn."""
    if not content.startswith(b"\xff\xd8") or simplejpeg.decode_jpeg_header(content, strict=False)[2] in FOUR_INKS:
        return False
    if b"Exif\0" not in content[:4096]:
        return True
    with limits.open_image(io.BytesIO(content)) as image:
        return image.getexif().get(ORIENTATION, 1) == 1


def _decode_jpeg(content: bytes, height: int, width: int) -> np.ndarray:
    """(h, w, 3), at least of that height and width."""
    try:
        return simplejpeg.decode_jpeg(
            content,
            fastupsample=True,  # of colour differences, which resizing smooths again
            min_height=height,
            min_width=width,
            min_factor=SMALLEST_SHRINK,
        )
    except ValueError:  # Pillow forgives some faults, such as stray bytes between segments
        return _decode_all(content)


def _decode_all(content: bytes) -> np.ndarray:
    """(H, W, 3) of any format: uint8, or float32 from 0 to 1."""
    with warnings.catch_warnings(), limits.open_image(io.BytesIO(content)) as image:
        warnings.simplefilter("ignore")  # about metadata
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in DEEP:
            return np.repeat(_to_unit(image)[..., None], 3, 2)
        return np.array(image.convert("RGB"))


def _to_unit(image: Image.Image) -> np.ndarray:
    """(H, W) float32 from 0 to 1 of a grey image of more than 8 bits, which Pillow would clip to them."""
    values = np.array(image, dtype=np.float32)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # nor with NaN
            raise ValueError(f"has floating-point values from {values.min():g} to {values.max():g}; expected 0 to 1")
        return values
    if image.mode == "I" and image.format not in OF_16_BITS:
        raise ValueError("has integers of 32 bits or with a sign, of no known range; expected 8 or 16 bits, or 0 to 1")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    values /= 2 ** tags.get(BITS, (16,))[0] - 1
    return 1 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
