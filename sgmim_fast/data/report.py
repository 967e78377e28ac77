"""What a data set is made of, what was left out of it, and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NAMED = 3  # files of each kind that a summary names
_OBJECT = re.compile(r"\s*<[\w.]+ object at 0x[0-9a-f]+>")  # in messages of decoders: they got the content, no file


class DataError(ValueError):
    """A data set that nothing can be trained on: says what was looked for and what was found."""


class BrokenFile(Exception):
    """One file that cannot be used, and why. Data sets catch it, report it and go on."""

    def __init__(self, name: str | os.PathLike[str], reason: object):
        self.name = os.fspath(name)
        self.reason = " ".join(_OBJECT.sub("", str(reason)).split())
        if not any(map(str.isalpha, self.reason)):  # a number, or nothing
            self.reason = f"{type(reason).__name__} {self.reason}".strip()
        super().__init__(self.name, self.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    @property
    def line(self) -> str:
        """As an item's "skipped" and reports have it: name, tab, reason; a name's own tabs and newlines are escaped."""
        return f"{escaped(self.name)}\t{self.reason}"


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
    again: list[str] = field(default_factory=list)  # links to folders that are in the tree by another path
    kinds: Counter[str] = field(default_factory=Counter)  # of what has been read so far: "images, 8 bits" -> files

    def add(self, other: Report) -> None:
        """Adds what another one has."""
        self.used += other.used
        self.images_without_map += other.images_without_map
        self.maps_without_image += other.maps_without_image
        self.broken |= other.broken
        self.again += other.again
        self.kinds.update(other.kinds)

    def add_skipped(self, skipped: str | Iterable[str]) -> None:
        """Adds the broken files named by an item's "skipped", or by those of a batch."""
        for line in skipped_lines([skipped] if isinstance(skipped, str) else skipped):
            name, _, reason = line.partition("\t")
            self.broken.setdefault(name, reason)

    def summary(self) -> str:
        """One line: what is used, how much of what is left out, and the first names."""
        left_out = [
            f"{len(names)} {kind} ({some(names)})"
            for kind, names in (
                ("images without a map", self.images_without_map),
                ("maps without an image", self.maps_without_image),
                ("broken files", [f"{name}: {reason}" for name, reason in self.broken.items()]),
                ("folders that are there already", self.again),
            )
            if names
        ]
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return f"{self.used} pairs; left out: {', '.join(left_out) or 'nothing'}" + (
            f"; read: {kinds}" if kinds else ""
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the summary and every name that was left out, one a line after its kind, separated by a tab."""
        lines = [self.summary()]
        lines += [f"image without a map\t{escaped(name)}" for name in self.images_without_map]
        lines += [f"map without an image\t{escaped(name)}" for name in self.maps_without_image]
        lines += [f"folder again\t{escaped(name)}" for name in self.again]
        lines += [f"broken\t{escaped(name)}\t{reason}" for name, reason in self.broken.items()]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def skipped_lines(batch: Iterable[str]) -> list[str]:
    """Name, tab and reason of the broken files in the "skipped" of a batch's items."""
    return [line for lines in batch for line in lines.split("\n") if line]


def skipped_names(batch: Iterable[str]) -> list[str]:
    """The broken files that the "skipped" of a batch's items name."""
    return [line.partition("\t")[0] for line in skipped_lines(batch)]


def escaped(name: str) -> str:
    """A file's name in one line."""
    return name.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n") if set("\t\n") & set(name) else name


def some(names: list[str]) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
