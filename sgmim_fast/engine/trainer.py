"""The training loop: steps, and between them what is logged, drawn and saved."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch.utils.data import Dataset

import sgmim_fast
from sgmim_fast.engine import checkpoint, loader, log
from sgmim_fast.engine.checkpoint import Saved
from sgmim_fast.engine.launch import StopSignals
from sgmim_fast.engine.loader import Layout
from sgmim_fast.engine.step import Stepper, Window, mean
from sgmim_fast.engine.task import Task
from sgmim_fast.errors import UserError
from sgmim_fast.memory import keep_freed_memory


class Trainer:
    """One run, from its first step or from a checkpoint.

    Args:
        task: what is trained.
        run: the run's folder, which exists.
        saved: the checkpoint to go on from, or None.

    Raises:
        UserError: something in the configuration does not fit the data or the machine.
    """

    def __init__(self, task: Task, run: Path, accelerator: Accelerator, dataset: Dataset, saved: Saved | None):
        self.task, self.config, self.run, self.accelerator, self.dataset = task, task.config, run, accelerator, dataset
        optim, count = task.config.optim, accelerator.num_processes
        if task.config.run.tensorboard:
            log.board_writer()  # raises at once, not behind the first step
        if task.config.run.wandb is not None:
            log.wandb_module()
        self.layout = Layout(optim.batch, optim.accumulate, count, accelerator.process_index)
        if hasattr(dataset, "check_parts"):  # of shards
            dataset.check_parts(count, max(1, loader.workers(task.config.data)))
        self.steps_per_epoch = loader.steps_per_epoch(task.config.data, dataset, self.layout)
        self.stepper = Stepper(task, accelerator, self.layout, self.steps_per_epoch)
        self.steps = self.stepper.steps
        facts = saved.facts if saved else {}
        self.done = facts.get("step", 0)
        self.window = Window(accelerator, facts.get("skipped_steps", 0), log.read_skipped(run) if saved else None)
        self.since_checkpoint: list[list[float]] = []  # values of its steps
        if saved:
            raw = self.stepper.optimizer.optimizer
            parts = checkpoint.read(saved.path, "model"), checkpoint.read(saved.path, "optimizer")
            checkpoint.restore(self.stepper.model, raw, *parts)
            self.stepper.average.restore(saved.path)
            if accelerator.scaler is not None and facts.get("scaler"):
                accelerator.scaler.load_state_dict(facts["scaler"])
        self.log: log.Log | None = None
        self.graphs = 0  # CUDA graphs of the step, at the last log line

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    def train(self) -> str:
        """Trains to the end, or to the signal that stops it, whose name is returned ("" at the end).

        Raises:
            UserError: a checkpoint cannot be written, or too many steps in a row have no finite loss.
        """
        config, main = self.config.run, self.accelerator.is_main_process
        if main:
            self.log = log.Log(self.run, self.steps, self.done, config.tensorboard, self.task.losses, config.wandb)
        examples = self.task.examples(self.dataset, config.pictures)
        pin, each = self.accelerator.device.type == "cuda", loader.workers(self.config.data)
        batches = loader.batches(
            *(self.dataset, self.layout, config.seed, self.done, self.steps_per_epoch), workers=each, pin=pin
        )
        alone = self.accelerator.num_processes == 1
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        try:
            with StopSignals() as signals:
                self.window.pause()
                while not self.finished:
                    self._step(batches)
                    log_due, save_due, draw_due = (
                        self.finished or (every and self.done % every == 0)
                        for every in (config.log_every, config.checkpoint_every, config.pictures_every)
                    )
                    test_due = self.task.tested and (
                        save_due or (self.task.tested_each_epoch and self.done % self.steps_per_epoch == 0)
                    )
                    # several processes can only agree on stopping where they talk to each other
                    asked = bool(signals.asked) and alone
                    if not (log_due or save_due or draw_due or test_due or asked):
                        continue
                    asked = self._close_window(bool(signals.asked))
                    score = self._evaluate() if test_due else None
                    if save_due or asked:
                        self._save(score)
                    if draw_due:
                        self._draw(examples)
                    if asked and not self.finished:
                        return signals.asked or "a signal to another process"
                    self.window.pause()
        finally:
            del batches  # ends its workers
            if self.log is not None:
                self.log.close()
        return ""

    def _step(self, batches: Any) -> None:
        done = self.stepper(self.done, batches)
        self.window.steps.append(done)
        self.done += 1
        if self.log is not None:
            self.log.steps_done(self.done)

    def _close_window(self, stop: bool) -> bool:
        """Writes the log line; returns whether any process was asked to stop."""
        lr = self.window.steps[-1].lr
        known = len(self.window.broken)
        rows, seconds, waiting, stop, too_many = self.window.close(stop, self.config.run.nonfinite)
        if self.log is not None and len(self.window.broken) > known:
            log.write_skipped(self.run, self.window.broken)
        self.since_checkpoint += rows
        graphs = self.stepper.captured.captures if self.stepper.captured is not None else 0
        if self.log is not None:
            if graphs and not self.graphs:
                self.log.say("forward and backward run as a CUDA graph from here on")
            self.log.window(
                {
                    "step": self.done,
                    "epoch": round(self.done / self.steps_per_epoch, 4),
                    "lr": lr,
                    **self._means(rows),
                    "images_per_second": round(self.layout.total / seconds, 2),
                    "waiting": round(waiting, 4),  # share of the time, for data
                    "graphs": graphs,  # captured so far, one more for another shape
                    "memory_gib": round(log.memory(self.accelerator.device), 3),
                    "skipped_steps": self.window.skipped_steps,
                    "skipped_files": len(self.window.broken),
                    "seconds_left": round((self.steps - self.done) * seconds, 1),
                    "time": round(time.time(), 1),
                }
            )
        self.graphs = graphs
        if too_many:
            self._give_up()
        return stop

    def _give_up(self) -> None:
        names = gather_object(self.window.worst)
        path = self.run / "nonfinite.txt"
        if self.accelerator.is_main_process:
            path.write_text("".join(f"{name}\n" for name in names))
        raise UserError(
            f"{self.window.in_row} steps in a row up to step {self.done} had no finite loss or gradient, and were left "
            f"out; the last one's images ({path} has all {len(names)}): {', '.join(names[:8])}"
        )

    def _means(self, rows: list[list[float]]) -> dict[str, float | None]:
        names = (*self.task.losses, "grad_norm")
        return dict(zip(names, mean(rows, len(names)), strict=True))

    def _evaluate(self) -> float:
        """The score of the model as it is, which is logged."""
        for statistics in self.stepper.statistics():  # of batch norms: what the first process saves is what is tested
            statistics.copy_(broadcast(statistics))
        with self.stepper.average.in_place():
            score, metrics = self.task.evaluate(self.stepper.plain, self.accelerator)
        if self.log is not None:
            self.log.metrics(self.done, metrics)
        return score

    def _save(self, score: float | None) -> None:
        tensors = checkpoint.gather(self.stepper.model, self.stepper.optimizer.optimizer) | self.stepper.average.parts()
        if self.accelerator.is_main_process:
            means = self._means(self.since_checkpoint)
            scaler = self.accelerator.scaler
            folder = self.run / "checkpoints"
            path = checkpoint.write(
                folder,
                self.done,
                tensors,
                {
                    "version": sgmim_fast.__version__,
                    "torch": torch.__version__,
                    "command": self.task.command,
                    **{name: means[name] for name in self.task.losses},  # since the checkpoint before
                    **self.task.facts_of(self.stepper.plain),
                    "score": score if self.task.tested else means["loss"],  # not known where a signal asked to save
                    "steps": self.steps,
                    "epoch": self.done / self.steps_per_epoch,
                    "total_batch": self.layout.total,
                    "images": self.steps_per_epoch * self.layout.total,
                    "skipped_steps": self.window.skipped_steps,
                    "skipped_files": len(self.window.broken),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "config": dataclasses.asdict(self.config),
                },
            )
            checkpoint.tidy(folder, self.config.run.keep, path)
        self.since_checkpoint = []
        self.accelerator.wait_for_everyone()

    def _draw(self, examples: Any) -> None:
        if not (self.accelerator.is_main_process or self.config.run.fsdp):  # sharded, all processes compute it
            return
        with self.stepper.average.in_place():
            found = self.task.draw_picture(self.stepper.plain, examples, self.accelerator)
        if self.accelerator.is_main_process:
            name = f"step-{self.done:08d}.png"
            self.task.save_picture(found, self.run / "pictures" / name, f"step {self.done} of {self.steps}")
