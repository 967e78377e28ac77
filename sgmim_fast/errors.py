"""The error that a command shows in one line, and words of such lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Something the user can put right. `sgmim-fast` prints it as one line, without a traceback, and exits with 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """ "; did you mean ...?" with the known names most like `name`, or "" where none is."""
    close = difflib.get_close_matches(name, list(known), count, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def by(size: Sequence[int]) -> str:
    """Height and width as they are written: 480x640."""
    return f"{size[0]}x{size[1]}"
