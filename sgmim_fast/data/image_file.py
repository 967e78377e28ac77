"""Image files that are decoded lazily, at the resolution that a crop needs."""

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
ORIENTATION = 0x0112  # EXIF tag
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags BitsPerSample and PhotometricInterpretation; a value of it
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's grey modes of more than 8 bits
OF_16_BITS = ("PNG", "PPM")  # formats whose 16-bit integers Pillow may return as 32-bit integers
FOUR_INKS = ("CMYK", "YCCK")
SMALLEST_SHRINK = 2.0  # libjpeg-turbo is slower at 5/8 to 7/8 of the size than at full size


class ImageFile:
    """An image in any format of `IMAGE_SUFFIXES`.

    JPEGs that EXIF does not rotate are decoded by `decode`, other files by the constructor.

    Args:
        name: path, or a name for messages.
        content: the file's bytes. None: the file `name` is read.

    Raises:
        BrokenFile: the file cannot be decoded. `decode` may raise it, too.
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
        except Exception as error:  # decoders raise exceptions of any type
            raise BrokenFile(self.name, error) from error

    @property
    def kind(self) -> str:
        """Stored bit depth, for reports."""
        return "8 bits" if self._pixels is None or self._pixels.dtype == np.uint8 else "16 bits or float, grey"

    def decode(self, shrink: float = 1.0) -> Tensor:
        """Decodes to (3, h, w) RGB, rotated according to EXIF. h and w are at least `shrink` times the full size. The
        dtype is uint8, or float32 in [0, 1] for images of more than 8 bits."""
        pixels = self._pixels
        try:
            if pixels is None:
                pixels = _decode_jpeg(self._content, *[math.ceil(length * shrink) for length in self.size])
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except Exception as error:
            raise BrokenFile(self.name, error) from error


def _is_upright_jpeg(content: bytes) -> bool:
    """Returns whether the content is an RGB or grey JPEG that EXIF does not rotate."""
    if not content.startswith(b"\xff\xd8") or simplejpeg.decode_jpeg_header(content, strict=False)[2] in FOUR_INKS:
        return False
    if b"Exif\0" not in content:
        return True
    with limits.open_image(io.BytesIO(content)) as image:
        return image.getexif().get(ORIENTATION, 1) == 1


def _decode_jpeg(content: bytes, height: int, width: int) -> np.ndarray:
    """Decodes a JPEG to (h, w, 3) uint8, where h and w are at least `height` and `width`."""
    try:
        return simplejpeg.decode_jpeg(
            content,
            fastupsample=True,  # fast chroma upsampling suffices, since resizing smooths the result
            min_height=height,
            min_width=width,
            min_factor=SMALLEST_SHRINK,
        )
    except ValueError:  # Pillow tolerates some faults, such as stray bytes between segments
        return _decode_all(content)


def _decode_all(content: bytes) -> np.ndarray:
    """Decodes any format with Pillow to (H, W, 3): uint8, or float32 in [0, 1]."""
    with warnings.catch_warnings(), limits.open_image(io.BytesIO(content)) as image:
        warnings.simplefilter("ignore")  # Pillow warns about metadata
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in DEEP:
            return np.repeat(_to_unit(image)[..., None], 3, 2)
        return np.array(image.convert("RGB"))


def _to_unit(image: Image.Image) -> np.ndarray:
    """Converts a grey image of more than 8 bits, which Pillow would clip to 8 bits, to (H, W) float32 in [0, 1]."""
    values = np.array(image, dtype=np.float32)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also False for NaN
            raise ValueError(f"has floating-point values from {values.min():g} to {values.max():g}; expected 0 to 1")
        return values
    if image.mode == "I" and image.format not in OF_16_BITS:
        raise ValueError("has 32-bit or signed integers, whose range is unknown; expected 8 or 16 bits, or 0 to 1")
    tags = getattr(image, "tag_v2", {})  # TIFF only
    values /= 2 ** tags.get(BITS, (16,))[0] - 1
    return 1 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
