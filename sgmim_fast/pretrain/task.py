"""`sgmim-fast pretrain`: pre-training as a `Task`, evaluated by the losses on held-out pairs and by a linear probe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from sgmim_fast.data import StructureKind, sheet, structure_of
from sgmim_fast.data.seeds import mix
from sgmim_fast.engine import launch, loader, log
from sgmim_fast.engine.command import Command
from sgmim_fast.engine.task import Task
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build, export, initial, pictures, probe
from sgmim_fast.pretrain.build import Drawn
from sgmim_fast.pretrain.config import PRESETS, Config
from sgmim_fast.salience import RATIO


class Pretraining(Task):
    """Pre-training with SG-MIM; without guidance it is SimMIM, or MAE if the encoder sees visible patches alone."""

    config: Config
    command = "pretrain"
    losses = ("loss", "image_loss", "structure_loss")
    tested_each_epoch = True
    held_out: Dataset | None = None  # held-out data for the losses; set by `create_dataset`
    probed: Dataset | None = None  # labelled pairs for the probe; set by `create_dataset`

    @cached_property
    def kind(self) -> StructureKind:
        return build.structure_kind(self.config)

    @property
    def tested(self) -> bool:
        return self.held_out is not None or self.probed is not None

    @property
    def average(self) -> float:
        return self.config.optim.ema

    @property
    def tested_on(self) -> Dataset | None:
        return self.held_out

    def check(self) -> None:
        build.check(self.config)

    def create_model(self) -> SGMIM:
        if self.facts:
            return build.create_model(build.without_initial_weights(self.config))
        model = build.create_model(self.config)
        lines = initial.load(model, self.config) if self.config.model.init is not None else []
        if lines and launch.rank() == 0:
            print(*lines, sep="\n", flush=True)
        return model

    def create_dataset(self) -> Dataset:
        dataset, self.held_out = build.hold_out(self.config, build.create_dataset(self.config))
        self.probed = None if self.config.data.probe is None else probe.create(self.config)
        return dataset

    def create_optimizer(self, model: SGMIM) -> torch.optim.AdamW:
        return build.create_optimizer(model, self.config.optim)

    def learning_rate(self, step: int, steps_per_epoch: int, steps: int, total_batch: int) -> float:
        return build.learning_rate(self.config.optim, step, steps_per_epoch, total_batch)

    @property
    def capturable(self) -> bool:
        """Salience-based masking synchronises, to read the number of masked units."""
        return self.config.mask.masking == "random"

    def draw(self, step: int, images: int, device: torch.device) -> Drawn:
        return build.draw_step(self.config, images, self.config.run.seed, step, device)

    def part(self, drawn: Drawn, first: int, count: int) -> Drawn:
        return drawn.part(first, count)

    def loss(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        drawn: Drawn,
        first: int,
        accelerator: Accelerator,
    ) -> Sequence[Tensor]:
        device = accelerator.device
        images = batch["image"].to(device, non_blocking=True)
        structure, valid = structure_of(batch, device, self.kind)
        drawn = drawn.part(first, len(images))
        with accelerator.autocast():
            mask = build.masks_of(drawn, self.config, accelerator.unwrap_model(model), images)
            return model(images, structure, mask, return_losses=True, structure_valid=valid)

    def shards(self, model: SGMIM) -> Iterable[nn.Module]:
        """Yields the blocks of the encoder, and of the decoder if there is one."""
        encoder = model.encoder.model
        for stage in getattr(encoder, "layers", [encoder]):
            yield from stage.blocks
        if model.decoder is not None:
            yield from model.decoder.blocks

    def evaluate(self, model: SGMIM, accelerator: Accelerator) -> tuple[float, dict[str, float]]:
        """Returns the score, and the losses on held-out data and the probe's metric. The score is the held-out loss, or
        without held-out data 1 - the probe's metric."""
        score, metrics = None, {}
        if self.held_out is not None:
            found = held_out_losses(model, self.held_out, self.config, accelerator)
            score, metrics = found[0], {f"val_{k}": v for k, v in zip(self.losses, found, strict=True)}
        if self.probed is not None:
            metrics |= (found := probe.measure(model, self.probed, self.config, accelerator))
            score = 1 - next(iter(found.values())) if score is None else score
        return score, metrics

    def examples(self, dataset: Dataset, number: int) -> dict[str, Any]:
        """Returns held-out pairs if there are any, else training pairs."""
        return super().examples(self.held_out or dataset, number)

    def draw_picture(self, model: SGMIM, examples: dict[str, Any], accelerator: Accelerator) -> pictures.Panels:
        with accelerator.autocast():
            return pictures.panels(model, examples, self.config, accelerator.device)

    def save_picture(self, found: pictures.Panels, path: Path, title: str) -> None:
        title = f"held out, {title}" if self.held_out is not None else title
        pictures.grid(found, path, title, self.kind, **build.normalisation(self.config))

    def describe(self, model: SGMIM) -> str:
        parameters, encoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, model.encoder))
        return f"{self.config.model.encoder}, {parameters:.1f} M parameters, {encoder:.1f} M of them the encoder's"

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        path = folder / "pairs.png"
        sheet(dataset, path, kind=self.kind, **build.normalisation(self.config))
        return f"{path} shows some pairs"

    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        tests = log.read(folder, log.METRICS)
        log.curves(lines, folder / "losses.png", ("image_loss", "structure_loss"), tests)
        encoder = folder / "encoder.safetensors"
        card = export.export(build.find(folder), encoder)
        last = max((folder / "pictures").glob("*.png"), default=None)
        tests = [line for line in tests if "val_loss" in line]
        first = tests[0] if tests else {}
        fell = ", ".join(
            f"{name.replace('_', ' ')} {first[f'val_{name}']:.4f} after step {first['step']}, now "
            f"{tests[-1][f'val_{name}']:.4f}"
            for name in self.losses[1:]
            if tests
        )
        report = f"on held-out data: {fell}\n" if tests else ""
        return f"{report}wrote {encoder} and {card.name}; see {folder / 'losses.png'} and {last}"


