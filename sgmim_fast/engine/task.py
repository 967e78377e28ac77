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
    """Base class of a kind of training: defines model, data, optimizer, losses and evaluation from a configuration.

    Args:
        config: configuration with the sections optim (epochs, batch, accumulate, clip), data (workers) and run
            (`sgmim_fast.engine.settings.Run`).
        facts: metadata of the checkpoint to resume from; None: the training starts.

    Attributes:
        command: name of the subcommand of `sgmim-fast`, stored in checkpoints.
        losses: names of the losses that `loss` returns; the first one is minimised.
        tested: whether `evaluate` computes the score of checkpoints, lower is better; otherwise the loss is the score.
        tested_each_epoch: whether to evaluate after every epoch, too.
        average: decay of the moving average, see `engine.average.Average`.
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
        """Whether a CUDA graph can capture forward and backward, i.e. they do not synchronise."""
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
        """Returns the learning rate of a step, counted from 0, in a run of `steps`."""

    def draw(self, step: int, images: int, device: torch.device) -> Any:
        """Draws the random values (masks) of a step with `images` images, the same in all processes.

        Must not synchronise."""
        return None

    def part(self, drawn: Any, first: int, count: int) -> Any:
        """Returns the part of `draw`'s result that belongs to `count` images from `first` on."""
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
        """Returns the modules that FSDP shards as separate units, with run.fsdp."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> tuple[float, dict[str, float]]:
        """Returns score and metrics. Called by all processes before each checkpoint if the task is `tested`."""
        raise NotImplementedError

    def examples(self, dataset: Dataset, number: int) -> Any:
        """Returns items for pictures, the same at every call."""
        return loader.examples(dataset, number)

    def facts_of(self, model: nn.Module) -> dict[str, Any]:
        """Returns metadata of the model for checkpoints, besides the configuration; serialisable as JSON."""
        return {}

    @abstractmethod
    def draw_picture(self, model: nn.Module, examples: Any, accelerator: Accelerator) -> Any:
        """Returns predictions for `examples`, for `save_picture`. With run.fsdp, all processes call it."""

    @abstractmethod
    def save_picture(self, found: Any, path: Path, title: str) -> None: ...

    @abstractmethod
    def describe(self, model: nn.Module) -> str:
        """Returns a short description of the model."""

    @property
    def tested_on(self) -> Dataset | None:
        """The data set that `evaluate` uses."""
        return None

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        """Draws some items of the data set; returns a message that names the file."""
        return ""

    @abstractmethod
    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        """Writes the run's results after the last step; returns a message. `lines` are those of the log."""
