"""The learning rate of every step of a fine-tuning."""

from __future__ import annotations

import math

from sgmim_fast.finetune.config import Optim


def learning_rate(settings: Optim, step: int, steps: int, steps_per_epoch: int) -> float:
    """Of a step, counted from 0, of a run of `steps`.

    "triangle" rises from `min_lr` to `lr` over half of the run and falls back, as (share of that half)**power: what
    "Revealing the Dark Secrets of Masked Image Modeling" (arXiv 2205.13543) fine-tunes depth with. "poly" falls from
    `lr` as (1 - share of the run)**power, as mmsegmentation has it, "cosine" as half a cosine; both end at `min_lr` and
    may have a linear warm-up from 0 in front, which they count from the first step of the run on.
    """
    low, high = settings.min_lr, settings.lr
    if settings.schedule == "triangle":
        half = max(1.0, steps / 2)
        if step < half:
            return low + (high - low) * (step / half) ** settings.power
        return high - (high - low) * min(1.0, step / half - 1) ** settings.power
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    share = step / steps
    if settings.schedule == "poly":
        rate = low + (high - low) * (1 - share) ** settings.power
    else:
        rate = low + 0.5 * (high - low) * (1 + math.cos(math.pi * share))
    return rate * (step + 1) / (warmup + 1) if step < warmup else rate
