"""The training loop: `Stepper` runs optimizer steps, `Window` gathers the values of steps for a log line, and
`Trainer` runs both, logs, draws pictures and saves checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

import sgmim_fast
from sgmim_fast.capture import CapturedStep, capture
from sgmim_fast.data import skipped_lines
from sgmim_fast.data.seeds import mix
from sgmim_fast.engine import checkpoint, loader, log
from sgmim_fast.engine.average import Average
from sgmim_fast.engine.checkpoint import Saved
from sgmim_fast.engine.launch import StopSignals
from sgmim_fast.engine.loader import Layout
from sgmim_fast.engine.task import Task
from sgmim_fast.errors import UserError
from sgmim_fast.graph import Graph
from sgmim_fast.memory import keep_freed_memory


class Done(NamedTuple):
    """Results of an optimizer step. The device may still be computing them."""

    values: Tensor  # (n + 1,) float32 on the device: the task's n losses of this process, global gradient norm
    lr: float
    names: list[str]  # names of the images
    skipped: list[str]  # name, tab and reason of broken files, which were replaced by other images
    waited: float  # seconds spent waiting for batches


class Stepper:
    """Owns the model and the optimizer, prepared by accelerate, and runs optimizer steps.

    All random numbers of a step (masks, drop path) are seeded from the run's seed and the step's number, so a resumed
    run repeats an uninterrupted one exactly. If a loss is not finite, all gradients become NaN on all processes; AdamW
    then leaves parameters and moments unchanged (`found_inf`), and running statistics of batch norms are restored. None
    of this synchronises with the device.

    Raises:
        UserError: the model cannot be created from its settings.
    """

    def __init__(self, task: Task, accelerator: Accelerator, layout: Layout, steps_per_epoch: int):
        self.task, self.accelerator, self.layout = task, accelerator, layout
        self.config, self.steps_per_epoch = task.config, steps_per_epoch
        self.steps = max(1, round(task.config.optim.epochs * steps_per_epoch))  # total of the run
        torch.manual_seed(mix(self.config.run.seed, "model"))
        self.plain: nn.Module = task.create_model()
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            self.plain = nn.SyncBatchNorm.convert_sync_batchnorm(self.plain)
        self.plain.to(accelerator.device)
        self._norms = [module for module in self.plain.modules() if isinstance(module, _BatchNorm)]
        self.model: nn.Module = self.plain
        several, on_gpu = accelerator.num_processes > 1, accelerator.device.type == Graph.device_type
        captures = self.config.run.capture and task.capturable and on_gpu and not self.config.run.fsdp
        captures = captures and not (several and self._norms)  # several processes' batch norms communicate
        if self.config.run.fsdp:
            self._shard()
            self.optimizer = accelerator.prepare(task.create_optimizer(self.plain))
        elif captures and several:  # without DistributedDataParallel, which cannot be captured
            self.model = accelerator.prepare_model(self.plain, evaluation_mode=True)
            self.optimizer = accelerator.prepare(task.create_optimizer(self.plain))
        else:
            self.model, self.optimizer = accelerator.prepare(self.plain, task.create_optimizer(self.plain))
        self.average = Average(self.plain, task.average) if task.average else None
        self.model.train()
        self.captured: CapturedStep | None = None
        if captures:
            options = {"accumulate": layout.accumulate, "process_group": dist.group.WORLD if several else None}
            self.captured = capture(self.model, loss=self._losses, scaler=accelerator.scaler, **options)

    def __call__(self, step: int, batches: Iterator[dict[str, Any]]) -> Done:
        """Runs a step, numbered from 0, with the next batches."""
        settings, device, accumulate = self.config.optim, self.accelerator.device, self.layout.accumulate
        seed = self.config.run.seed
        lr = self.task.learning_rate(step, self.steps_per_epoch, self.steps, self.layout.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        torch.manual_seed(mix(seed, "step", step, self.layout.rank))
        drawn = self.task.draw(step, self.layout.total, device)
        losses, names, skipped = torch.zeros(len(self.task.losses), device=device), [], []
        waited = 0.0
        before = [buffer.clone() for buffer in self.statistics()]
        for backward in range(accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            names += batch["name"]
            skipped += skipped_lines(batch["skipped"])
            with self._sync(backward == accumulate - 1):
                losses += self._backward(batch, drawn, self.layout.first(backward)) / accumulate
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip or torch.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.accelerator.scaler is None:  # a GradScaler sets found_inf itself
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        for buffer, old in zip(self.statistics(), before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(step)
        self.optimizer.zero_grad(set_to_none=True)
        return Done(torch.cat([losses, norm.float().view(1)]), lr, names, skipped, waited)

    def _backward(self, batch: dict[str, Any], drawn: Any, first: int) -> Tensor:
        if self.captured is None:
            total, *losses = self._losses(self.model, batch, drawn, first)
            self.accelerator.backward(total / self.layout.accumulate)
        else:  # the graph gets a part of the step's masks, whose shape is the same for each backward pass
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            _, *losses = self.captured(tensors, self.task.part(drawn, first, len(batch["name"])), 0)
        return torch.stack([loss.detach().float() for loss in losses])

    def _losses(self, model: nn.Module, batch: dict[str, Any], drawn: Any, first: int) -> list[Tensor]:
        """Returns the tensor that is minimised, followed by the task's losses."""
        losses = self.task.loss(model, batch, drawn, first, self.accelerator)
        finite = losses[0].detach().isfinite()
        # The gradient of L1 is a sign, which is finite even if the loss is not, so multiply a non-finite loss by NaN.
        poison = torch.where(finite, 1.0, torch.nan)
        return [losses[0] * poison, *losses]

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context manager in which the model has the moving averages of its parameters, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def statistics(self) -> list[Tensor]:
        """Returns the running statistics of batch norms."""
        return [buffer for norm in self._norms for buffer in norm.buffers()]

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """Synchronises gradients in the last backward of a step only (gradient accumulation)."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            yield
        else:
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                yield

    def _shard(self) -> None:
        """Applies FSDP over all processes. Each module of `Task.shards` is a unit, the rest is another one."""
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for part in self.task.shards(self.plain):
            fully_shard(part, mesh=mesh)
        fully_shard(self.plain, mesh=mesh)
        for method in ("predict", "salience"):
            if hasattr(self.plain, method):
                register_fsdp_forward_method(self.plain, method)


class Window:
    """Gathers the steps since the last log line. Values stay on the device until `close` copies all of them at once.

    Attributes:
        in_row: number of consecutive steps without a finite loss, up to the last step.
        skipped_steps: number of steps of the run without a finite loss.
        broken: maps files that could not be read, on any process, to reasons.
    """

    def __init__(self, accelerator: Accelerator, skipped_steps: int = 0, broken: dict[str, str] | None = None):
        self.accelerator = accelerator
        self.skipped_steps, self.broken, self.in_row = skipped_steps, dict(broken or {}), 0
        self.steps: list[Done] = []
        self.worst: list[str] = []  # names of this process's images in the last step without a finite loss
        self.pause()

    def pause(self) -> None:
        """Restarts the clock: time since the last window was closed does not count for the next one."""
        self.begun = time.perf_counter()

    def close(self, stop: bool, limit: int) -> tuple[list[list[float]], float, float, bool, bool]:
        """Ends the window and averages its values over processes, all of which must call it. Synchronises.

        Args:
            stop: whether this process was asked to stop.
            limit: number of consecutive steps without a finite loss at which the run has to end.

        Returns:
            losses and gradient norm of every step in which they are finite; seconds per step; the share of this time
            spent waiting for data; whether any process was asked to stop; whether `limit` was reached.
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
        if file_share > 0:  # any process has new ones
            for name, reason in gather_object(list(new.items())):
                self.broken.setdefault(name, reason)
        counted, too_many = [], False
        scaled = self.accelerator.scaler is not None  # then gradients overflow while GradScaler searches for a scale
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
        """Returns the broken files of the steps on this process, with reasons."""
        lines = (line.partition("\t") for done in self.steps for line in done.skipped)
        return {name: reason for name, _, reason in lines}


