"""Reads label maps from files, and checks the range of their ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from sgmim_fast.data.files import find_files, match
from sgmim_fast.data.image_file import IMAGE_SUFFIXES
from sgmim_fast.data.map_file import MapFile, class_ids, out_of_range
from sgmim_fast.data.report import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data.dense import DensePairs
from sgmim_fast.finetune.data.lists import only_listed

LABEL_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".bmp", ".gif")  # lossless formats only
IGNORED = 255  # label of ignored pixels in items


class LabelFile(MapFile):
    """A label map with its ids as stored: `pixels` (H, W), integers; for a palette image, its indices."""

    kind = "label map"
    palette = True

    def _arranged(self, pixels: np.ndarray) -> np.ndarray:
        return super()._arranged(class_ids(pixels))

    def decode(self, classes: int, ignore: int | None, reduce_zero: bool) -> tv_tensors.Mask:
        """Returns the labels, (H, W) int64, 0 to classes - 1, 255 = ignored; see `SegmentationFolders`.

        Raises:
            DataError: an id is out of range.
        """
        labels = self.pixels.astype(np.int64)
        ignored = np.zeros(labels.shape, bool) if ignore is None else labels == ignore
        if reduce_zero:
            ignored |= labels == 0
            labels -= 1
        outside = ~ignored & ((labels < 0) | (labels >= classes))
        if outside.any():
            raise DataError(
                f"{self.name}: {out_of_range(self.pixels[outside])}; {_expected(classes, ignore, reduce_zero)}"
            )
        labels[ignored] = IGNORED
        return tv_tensors.Mask(torch.from_numpy(labels))


def _expected(classes: int, ignore: int | None, reduce_zero: bool) -> str:
    first, last = (1, classes) if reduce_zero else (0, classes - 1)
    void = [str(id) for id in ([0] if reduce_zero else []) + ([] if ignore is None else [ignore])]
    return f"expected {first} to {last}" + (f", or {' or '.join(void)} for ignored" if void else "")


class SegmentationFolders(DensePairs):
    """Pairs of an image and a label map that have the same relative path, except for the suffix, in two folder trees.

    Items: {"image": (3, H, W) float32, normalised; "labels": (H, W) int64, 0 to classes - 1, 255 = ignored; "name":
    path of the image in its tree; "skipped": broken files that the item replaces}. Files without a partner and
    unreadable files are left out and listed in `report`. A pair that turns out to be broken later is replaced by the
    next good one. A class id out of range always raises, also in `verify`.

    Args:
        images: folder of images in any format of `sgmim_fast.data.IMAGE_SUFFIXES`.
        labels: folder of maps of the images' sizes, in any format of `LABEL_SUFFIXES`, with one id per pixel. For a
            palette PNG the ids are the indices, not the colours.
        transform: takes (image, labels) and returns both, such as `DenseTransform`. None: `Normalize`.
        names: file that lists the images to use, one path per line, relative to `images`, with or without suffix. None:
            all images.
        classes: number of classes, 1 to 255.
        ignore: stored id of ignored pixels. None: no id is ignored.
        reduce_zero: the stored id 0 is ignored, too, and the ids of classes start from 1, as in ADE20K.
        class_names: one name per class, or None.
        seed: seed of the transform.

    Raises:
        DataError: there are no files, no pairs, none of the pairs tried can be read or has a labelled pixel, or an id
            is out of range.
        UserError: an argument is out of range.
    """

    task = "segmentation"
    kind = LabelFile.kind
    target = ("labels", torch.int64, ())

    def __init__(
        self,
        images: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        classes: int,
        names: str | os.PathLike[str] | None = None,
        ignore: int | None = IGNORED,
        reduce_zero: bool = False,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, seed)
        if not 1 <= classes <= IGNORED:
            raise UserError(f"classes is {classes}; expected 1 to {IGNORED}, since {IGNORED} means ignored")
        if class_names is not None and len(class_names) != classes:
            raise UserError(f"class_names has {len(class_names)} names; expected {classes}, as many as classes")
        self.classes, self.ignore, self.reduce_zero = classes, ignore, reduce_zero
        self.class_names = None if class_names is None else list(class_names)
        self.images, self.maps = Path(images), Path(labels)
        found = only_listed(
            find_files(self.images, "images", IMAGE_SUFFIXES, self.report), names, self.images, self.report
        )
        maps = find_files(self.maps, "labels", LABEL_SUFFIXES, self.report)
        self._use(match(found, maps, self.images, self.maps, self.kind, self.report))

    def _try_some(self) -> None:
        super()._try_some()
        if not any((labels != IGNORED).any() for _, labels in self._some_maps()):
            raise DataError(f"no pixel has a label in {len(self._sampled())} label maps tried; {self._map_name(0)} ...")

    def _map(self, index: int) -> tv_tensors.Mask:
        return LabelFile(self._map_name(index)).decode(self.classes, self.ignore, self.reduce_zero)
