"""Finds the files of a folder tree, and matches the files of two mirrored trees."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sgmim_fast.data.report import DataError, Report

Found = dict[str, list[str]]  # relative path without suffix -> suffixes
# Lossy formats, which are refused for maps because they change the values
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp", ".avif")


def find_files(root: Path, argument: str, suffixes: tuple[str, ...], report: Report | None = None) -> Found:
    """Finds the files of a tree that have one of these suffixes, sorted, without dotfiles. `argument` is the name of
    `root` in messages. Symbolic links to folders are followed, but each real folder is visited once. Links to folders
    that were visited already, and maps in lossy formats, are added to `report`.

    Raises:
        DataError: the folder does not exist, has no such file, or has a folder that cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"{argument} is {root}; expected a folder, found {'a file' if root.exists() else 'nothing'}")
    report = Report() if report is None else report
    found: Found = {}
    others: Counter[str] = Counter()
    for inside, files in walk(root, report):
        for file in files:
            stem, suffix = os.path.splitext(os.path.join(inside, file))
            if suffix.lower() in suffixes:
                found.setdefault(stem, []).append(suffix)
                continue
            others[suffix or file] += 1
            if suffix.lower() in LOSSY:
                report.broken[os.path.join(root, stem + suffix)] = (
                    f"is a map saved as {suffix}, which changes its values; expected {', '.join(suffixes)}"
                )
    if not found:
        rest = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5)) or "no files"
        lossy = "; maps saved as JPEG or WebP have lost their values" if set(others) & set(LOSSY) else ""
        raise DataError(
            f"{argument}: no file in {root} ends in {', '.join(suffixes)}, at any depth; found {rest}{lossy}"
        )
    return dict(sorted(found.items()))


def walk(root: Path, report: Report) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder of a tree, relative to `root`, with its files, sorted, without dotfiles. Links to folders come
    last, so that a folder is reported by its own path rather than by a link's.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}; expected a readable one")

    seen: set[tuple[int, int]] = set()
    waiting = deque([""])
    while waiting:
        for folder, folders, files in os.walk(os.path.join(root, waiting.popleft()), onerror=refuse):
            inside = os.path.relpath(folder, root)
            inside = "" if inside == "." else inside
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                report.again.append(os.path.join(root, inside))
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting.extend(os.path.join(inside, name) for name in folders if os.path.islink(os.path.join(folder, name)))
            yield inside, sorted(name for name in files if not name.startswith("."))


def match(
    images: Found, maps: Found, images_root: Path, maps_root: Path, kind: str, report: Report, suffix: str = ".png"
) -> np.ndarray:
    """Matches images and maps by relative path without suffix. Returns a (pairs, 2) array of relative paths as bytes.

    Files without a partner are added to `report`, as is the second of two maps for one image.

    Args:
        images, maps, images_root, maps_root: results of `find_files`, and the roots of their trees.
        kind: word for a map in messages.
        suffix: suffix of the example in messages.

    Raises:
        DataError: no image has a map, or files of one folder could be images as well as maps.
    """
    if os.path.samefile(images_root, maps_root):
        _tell_apart(images, maps, maps_root, kind, report)
    pairs = []
    refused = {os.path.splitext(name)[0] for name in report.broken}
    for stem, suffixes in images.items():
        found = maps.get(stem)
        for end in suffixes:
            if not found:
                if os.path.join(maps_root, stem) not in refused:
                    report.images_without_map.append(stem + end)
            else:
                pairs.append((os.fsencode(stem + end), os.fsencode(stem + found[0])))
    for stem, suffixes in maps.items():
        unused = suffixes[1:] if stem in images else suffixes
        report.maps_without_image += [stem + end for end in unused]
    if not pairs:
        example = next(iter(images))
        raise DataError(
            f"no image has a {kind}: {len(images)} images in {images_root}, such as {example + images[example][0]}; "
            f"{len(maps)} maps in {maps_root}, such as {report.maps_without_image[0]}; expected the same relative path "
            f"but for the suffix, such as {example + suffix}"
        )
    return np.array(pairs, dtype=np.bytes_)


def _tell_apart(images: Found, maps: Found, root: Path, kind: str, report: Report) -> None:
    """Removes maps from the images of a folder of both, and images from its maps, so that no file is its own map.

    A file that can be either is a map if a file of the same name can only be an image (a.jpg beside a.png), and an
    image otherwise (a.png beside a.npy).

    Raises:
        DataError: several files of one name can be either, or none is left as a map.
    """
    inside = os.path.join(root, "")
    report.broken = {name: reason for name, reason in report.broken.items() if not name.startswith(inside)}  # the JPEGs
    unclear = []
    for stem in sorted(images.keys() & maps.keys()):
        if photographs := [end for end in images[stem] if end not in maps[stem]]:
            images[stem] = photographs
        else:
            maps[stem] = [end for end in maps[stem] if end not in images[stem]]
            unclear += [] if maps[stem] else [[stem + end for end in images[stem]]]
    most = max(unclear, key=len, default=[])
    if len(most) > 1 or not any(maps.values()):
        raise DataError(
            f"{root} is the folder of images and of {kind}s, and {' and '.join(most)} could be either; expected a "
            f"folder for each, or suffixes that differ, such as a.jpg for the image and a.png for the {kind}"
        )
