"""Kinds of structure maps, which define how depth, channels, normals and labels are read, standardised and drawn."""

from __future__ import annotations

import colorsys
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import matplotlib
import torch
from matplotlib.colors import Normalize
from torch import Tensor

from sgmim_fast.data.channel_files import ChannelsFile, NormalsFile, SemanticFile
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.errors import UserError
from sgmim_fast.ops import standardize_structure

GOLDEN = 0.618034  # golden ratio; as a step between hues it keeps consecutive classes far apart


def standardize_valid(structure: Tensor, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Standardises maps of a data set for the model, on any device, without synchronising.

    Args:
        structure: (B, S, H, W), NaN = missing.
        limit: clamps standardised values to ± this. None: no clamping. In a map that is flat except for a few pixels,
            these pixels are tens of standard deviations from the mean, and one such map dominates the loss of a batch.

    Returns:
        The maps, standardised over their valid values (see `sgmim_fast.standardize_structure`) and 0 elsewhere, and the
        model's `structure_valid`, (B, S, H, W) bool, True = valid.
    """
    standardized = standardize_structure(structure, nonfinite="ignore")
    if limit is not None:
        standardized = standardized.clamp_(-limit, limit)
    return standardized, structure.isfinite()


class StructureKind(ABC):
    """Base class of the kinds of structure maps.

    Attributes:
        name: name in settings.
        channels: number of channels of the model's input, `structure_channels`.
        stored: number of channels of the items of data sets.
        word: word for a map in messages.
    """

    name: ClassVar[str]
    channels: int
    word: ClassVar[str] = StructureFile.kind

    @property
    def stored(self) -> int:
        return self.channels

    @abstractmethod
    def read(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> StructureFile:
        """Reads a file. Raises BrokenFile."""

    @abstractmethod
    def standardize(self, structure: Tensor) -> tuple[Tensor, Tensor]:
        """Standardises maps (B, stored, H, W), NaN = missing, on any device, without synchronising. Returns the model's
        input, (B, channels, H, W) float32, 0 at missing values, and its validity, bool of the same shape."""

    @abstractmethod
    def colours(self, structure: Tensor) -> Tensor:
        """Returns colours, (B, 3, H, W) in [0, 1], for the model's inputs or predictions, on the CPU."""


@dataclass(frozen=True)
class Channels(StructureKind):
    """Maps of several channels, each standardised like depth. Flips do not change their values."""

    channels: int
    limit: float | None = None  # see `standardize_valid`
    name = "channels"

    def read(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> StructureFile:
        return ChannelsFile(name, content, channels=self.channels, missing=missing)

    def standardize(self, structure: Tensor) -> tuple[Tensor, Tensor]:
        return standardize_valid(structure, self.limit)

    def colours(self, structure: Tensor) -> Tensor:
        """Draws one channel with a colour map, and the first three of several channels as red, green and blue."""
        shown = Normalize(-2, 2, clip=True)(structure[:, :3].numpy())  # all pictures have the same scale
        if shown.shape[1] == 1:
            rgba = matplotlib.colormaps["inferno"](shown[:, 0])
            return torch.from_numpy(rgba[..., :3]).permute(0, 3, 1, 2).float()
        rgb = torch.full((len(shown), 3, *shown.shape[2:]), 0.5)
        rgb[:, : shown.shape[1]] = torch.from_numpy(shown.data)
        return rgb


@dataclass(frozen=True)
class Depth(Channels):
    """Maps of one channel: depth, disparity, or anything else."""

    channels: int = 1
    name = "depth"

    def read(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> StructureFile:
        return StructureFile(name, content, missing=missing)


DEPTH = Depth()  # the published kind


@dataclass(frozen=True)
class Surface(StructureKind):
    """Surface normals. Unit vectors are multiplied by sqrt(3), so that their mean square over channels is 1.

    Standardising between deciles, as for depth, would amplify the noise of a wall, whose normals are equal."""

    channels: int = 3
    name = "normals"
    word = NormalsFile.kind

    def read(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> StructureFile:
        return NormalsFile(name, content, missing=missing)

    def standardize(self, structure: Tensor) -> tuple[Tensor, Tensor]:
        valid = structure.isfinite()
        return torch.where(valid, structure * math.sqrt(3), 0), valid

    def colours(self, structure: Tensor) -> Tensor:
        return (structure / math.sqrt(3) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Semantic(StructureKind):
    """Class ids, encoded one-hot: (1 - m) / d in the channel of the class and -m / d in the others, with
    m = 1 / classes and d = sqrt(m (1 - m)), so that mean and variance over the channels of a pixel are 0 and 1.
    (Between deciles, as for depth, a class on less than a tenth of an image would have no variance.)

    Items of data sets have ids, (1, H, W); `standardize` computes the one-hot channels on the device.
    """

    channels: int  # number of classes
    ignore: int | None = 255  # id of unlabelled pixels
    name = "semantic"
    word = SemanticFile.kind

    @property
    def stored(self) -> int:
        return 1

    def read(
        self, name: str | os.PathLike[str], content: bytes | None = None, *, missing: float | None = 0
    ) -> StructureFile:
        """Reads a file. `missing` is ignored, since 0 is a class."""
        return SemanticFile(name, content, classes=self.channels, ignore=self.ignore)

    def standardize(self, structure: Tensor) -> tuple[Tensor, Tensor]:
        valid = structure.isfinite()
        ids = torch.arange(self.channels, device=structure.device, dtype=structure.dtype)[:, None, None]
        mean = 1 / self.channels
        one_hot = (structure == ids).to(structure.dtype).sub_(mean).div_(math.sqrt(mean * (1 - mean)))
        return torch.where(valid, one_hot, 0), valid.repeat(1, self.channels, 1, 1)

    def colours(self, structure: Tensor) -> Tensor:
        """Draws each pixel in the colour of its most likely class."""
        palette = torch.tensor([colorsys.hsv_to_rgb(i * GOLDEN % 1, 0.75, 0.9) for i in range(self.channels)])
        return palette[structure.argmax(1)].permute(0, 3, 1, 2)


NAMES = tuple(kind.name for kind in (Depth, Channels, Surface, Semantic))


def structure_kind(
    name: str,
    *,
    channels: int | None = None,
    classes: int | None = None,
    ignore: int | None = 255,
    limit: float | None = None,
    prefix: str = "",
) -> StructureKind:
    """Creates a kind of structure maps by its name, one of `NAMES`.

    Args:
        channels, classes, ignore, limit: arguments of the kinds that have them.
        prefix: prefix of the names of settings in messages.

    Raises:
        UserError: an argument that the kind needs is missing, or an argument is given that the kind does not have.
    """
    for what, of, least, value in (("channels", "channels", 1, channels), ("classes", "semantic", 2, classes)):
        if name == of and (value is None or value < least):
            found = "missing" if value is None else str(value)
            raise UserError(
                f"{prefix}{what} is {found}; expected the number of {what}, at least {least}, in {name} maps"
            )
        if name != of and value is not None:
            raise UserError(f"{prefix}{what} is {value} with maps of {name}; expected the kind {of} with it")
    if name == "semantic":
        return Semantic(classes, ignore)
    if name == "normals":
        return Surface()
    return Depth(limit=limit) if name == "depth" else Channels(channels, limit)


def structure_of(
    batch: Mapping[str, Any], device: torch.device, kind: StructureKind
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Moves a batch's maps to the device and standardises them. Returns (None, None) for a batch without maps."""
    if "structure" not in batch:
        return None, None
    return kind.standardize(batch["structure"].to(device, non_blocking=True))
