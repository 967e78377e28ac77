"""Losses of fine-tuning. Both compute in float32, are finite without a single valid pixel, and never wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-6  # metres; below it a prediction counts as this


def silog(prediction: Tensor, target: Tensor, *, lam: float = 0.5, min_depth: float, max_depth: float) -> Tensor:
    """Scale-invariant logarithmic error, sqrt(mean(d^2) - lam * mean(d)^2) with d = log(prediction) - log(target).

    Means are over all valid pixels of the batch together, and nothing is scaled: as GLPDepth's `SiLogLoss` (lam 0.5,
    utils/criterion.py), which the MIM depth protocol trains with. (BTS and AdaBins use lam 0.85 and ten times that.)

    Args:
        prediction: (B, 1, H, W) metres, above 0; less than 1e-6 counts as that, so that the logarithm is finite.
        target: the same shape, metres; NaN and what is not strictly between min_depth and max_depth has no value.
        lam: 0 is the root mean square of d, 1 its deviation.

    Returns:
        float32 scalar; 0 with zero gradients where no pixel is valid or all are met exactly.
    """
    prediction, target = prediction.float(), target.float()
    valid = valid_depth(target, min_depth, max_depth)
    difference = torch.log(prediction.clamp(min=_LEAST)) - torch.log(torch.where(valid, target, 1.0))
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, difference, 0.0).sum() / count
    # the same as variance and mean, which does not cancel
    variance = torch.where(valid, difference - mean, 0.0).square().sum() / count
    square = variance + (1 - lam) * mean.square()
    positive = square > 0  # not so without error: the root has no gradient there
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def valid_depth(target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Where a map has a value that counts: strictly between the two, as GLPDepth, BTS and the MIM protocol have it."""
    return (target > min_depth) & (target < max_depth)  # never so for NaN


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Mean over the pixels that have a class; 0 with zero gradients where none has.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W) int64, `ignore` where there is none. mmsegmentation divides by all pixels, ignored ones
            too, unless it is told `avg_non_ignore`.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
