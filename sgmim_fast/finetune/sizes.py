"""Sizes of images, windows and grids: one side, or (height, width)."""

from __future__ import annotations

from collections.abc import Sequence

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def by(size: Sequence[int]) -> str:
    """As it is written: 480x640."""
    return f"{size[0]}x{size[1]}"
