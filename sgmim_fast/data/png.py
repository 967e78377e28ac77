"""16-bit PNG that loads fast."""

from __future__ import annotations

import struct
import zlib

import numpy as np

UP = 2  # the row filter of PNG that subtracts the row above


def encode_png(pixels: np.ndarray, *, compression: int = 0, text: dict[str, str] | None = None) -> bytes:
    """A grey PNG of (H, W) uint16.

    Libraries filter the rows of every PNG and make readers undo that, also where nothing is compressed. Here such a
    file holds plain rows, which load several times as fast (benchmarks/NOTES.md, "Loading").

    Args:
        pixels: (H, W) uint16.
        compression: zlib's, 0 to 9; above 0 rows are stored as differences from the row above.
        text: chunks of text, keyword -> Latin-1 text.
    """
    height, width = pixels.shape
    rows = np.zeros((height, 1 + 2 * width), np.uint8)  # a filter's number, and the row
    rows[:, 1:] = pixels.astype(">u2").view(np.uint8)
    if compression:
        rows[1:, 1:] -= rows[:-1, 1:].copy()
        rows[:, 0] = UP
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)  # bits; grey, and the only choices there are
    notes = [_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in (text or {}).items()]
    image = _chunk(b"IDAT", zlib.compress(rows.tobytes(), compression))
    return b"".join([b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *notes, image, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
