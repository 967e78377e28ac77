"""AdamW, its parameter groups, and the learning rate of every step. docs/SPEC.md "Published recipes"."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from timm.optim import param_groups_weight_decay

from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain.config import Optim


def create_optimizer(model: SGMIM, settings: Optim) -> torch.optim.AdamW:
    """Fused AdamW. No weight decay on vectors, biases, mask and class token, positions and position tables."""
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=model.no_weight_decay())
    return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)


def learning_rate(settings: Optim, step: int, steps_per_epoch: int, total_batch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run.

    Rates are those of `settings` times total_batch / 512, the warm-up's and the last one too. Warm-up is linear in the
    step; behind it cosine is where it would be without warm-up, as in timm's `CosineLRScheduler` and SimMIM.

    Args:
        steps_per_epoch: optimizer steps of an epoch.
        total_batch: images of a step, over all processes and accumulated backwards.
    """
    scale = total_batch / 512
    high, low, start = scale * settings.lr, scale * settings.min_lr, scale * settings.warmup_lr
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + step * (high - start) / warmup
    if settings.schedule == "multistep":
        milestones = [round(epoch * steps_per_epoch) for epoch in settings.milestones]
        return high * settings.gamma ** bisect_right(milestones, step)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / round(settings.epochs * steps_per_epoch)))