def mean(rows: Sequence[Sequence[float]], columns: int) -> list[float | None]:
    """Returns the mean of each column; None for each without rows."""
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [None] * columns


class Trainer:
    """Trains one run, from its first step or from a checkpoint.

    Args:
        task: defines the training.
        run: the run's folder, which exists.
        saved: the checkpoint to resume from, or None.

    Raises:
        UserError: the configuration does not fit the data or the machine.
    """

    def __init__(self, task: Task, run: Path, accelerator: Accelerator, dataset: Dataset, saved: Saved | None):
        self.task, self.config, self.run, self.accelerator, self.dataset = task, task.config, run, accelerator, dataset
        optim, count = task.config.optim, accelerator.num_processes
        if task.config.run.tensorboard:
            log.board_writer()  # raises before the training if TensorBoard is not installed
        if task.config.run.wandb is not None:
            log.wandb_module()
        self.layout = Layout(optim.batch, optim.accumulate, count, accelerator.process_index)
        if hasattr(dataset, "check_parts"):  # shards
            dataset.check_parts(count, max(1, loader.workers(task.config.data)))
        self.steps_per_epoch = loader.steps_per_epoch(task.config.data, dataset, self.layout)
        self.data = {"images": len(dataset), "names": dataset.digest()} if hasattr(dataset, "digest") else None
        self.stepper = Stepper(task, accelerator, self.layout, self.steps_per_epoch)
        self.steps = self.stepper.steps
        facts = saved.facts if saved else {}
        self.done = facts.get("step", 0)
        self.window = Window(accelerator, facts.get("skipped_steps", 0), log.read_skipped(run) if saved else None)
        self.since_checkpoint: list[list[float]] = []  # losses and gradient norm of each step since the last one
        if saved:
            raw = self.stepper.optimizer.optimizer
            weights = checkpoint.weights_for(self.stepper.plain, self.config, saved)
            checkpoint.restore(self.stepper.model, raw, weights, checkpoint.read(saved.path, "optimizer"))
            if self.stepper.average is not None:
                self.stepper.average.restore(saved.path)
            if accelerator.scaler is not None and facts.get("scaler"):
                accelerator.scaler.load_state_dict(facts["scaler"])
        self.log: log.Log | None = None
        self.graphs = 0  # number of captured CUDA graphs at the last log line

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    def train(self) -> str:
        """Trains to the end and returns "", or until a signal arrives and returns the signal's name.

        Raises:
            UserError: a checkpoint cannot be written, or too many consecutive steps have no finite loss.
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
                    # Several processes can agree on stopping only when they communicate, at the next log line.
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
            del batches  # shuts down the workers
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
        """Closes the window and writes a log line; returns whether any process was asked to stop."""
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
                    "waiting": round(waiting, 4),  # share of the time spent waiting for data
                    "graphs": graphs,  # number of captured graphs so far, one per shape
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
            f"{self.window.in_row} steps in a row up to step {self.done} had a loss or gradient that is not finite, "
            f"and were skipped; images of the last one ({path} lists all {len(names)}): {', '.join(names[:8])}"
        )

    def _means(self, rows: list[list[float]]) -> dict[str, float | None]:
        names = (*self.task.losses, "grad_norm")
        return dict(zip(names, mean(rows, len(names)), strict=True))

    def _evaluate(self) -> float:
        """Evaluates the current model and logs the metrics; returns the score."""
        for statistics in self.stepper.statistics():  # all processes use those of the first one, which saves them
            statistics.copy_(broadcast(statistics))
        with self.stepper.averaged():
            score, metrics = self.task.evaluate(self.stepper.plain, self.accelerator)
        if self.log is not None:
            self.log.metrics(self.done, metrics)
        return score

    def _save(self, score: float | None) -> None:
        tensors = checkpoint.gather(self.stepper.model, self.stepper.optimizer.optimizer)
        if self.stepper.average is not None:
            tensors |= self.stepper.average.parts()
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
                    **{name: means[name] for name in self.task.losses},  # means since the last checkpoint
                    **self.task.facts_of(self.stepper.plain),
                    "score": score if self.task.tested else means["loss"],  # unknown if a signal caused the save
                    "steps": self.steps,
                    "epoch": self.done / self.steps_per_epoch,
                    "total_batch": self.layout.total,
                    "images": self.steps_per_epoch * self.layout.total,
                    "data": self.data,  # number of training images and a hash of the files' names; None: no files
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
        if not (self.accelerator.is_main_process or self.config.run.fsdp):  # a sharded model needs all processes
            return
        with self.stepper.averaged():
            found = self.task.draw_picture(self.stepper.plain, examples, self.accelerator)
        if self.accelerator.is_main_process:
            name = f"step-{self.done:08d}.png"
            self.task.save_picture(found, self.run / "pictures" / name, f"step {self.done} of {self.steps}")
