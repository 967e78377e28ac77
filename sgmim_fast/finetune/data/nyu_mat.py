"""Reads the labelled part of NYU-v2, which is one MATLAB file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgmim_fast.data.pair import Structure
from sgmim_fast.data.report import BrokenFile, DataError
from sgmim_fast.finetune.data.depth import to_metres

INDICES = {"train": "trainNdxs", "test": "testNdxs"}  # arrays in splits.mat, whose indices start from 1
SHAPES = {"images": 4, "depths": 3, "rawDepths": 3}  # data sets of the file -> number of dimensions


class LabelledMat:
    """nyu_depth_v2_labeled.mat, an HDF5 file (MATLAB 7.3) whose axes are reversed: (image, channel, column, row).

    Each process opens the file for itself, and reads one image at a time.

    Args:
        path: path of the file.
        depths: depth maps to read: "rawDepths" or "depths".

    Raises:
        DataError: the file is not HDF5, or lacks a data set.
    """

    def __init__(self, path: Path, depths: str) -> None:
        self.path, self.depths = path, depths
        self._process, self._file = 0, None
        try:
            with _import("h5py").File(path, "r") as file:
                shapes = {name: file[name].shape for name in file if name in SHAPES}
        except OSError as error:
            raise DataError(f"{path}: {error}; expected HDF5, a MATLAB file of version 7.3") from error
        for name in ("images", depths):
            if len(shapes.get(name, ())) != SHAPES[name]:
                found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none of these"
                raise DataError(f"{path}: found {found}; expected {name}, of {SHAPES[name]} dimensions")
        self._count = shapes["images"][0]
        if self._count != shapes[depths][0]:
            raise DataError(f"{path}: found {self._count} images, {shapes[depths][0]} {depths}; expected equal numbers")

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": 0, "_file": None}

    def image(self, index: int) -> Tensor:
        """Reads an image, (3, H, W) uint8."""
        return torch.from_numpy(np.ascontiguousarray(self._at("images", index).transpose(0, 2, 1)))

    def depth(self, index: int) -> Structure:
        """Reads a depth map, (1, H, W) float32, metres, NaN = missing."""
        return to_metres(self._at(self.depths, index).T, 1.0)

    def _at(self, name: str, index: int) -> np.ndarray:
        try:
            return self._open()[name][index]
        except OSError as error:
            raise BrokenFile(f"{self.path}, {name} {index}", error) from error

    def _open(self) -> Any:
        if self._process != os.getpid():  # a forked process must not use its parent's open file
            self._file, self._process = _import("h5py").File(self.path, "r"), os.getpid()
        return self._file


def split_indices(path: Path, split: str, count: int) -> np.ndarray:
    """Reads the indices, counted from 0, of the images of a split from splits.mat.

    Raises:
        DataError: the file is not a MATLAB file with indices of the `count` images.
    """
    name = INDICES[split]
    try:
        found = _import("scipy.io").loadmat(path)
        indices = found[name].ravel().astype(np.int64) - 1
    except (KeyError, ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: {error}; expected a MATLAB file with {' and '.join(INDICES.values())}") from error
    if not len(indices) or indices.min() < 0 or indices.max() >= count:
        raise DataError(f"{path}: {name} has {len(indices)} numbers; expected some, each 1 to {count}")
    return indices


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"NYU's .mat files need {package}, which is not installed: pip install 'sgmim_fast[downstream]'",
            name=package,
        ) from None
