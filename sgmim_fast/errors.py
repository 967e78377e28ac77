"""The error that a command shows in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. `sgmim-fast` prints it as one line, without a traceback, and exits with 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """ "; did you mean ...?" with the known names most like `name`, or "" where none is."""
    close = difflib.get_close_matches(name, list(known), count, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
