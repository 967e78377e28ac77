"""Pre-training as a `Task`: SGMIM, masks and pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from sgmim_fast.data import StructureKind, sheet, structure_of
from sgmim_fast.engine import log
from sgmim_fast.engine.task import Task
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build, export, held_out, masks, optimizer, pictures
from sgmim_fast.pretrain.config import Config
from sgmim_fast.pretrain.runs import find, trained


class Pretraining(Task):
    """SG-MIM, or SimMIM without its guidance."""

    config: Config
    command = "pretrain"
    losses = ("loss", "image_loss", "structure_loss")
    tested_each_epoch = True
    held_out: Dataset | None = None  # what is tested on; `create_dataset` sets it

    @cached_property
    def kind(self) -> StructureKind:
        return build.structure_kind(self.config)

    @property
    def tested(self) -> bool:
        return self.held_out is not None

    @property
    def tested_on(self) -> Dataset | None:
        return self.held_out

    def check(self) -> None:
        build.check(self.config)
        held_out.check(self.config)

    def create_model(self) -> SGMIM:
        return build.create_model(trained(self.config) if self.facts else self.config)

    def create_dataset(self) -> Dataset:
        dataset, self.held_out = held_out.create(self.config, build.create_dataset(self.config))
        return dataset

    def create_optimizer(self, model: SGMIM) -> torch.optim.AdamW:
        return optimizer.create_optimizer(model, self.config.optim)

    def learning_rate(self, step: int, steps_per_epoch: int, steps: int, total_batch: int) -> float:
        return optimizer.learning_rate(self.config.optim, step, steps_per_epoch, total_batch)

    def draw(self, step: int, images: int, device: torch.device) -> masks.SelectiveMask:
        config = self.config
        return masks.draw(
            config.mask, config.data.size, images, config.run.seed, step, device, stride=config.model.stride
        )

    def part(self, drawn: masks.SelectiveMask, first: int, count: int) -> masks.SelectiveMask:
        return drawn.part(first, count)

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        drawn: masks.SelectiveMask,
        first: int,
        accelerator: Accelerator,
    ) -> Sequence[Tensor]:
        device = accelerator.device
        images = batch["image"].to(device, non_blocking=True)
        structure, valid = structure_of(batch, device, self.kind)
        mask = drawn.part(first, len(images))
        with accelerator.autocast():
            return model(images, structure, mask, return_losses=True, structure_valid=valid)

    def shards(self, model: SGMIM) -> Iterable[nn.Module]:
        """The blocks of the encoder."""
        encoder = model.encoder.model
        for stage in getattr(encoder, "layers", [encoder]):
            yield from stage.blocks

    def evaluate(self, model: SGMIM, accelerator: Accelerator) -> tuple[float, dict[str, float]]:
        """The losses on held-out data."""
        found = held_out.losses(model, self.held_out, self.config, accelerator)
        return found[0], {f"val_{name}": value for name, value in zip(self.losses, found, strict=True)}

    def examples(self, dataset: Dataset, number: int) -> dict[str, Any]:
        """Held-out pairs, where there are some."""
        return super().examples(self.held_out or dataset, number)

    def draw_picture(self, model: SGMIM, examples: dict[str, Any], accelerator: Accelerator) -> pictures.Panels:
        with accelerator.autocast():
            return pictures.panels(model, examples, self.config, accelerator.device)

    def save_picture(self, found: pictures.Panels, path: Path, title: str) -> None:
        pictures.grid(found, path, f"held out, {title}" if self.tested else title, self.kind)

    def describe(self, model: SGMIM) -> str:
        parameters, encoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.encoder))
        return f"{self.config.model.encoder}, {parameters:.1f} M parameters, {encoder:.1f} M of them the encoder's"

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        path = folder / "pairs.png"
        sheet(dataset, path, kind=self.kind)
        return f"{path} shows some pairs"

    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        tests = log.read(folder, log.METRICS)
        pictures.curves(lines, folder / "losses.png", ("image_loss", "structure_loss"), tests)
        encoder = folder / "encoder.safetensors"
        card = export.export(find(folder), encoder)
        last = max((folder / "pictures").glob("*.png"), default=None)
        first = tests[0] if tests else {}
        fell = ", ".join(
            f"{name.replace('_', ' ')} {first[f'val_{name}']:.4f} after step {first['step']}, now "
            f"{tests[-1][f'val_{name}']:.4f}"
            for name in self.losses[1:]
            if tests
        )
        told = f"on held-out data: {fell}\n" if tests else ""
        return f"{told}wrote {encoder} and {card.name}; look at {folder / 'losses.png'} and {last}"
