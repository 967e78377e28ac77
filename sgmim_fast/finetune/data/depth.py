"""Reads depth in metres from files, and checks its unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from sgmim_fast.data.files import find_files, match
from sgmim_fast.data.image_file import IMAGE_SUFFIXES
from sgmim_fast.data.map_file import MAP_SUFFIXES, MapFile
from sgmim_fast.data.pair import Structure
from sgmim_fast.data.report import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data.dense import DensePairs
from sgmim_fast.finetune.data.lists import only_listed

CROPS = (None, "eigen", "garg")
LEAST_MEDIAN, MOST_MEDIAN = 0.01, 1.5  # relative to `max_depth`; a median outside this range means a wrong unit


class DepthFile(MapFile):
    """A depth map with its values as stored: `pixels` (H, W), integers or floating point."""

    kind = "depth map"

    def decode(self, scale: float | None) -> Structure:
        """Returns the depth in metres, (1, H, W); see `to_metres`.

        Raises:
            DataError: the map holds integers, and `scale` is None.
        """
        if scale is None and self.pixels.dtype.kind != "f":
            raise DataError(
                f"{self.name}: depth map holds {self.pixels.dtype}, of unknown unit; expected scale=, the value of one "
                "metre, such as 1000 for millimetres"
            )
        return to_metres(self.pixels, 1.0 if scale is None else scale)


def to_metres(pixels: np.ndarray, scale: float) -> Structure:
    """Divides stored values (H, W) by `scale`. Returns metres, (1, H, W) float32.

    Missing values (0 and below, NaN, infinities) become NaN.
    """
    metres = np.divide(pixels, scale, dtype=np.float32, casting="unsafe", order="C")
    metres[~(metres > 0) | np.isinf(metres)] = np.nan
    return Structure(torch.from_numpy(metres)[None])


class DepthPairs(DensePairs):
    """Base class of data sets of images with depth in metres.

    The constructor reads some maps. If the median of their median depths is not within 0.01 to 1.5 times `max_depth`,
    the unit is assumed to be wrong. This detects millimetres read as metres, but not millimetres read as 1/256 metres.

    Args:
        transform, seed: see `Pairs`.
        scale: stored value of one metre: 1000 for millimetres, 256 for KITTI. None: floating-point maps are in metres,
            and maps of integers are an error.
        min_depth, max_depth: range of evaluation in metres; items keep values outside it.
        crop: part of the image for evaluation: None, "eigen" or "garg".
        check_units: whether to check the unit. False: accepts any depth.

    Raises:
        DataError: none of the maps read has a value, or their unit is wrong.
    """

    task = "depth"
    kind = DepthFile.kind
    target = ("depth", torch.float32, (1,))

    def __init__(
        self,
        transform: Callable[..., Sequence[Tensor]] | None,
        seed: int,
        *,
        scale: float | None,
        min_depth: float,
        max_depth: float,
        crop: str | None,
        check_units: bool,
    ) -> None:
        super().__init__(transform, seed)
        if scale is not None and not scale > 0:
            raise UserError(f"scale is {scale}; expected the stored value of one metre, such as 1000 for millimetres")
        if not 0 < min_depth < max_depth:
            raise UserError(f"depth range is {min_depth} to {max_depth} m; expected 0 < min_depth < max_depth")
        if crop not in CROPS:
            raise UserError(f"crop is {crop!r}; expected None, 'eigen' or 'garg'")
        self.scale, self.min_depth, self.max_depth, self.crop = scale, min_depth, max_depth, crop
        self.check_units = check_units

    def _map(self, index: int) -> Structure:
        return DepthFile(self._map_name(index)).decode(self.scale)

    def _try_some(self) -> None:
        super()._try_some()
        if self.check_units:
            self._check_units()

    def _check_units(self) -> None:
        medians = {}
        for index, depth in self._some_maps():
            if not depth.isnan().all():
                medians[index] = float(depth.nanmedian())
        if not medians:
            raise DataError(f"no pixel has a value in {len(self._sampled())} depth maps tried; {self._map_name(0)} ...")
        found = median_low(medians.values())
        least, most = LEAST_MEDIAN * self.max_depth, MOST_MEDIAN * self.max_depth
        if not least <= found <= most:
            index = next(index for index, median in medians.items() if median == found)
            unit = "as stored" if self.scale is None else f"at {self.scale:g} to the metre"
            raise DataError(
                f"{self._map_name(index)}: the median depth is {found:.3g} m {unit}; expected {least:.3g} to "
                f"{most:.3g} m with max_depth {self.max_depth:g} m; give the scale of the maps, or check_units=False"
            )


class DepthFolders(DepthPairs):
    """Pairs of an image and a depth map that have the same relative path, except for the suffix, in two folder trees.

    Items: {"image": (3, H, W) float32, normalised; "depth": (1, H, W) float32, metres, NaN = missing; "name": path of
    the image in its tree; "skipped": broken files that the item replaces}. Files without a partner and unreadable files
    are left out and listed in `report`. A pair that turns out to be broken later is replaced by the next good one.

    Args:
        images: folder of images in any format of `sgmim_fast.data.IMAGE_SUFFIXES`.
        depth: folder of maps of the images' sizes, in any format of `sgmim_fast.data.MAP_SUFFIXES`. Values of 0 and
            below, NaN and infinities are missing.
        transform: takes (image, depth) and returns both, such as `DenseTransform`. None: `Normalize`.
        names: file that lists the images to use, one path per line, relative to `images`, with or without suffix. None:
            all images.
        scale, min_depth, max_depth, crop, check_units: see `DepthPairs`.
        seed: seed of the transform.

    Raises:
        DataError: there are no files, no pairs, none of the pairs tried can be read, or their unit is wrong.
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        depth: str | os.PathLike[str],
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        names: str | os.PathLike[str] | None = None,
        scale: float | None = None,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        crop: str | None = None,
        check_units: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            transform,
            seed,
            scale=scale,
            min_depth=min_depth,
            max_depth=max_depth,
            crop=crop,
            check_units=check_units,
        )
        self.images, self.maps = Path(images), Path(depth)
        found = only_listed(
            find_files(self.images, "images", IMAGE_SUFFIXES, self.report), names, self.images, self.report
        )
        maps = find_files(self.maps, "depth", MAP_SUFFIXES, self.report)
        self._use(match(found, maps, self.images, self.maps, self.kind, self.report))
