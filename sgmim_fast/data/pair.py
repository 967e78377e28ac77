"""Structure maps as torchvision tv_tensors, and the items of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


class Structure(tv_tensors.Mask):
    """A structure map, (C, H, W) float32, NaN at missing values.

    torchvision's v2 transforms crop, flip and resize it together with its image. It is resized by nearest neighbour, so
    that missing values do not spread.
    """


class Normals(Structure):
    """A map of surface normals, (3, H, W). A horizontal flip negates x, which points along the rows."""


def resample(pixels: Tensor, box: Sequence[float], size: int | Sequence[int]) -> Tensor:
    """Resamples the box (top, left, height, width), in fractional pixels, of (..., H, W) by nearest neighbour to
    `size`, which is the length of each side or (height, width). Keeps the tensor subclass."""
    shape = (size, size) if isinstance(size, int) else (size[0], size[-1])
    rows, columns = map(torch.from_numpy, nearest_indices(box, shape, pixels.shape[-2:]))
    return tv_tensors.wrap(pixels.as_subclass(Tensor)[..., rows[:, None], columns], like=pixels)


def nearest_indices(box: Sequence[float], size: Sequence[int], limits: Sequence[int]) -> list[np.ndarray]:
    """Returns the rows and columns of an image of size `limits` that are nearest to the pixel centres of the box
    resampled to `size`."""
    return [
        np.clip((start + (np.arange(count) + 0.5) * (length / count)).astype(np.int64), 0, limit - 1)
        for start, length, count, limit in zip(box[:2], box[2:], size, limits, strict=True)
    ]


@F.register_kernel(F.resized_crop, Structure)
def _resized_crop(
    structure: Structure, top: int, left: int, height: int, width: int, size: Sequence[int], *_: Any, **__: Any
) -> Structure:
    return resample(structure, (top, left, height, width), size)


@F.register_kernel(F.resize, Structure)
def _resize(
    structure: Structure, size: Sequence[int] | None, *_: Any, max_size: int | None = None, **__: Any
) -> Structure:
    plain = F.resize_image(structure.as_subclass(Tensor), size, InterpolationMode.NEAREST_EXACT, max_size=max_size)
    return tv_tensors.wrap(plain, like=structure)


@F.register_kernel(F.horizontal_flip, Normals)
def _flip(normals: Normals, *_: Any, **__: Any) -> Normals:
    plain = normals.as_subclass(Tensor).flip(-1)
    plain[0].neg_()
    return tv_tensors.wrap(plain, like=normals)


class Item(TypedDict, total=False):
    """An item of the data sets, suitable for default_collate."""

    image: tv_tensors.Image  # (channels, H, W) float32, normalised; 3 channels unless the data set says otherwise
    structure: Structure  # (C, H, W) float32, not standardised, NaN = missing; absent in data sets without maps
    name: str
    skipped: str  # broken files that this item replaces, separated by newlines
    labels: tv_tensors.Mask  # (H, W) int64; `Scenes(labels=True)` only


def make_item(
    tensors: Sequence[Tensor], name: str, skipped: Sequence[str] = (), channels: int = 1, image_channels: int = 3
) -> Item:
    """Makes an item of the outputs of a transform: the image, optionally followed by the structure map and the labels.

    `channels` and `image_channels` are the expected numbers of channels of the structure map and of the image.

    Raises:
        TypeError: the image or the structure map has another type, dtype or shape.
    """
    image, *maps = tensors
    check_tensor("image", image, torch.float32, (image_channels,))
    item = Item(image=image, name=name, skipped="\n".join(skipped))
    if maps:
        check_tensor("structure", maps[0], torch.float32, (channels,))
        item["structure"] = maps[0]
    if len(maps) > 1:
        item["labels"] = maps[1]
    return item


def check_tensor(what: str, tensor: Any, dtype: torch.dtype, channels: tuple[int, ...]) -> None:
    """Raises TypeError unless an output of a transform is a tensor of this dtype with the shape (*channels, H, W)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"transform returned a {type(tensor).__name__} for {what}; expected a tensor")
    if tensor.dtype != dtype or tensor.ndim != len(channels) + 2 or tensor.shape[:-2] != channels:
        expected = ", ".join([*map(str, channels), "H", "W"])
        raise TypeError(
            f"transform returned {what} as {tensor.dtype} {tuple(tensor.shape)}; "
            f"expected {str(dtype).removeprefix('torch.')} ({expected})"
        )
