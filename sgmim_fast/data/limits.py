"""Limits on the memory that decoding a file may use, since small files can expand to any size.

Environment variables set them: `SGMIM_FAST_MAX_PIXELS`, pixels of an image or map (default: Pillow's limit, 89
million); `SGMIM_FAST_MAX_FILE_MIB`, MiB of a file or a member of a shard (512); `SGMIM_FAST_MAX_EXPANSION`, size of a
decompressed shard as a multiple of its compressed size (100).
"""

from __future__ import annotations

import os
import stat
import warnings

from PIL import Image

PIXELS, FILE_MIB, EXPANSION = "SGMIM_FAST_MAX_PIXELS", "SGMIM_FAST_MAX_FILE_MIB", "SGMIM_FAST_MAX_EXPANSION"
_DEFAULTS = {PIXELS: 89_478_485, FILE_MIB: 512, EXPANSION: 100}


def limit(name: str) -> int:
    """Returns a limit, from the environment or the default. Raises ValueError unless it is a positive integer."""
    text = os.environ.get(name, "")
    if text and not (text.isdecimal() and int(text)):
        raise ValueError(f"{name} is {text!r}; expected a positive number")
    return int(text or _DEFAULTS[name])


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError if an image has too many pixels."""
    if height * width > limit(PIXELS):
        raise ValueError(f"has {height}×{width} pixels, more than {limit(PIXELS)} ({PIXELS})")


def check_bytes(size: int) -> None:
    """Raises ValueError if a file has too many bytes."""
    if size > limit(FILE_MIB) * 2**20:
        raise ValueError(f"has {size / 2**20:.0f} MiB, more than {limit(FILE_MIB)} ({FILE_MIB})")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Reads a regular file. Pipes and devices are refused, since they may be endless.

    Raises:
        OSError, ValueError: the file cannot be read, is not a regular file, is empty, or exceeds the limit.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is not a regular file")
    check_bytes(found.st_size)
    with open(path, "rb") as file:
        content = file.read()
    if not content:
        raise ValueError("the file is empty")
    return content


def open_image(file: object) -> Image.Image:
    """Opens an image with Pillow without decoding it, and applies our limit on pixels instead of Pillow's."""
    if PIXELS in os.environ:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limit(PIXELS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels refuses such images
        image = Image.open(file)
    check_pixels(image.height, image.width)
    return image
