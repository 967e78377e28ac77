"""Data set ADE20K, with the 150 classes of the scene parsing challenge."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from sgmim_fast.data.report import DataError
from sgmim_fast.finetune.data.dense import check_split
from sgmim_fast.finetune.data.segmentation import SegmentationFolders

FOLDER = "ADEChallengeData2016"
PARTS = {"train": "training", "test": "validation"}  # the challenge's test images have no labels
CLASSES = 150
NAMES = "objectInfo150.txt"


class ADE20K(SegmentationFolders):
    """ADE20K of the scene parsing challenge 2016: 20210 training and 2000 validation images, 150 classes.

    docs/DOWNSTREAM_DATA.md describes the layout. The stored annotation 0 means "other" and is ignored (255 in items); 1
    to 150 become 0 to 149. `class_names` are read from objectInfo150.txt if it exists.

    Items are those of `SegmentationFolders`.

    Args:
        root: the folder ADEChallengeData2016, or its parent.
        split: "train", or "test" for the validation images.
        transform: takes (image, labels) and returns both, such as `DenseTransform`. None: `Normalize`.
        seed: seed of the transform.

    Raises:
        DataError: a folder is missing, or an id is out of range.
        UserError: there is no such split.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        check_split(split)
        root = Path(root)
        if (root / FOLDER).is_dir():
            root = root / FOLDER
        self.split = split
        images, labels = root / "images" / PARTS[split], root / "annotations" / PARTS[split]
        for folder in (images, labels):
            if not folder.is_dir():
                raise DataError(f"no {folder}; expected images/ and annotations/ with {PARTS[split]}/ in {FOLDER}")
        names = _read_names(root / NAMES) if (root / NAMES).is_file() else None
        super().__init__(images, labels, transform, classes=CLASSES, reduce_zero=True, class_names=names, seed=seed)


def _read_names(path: Path) -> list[str]:
    """Reads the last column of a tab-separated table with the header Idx, Ratio, Train, Val, Name."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    names = {row[0].strip(): row[-1].strip() for row in rows if len(row) > 1}
    expected = [str(number) for number in range(1, CLASSES + 1)]
    if list(names) != expected:
        raise DataError(
            f"{path}: found {len(names)} classes; expected a header, then a line for each of 1 to {CLASSES}"
        )
    return list(names.values())
