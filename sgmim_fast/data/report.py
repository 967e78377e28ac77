"""Reports on data sets: the number of pairs used, the files left out, and the reasons."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

NAMED = 3  # number of files of each kind that a summary names
_OBJECT = re.compile(
    r"\s*<[\w.]+ object at 0x[0-9a-f]+>"
)  # decoders that read from memory print the file object in their messages, instead of the file's name


class DataError(ValueError):
    """A data set is unusable. The message says what was expected and what was found."""


class BrokenFile(Exception):
    """A file cannot be used. Data sets catch this error, report it, and continue."""

    def __init__(self, name: str | os.PathLike[str], reason: object):
        self.name = os.fspath(name)
        self.reason = " ".join(_OBJECT.sub("", str(reason)).split())
        if not any(map(str.isalpha, self.reason)):  # the message is a bare number, or empty
            self.reason = f"{type(reason).__name__} {self.reason}".strip()
        super().__init__(self.name, self.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    @property
    def line(self) -> str:
        """Name, tab and reason, as in an item's "skipped" and in reports. Tabs and newlines in the name are escaped."""
        return f"{escaped(self.name)}\t{self.reason}"


@dataclass
class Report:
    """Counts the pairs of a data set, and lists the files that were left out.

    `broken` has the broken files found so far. `FolderPairs.verify` reads every file, and a training loop adds the
    "skipped" of its items with `add_skipped`.
    """

    used: int = 0  # number of pairs
    images_without_map: list[str] = field(default_factory=list)
    maps_without_image: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # file -> reason
    again: list[str] = field(default_factory=list)  # links to folders that the tree also contains under another path
    kinds: Counter[str] = field(
        default_factory=Counter
    )  # storage format, such as "images of 8 bits" -> number of files read so far

    def add(self, other: Report) -> None:
        """Adds the contents of another report."""
        self.used += other.used
        self.images_without_map += other.images_without_map
        self.maps_without_image += other.maps_without_image
        self.broken |= other.broken
        self.again += other.again
        self.kinds.update(other.kinds)

    def add_skipped(self, skipped: str | Iterable[str]) -> None:
        """Adds the broken files in the "skipped" of an item, or of the items of a batch."""
        for line in skipped_lines([skipped] if isinstance(skipped, str) else skipped):
            name, _, reason = line.partition("\t")
            self.broken.setdefault(name, reason)

    def summary(self) -> str:
        """Returns one line: number of pairs, files left out (count and first names), and storage formats."""
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
        """Writes the summary, and one line for each file left out: kind and name, separated by a tab. The line of a
        broken file also has a tab and the reason."""
        lines = [self.summary()]
        lines += [f"image without a map\t{escaped(name)}" for name in self.images_without_map]
        lines += [f"map without an image\t{escaped(name)}" for name in self.maps_without_image]
        lines += [f"folder again\t{escaped(name)}" for name in self.again]
        lines += [f"broken\t{escaped(name)}\t{reason}" for name, reason in self.broken.items()]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")


def skipped_lines(batch: Iterable[str]) -> list[str]:
    """Returns a line "name, tab, reason" for each broken file in the "skipped" of a batch's items."""
    return [line for lines in batch for line in lines.split("\n") if line]


def skipped_names(batch: Iterable[str]) -> list[str]:
    """Returns the names of the broken files in the "skipped" of a batch's items."""
    return [line.partition("\t")[0] for line in skipped_lines(batch)]


def escaped(name: str) -> str:
    """Returns a file name with tabs and newlines escaped."""
    return name.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n") if set("\t\n") & set(name) else name


def some(names: list[str]) -> str:
    """Joins the first names, with "..." if there are more."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
