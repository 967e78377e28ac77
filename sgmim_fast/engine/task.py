"""What a run trains: all in which pre-training and fine-tuning differ, for the engine that is the same."""

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
    """A configuration, and what follows from it.

    Args:
        facts: of the checkpoint to go on from, {} at the start.

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
        """Of a run's folder, where the user gives none."""
        return self.config.preset or "run"

    @property
    def capturable(self) -> bool:
        """Whether forward and backward ask the device nothing, so that a CUDA graph can hold them."""
        return True

    @abstractmethod
    def check(self) -> None:
        """Raises UserError where settings are impossible, before anything is built."""

    @abstractmethod
    def create_model(self) -> nn.Module:
        """The model, what is random of it drawn from torch's default generator. Raises UserError."""

    @abstractmethod
    def create_dataset(self) -> Dataset:
        """What is trained on: items with "name" and "skipped". Raises UserError or DataError."""

    @abstractmethod
    def create_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Fused AdamW. A group's "lr_scale", if it has one, multiplies its learning rate."""

    @abstractmethod
    def learning_rate(self, step: int, steps_per_epoch: int, steps: int, total_batch: int) -> float:
        """Of a step, counted from 0 over the whole run of `steps`."""

    def draw(self, step: int, images: int, device: torch.device) -> Any:
        """What is random about a step with so many images, the same in all processes; nothing waits for it."""
        return None

    def part(self, drawn: Any, first: int, count: int) -> Any:
        """Of what `draw` returned for a step, that of `count` images from the `first` on."""
        return drawn

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Any], drawn: Any, first: int, accelerator: Accelerator
    ) -> Sequence[Tensor]:
        """The losses named by `losses`, scalars on the device. The model is called under `accelerator.autocast()`.

        Args:
            batch: collated items, on the CPU.
            drawn: what `draw` returned for the step.
            first: place of the batch's first image among those of the step.
        """

    def shards(self, model: nn.Module) -> Iterable[nn.Module]:
        """The parts that FSDP gathers by themselves, with run.fsdp."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> tuple[float, dict[str, float]]:
        """The score and metrics by name, before every checkpoint that is due, where the task is `tested`. All
        processes call it."""
        raise NotImplementedError

    def examples(self, dataset: Dataset, number: int) -> Any:
        """Something to draw, the same at every call."""
        return loader.examples(dataset, number)

    def facts_of(self, model: nn.Module) -> dict[str, Any]:
        """What checkpoints say about the model besides the configuration; JSON."""
        return {}

    @abstractmethod
    def draw_picture(self, model: nn.Module, examples: Any, accelerator: Accelerator) -> Any:
        """What there is to see of `examples`; `save_picture` takes it. All processes call it with run.fsdp."""

    @abstractmethod
    def save_picture(self, found: Any, path: Path, title: str) -> None: ...

    @abstractmethod
    def describe(self, model: nn.Module) -> str:
        """The model in a few words."""

    @property
    def tested_on(self) -> Dataset | None:
        """What `evaluate` takes."""
        return None

    def dry_run(self, dataset: Dataset, folder: Path) -> str:
        """Draws some of the data set; says what it wrote."""
        return ""

    @abstractmethod
    def finish(self, folder: Path, lines: list[dict[str, Any]]) -> str:
        """What is written after the last step; says so. `lines`: of the log."""
