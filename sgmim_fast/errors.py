"""The error for users of commands, and helpers for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """An error that the user can correct. `sgmim-fast` prints it in one line, without a traceback, and exits with 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Returns "; did you mean ...?" with the known names that are similar to `name`; "" if there are none."""
    close = difflib.get_close_matches(name, list(known), count, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def by(size: Sequence[int]) -> str:
    """Formats (height, width) as 480x640."""
    return f"{size[0]}x{size[1]}"
