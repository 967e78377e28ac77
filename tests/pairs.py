"""Small images and maps for the tests of `sgmim_fast.data`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def ramp(height: int, width: int, reverse: bool = False) -> np.ndarray:
    """Returns a (height, width) uint16 ramp that starts with 0 in the upper left corner (`reverse`: upper right)."""
    values = np.arange(height)[:, None] * 211 + np.arange(width) * 97
    return (values[:, ::-1] if reverse else values).astype(np.uint16)


def photograph(height: int, width: int) -> Image.Image:
    """Returns an image whose red increases to the right and green downwards, with a smooth blue."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / width, 255 * y / height, 127 + 60 * np.sin(x / 9) * np.cos(y / 7)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        if kind == "NPY":
            np.save(buffer, image)
            return buffer.getvalue()
        image = Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_trees(root: Path, names: list[str], size: tuple[int, int] = (40, 60)) -> tuple[Path, Path]:
    """Writes a folder of JPEG images and one of 16-bit PNG maps. The names have no suffix."""
    for name in names:
        write(root / "images" / f"{name}.jpg", encoded(photograph(*size), "JPEG", quality=95))
        write(root / "maps" / f"{name}.png", encoded(ramp(*size) + 1, "PNG"))
    return root / "images", root / "maps"
