"""Reads structure maps of several channels, surface normals, and class ids."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from sgmim_fast.data import limits
from sgmim_fast.data.map_file import class_ids, full_pages, out_of_range
from sgmim_fast.data.pair import Normals, Structure
from sgmim_fast.data.report import BrokenFile
from sgmim_fast.data.structure_file import SPARSE, StructureFile

# byte offset of the bit depth in a PNG file, and Pillow's modes with several channels
BITS_OF_PNG, BANDS = 24, ("LA", "RGB", "RGBA", "RGBX")
BITS = 258  # TIFF tag BitsPerSample
MIN_LENGTH, MEDIAN_LENGTH = (
    0.1,
    (0.9, 1.1),
)  # vectors shorter than MIN_LENGTH are missing values; the median length of the others must lie within MEDIAN_LENGTH


class ChannelsFile(StructureFile):
    """A structure map of several channels.

    The supported formats are .npy of shape (C, H, W) or (H, W, C); PNG with grey and alpha, RGB or RGBA, of 8 or 16
    bits, where alpha is a channel like the others; TIFF with one grey page per channel, or RGB(A) of 8 bits; and EXR.
    Integers are scaled as in `StructureFile`.

    Args:
        channels: number of channels.
        name, content, missing: see `StructureFile`. A pixel may have values in some channels and none in others.

    Raises:
        BrokenFile: the file cannot be decoded, or has another number of channels.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        content: bytes | None = None,
        *,
        channels: int,
        missing: float | None = 0,
    ) -> None:
        self.channels = channels
        super().__init__(name, content, missing=missing)

    def _arranged(self, pixels: np.ndarray) -> np.ndarray:
        """Rearranges the pixels to (H, W, C)."""
        self._check_dtype(pixels)
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim == 3 and pixels.shape[0] == self.channels:
            pixels = np.moveaxis(pixels, 0, 2)
        if pixels.ndim != 3 or pixels.shape[2] != self.channels or pixels.size == 0:
            raise ValueError(
                f"{self.kind} has shape {pixels.shape}; expected {self.channels} channels, "
                f"({self.channels}, H, W) or (H, W, {self.channels})"
            )
        return pixels

    def _read_pillow(self, file: io.BytesIO) -> np.ndarray:
        with limits.open_image(file) as image:
            if image.format == "TIFF":
                return _read_pages(image, self.kind, self._decoded)
            if image.mode in BANDS and image.format == "PNG" and file.getvalue()[BITS_OF_PNG] == 16:
                return _read_deep_png(file.getvalue())
            return _plain(image, self.kind, self._decoded)

    def _to_structure(self, pixels: np.ndarray) -> Structure:
        return Structure(torch.from_numpy(np.ascontiguousarray(np.moveaxis(self._values(pixels), 2, 0))))


