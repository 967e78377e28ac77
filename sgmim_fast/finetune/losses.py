"""Losses for fine-tuning. They compute in float32, are finite without valid pixels, and do not synchronise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-6  # metres, to which smaller predictions are clamped


def silog(prediction: Tensor, target: Tensor, *, lam: float = 0.5, min_depth: float, max_depth: float) -> Tensor:
    """Computes the scale-invariant log error, sqrt(mean(d^2) - lam * mean(d)^2), d = log(prediction) - log(target).

    Means are over all valid pixels of the batch, and the loss is not scaled, as in GLPDepth's `SiLogLoss` (lam 0.5,
    utils/criterion.py), with which the MIM depth protocol trains. (BTS and AdaBins use lam 0.85 and multiply by 10.)

    Args:
        prediction: (B, 1, H, W), metres, clamped to at least 1e-6.
        target: (B, 1, H, W), metres; invalid where NaN or not strictly between min_depth and max_depth.
        lam: with 0 the loss is the root mean square of d, with 1 its standard deviation.
        min_depth, max_depth: range of valid depth, metres.

    Returns:
        float32 scalar; 0 with zero gradients if no pixel is valid, or if all predictions are exact.
    """
    prediction, target = prediction.float(), target.float()
    valid = valid_depth(target, min_depth, max_depth)
    difference = torch.log(prediction.clamp(min=_LEAST)) - torch.log(torch.where(valid, target, 1.0))
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, difference, 0.0).sum() / count
    # mean(d^2) - lam * mean(d)^2, computed from the variance to avoid cancellation
    variance = torch.where(valid, difference - mean, 0.0).square().sum() / count
    square = variance + (1 - lam) * mean.square()
    positive = square > 0  # the gradient of the square root is infinite at 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def valid_depth(target: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Returns the mask of valid depth, strictly in (min_depth, max_depth), as in GLPDepth, BTS and the MIM protocol."""
    return (target > min_depth) & (target < max_depth)  # False for NaN


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Computes the cross-entropy, averaged over the labelled pixels; 0 with zero gradients if there are none.

    (mmsegmentation divides by the number of all pixels, unless `avg_non_ignore` is set.)

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W) int64, `ignore` at unlabelled pixels.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)
