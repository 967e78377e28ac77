"""Colour augmentations of the published recipes for depth and segmentation.

They map an image, (3, H, W) float32 in [0, 1], to one of the same shape, dtype and range. Random numbers come from
torch's CPU generator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

GREY = 1e-6  # a smaller difference between channels is a rounding error, not a hue

Range = tuple[float, float]


class DepthColors:
    """Applies three augmentations, each with probability `p`: contrast and brightness; gamma; hue, saturation and
    value.

    They are those of GLPDepth and MIM-Depth-Estimation, with the defaults of albumentations' RandomBrightnessContrast,
    RandomGamma and HueSaturationValue, except that grey pixels stay grey (OpenCV tints them red when saturation is
    added).

    Args:
        p: probability of each augmentation.
        brightness: largest absolute value that is added to pixels.
        contrast: pixels are multiplied by a factor between 1 - contrast and 1 + contrast.
        gamma: range of the exponent.
        hue: largest rotation of the hue, as a fraction of the circle, at most 0.5.
        saturation, value: largest absolute value that is added to each.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        brightness: float = 0.2,
        contrast: float = 0.2,
        gamma: Range = (0.8, 1.2),
        hue: float = 20 / 180,
        saturation: float = 30 / 255,
        value: float = 20 / 255,
    ) -> None:
        self.p, self.brightness, self.contrast, self.gamma = p, brightness, contrast, gamma
        self.hue, self.saturation, self.value = hue, saturation, value

    def __call__(self, image: Tensor) -> Tensor:
        *chosen, a, b, c, d, e, f = torch.rand(9).tolist()
        exposure, gamma, colour = (number < self.p for number in chosen)
        if exposure:
            image = (image * (1 + _within(a, self.contrast)) + _within(b, self.brightness)).clamp_(0, 1)
        if gamma:
            image = F.adjust_gamma_image(image, self.gamma[0] + c * (self.gamma[1] - self.gamma[0]))
        if colour:
            image = F.adjust_hue_image(image, _within(d, self.hue))
            image = saturate(image, add=_within(e, self.saturation))
            image = add_value(image, _within(f, self.value))
        return image


class SegmentationColors:
    """Changes brightness, contrast, saturation and hue, each with probability `p`. Contrast comes before or after
    saturation and hue, at random.

    This is mmsegmentation's PhotoMetricDistortion without rounding to 8 bits between the steps.

    Args:
        p: probability of each change.
        brightness: largest absolute value that is added to pixels.
        contrast: range of the factor of pixels.
        saturation: range of the factor of the saturation.
        hue: largest rotation of the hue, as a fraction of the circle, at most 0.5.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        brightness: float = 32 / 255,
        contrast: Range = (0.5, 1.5),
        saturation: Range = (0.5, 1.5),
        hue: float = 18 / 180,
    ) -> None:
        self.p, self.brightness, self.contrast, self.saturation, self.hue = p, brightness, contrast, saturation, hue

    def __call__(self, image: Tensor) -> Tensor:
        *chosen, order, a, b, c, d = torch.rand(9).tolist()
        brightness, contrast, saturation, hue = (number < self.p for number in chosen)
        factor = self.contrast[0] + b * (self.contrast[1] - self.contrast[0])
        if brightness:
            image = (image + _within(a, self.brightness)).clamp_(0, 1)
        if contrast and order < 0.5:
            image = F.adjust_brightness_image(image, factor)
        if saturation:
            image = saturate(image, factor=self.saturation[0] + c * (self.saturation[1] - self.saturation[0]))
        if hue:
            image = F.adjust_hue_image(image, _within(d, self.hue))
        if contrast and order >= 0.5:
            image = F.adjust_brightness_image(image, factor)
        return image


def saturate(image: Tensor, factor: float = 1.0, add: float = 0.0) -> Tensor:
    """Multiplies the HSV saturation by `factor` and adds `add`; hue and value are unchanged, and grey stays grey.

    (torchvision's adjust_saturation blends with grey instead, which changes the value.)
    """
    value = image.amax(-3, keepdim=True)
    span = value - image.amin(-3, keepdim=True)
    new_span = (span / value * factor + add).clamp_(0, 1) * value
    ratio = torch.where(span > GREY, new_span / span, 0.0)
    return (value - (value - image) * ratio).clamp_(min=0)  # rounding errors may be below 0


def add_value(image: Tensor, add: float) -> Tensor:
    """Adds `add` to the HSV value, which is the largest channel; hue and saturation are unchanged."""
    value = image.amax(-3, keepdim=True)
    new_value = (value + add).clamp_(0, 1)
    return torch.where(value > 0, image * (new_value / value), new_value)


def _within(number: float, most: float) -> float:
    """Maps [0, 1] to [-most, most]."""
    return (2 * number - 1) * most
