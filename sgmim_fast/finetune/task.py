"""`sgmim-fast finetune`: fine-tuning on depth or segmentation as a `Task`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from sgmim_fast.engine import loader, log
from sgmim_fast.engine.command import Command
from sgmim_fast.engine.task import Task
from sgmim_fast.finetune import build, pictures
from sgmim_fast.finetune.config import PRESETS, Config
from sgmim_fast.finetune.heads import DenseModel, to_depth
from sgmim_fast.finetune.inference import predict
from sgmim_fast.finetune.losses import cross_entropy, silog


class Finetuning(Task):
    """Fine-tuning on depth with the SiLog loss, or on segmentation with cross-entropy.

    It is evaluated before every checkpoint. The score of a checkpoint is the RMSE, or 1 - mIoU.
    """

    config: Config
    command = "finetune"
    tested = True

    @property
    def name(self) -> str:
        return f"{self.config.preset or 'finetune'}_{self.config.data.task}"

    def check(self) -> None:
        build.check(self.config)

    @cached_property
    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """Mean and standard deviation with which images are normalised, in training and evaluation."""
        return build.normalisation(self.config, self.facts.get("encoder"))

    @cached_property
    def test_set(self) -> Dataset:
        """The data set for evaluation."""
        return build.create_dataset(self.config, False, self.normalisation)

    @property
    def tested_on(self) -> Dataset:
        return self.test_set

    @cached_property
    def train_set(self) -> Dataset:
        return build.create_dataset(self.config, True, self.normalisation)

    def create_dataset(self) -> Dataset:
        """Creates the training set. Also creates the test set, so that its errors are raised before training."""
        _ = self.test_set
        return self.train_set

    @cached_property
    def range(self) -> tuple[float, float]:
        """Smallest and largest depth in metres."""
        return build.depth_range(self.config, self.test_set)

    def create_model(self) -> DenseModel:
        outputs = 1 if self.config.data.task == "depth" else self.test_set.classes
        return build.create_model(self.config, outputs, self.facts.get("encoder"))

    def facts_of(self, model: DenseModel) -> dict[str, Any]:
        return {"encoder": build.describe_encoder(model.features) | self.normalisation}

    def create_optimizer(self, model: DenseModel) -> torch.optim.AdamW:
        settings = self.config.optim
        layer_decay = 0.0 if self.config.model.freeze else settings.layer_decay
        groups = build.param_groups(model, settings.weight_decay, layer_decay)
        return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)

    def learning_rate(self, step: int, steps_per_epoch: int, steps: int, total_batch: int) -> float:
        return build.learning_rate(self.config.optim, step, steps, steps_per_epoch)

    def loss(
        self, model: nn.Module, batch: dict[str, Any], drawn: None, first: int, accelerator: Accelerator
    ) -> Sequence[Tensor]:
        device = accelerator.device
        with accelerator.autocast():
            raw = model(batch["image"].to(device, non_blocking=True))
        if self.config.data.task == "segmentation":
            return [cross_entropy(raw, batch["labels"].to(device, non_blocking=True))]
        low, high = self.range
        depth = batch["depth"].to(device, non_blocking=True)
        return [silog(to_depth(raw, low, high), depth, min_depth=low, max_depth=high)]

    def predict(self, model: DenseModel, images: Tensor, size: Sequence[int], accelerator: Accelerator) -> Tensor:
        """Predicts metres, (B, 1, *size), or logits, (B, classes, *size), for images (B, 3, H, W) on any device."""
        settings = self.config.evaluation
        window = tuple(self.config.data.size) if settings.slide else None
        depth = self.config.data.task == "depth"
        with accelerator.autocast():
            found = predict(
                model,
                images.to(accelerator.device),
                flip=settings.flip,
                window=window,
                stride=settings.stride if settings.slide else None,
                transform=(lambda raw: to_depth(raw, *self.range)) if depth else None,
            )
        if found.shape[2:] == torch.Size(size):
            return found
        return nn.functional.interpolate(found, tuple(size), mode="bilinear", align_corners=False)

    def target(self, item: dict[str, Any]) -> Tensor:
        """Returns the ground truth of an item or a batch: depth in metres, (..., 1, H, W), or labels, (..., H, W)."""
        return item["depth" if self.config.data.task == "depth" else "labels"]

    @torch.no_grad()
    def evaluate(
        self, model: DenseModel, accelerator: Accelerator, images: int | None = None, progress: bool = False
    ) -> tuple[float, dict[str, float]]:
        """Returns the score and the metrics over `images` evenly spaced images of the test set; None: as many as the
        configuration has for checkpoints. All processes have to call this method."""
        dataset, metrics = self.test_set, build.create_metrics(self.config, self.test_set).to(accelerator.device)
        chosen = loader.spread(len(dataset), images or self.config.evaluation.images or len(dataset))
        own = Subset(dataset, chosen[accelerator.process_index :: accelerator.num_processes])
        training = model.training
        model.eval()
        # Images may differ in size, so each batch has one.
        batches = loader.read(own, loader.workers(self.config.data), batch_size=1)
        for batch in tqdm(batches, "evaluating", len(own), unit="image", disable=not progress):
            target = self.target(batch)
            metrics.update(
                self.predict(model, batch["image"], target.shape[-2:], accelerator), target.to(accelerator.device)
            )
        model.train(training)
        found = build.plain(metrics.compute())
        score = found["rmse"] if self.config.data.task == "depth" else 1 - found["mIoU"]
        return score, found

    def examples(self, dataset: Dataset, number: int) -> list[dict[str, Any]]:
        """Returns evenly spaced items of the test set, which may differ in size."""
        return [self.test_set[index] for index in loader.spread(len(self.test_set), number)]

    @torch.no_grad()
    def draw_picture(
        self, model: DenseModel, examples: list[dict[str, Any]], accelerator: Accelerator
    ) -> list[pictures.Panel]:
        training = model.training
        model.eval()
        found = []
        for item in examples:
            target = self.target(item)
            guess = self.predict(model, item["image"][None], target.shape[-2:], accelerator)[0].cpu()
            found.append(pictures.Panel(item["image"], guess, target))
        model.train(training)
        return found

    def save_picture(self, found: list[pictures.Panel], path: Path, title: str) -> None:
        classes = None if self.config.data.task == "depth" else self.test_set.classes
        pictures.grid(found, path, title, classes, **self.normalisation)

    def describe(self, model: DenseModel) -> str:
        settings, features = self.config, model.features
        whole, encoder = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, features))
        return "\n".join(
            [
                f"{features.name} with the head {settings.model.head} for {settings.data.task}, "
                f"{whole:.1f} M parameters, {encoder:.1f} M of them the encoder's",
                f"{len(self.train_set)} images to train on, {len(self.test_set)} to test on",
                *filter(None, [build.padding(settings, self.train_set)]),
                *features.notes,
            ]
        )

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        path = folder / "items.png"
        items = [dataset[index] for index in loader.spread(len(dataset), 6)]
        panels = [pictures.Panel(item["image"], None, self.target(item)) for item in items]
        self.save_picture(panels, path, "items to train on")
        return f"{path} shows some of the {len(dataset)} items to train on"

    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        log.curves(lines, folder / "losses.png", ("loss",))
        last = log.read(folder, log.METRICS)[-1]
        values = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step")
        drawn = max((folder / "pictures").glob("*.png"), default=None)
        return f"tested after the last step: {values}; see {folder / 'losses.png'} and {drawn}"


# option -> (setting that it sets, metavar, help)
OPTIONS = {
    "encoder": ("model.encoder", "RUN|FILE|NAME", "finished run of pretrain, exported file, or name of a timm model"),
    "head": ("model.head", "HEAD", "decoder head: deconv, dpt or upernet"),
    "source": ("data.source", "NAME", "data set: nyu, kitti, ade20k, folders or scenes"),
    "root": ("data.root", "DIR", "folder of the data set, for the sources nyu, kitti and ade20k"),
    "images": ("data.images", "DIR", "folder of training images, for the source folders"),
    "maps": ("data.maps", "DIR", "folder of depth or label maps with the same relative paths as the training images"),
    "test_images": ("data.test_images", "DIR", "folder of test images"),
    "test_maps": ("data.test_maps", "DIR", "folder of depth or label maps of the test images"),
    "classes": ("data.classes", "N", "number of classes in the label maps, for the source folders"),
}
SHORT = {"task": "data.task"} | {name: setting for name, (setting, _, _) in OPTIONS.items()}
INSTEAD = {"data.images": {"data.source": "folders"}}  # setting that the user gives -> the preset's that it replaces
COMMAND = Command("finetune", Config(), PRESETS, SHORT, Finetuning, INSTEAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["depth", "segmentation"], help="task to train on")
    for name, (_, metavar, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=what)
    COMMAND.add_arguments(parser, "tiny_demo needs no data")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    return COMMAND.execute(args)
