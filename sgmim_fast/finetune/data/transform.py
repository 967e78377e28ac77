"""Joint transforms of images and maps for fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from sgmim_fast.data.pair import resample
from sgmim_fast.data.transform import Normalize, decode
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data.colors import DepthColors, SegmentationColors
from sgmim_fast.finetune.data.segmentation import IGNORED

TASKS = ("depth", "segmentation")
TRIES = 10  # number of attempts to draw a crop that no class dominates, as in mmsegmentation
LONGEST = 4  # longest side / crop side: mmsegmentation resizes ADE20K to fit (2048, 512) for crops of 512 × 512

Fit = tuple[int, int] | Literal[False] | None
Colors = Callable[[Tensor], Tensor] | bool | None


class DenseTransform(Normalize):
    """Scales, crops and flips an image and its depth or labels jointly, changes colours, and normalises the image.

    The steps are: fit and scale; `cut_depth`; crop; flip; colours; normalise; pad at the bottom and the right, with 0
    in the normalised image, NaN in depth, 255 in labels. Images are resized bilinearly with antialiasing, maps by
    nearest neighbour. Depth is not divided by the scale. Random numbers come from torch's CPU generator. Defaults
    (None) are those published for the task:

    | | depth | segmentation |
    |---|---|---|
    | recipe | MIM-Depth-Estimation (arXiv 2205.13543), which uses GLPDepth's | mmsegmentation's ADE20K |
    | size | 480 × 480 for NYU-v2, 352 × 352 for KITTI | 512 × 512, also 640 × 640 |
    | fit | False | 4 times the crop's smaller side, and that side |
    | scale | (1, 1) | (0.5, 2) |
    | max_share | 1 | 0.75 |
    | cut_depth | 0.25 | 0 |
    | colors | `DepthColors` | `SegmentationColors` |

    The depth recipe's code differs in two respects. It does not normalise images, and its strips of depth have the
    stored integer, which wraps at 256; here they have depth / max_depth, in grey.

    Args:
        size: height and width of the crop, or one number for both, in pixels.
        task: "depth" or "segmentation".
        fit: resizes the image first, with its aspect ratio, to the largest size that fits (longest, shortest) side in
            pixels. False: no resizing.
        scale: range of a further factor of the size, drawn uniformly.
        max_share: a crop is redrawn, up to 10 times in total, if one class covers at least this share of its labelled
            pixels. 1: crops are never redrawn.
        flip: probability of a horizontal flip.
        cut_depth: probability that a vertical strip of the image is replaced by its depth (vertical CutDepth, arXiv
            2201.07436). 0: never.
        cut_width: largest width of the strip, relative to the distance from its left to the image's right edge.
        max_depth: depth in metres that is white in the strip, such as 10 for NYU-v2; required for `cut_depth`.
        colors: function of (3, h, w) float32 in [0, 1]. False: colours are unchanged. True or None: as published.
        mean, std: mean and standard deviation of the image's channels, ImageNet's by default.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        task: str,
        *,
        fit: Fit = None,
        scale: tuple[float, float] | None = None,
        max_share: float | None = None,
        flip: float = 0.5,
        cut_depth: float | None = None,
        cut_width: float = 0.75,
        max_depth: float | None = None,
        colors: Colors = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(mean, std)
        _check_task(task)
        self.size = _pair(size)
        self.task = task
        segments = task == "segmentation"
        self.fit = _published_fit(self.size, task) if fit is None else fit
        self.scale = ((0.5, 2.0) if segments else (1.0, 1.0)) if scale is None else scale
        self.max_share = (0.75 if segments else 1.0) if max_share is None else max_share
        self.flip = flip
        self.cut_depth = (0.0 if segments else 0.25) if cut_depth is None else cut_depth
        self.cut_width, self.max_depth = cut_width, max_depth
        self.colors = (SegmentationColors() if segments else DepthColors()) if colors in (None, True) else colors
        self._check()

    def _check(self) -> None:
        _check_fit(self.fit)
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"scale is {self.scale}; expected 0 < smallest <= largest")
        for name in ("max_share", "flip", "cut_depth", "cut_width"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        if self.cut_depth and self.task != "depth":
            raise UserError(f"cut_depth is {self.cut_depth}; expected 0 with task {self.task!r}, which has no depth")
        if self.cut_depth and not (self.max_depth is not None and self.max_depth > 0):
            raise UserError(
                f"max_depth is {self.max_depth}; expected the depth in metres that is white in the strips of "
                "cut_depth, such as 10 for NYU-v2 and 80 for KITTI, or cut_depth=0"
            )

    @staticmethod
    def evaluation(
        task: str,
        size: int | tuple[int, int] | None = None,
        *,
        fit: Fit = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> DenseEvaluation:
        """Creates a deterministic transform for batches of one, which leaves the map unchanged. For segmentation, the
        image is fitted as in training.

        Args:
            task: "depth" or "segmentation".
            size: size of the crops in training, from which the published `fit` is computed.
            fit: see `DenseTransform`. None: as published for the task and `size`, or False without `size`.
            mean, std: see `DenseTransform`.
        """
        _check_task(task)
        if fit is None:
            fit = False if size is None else _published_fit(_pair(size), task)
        return DenseEvaluation(fit, mean=mean, std=std)

    def __call__(self, image: Tensor | Any, target: Tensor | Any) -> tuple[tv_tensors.Image, Tensor]:
        """Transforms an image and its map.

        Args:
            image: (3, H, W), uint8 or floating point in [0, 1], or a file.
            target: depth in metres, (1, H, W) floating point, or labels, (H, W) integers, or a file.

        Returns:
            The image, (3, h, w) float32, and the target, (..., h, w), of the same dtype and class.
        """
        image, target = decode(image, target)
        kind = target
        ratio, flip, cut, *strip = torch.rand(5).tolist()
        height, width = scaled(image.shape[-2:], self.fit, self.scale[0] + ratio * (self.scale[1] - self.scale[0]))
        image = _resized(image, height, width)
        if target.shape[-2:] != (height, width):
            target = resample(target, (0, 0, *target.shape[-2:]), (height, width))
        target = target.as_subclass(Tensor)
        top, left = self._draw_crop(target)
        rows, columns = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        image, target = _to_unit(image[..., rows, columns]), target[..., rows, columns]
        if cut < self.cut_depth:
            start = int(strip[0] * width)
            end = start + max(int((width - strip[0] * width) * strip[1] * self.cut_width), 1)
            image = self._with_strip(image, target, max(start - left, 0), max(end - left, 0))
        if flip < self.flip:
            image, target = image.flip(-1), target.flip(-1)
        if self.colors:
            image = self.colors(image)
        image = self._padded(self.normalize(image).as_subclass(Tensor), 0.0)
        target = self._padded(target, math.nan if target.is_floating_point() else IGNORED).contiguous()
        return tv_tensors.Image(image), tv_tensors.wrap(target, like=kind)

    def _draw_crop(self, target: Tensor) -> tuple[int, int]:
        """Draws top and left of the crop. The last attempt is used even if one class dominates it."""
        room = [max(have - want, 0) for have, want in zip(target.shape[-2:], self.size, strict=True)]
        for _ in range(TRIES if self.max_share < 1 else 1):
            top, left = (int(number * (most + 1)) for number, most in zip(torch.rand(2).tolist(), room, strict=True))
            if self.max_share == 1:
                break
            part = target[..., top : top + self.size[0], left : left + self.size[1]]
            counts = torch.bincount(part.reshape(-1), minlength=IGNORED + 1)[:IGNORED]
            if counts.max() < self.max_share * counts.sum():
                break
        return top, left

    def _with_strip(self, image: Tensor, depth: Tensor, start: int, end: int) -> Tensor:
        image = image.clone()
        image[..., start:end] = (depth[..., start:end] / self.max_depth).nan_to_num_(0.0).clamp_(0, 1)
        return image

    def _padded(self, pixels: Tensor, value: float) -> Tensor:
        below, right = (want - have for want, have in zip(self.size, pixels.shape[-2:], strict=True))
        return torch.nn.functional.pad(pixels, (0, right, 0, below), value=value) if below or right else pixels


class DenseEvaluation(Normalize):
    """Normalises the image, after resizing it to `fit` if given, and leaves maps unchanged. See `DenseTransform`."""

    def __init__(
        self,
        fit: Fit = False,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(mean, std)
        _check_fit(fit)
        self.fit = fit

    def __call__(self, image: Tensor | Any, *maps: Tensor | Any) -> tuple[Tensor, ...]:
        image, *maps = decode(image, *maps)
        return self.normalize(_resized(image, *scaled(image.shape[-2:], self.fit))), *maps


def scaled(size: Sequence[int], fit: Fit, factor: float = 1.0) -> tuple[int, int]:
    """Returns height and width of an image of this size after fitting and scaling, rounded as in mmcv."""
    if fit:
        factor *= min(fit[0] / max(size), fit[1] / min(size))
    height, width = (max(int(length * factor + 0.5), 1) for length in size)
    return height, width


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    image = image.as_subclass(Tensor)
    return image if image.shape[-2:] == (height, width) else F.resize_image(image, [height, width], antialias=True)


def _to_unit(image: Tensor) -> Tensor:
    return F.to_dtype_image(image, torch.float32, scale=True)


def _published_fit(size: tuple[int, int], task: str) -> Fit:
    return (LONGEST * min(size), min(size)) if task == "segmentation" else False


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(length, int) and length > 0 for length in pair):
        raise UserError(f"size is {size!r}; expected height and width in pixels")
    return pair


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise UserError(f"task is {task!r}; expected {' or '.join(TASKS)}")


def _check_fit(fit: Fit) -> None:
    if fit is not False and not (len(fit) == 2 and fit[0] >= fit[1] > 0):
        raise UserError(f"fit is {fit!r}; expected the longest and the shortest side in pixels, or False")
