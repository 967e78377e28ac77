"""Predicts images of any size with padding, sliding windows, and the average over an image and its mirror image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast.errors import UserError, by
from sgmim_fast.finetune.encoder import Size
from sgmim_fast.finetune.heads import DenseModel


@torch.no_grad()
def predict(
    model: DenseModel,
    images: Tensor,
    *,
    flip: bool = False,
    window: Size | None = None,
    stride: Size | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Predicts images of any size, without gradients. The caller puts the model into evaluation mode.

    Images, or windows of them, are padded with zeros (the mean colour) at the bottom and the right to a multiple of
    `model.multiple`, and the prediction is cropped. For an encoder of fixed size (`model.fixed_size`, BEiT), larger
    images are split into windows of that size, and smaller ones are padded to it.

    Settings of the published protocols:

    - ADE20K at 512: `window=512, stride=341`, mmsegmentation's two thirds.
    - NYU-v2, 480x640 with a model for 480: `flip=True, window=480, stride=160, transform=...`, the two windows of the
      MIM depth protocol (`--shift_window_test --shift_size 2`).
    - KITTI, 352x1216 with a model for 352: `flip=True, window=352, stride=58, transform=...`, 16 windows. The published
      code has a stride of 57 and does not predict the last 9 columns, which the Garg crop does not evaluate.

    Args:
        model: encoder and head.
        images: (B, 3, H, W), normalised.
        flip: averages the prediction of each window with that of the mirrored window.
        window: side or (height, width) of the windows. None: the whole image.
        stride: distance between windows, or (vertical, horizontal). None: two thirds of the window. Windows start at
            multiples of the stride, and the last one ends with the image, as in mmsegmentation's `slide_inference`.
            Predictions are averaged where windows overlap.
        transform: applied to each prediction (B, outputs, h, w) before any averaging. The depth protocols average
            metres: `lambda raw: to_depth(raw, min_depth, max_depth)`.

    Returns:
        (B, outputs, H, W) float32, the outputs of the model, or of `transform`.

    Raises:
        UserError: the window is not `model.fixed_size`, or the stride leaves gaps between windows.
    """
    size = (images.shape[2], images.shape[3])
    fixed = model.fixed_size
    if window is None:
        window = fixed if fixed is not None else size
    window = to_2tuple(window)
    if fixed is not None and window != fixed:
        raise UserError(f"window is {by(window)}; {model.features.name} takes {by(fixed)} only")
    step = tuple(max(1, side * 2 // 3) for side in window) if stride is None else to_2tuple(stride)
    if not all(0 < one <= side for one, side in zip(step, window, strict=True)):
        raise UserError(f"stride is {by(step)}; expected 1 to the window's {by(window)}")

    total: Tensor | None = None
    for top, bottom in starts_and_ends(size[0], window[0], step[0]):
        for left, right in starts_and_ends(size[1], window[1], step[1]):
            out = _flipped(model, images[:, :, top:bottom, left:right], flip, transform)
            if total is None:
                total = out.new_zeros(out.shape[0], out.shape[1], *size)
                times = out.new_zeros(size)
            total[:, :, top:bottom, left:right] += out
            times[top:bottom, left:right] += 1
    return total / times


def starts_and_ends(length: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yields mmsegmentation's positions of windows along a side. A window that would exceed the image is moved back."""
    for index in range(max(0, -((window - length) // stride)) + 1):
        end = min(index * stride + window, length)
        yield max(end - window, 0), end


def _flipped(model: DenseModel, images: Tensor, flip: bool, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    out = _padded(model, images, transform)
    if flip:
        out = (out + _padded(model, images.flip(3), transform).flip(3)) / 2
    return out


def _padded(model: DenseModel, images: Tensor, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    height, width = images.shape[2:]
    if model.fixed_size is None:
        full = tuple(-(-side // model.multiple) * model.multiple for side in (height, width))
    else:
        full = model.fixed_size
    if full != (height, width):
        images = F.pad(images, (0, full[1] - width, 0, full[0] - height))
    out = model(images)[:, :, :height, :width].float()
    return out if transform is None else transform(out)
