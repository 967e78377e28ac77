"""What a data set is made of, what was left out of it, and why."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NAMED = 3  # files of each kind that a summary names


class DataError(ValueError):
    """A data set that nothing can be trained on: says what was looked for and what was found."""


class BrokenFile(Exception):
    """One file that cannot be used, and why. Data sets catch it, report it and go on."""

    def __init__(self, name: str | os.PathLike[str], reason: object):
        self.name = os.fspath(name)
        self.reason = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(self.name, self.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Report:
    """The pairs of a data set and what was left out.

    `broken` holds what has been met so far: `FolderPairs.verify` looks at every file, and a training loop adds what its
    items say under "skipped", by `add_skipped`.
    """

    used: int = 0  # pairs
    images_without_map: list[str] = field(default_factory=list)
    maps_without_image: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # name of the file -> what is wrong with it

    def add_skipped(self, skipped: str | Iterable[str]) -> None:
        """Adds the broken files named by an item's "skipped", or by those of a batch."""
        for name in skipped_names([skipped] if isinstance(skipped, str) else skipped):
            self.broken.setdefault(name, "could not be read while training")

    def summary(self) -> str:
        """One line: what is used, how much of what is left out, and the first names."""
        left_out = [
            f"{len(names)} {kind} ({some(names)})"
            for kind, names in (
                ("images without a map", self.images_without_map),
                ("maps without an image", self.maps_without_image),
                ("broken files", list(self.broken)),
            )
            if names
        ]
        return f"{self.used} pairs; left out: {', '.join(left_out) or 'nothing'}"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the summary and every name that was left out, one a line after its kind, separated by a tab."""
        lines = [self.summary()]
        lines += [f"image without a map\t{name}" for name in self.images_without_map]
        lines += [f"map without an image\t{name}" for name in self.maps_without_image]
        lines += [f"broken\t{name}\t{reason}" for name, reason in self.broken.items()]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def skipped_names(batch: Iterable[str]) -> list[str]:
    """The broken files that the "skipped" of a batch's items name."""
    return [name for names in batch for name in names.split("\n") if name]


def some(names: list[str]) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
