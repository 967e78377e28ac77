"""One optimizer step: masks and standardisation on the device, forward and backward, clipping, AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from sgmim_fast.data import skipped_names, standardize_valid
from sgmim_fast.model import SGMIM
from sgmim_fast.train import masks
from sgmim_fast.train.build import create_model
from sgmim_fast.train.config import Config
from sgmim_fast.train.optimizer import create_optimizer, learning_rate
from sgmim_fast.train.order import Layout, mix


class Done(NamedTuple):
    """A step that was taken, without waiting for the device."""

    values: Tensor  # (4,) float32 on the device: loss, image loss, structure loss of this process, gradient norm of all
    lr: float
    names: list[str]  # of the images
    skipped: list[str]  # broken files that other images stand in for


class Stepper:
    """Model and optimizer, placed by accelerate, and the step that trains them.

    A step draws its masks and its random numbers (drop path) from the seed and its own number alone, so it does the
    same after any interruption. Where the loss is not finite, every gradient becomes NaN, in all processes, and AdamW
    is told on the device to leave parameters and moments alone: nothing waits for that.

    Raises:
        UserError: the model's settings do not fit together.
    """

    def __init__(self, config: Config, accelerator: Accelerator, layout: Layout, steps_per_epoch: int):
        self.config, self.accelerator, self.layout = config, accelerator, layout
        self.steps_per_epoch = steps_per_epoch
        torch.manual_seed(mix(config.run.seed, 0))
        self.plain: SGMIM = create_model(config).to(accelerator.device)
        self.model: nn.Module = self.plain
        if config.run.fsdp:
            self._shard()
            self.optimizer = accelerator.prepare(create_optimizer(self.plain, config.optim))
        else:
            self.model, self.optimizer = accelerator.prepare(self.plain, create_optimizer(self.plain, config.optim))
        self.model.train()

    def __call__(self, step: int, batches: Iterator[dict[str, Any]]) -> Done:
        """Takes the step of that number, from 0, with the next batches."""
        settings, device, accumulate = self.config.optim, self.accelerator.device, self.layout.accumulate
        seed = self.config.run.seed
        lr = learning_rate(settings, step, self.steps_per_epoch, self.layout.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(mix(seed, 3, step, self.layout.rank))
        mask = masks.draw(self.config.mask, self.config.data.size, self.layout.total, seed, step, device)
        losses, names, skipped = torch.zeros(3, device=device), [], []
        for backward in range(accumulate):
            batch = next(batches)
            names += batch["name"]
            skipped += skipped_names(batch["skipped"])
            own = masks.part(mask, self.layout.first(backward), self.layout.batch)
            with self._sync(backward == accumulate - 1):
                losses += self._backward(batch, own).float() / accumulate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip or torch.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.accelerator.scaler is None:  # a gradient scaler does the same by itself
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Done(torch.cat([losses, norm.float().view(1)]), lr, names, skipped)

    def _backward(self, batch: dict[str, Any], mask: masks.SelectiveMask) -> Tensor:
        device = self.accelerator.device
        images = batch["image"].to(device, non_blocking=True)
        structure, valid = standardize_valid(batch["structure"].to(device, non_blocking=True))
        with self.accelerator.autocast():
            losses = self.model(images, structure, mask, return_losses=True, structure_valid=valid)
        finite = losses.total.detach().isfinite()
        # L1's gradient is a sign, which does not pass an infinite loss on
        poison = torch.where(finite, 1 / self.layout.accumulate, torch.nan)
        self.accelerator.backward(losses.total * poison)
        return torch.stack([loss.detach() for loss in losses])

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over the processes in the last backward of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def _shard(self) -> None:
        """FSDP over all processes: each block of the encoder is gathered by itself, the rest together."""
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        encoder = self.plain.encoder.model
        for stage in getattr(encoder, "layers", [encoder]):
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(self.plain, mesh=mesh)
        register_fsdp_forward_method(self.plain, "predict")
