"""The steps since the last log line: their values stay on the device until the line is due."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sgmim_fast.engine.step import Done


class Window:
    """Collects steps, and brings them to the host in one transfer.

    Attributes:
        in_row: steps without a finite loss up to the last one.
        skipped_steps: of the run, all processes together.
        broken: the files of the run that could not be read, all processes together: name -> reason.
    """

    def __init__(self, accelerator: Accelerator, skipped_steps: int = 0, broken: dict[str, str] | None = None):
        self.accelerator = accelerator
        self.skipped_steps, self.broken, self.in_row = skipped_steps, dict(broken or {}), 0
        self.steps: list[Done] = []
        self.worst: list[str] = []  # images of this process in the last step without a finite loss
        self.pause()

    def pause(self) -> None:
        """What happened since the last window closed does not count as time of the next one."""
        self.begun = time.perf_counter()

    def close(self, stop: bool, limit: int) -> tuple[list[list[float]], float, float, bool, bool]:
        """Averages over the processes, which all have to call it; waits for the device.

        Args:
            stop: this process was asked to stop.
            limit: so many steps in a row without a finite loss are too many.

        Returns:
            the losses and the gradient norm of every step that counted; seconds that a step took; the share of them in
            which the processes waited for data; whether any process was asked to stop; whether the limit was reached.
        """
        values = torch.stack([done.values for done in self.steps])
        new = {name: reason for name, reason in self._skipped().items() if name not in self.broken}
        flags = values.new_zeros(2, values.shape[1])
        waited = sum(done.waited for done in self.steps)
        flags[:, :2] = torch.tensor([[float(stop), float(len(new))], [waited, 0]])
        mean = self.accelerator.reduce(torch.cat([values, flags]), "mean").tolist()
        seconds = (time.perf_counter() - self.begun) / len(self.steps)
        *rows, (stop_share, file_share, *_), (waited, *_) = mean
        waiting = waited / (seconds * len(self.steps))
        if file_share > 0:  # in any process
            for name, reason in gather_object(list(new.items())):
                self.broken.setdefault(name, reason)
        counted, too_many = [], False
        scaled = self.accelerator.scaler is not None  # an overflow is then part of finding the scale
        for done, row in zip(self.steps, rows, strict=True):
            if all(map(math.isfinite, row)):
                counted.append(row)
            else:
                self.skipped_steps += 1
            if all(map(math.isfinite, row[:-1] if scaled else row)):
                self.in_row = 0
                continue
            self.in_row += 1
            self.worst = done.names
            too_many |= self.in_row >= limit
        self.steps = []
        self.pause()
        return counted, seconds, waiting, stop_share > 0, too_many

    def _skipped(self) -> dict[str, str]:
        """Name -> reason of the broken files of the steps, in this process."""
        lines = (line.partition("\t") for done in self.steps for line in done.skipped)
        return {name: reason for name, _, reason in lines}


def mean(rows: Sequence[Sequence[float]], columns: int) -> list[float | None]:
    """Of each column; None without rows."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [None] * columns
