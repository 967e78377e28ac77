"""Data set KITTI, depth with the Eigen split."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from sgmim_fast.data.image_file import IMAGE_SUFFIXES
from sgmim_fast.data.report import BrokenFile, DataError
from sgmim_fast.finetune.data.dense import check_split
from sgmim_fast.finetune.data.depth import DepthPairs
from sgmim_fast.finetune.data.lists import Tree, find_split_file, listed_pairs

HEIGHT, WIDTH = 352, 1216  # size of the benchmark's crop: the lowest rows, the middle columns
# file lists of BTS, of AdaBins and ZoeDepth, and of GLPDepth and MIM-Depth-Estimation
LISTS = ("eigen_{}_files_with_gt.txt", "kitti_eigen_{}_files_with_gt.txt", "eigen_benchmark/{}_list.txt")
IMAGE_FOLDERS = (".", "raw", "raw_data")
DEPTH_FOLDERS = tuple(
    f"{folder}{part}" for folder in (".", "data_depth_annotated", "gts") for part in ("", "/train", "/val")
)


class KITTI(DepthPairs):
    """KITTI: images of the raw data, and depth of the depth completion benchmark, accumulated over 11 laser scans.

    docs/DOWNSTREAM_DATA.md describes the layout. A split file lists the pairs. Those without ground truth (45 of 697 in
    the test split) are left out and listed in `report`. Image and depth are cropped to the benchmark's 352 × 1216
    pixels, the lowest rows and the middle columns, as BTS and MIM-Depth-Estimation do in training and evaluation. Depth
    is stored as 16-bit PNG, in units of 1/256 metre, 0 = missing. It is evaluated from 1e-3 to 80 m in the Garg crop.

    Items are those of `DepthFolders`.

    Args:
        root: folder with the raw data and the depth.
        split: "train" or "test".
        transform: takes (image, depth) and returns both, such as `DenseTransform`. None: `Normalize`.
        split_file: list of the pairs. None: one of `LISTS`, next to the data.
        check_units: see `DepthPairs`.
        seed: seed of the transform.

    Raises:
        DataError: the list or all of its files are missing, or the depth has another unit.
        UserError: there is no such split.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        split_file: str | os.PathLike[str] | None = None,
        check_units: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            transform, seed, scale=256, min_depth=1e-3, max_depth=80.0, crop="garg", check_units=check_units
        )
        check_split(split)
        self.split = split
        self.images = self.maps = root = Path(root)
        if not root.is_dir():
            raise DataError(
                f"root is {root}; expected the folder of KITTI, found {'a file' if root.exists() else 'nothing'}"
            )
        source = find_split_file(root, split_file, [name.format(split) for name in LISTS])
        images = Tree(root, IMAGE_FOLDERS, IMAGE_SUFFIXES)  # many users convert the raw PNG files to JPEG
        self._use(listed_pairs(source, images, Tree(root, DEPTH_FOLDERS), self.kind, self.report))

    def _part(self, pixels: Tensor, index: int) -> Tensor:
        height, width = pixels.shape[-2:]
        if height < HEIGHT or width < WIDTH:
            raise BrokenFile(
                os.path.join(self.images, self.name(index)),
                f"image is {height}×{width}; expected at least the benchmark's crop, {HEIGHT}×{WIDTH}",
            )
        left = (width - WIDTH) // 2
        return pixels[..., height - HEIGHT :, left : left + WIDTH]