def _read_deep_png(content: bytes) -> np.ndarray:
    """Reads a 16-bit colour PNG as (C, H, W) with torchvision, since Pillow would reduce it to 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchvision has deprecated its decoder
        try:
            from torchvision.io import ImageReadMode, decode_image
        except ImportError:
            raise ValueError("is a 16-bit colour PNG, which this torchvision cannot read; use .npy") from None
        return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()


def _plain(image: Image.Image, kind: str, decoded: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    if image.mode == "P" or (image.mode not in BANDS and len(image.getbands()) != 1):
        raise TypeError(f"{kind} is an image with the mode {image.mode}; expected grey, RGB or RGBA, or .npy")
    return decoded(image)


def _read_pages(image: Image.Image, kind: str, decoded: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    pages = []
    for number in full_pages(image):
        image.seek(number)
        limits.check_pixels(image.height, image.width * (len(pages) + 1))
        if image.mode in BANDS and max(image.tag_v2.get(BITS, (8,))) > 8:
            raise ValueError(f"{kind} is a colour TIFF with more than 8 bits; expected one page per channel, or .npy")
        pages.append(_plain(image, kind, decoded))
    if len({page.shape for page in pages}) > 1:
        raise ValueError(f"{kind} has pages of different sizes; expected one page per channel, all of one size")
    return pages[0] if len(pages) == 1 else np.stack(pages)


class NormalsFile(ChannelsFile):
    """A map of surface normals. x points to the right; y and z may have either direction.

    8- and 16-bit integers encode (n + 1) / 2, scaled to the range of the dtype. A pixel is missing if it equals
    `missing` in all channels, has a NaN or infinite component, or has a length near 0. Vectors are normalised to unit
    length.

    Raises:
        BrokenFile: the file cannot be decoded, or does not hold unit vectors.
    """

    kind = "map of normals"

    def __init__(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> None:
        super().__init__(name, content, channels=3, missing=missing)

    def _check_values(self) -> None:
        for pixels in (self.pixels[::SPARSE, ::SPARSE], self.pixels):
            _, lengths = self._vectors(pixels)
            valid = lengths[lengths > MIN_LENGTH]
            if valid.size:
                break
        else:
            raise BrokenFile(self.name, f"{self.kind} has no vector longer than {MIN_LENGTH} anywhere")
        middle = float(np.median(valid))
        if not MEDIAN_LENGTH[0] <= middle <= MEDIAN_LENGTH[1]:
            raise BrokenFile(
                self.name,
                f"{self.kind} has vectors of length {middle:.2g} (median); expected 1, with integers as (n + 1) / 2 of "
                "their range, floating-point numbers from -1 to 1",
            )

    def _check_dtype(self, pixels: np.ndarray) -> None:
        super()._check_dtype(pixels)
        if pixels.dtype.kind != "f" and pixels.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"{self.kind} has dtype {pixels.dtype}; expected uint8, uint16 or floating-point numbers")

    def _vectors(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors, (h, w, 3) float32, and their lengths, (h, w), which are 0 at missing values."""
        vectors = pixels.astype(np.float32)
        known = np.isfinite(vectors).all(2)
        if pixels.dtype.kind != "f":
            vectors = vectors * (2 / np.iinfo(pixels.dtype).max) - 1
            if self.missing is not None:
                known = (pixels != self.missing).any(2)
        lengths = np.linalg.norm(np.where(known[..., None], vectors, 0), axis=2)
        return vectors, lengths

    def _to_structure(self, pixels: np.ndarray) -> Normals:
        vectors, lengths = self._vectors(pixels)
        lengths[~(lengths > MIN_LENGTH)] = np.nan
        return Normals(torch.from_numpy(np.ascontiguousarray(np.moveaxis(vectors / lengths[..., None], 2, 0))))


class SemanticFile(StructureFile):
    """A map of class ids from 0 to classes - 1.

    The file is a grey image of 8 or 16 bits, a palette image whose indices are the ids, or .npy of integers.

    Args:
        classes: number of classes.
        ignore: id of unlabelled pixels. None: all pixels are labelled.

    Raises:
        BrokenFile: the file cannot be decoded, an id is out of range, or no pixel is labelled.
    """

    kind = "label map"
    palette = True

    def __init__(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, classes: int, ignore: int | None = 255
    ) -> None:
        self.classes = classes
        super().__init__(name, content, missing=ignore)

    def _arranged(self, pixels: np.ndarray) -> np.ndarray:
        return super()._arranged(class_ids(pixels))

    def _check_values(self) -> None:
        known = np.ones(self.size, bool) if self.missing is None else self.pixels != self.missing
        outside = self.pixels[known & ((self.pixels < 0) | (self.pixels >= self.classes))]
        if outside.size:
            void = "" if self.missing is None else f", or {self.missing} for none"
            raise BrokenFile(self.name, f"{out_of_range(outside)}; expected 0 to {self.classes - 1}{void}")
        if not known.any():
            raise BrokenFile(self.name, f"{self.kind} is {self.missing}, no class, everywhere")

    def _values(self, pixels: np.ndarray) -> np.ndarray:
        ids = pixels.astype(np.float32)
        if self.missing is not None:
            ids[pixels == self.missing] = np.nan
        return ids
