"""Losses of fine-tuning. They compute in float32, are finite without valid pixels, and do not synchronise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-6  # metres; smaller predictions are clamped to it


def silog(prediction: Tensor, target: Tensor, *, lam: float = 0.5, min_depth: float, max_depth: float) -> Tensor:
    """Scale-invariant logarithmic error, sqrt(mean(d^2) - lam * mean(d)^2) with d = log(prediction) - log(target).

    Means are over all valid pixels of the batch, without a scale: as in GLPDepth's `SiLogLoss` (lam 0.5,
    utils/criterion.py), which the MIM depth protocol trains with. (BTS and AdaBins use lam 0.85 and ten times that.)

    Args:
        prediction: (B, 1, H, W) metres, clamped to at least 1e-6.
        target: the same shape, metres; invalid where NaN or not strictly between min_depth and max_depth.
        lam: 0 gives the root mean square of d, 1 its standard deviation.

    Returns:
        float32 scalar; 0 with zero gradients if no pixel is valid, or if all predictions are exact.
    """
    prediction, target = prediction.float(), target.float()
    valid = valid_depth(target, min_depth, max_depth)
    difference = torch.log(prediction.clamp(min=_LEAST)) - torch.log(torch.where(valid, target, 1.0))
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, difference, 0.0).sum() / count
    # by the variance, which avoids cancellation
    variance = torch.where(valid, difference - mean, 0.0).square().sum() / count
    square = variance + (1 - lam) * mean.square()
    positive = square > 0  # the square root has no gradient at 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def valid_depth(target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Mask of valid depth: strictly between min_depth and max_depth, as in GLPDepth, BTS and the MIM protocol."""
    return (target > min_depth) & (target < max_depth)  # False for NaN


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Cross-entropy, averaged over the labelled pixels; 0 with zero gradients if there are none.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W) int64, `ignore` at unlabelled pixels. (mmsegmentation divides by all pixels, unless
            `avg_non_ignore` is set.)
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
