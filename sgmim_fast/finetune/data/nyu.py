"""Data set NYU depth v2, stored as one MATLAB file or as folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from sgmim_fast.data.pair import Structure
from sgmim_fast.data.report import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data.dense import check_split
from sgmim_fast.finetune.data.depth import DepthPairs
from sgmim_fast.finetune.data.lists import Tree, find_split_file, listed_pairs
from sgmim_fast.finetune.data.nyu_mat import LabelledMat, split_indices

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
LISTS = ("nyudepthv2_{}_files_with_gt.txt", "nyudepthv2/{}_list.txt")  # BTS; GLPDepth and MIM-Depth-Estimation
FOLDERS = {"train": ("sync", ".", "train"), "test": ("official_splits/test", "test", ".")}
DEPTHS = {"raw": "rawDepths", "filled": "depths"}
BORDERS = ("published", "keep", "crop")
SHOWN = (7, 474, 7, 632)  # rows and columns of the .mat's images that BTS's tool keeps; the tool blackens the rest
INSIDE = (45, 472, 43, 608)  # rows and columns on which BTS trains


class NYU(DepthPairs):
    """NYU-v2: indoor images of 480 × 640 pixels with a Kinect's depth, evaluated from 1e-3 to 10 m in the Eigen crop.

    There are two layouts, which docs/DOWNSTREAM_DATA.md describes: the labelled .mat (795 training and 654 test images,
    separated by splits.mat), and folders of JPEG and 16-bit PNG in millimetres, 0 = missing, with list files (BTS's
    24231 training images under sync/, the same 654 test images under official_splits/test). Listed pairs whose files
    are missing are left out and listed in `report`.

    Items are those of `DepthFolders`.

    Args:
        root: the .mat, or a folder. A folder has the second layout if it contains sync/, official_splits/ or a list, or
            if `split_file` is a list; otherwise it must contain the .mat.
        split: "train" or "test".
        transform: takes (image, depth) and returns both, such as `DenseTransform`. None: `Normalize`.
        split_file: splits.mat or the list. None: splits.mat next to the .mat, or one of `LISTS` next to the data.
        depths: depth maps of the .mat: "raw", as the camera measured them, with holes, or "filled", with inpainted
            holes. The published test set is taken from the raw maps.
        border: "published": images of the .mat get a black border, 7 or 8 pixels wide, as the published test images
            have; folders are unchanged. "keep": all images are unchanged. "crop": images and depth are cropped to rows
            45 to 471 and columns 43 to 607, as in BTS's training.
        check_units: see `DepthPairs`.
        seed: seed of the transform.

    Raises:
        DataError: the split file or all of its files are missing, the .mat is another file, or depth has another unit.
        UserError: an argument has an unknown value.
        ModuleNotFoundError: the layout is the .mat, and h5py or scipy is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        split_file: str | os.PathLike[str] | None = None,
        depths: str = "raw",
        border: str = "published",
        check_units: bool = True,
        seed: int = 0,
    ) -> None:
        check_split(split)
        if depths not in DEPTHS:
            raise UserError(f"depths is {depths!r}; expected {' or '.join(DEPTHS)}")
        if border not in BORDERS:
            raise UserError(f"border is {border!r}; expected {', '.join(BORDERS)}")
        root = Path(root)
        mat = _find_mat(root, split_file)
        super().__init__(
            transform,
            seed,
            scale=1000 if mat is None else None,
            min_depth=1e-3,
            max_depth=10.0,
            crop="eigen",
            check_units=check_units,
        )
        self.split, self.border = split, border
        if mat is None:
            self._mat = None
            self.images = self.maps = root
            source = find_split_file(root, split_file, [name.format(split) for name in LISTS])
            tree = Tree(root, FOLDERS[split])
            self._use(listed_pairs(source, tree, tree, self.kind, self.report))
        else:
            self._mat = LabelledMat(mat, DEPTHS[depths])
            source = find_split_file(mat.parent, split_file, [SPLITS])
            self._use(split_indices(source, split, len(self._mat)))

    def name(self, index: int) -> str:
        """Returns the path of an image relative to `root`. For the .mat, returns the name, with the image's index, that
        BTS's tool writes."""
        return super().name(index) if self._mat is None else f"rgb_{self._entries[index]:05d}"

    def _map_name(self, index: int) -> str:
        if self._mat is None:
            return super()._map_name(index)
        return f"{self._mat.path}, {self._mat.depths} {self._entries[index]}"

    def _image(self, index: int) -> Tensor:
        if self._mat is None:
            return super()._image(index)
        image = self._mat.image(int(self._entries[index]))
        if self.border == "published":
            top, bottom, left, right = SHOWN
            shown = image[:, top:bottom, left:right].clone()
            image.zero_()[:, top:bottom, left:right] = shown
        return image

    def _map(self, index: int) -> Structure:
        return super()._map(index) if self._mat is None else self._mat.depth(int(self._entries[index]))

    def _part(self, pixels: Tensor, index: int) -> Tensor:
        if self.border != "crop":
            return pixels
        top, bottom, left, right = INSIDE
        return pixels[..., top:bottom, left:right]


def _find_mat(root: Path, split_file: str | os.PathLike[str] | None) -> Path | None:
    """Returns the path of the .mat, or None if `root` has the layout of folders."""
    if root.is_file():
        return root
    if not root.is_dir():
        raise DataError(f"root is {root}; expected {MAT} or the folder of NYU-v2, found nothing")
    if split_file is not None and Path(split_file).suffix != ".mat":
        return None
    lists = [name.format(split) for name in LISTS for split in FOLDERS]
    if any((root / name).exists() for name in ("sync", "official_splits", *lists)):
        return None
    if (root / MAT).is_file():
        return root / MAT
    raise DataError(
        f"no NYU-v2 in {root}: looked for {MAT}, for the folders sync and official_splits, and for the lists "
        f"{', '.join(lists)}"
    )
