"""Joint transforms of images and structure maps for pre-training (docs/SPEC.md, "Published recipes")."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.data.pair import resample
from sgmim_fast.data.structure_file import StructureFile

TRIES = 10  # number of attempts to draw a crop that fits, as in torchvision


class Normalize:
    """Converts the image to float32 in [0, 1], subtracts `mean` and divides by `std`. Leaves maps unchanged.

    This is the default transform of data sets.
    """

    def __init__(
        self, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
    ) -> None:
        self.mean, self.std = torch.tensor([list(mean), list(std)])[..., None, None]  # (3, 1, 1) each

    def __call__(self, image: Tensor | ImageFile, *maps: Tensor | StructureFile) -> tuple[Tensor, ...]:
        image, *maps = decode(image, *maps)
        return self.normalize(image.as_subclass(Tensor)), *maps

    def normalize(self, image: Tensor) -> tv_tensors.Image:
        """Normalises (3, H, W), uint8 or floating point in [0, 1]. Returns contiguous float32."""
        full_scale = 1 if image.is_floating_point() else 255
        image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return tv_tensors.Image(image.sub_(self.mean * full_scale).div_(self.std * full_scale))


def decode(*files: Tensor | ImageFile | StructureFile) -> list[Tensor]:
    """Decodes the files among the arguments, and returns tensors unchanged."""
    return [file if isinstance(file, Tensor) else file.decode() for file in files]


def transformed(
    transform: Callable[..., Sequence[Tensor]], image: ImageFile | Tensor, *maps: StructureFile | Tensor
) -> Sequence[Tensor]:
    """Applies a transform to an image and its maps. `Normalize` and its subclasses are given files, which they decode
    as needed; other transforms are given tensors."""
    if isinstance(transform, Normalize):
        return transform(image, *maps)
    image, *maps = decode(image, *maps)
    found = transform(tv_tensors.Image(image), *maps)
    return (found,) if isinstance(found, Tensor) else found


class PairTransform(Normalize):
    """Crops and flips an image and its maps jointly at random, resizes them to size × size, and normalises the image.

    The image is resized bilinearly with antialiasing, maps by nearest neighbour (see `Structure`). A map may have
    another resolution than its image. Random numbers come from torch's CPU generator. Image files are decoded after
    the crop is drawn, at the smallest scale at which the crop is not smaller than the result.

    Args:
        size: pixels along each side of the result.
        scale: range of the crop's area, relative to the image's.
        ratio: range of the crop's aspect ratio, width / height.
        flip: probability of a horizontal flip.
        mean, std: mean and standard deviation of the image's channels, ImageNet's by default.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.67, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size is {size!r}; expected a positive number of pixels")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {scale}; expected 0 < smallest <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio is {ratio}; expected 0 < smallest <= largest")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip}; expected a probability")
        super().__init__(mean, std)
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self._middle = False  # see `evaluation`

    @classmethod
    def evaluation(
        cls, size: int, *, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
    ) -> PairTransform:
        """Creates a deterministic transform, which crops the largest central square and resizes it."""
        transform = cls(size, mean=mean, std=std)
        transform._middle = True
        return transform

    def __call__(self, image: Tensor | ImageFile, *maps: Tensor | StructureFile) -> tuple[Tensor, ...]:
        """Transforms an image and its maps.

        Args:
            image: (3, H, W), uint8 or floating point in [0, 1], or a file.
            maps: (..., h, w) of any dtype, such as structure and labels, or files.

        Returns:
            The image, (3, size, size) float32, and the maps, (..., size, size).
        """
        height, width = image.size if isinstance(image, ImageFile) else image.shape[-2:]
        (top, left, bottom, right), flipped = self._draw(height, width)
        if isinstance(image, ImageFile):
            image = image.decode(min(1.0, max(self.size / (bottom - top), self.size / (right - left))))
            # The decoded image may be smaller. Round the box outwards to whole pixels; maps are cropped to this box.
            down, across = image.shape[-2] / height, image.shape[-1] / width
            height, width = image.shape[-2:]
            top, bottom = math.floor(top * down), min(math.ceil(bottom * down), height)
            left, right = math.floor(left * across), min(math.ceil(right * across), width)
        box = (top, left, bottom - top, right - left)
        # A plain tensor, since each operation on a tv_tensor costs tens of microseconds more.
        part = image.as_subclass(Tensor)[:, top:bottom, left:right]
        image = F.resize_image(part, [self.size, self.size], antialias=True)
        cut = []
        for pixels in maps:
            map_height, map_width = pixels.size if isinstance(pixels, StructureFile) else pixels.shape[-2:]
            down, across = map_height / height, map_width / width
            scaled = [length * scale for length, scale in zip(box, (down, across, down, across), strict=True)]
            take = pixels.resample if isinstance(pixels, StructureFile) else functools.partial(resample, pixels)
            cut.append(take(scaled, self.size))
        if flipped:
            image, cut = image.flip(-1), [F.horizontal_flip(pixels) for pixels in cut]
        return self.normalize(image), *cut

    def _draw(self, height: int, width: int) -> tuple[tuple[int, int, int, int], bool]:
        """Draws the top, left, bottom and right of the crop, and whether to flip.

        The crop has the distribution of torchvision's RandomResizedCrop. Calling the generator once instead of a dozen
        times saves up to a tenth of the time of an item.
        """
        if self._middle:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            return (top, left, top + side, left + side), False
        flip, down, across, *numbers = torch.rand(3 + 2 * TRIES).tolist()
        for a, b in zip(numbers[::2], numbers[1::2], strict=True):
            area = height * width * (self.scale[0] + a * (self.scale[1] - self.scale[0]))
            ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** b
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                break
        else:  # the largest central crop of a permitted aspect ratio
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            crop_height, crop_width = min(height, round(width / ratio)), min(width, round(height * ratio))
            down = across = 0.5
        top, left = int(down * (height - crop_height + 1)), int(across * (width - crop_width + 1))
        return (top, left, top + crop_height, left + crop_width), flip < self.flip
