"""What is in a folder tree, and what two of them have in common."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from sgmim_fast.data.report import DataError, Report

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


def match(
    images: Found, maps: Found, images_root: Path, maps_root: Path, kind: str, report: Report, suffix: str = ".png"
) -> np.ndarray:
    """Images and maps of the same relative path, but for the suffix: (pairs, 2) of their paths as bytes.

    What has no partner goes into `report`. The second of two maps for one image is not used either.

    Args:
        kind: what messages call a map.
        suffix: of an example that they give.

    Raises:
        DataError: no image has a map.
    """
    pairs = []
    for stem, suffixes in images.items():
        found = maps.get(stem)
        for end in suffixes:
            if found is None:
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
