"""Reads the files that list a split, and finds the listed files in a tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgmim_fast.data.files import Found
from sgmim_fast.data.image_file import IMAGE_SUFFIXES
from sgmim_fast.data.report import DataError, Report

# folders that are searched for a list: the data's own, and those of published repositories (BTS, GLPDepth, ZoeDepth)
LIST_FOLDERS = (".", "train_test_inputs", "filenames", "splits", "data_splits")
NONE = "None"  # name of the map in a list if the image has no map


def find_split_file(root: Path, given: str | os.PathLike[str] | None, names: Sequence[str]) -> Path:
    """Returns the file that lists a split: the given one, or the first of `names` that exists next to the data.

    Raises:
        DataError: there is no such file. The message has the folders that were searched.
    """
    if given is not None:
        if not (path := Path(given)).is_file():
            raise DataError(
                f"split_file is {path}; expected a file, found {'a folder' if path.exists() else 'nothing'}"
            )
        return path
    for folder in LIST_FOLDERS:
        for name in names:
            if (path := root / folder / name).is_file():
                return path
    raise DataError(
        f"no split file: looked for {' and '.join(names)} in {root} and its folders {', '.join(LIST_FOLDERS[1:])}; "
        "give split_file, the file's path"
    )


def read_list(path: Path) -> list[tuple[str, str]]:
    """Reads image and map of each line. Further columns, such as the focal length, are ignored.

    Raises:
        DataError: a line has one column only, or the list is empty.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        columns = [column.lstrip("/") for column in line.split()]
        if len(columns) == 1:
            raise DataError(f"{path}, line {number}: found {line.strip()!r}; expected an image and its map")
        if columns:
            pairs.append((columns[0], columns[1]))
    if not pairs:
        raise DataError(f"{path} is empty; expected an image and its map in each line")
    return pairs


class Tree:
    """Finds listed files below `root`. Their names in a list are relative to one of `folders`.

    Each folder is read once, since a list has tens of thousands of names in about a hundred folders.
    """

    def __init__(self, root: Path, folders: Sequence[str], other_suffixes: Sequence[str] = ()) -> None:
        self.root, self.folders, self.other_suffixes = root, folders, other_suffixes
        self._inside: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> str | None:
        """Returns the path of a listed file relative to the root, possibly with one of the other suffixes, or None."""
        parent, file = os.path.split(name)
        stem = os.path.splitext(file)[0]
        for folder in self.folders:
            place = os.path.normpath(os.path.join(folder, parent))
            inside = self._files(place)
            for other in (file, *(stem + suffix for suffix in self.other_suffixes)):
                if other in inside:
                    return os.path.join(place, other)
        return None

    def _files(self, place: str) -> frozenset[str]:
        if place not in self._inside:
            try:
                self._inside[place] = frozenset(os.listdir(self.root / place))
            except OSError:
                self._inside[place] = frozenset()
        return self._inside[place]


def listed_pairs(source: Path, images: Tree, maps: Tree, kind: str, report: Report) -> np.ndarray:
    """Returns the pairs of a list, as a (pairs, 2) array of paths relative to the trees' roots, as bytes.

    Missing images, and images without a map, whether listed as such or because the file is missing, are added to
    `report`.

    Raises:
        DataError: the list cannot be read, or none of its pairs exists.
    """
    pairs, names = [], read_list(source)
    for image_name, map_name in names:
        image, pixels = images.find(image_name), None if map_name == NONE else maps.find(map_name)
        if image is None:
            report.broken[image_name] = f"is listed in {source}, but not there"
        elif pixels is None:
            report.images_without_map.append(image_name)
        else:
            pairs.append((os.fsencode(image), os.fsencode(pixels)))
    if not pairs:
        image_name, map_name = next((pair for pair in names if pair[1] != NONE), names[0])
        raise DataError(
            f"none of the pairs in {source} exists: looked for images such as {image_name} in {_places(images)}, and "
            f"for {kind}s such as {map_name} in {_places(maps)}"
        )
    return np.array(pairs, dtype=np.bytes_)


def _places(tree: Tree) -> str:
    return f"{tree.root}" + "".join(f", {folder}/" for folder in tree.folders if folder != ".")


def only_listed(found: Found, names: str | os.PathLike[str] | None, root: Path, report: Report) -> Found:
    """Returns the found files that the list `names` has, one per line, with or without suffix. None: all files.

    Raises:
        DataError: there is no such list, or none of its files exists.
    """
    if names is None:
        return found
    if not (path := Path(names)).is_file():
        raise DataError(f"names is {path}; expected a file, found {'a folder' if path.exists() else 'nothing'}")
    kept: Found = {}
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    for name in filter(None, lines):
        stem, suffix = os.path.splitext(os.path.normpath(name))
        if suffix.lower() not in IMAGE_SUFFIXES:
            stem, suffix = stem + suffix, ""
        suffixes = [end for end in found.get(stem, []) if suffix in ("", end)]
        if suffixes:
            kept[stem] = kept.get(stem, []) + suffixes
        else:
            report.broken[name] = f"is listed in {path}, but not there"
    if not kept:
        raise DataError(f"none of the {len(report.broken)} images that {path} lists is in {root}; such as {lines[0]}")
    return dict(sorted(kept.items()))
