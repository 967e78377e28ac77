"""What is in a folder tree."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from sgmim_fast.data.report import DataError

Found = dict[str, list[str]]  # relative path without suffix -> suffixes


def find_files(root: Path, argument: str, suffixes: tuple[str, ...]) -> Found:
    """The files of a tree with these suffixes, sorted; hidden ones do not count.

    Raises:
        DataError: there is no such folder, or no such file in it.
    """
    if not root.is_dir():
        raise DataError(f"{argument} is {root}; expected a folder, found {'a file' if root.exists() else 'nothing'}")
    found: Found = {}
    others: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for file in sorted(name for name in files if not name.startswith(".")):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes:
                found.setdefault(stem if inside == "." else os.path.join(inside, stem), []).append(suffix)
            else:
                others[suffix or file] += 1
    if not found:
        rest = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5)) or "no files"
        raise DataError(f"{argument}: no file in {root} ends in {', '.join(suffixes)}, at any depth; found {rest}")
    return dict(sorted(found.items()))
