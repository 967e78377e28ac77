"""Reads maps from PNG, TIFF, NumPy, PFM and EXR files, and writes PNG files that load fast."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from pathlib import PurePath
from typing import ClassVar

import numpy as np
from PIL import Image

from sgmim_fast.data import limits
from sgmim_fast.data.report import BrokenFile

SUBFILE, REDUCED = 254, 1  # TIFF tag NewSubfileType, and its flag for reduced versions of another page
UP = 2  # PNG's filter type Up: differences from the row above
SCALES = {"L;2": 85, "L;4": 17}  # Pillow's names of grey of 2 and 4 bits -> factor by which it scales the values
NAMED = 3  # number of class ids that a message names
MAP_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".exr", ".pfm")


class MapFile:
    """A map with its values as stored in the file.

    Attributes:
        pixels: (H, W), integers or floating point; (H, W, C) in subclasses for several channels.
        size: (height, width).

    Args:
        name: path, or a name for messages; the suffix selects the format.
        content: the file's bytes. None: the file `name` is read.

    Raises:
        BrokenFile: the file cannot be decoded, or has an unsupported dtype or number of channels.
    """

    kind: ClassVar[str] = "map"  # word for the map in messages
    palette: ClassVar[bool] = False  # whether palette images are accepted, with their indices as values

    def __init__(self, name: str | os.PathLike[str], content: bytes | None = None) -> None:
        self.name = os.fspath(name)
        suffix = PurePath(name).suffix.lower()
        try:
            if suffix == ".exr":
                pixels = _read_exr(self.name, content)
            else:
                file = io.BytesIO(limits.read_file(name) if content is None else content)
                pixels = _read_numpy(file) if suffix == ".npy" else self._read_pillow(file)
            self.pixels = self._arranged(pixels)
        except Exception as error:  # decoders raise exceptions of any type
            raise BrokenFile(self.name, error) from error
        self.size: tuple[int, int] = self.pixels.shape[:2]  # height, width

    def _arranged(self, pixels: np.ndarray) -> np.ndarray:
        """Rearranges (H, W), (1, H, W) or (H, W, 1) to (H, W)."""
        self._check_dtype(pixels)
        if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
            pixels = pixels.squeeze(0 if pixels.shape[0] == 1 else 2)
        if pixels.ndim != 2 or pixels.size == 0:
            raise ValueError(f"{self.kind} has shape {pixels.shape}; expected one channel, (H, W)")
        return pixels

    def _check_dtype(self, pixels: np.ndarray) -> None:
        if pixels.dtype.kind not in "fiu":
            raise TypeError(f"{self.kind} has dtype {pixels.dtype}; expected integers or floating-point numbers")

    def _read_pillow(self, file: io.BytesIO) -> np.ndarray:
        with limits.open_image(file) as image:
            if image.mode == "P" and self.palette:
                return np.array(image)
            if image.mode == "P" or len(image.getbands()) != 1:
                raise TypeError(
                    f"{self.kind} is a colour image ({image.mode}); expected one channel, such as "
                    f"{'8-bit grey or a palette' if self.palette else '16-bit grey'}"
                )
            pages = full_pages(image)
            if len(pages) > 1:
                raise ValueError(f"{self.kind} has {len(pages)} pages; expected one")
            return self._decoded(image)

    def _decoded(self, image: Image.Image) -> np.ndarray:
        """Decodes Pillow's image to the stored values. Pillow itself scales grey of 2 and 4 bits to the range of 8."""
        if image.mode != "L" or image.format not in ("PNG", "TIFF"):
            return np.array(image)
        arguments = image.tile[0].args  # their first one is the stored format
        stored = arguments if isinstance(arguments, str) else arguments[0]
        return np.array(image) // SCALES.get(stored[:3], 1)


def full_pages(image: Image.Image) -> list[int]:
    """Returns the indices of a TIFF's pages that are not reduced versions of another page; [0] for other formats."""
    if image.format != "TIFF":
        return [0]
    pages = []
    for number in range(image.n_frames):
        image.seek(number)
        if not image.tag_v2.get(SUBFILE, 0) & REDUCED:
            pages.append(number)
    image.seek(0)
    return pages


def class_ids(pixels: np.ndarray) -> np.ndarray:
    """Returns the class ids of a label map; booleans become 0 and 1.

    Raises:
        TypeError: the dtype is not an integer or bool.
    """
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    if pixels.dtype.kind not in "iu":
        raise TypeError(f"label map has dtype {pixels.dtype}; expected integers, the ids of classes")
    return pixels


def out_of_range(pixels: np.ndarray) -> str:
    """Returns a message that lists the first ids among these pixels, with their counts."""
    ids, counts = np.unique(pixels, return_counts=True)
    named = [f"{id} ({count} pixels)" for id, count in zip(ids[:NAMED], counts[:NAMED], strict=True)]
    return f"class ids out of range: {', '.join(named)}{', ...' if len(ids) > NAMED else ''}"


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
        channels = exr.channels()  # R, G and B are one, "RGB"
        planes = [channels[name].pixels for name in channels]
    if len(planes) == 1:
        return planes[0]
    if any(plane.ndim != 2 or plane.shape != planes[0].shape for plane in planes):
        raise ValueError(f"has the channels {', '.join(channels)}; expected R, G and B, or others of one size")
    return np.stack(planes, -1)


def encode_png(pixels: np.ndarray, *, compression: int = 0, text: dict[str, str] | None = None) -> bytes:
    """Encodes a map as a 16-bit grey PNG.

    Other encoders filter rows even without compression, and decoders have to undo the filter. This function leaves the
    rows of uncompressed files unfiltered, so that they load several times as fast (benchmarks/NOTES.md, "Loading").

    Args:
        pixels: (H, W) uint16.
        compression: zlib level, 0 to 9. Above 0, rows are filtered with Up.
        text: tEXt chunks, keyword -> Latin-1 text.

    Returns:
        The bytes of the file.
    """
    height, width = pixels.shape
    rows = np.zeros((height, 1 + 2 * width), np.uint8)  # each row begins with its filter type
    rows[:, 1:] = pixels.astype(">u2").view(np.uint8)
    if compression:
        rows[1:, 1:] -= rows[:-1, 1:].copy()
        rows[:, 0] = UP
    header = struct.pack(
        ">IIBBBBB", width, height, 16, 0, 0, 0, 0
    )  # bit depth 16, grey, deflate, adaptive filtering, not interlaced
    notes = [_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in (text or {}).items()]
    image = _chunk(b"IDAT", zlib.compress(rows.tobytes(), compression))
    return b"".join([b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *notes, image, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