@torch.no_grad()
def held_out_losses(model: SGMIM, dataset: Dataset, config: Config, accelerator: Accelerator) -> Sequence[float]:
    """Computes the total, image and structure loss in evaluation mode, averaged over the images of the data set.

    All processes have to call this function. The masks depend on the seed alone, one for each image.
    """
    batch, device, count = config.optim.batch, accelerator.device, len(dataset)
    rank, processes = accelerator.process_index, accelerator.num_processes
    seed = mix(config.run.seed, "held out")
    drawn = build.draw_step(config, count, seed, 0, device)
    # All processes compute a sharded model together, so one without images left repeats the last batch, uncounted.
    starts = range(rank * batch, math.ceil(count / batch / processes) * processes * batch, processes * batch)
    firsts = [min(start, (count - 1) // batch * batch) for start in starts]
    batches = loader.read(
        dataset,
        min(loader.workers(config.data), len(firsts)),
        batch_sampler=[range(first, min(first + batch, count)) for first in firsts],
        generator=torch.Generator().manual_seed(0),  # keeps the loader from advancing the default generator
    )
    total = torch.zeros(4, device=device)
    training = model.training
    model.eval()
    for start, first, items in zip(starts, firsts, batches, strict=True):
        found = _losses(model, items, drawn.part(first, len(items["image"])), config, accelerator)
        if start == first:
            total += len(items["image"]) * torch.stack([*found, torch.ones_like(found[0])])
    model.train(training)
    *sums, images = accelerator.reduce(total, "sum").tolist()
    return [value / images for value in sums]


def _losses(
    model: SGMIM,
    items: dict[str, Tensor],
    drawn: Drawn,
    config: Config,
    accelerator: Accelerator,
) -> tuple[Tensor, ...]:
    images = items["image"].to(accelerator.device)
    structure, valid = structure_of(items, accelerator.device, build.structure_kind(config))
    with accelerator.autocast():
        mask = build.masks_of(drawn, config, model, images)
        return model(images, structure, mask, return_losses=True, structure_valid=valid)


SHORT = {name: f"data.{name}" for name in ("images", "structure", "shards", "val_images", "val_structure")}
SHORT |= {"init": "model.init", "probe": "data.probe"}
# setting that the user gives -> settings of the preset that it replaces
INSTEAD = {
    "data.images": {"data.scenes": 0, "data.shards": None},
    "data.shards": {"data.scenes": 0, "data.images": None, "data.structure": None},
    "mask.masking=salience": {"mask.ratio": RATIO},
}
COMMAND = Command("pretrain", Config(), PRESETS, SHORT, Pretraining, INSTEAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="folder of training images")
    parser.add_argument(
        "--structure",
        metavar="DIR",
        help="folder of structure maps with the same relative paths; not needed for SimMIM",
    )
    parser.add_argument("--shards", metavar="TARS", help="WebDataset shards, for example 'train-{000..099}.tar'")
    parser.add_argument("--val-images", metavar="DIR", help="folder of validation images, to measure the losses on")
    parser.add_argument(
        "--val-structure",
        metavar="DIR",
        help="structure maps of the validation images; --set data.val=0.02 splits the data instead",
    )
    parser.add_argument(
        "--probe",
        metavar="DIR",
        help="folder with images/ and labels/, to evaluate frozen features with a linear probe",
    )
    parser.add_argument(
        "--init",
        metavar="FILE|timm:NAME|RUN",
        help="initial weights: a checkpoint file, pre-trained weights of timm, or a run",
    )
    COMMAND.add_arguments(parser, "tiny_demo needs no data")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    return COMMAND.execute(args)
