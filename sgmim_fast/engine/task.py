"""The interface between the training engine and a kind of training: pre-training or fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from sgmim_fast.engine import loader


class Task(ABC):
    """What one kind of training defines: model, data, optimizer, losses and evaluation, all made from a configuration.

    Args:
        facts: metadata of the checkpoint that is resumed; {} at the start.

    Attributes:
        config: with the sections optim (epochs, batch, accumulate, clip), data (workers) and run
            (`sgmim_fast.engine.settings.Run`).
        command: of `sgmim-fast`, by which a run is known when it is read again.
        losses: names of what `loss` returns; the first one is minimised.
        tested: whether `evaluate` gives a checkpoint's score, the lower the better; otherwise the loss is it.
        tested_each_epoch: whether that is done after every epoch too.
        average: see `engine.average.Average`.
    """

    command: str
    losses: tuple[str, ...] = ("loss",)
    tested = False
    tested_each_epoch = False
    average = 0.0  # decay of the parameters' moving average; 0: none

    def __init__(self, config: Any, facts: dict[str, Any] | None = None) -> None:
        self.config, self.facts = config, facts or {}

    @property
    def name(self) -> str:
        """Default name of the run's folder."""
        return self.config.preset or "run"

    @property
    def capturable(self) -> bool:
        """Whether forward and backward ask the device nothing, so that a CUDA graph can hold them."""
        return True

    @abstractmethod
    def check(self) -> None:
        """Raises UserError for invalid settings, before anything is built."""

    @abstractmethod
    def create_model(self) -> nn.Module:
        """Creates the model; initialisation uses torch's default generator. Raises UserError."""

    @abstractmethod
    def create_dataset(self) -> Dataset:
        """Creates the training data set, whose items have "name" and "skipped". Raises UserError or DataError."""

    @abstractmethod
    def create_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Creates a fused AdamW. A parameter group's optional "lr_scale" multiplies its learning rate."""

    @abstractmethod
    def learning_rate(self, step: int, steps_per_epoch: int, steps: int, total_batch: int) -> float:
        """The learning rate of a step, counted from 0, in a run of `steps`."""

    def draw(self, step: int, images: int, device: torch.device) -> Any:
        """Draws what is random about a step of `images` images, identically in all processes, without synchronising."""
        return None

    def part(self, drawn: Any, first: int, count: int) -> Any:
        """The part of `draw`'s result that belongs to `count` images from `first` on."""
        return drawn

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Any], drawn: Any, first: int, accelerator: Accelerator
    ) -> Sequence[Tensor]:
        """Computes the losses named by `losses`, scalars on the device. Calls the model under `accelerator.autocast()`.

        Args:
            batch: collated items, on the CPU.
            drawn: the result of `draw` for the step.
            first: index of the batch's first image among those of the step.
        """

    def shards(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules that FSDP shards as units of their own, with run.fsdp."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> tuple[float, dict[str, float]]:
        """Returns score and metrics. Called by all processes before each checkpoint if the task is `tested`."""
        raise NotImplementedError

    def examples(self, dataset: Dataset, number: int) -> Any:
        """Items to draw, the same at every call."""
        return loader.examples(dataset, number)

    def facts_of(self, model: nn.Module) -> dict[str, Any]:
        """Metadata of the model for checkpoints, beside the configuration; serialisable as JSON."""
        return {}

    @abstractmethod
    def draw_picture(self, model: nn.Module, examples: Any, accelerator: Accelerator) -> Any:
        """Predictions for `examples`, for `save_picture`. With run.fsdp, all processes call it."""

    @abstractmethod
    def save_picture(self, found: Any, path: Path, title: str) -> None: ...

    @abstractmethod
    def describe(self, model: nn.Module) -> str:
        """A short description of the model."""

    @property
    def tested_on(self) -> Dataset | None:
        """The data set that `evaluate` uses."""
        return None

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        """Draws some items of the data set; returns a message that names the file."""
        return ""

    @abstractmethod
    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        """Writes the run's results after the last step; returns a message. `lines`: the log."""
