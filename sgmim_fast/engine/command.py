"""The command-line interface that `sgmim-fast pretrain` and `finetune` share: options, resuming, and running."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from sgmim_fast.engine import checkpoint, launch, loader, log
from sgmim_fast.engine.checkpoint import Saved, find
from sgmim_fast.engine.launch import UNFINISHED, RunLock, Stopped, stopping_at_once
from sgmim_fast.engine.settings import (
    add_arguments,
    differences,
    read_assignments,
    read_yaml,
    resolve,
    to_yaml,
    with_changes,
)
from sgmim_fast.engine.task import Task
from sgmim_fast.engine.trainer import Trainer
from sgmim_fast.errors import UserError

# option -> the setting that it sets
SHORT = {
    "epochs": "optim.epochs",
    "batch": "optim.batch",
    "workers": "data.workers",
    "precision": "run.precision",
    "seed": "run.seed",
}
AUTO = "auto"  # value of --resume


@dataclass(frozen=True)
class Command:
    """A subcommand that trains.

    Attributes:
        name: name of the subcommand, stored in its checkpoints.
        default: the configuration before any preset.
        presets: maps names to nested settings.
        short: maps options to the settings that they set, in addition to `SHORT`.
        task: constructs the task from a configuration and a checkpoint's metadata.
        instead: maps a setting that overrides a preset to new values of other settings, see `settings.resolve`.
    """

    name: str
    default: Any
    presets: Mapping[str, Any]
    short: Mapping[str, str]
    task: Callable[..., Task]
    instead: Mapping[str, Mapping[str, Any]]

    def add_arguments(self, parser: argparse.ArgumentParser, hint: str) -> None:
        """Adds the options that both commands have. `hint` is appended to the help of --preset."""
        preset = f"recipe to start from: {', '.join(self.presets)} ({hint})"
        add_arguments(parser, preset, "optim.lr=1e-4")
        parser.add_argument("--epochs", metavar="N", help="number of epochs")
        parser.add_argument("--batch", metavar="N", help="images per process in each forward and backward pass")
        parser.add_argument("--workers", metavar="N", help="data loading processes per training process")
        parser.add_argument("--precision", metavar="DTYPE", help="float32, bfloat16 or float16")
        parser.add_argument("--seed", metavar="N", help="seed of the random number generators")
        parser.add_argument("--out", type=Path, metavar="RUN", help="output folder of the run (default: runs/PRESET)")
        parser.add_argument(
            "--resume",
            type=Path,
            metavar="RUN|auto",
            help="run to resume; auto, or the same RUN as --out: resume the run in --out, or start it if there is none",
        )
        parser.add_argument(
            "--checkpoint",
            metavar="NAME",
            help="checkpoint to resume from, best or for example step-00001000 (default: newest)",
        )
        parser.add_argument(
            "--accept-changes", action="store_true", help="resume even if settings or files differ from the run's"
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="check settings and data and draw some items, without training"
        )

    def execute(self, args: argparse.Namespace) -> int:
        """Runs the command and returns the exit code: 0, or `launch.UNFINISHED` if a signal stopped the run early.

        Raises:
            UserError, DataError: errors that the user can correct.
        """
        try:
            # With several processes the launcher signals the others, which may be waiting in a collective.
            with stopping_at_once() if launch.size() == 1 else contextlib.nullcontext():
                return self._execute(args)
        except Stopped as stopped:
            print(f"stopped by {stopped} outside of training; run the same command again to continue", flush=True)
            return UNFINISHED

    def _execute(self, args: argparse.Namespace) -> int:
        goes_on, folder = _place(args)
        if folder is None:  # the configuration determines it
            folder = Path("runs", self.task(self._configuration(args, None)).name)
        # lock the folder before reading files that another process might be writing
        with RunLock(folder) if launch.rank() == 0 else contextlib.nullcontext() as lock:
            found = bool(checkpoint.steps(folder / "checkpoints"))
            if found and not goes_on:
                raise UserError(
                    f"{folder} already has a run; resume it with --resume {folder}, or start another one with --out"
                )
            needed = goes_on and (args.resume not in (Path(AUTO), args.out) or args.checkpoint is not None)
            saved = find(folder, args.checkpoint, type(self.default), self.name) if found or needed else None
            config = self._configuration(args, saved)
            task = self.task(config, saved.facts if saved else None)
            task.check()
            accelerator = launch.create_accelerator(config.run.precision, config.run.fsdp)
            dataset = task.create_dataset()
            trainer = Trainer(task, folder, accelerator, dataset, saved)
            if saved is not None:
                _same_batches(saved, trainer)
                _same_files(saved, trainer, args.accept_changes)
            if args.dry_run:
                code = 0
                if accelerator.is_main_process:
                    _dry_run(trainer, folder if args.out or args.resume else None)
            else:
                if lock is not None and lock.taken_over:
                    print(f"{folder}: took over the lock of {lock.taken_over}, which no longer runs", flush=True)
                code = self._train(trainer, folder)
            accelerator.end_training()
            return code

    def _train(self, trainer: Trainer, folder: Path) -> int:
        main = trainer.accelerator.is_main_process
        if main:
            _prepare_folder(folder, trainer.config, trainer.dataset)
            print(_summary(trainer, folder), flush=True)
        trainer.accelerator.wait_for_everyone()
        stopped = trainer.train()
        if stopped:
            if main:
                again = f"sgmim-fast {self.name} --resume {shlex.quote(str(folder))}"
                print(f"stopped by {stopped} after step {trainer.done}, which is saved; to resume: {again}", flush=True)
            return UNFINISHED
        if main:
            print(trainer.task.finish(folder, log.read(folder)), flush=True)
        return 0

    def _configuration(self, args: argparse.Namespace, saved: Saved | None) -> Any:
        short = {**SHORT, **self.short}
        changes = {key: getattr(args, name) for name, key in short.items() if getattr(args, name) is not None}
        changes |= read_assignments(args.set)
        if saved is None:
            return resolve(self.default, self.presets, args.preset, args.config, changes, self.instead)
        if args.resume != Path(AUTO) and args.out not in (None, args.resume):
            raise UserError(f"--out {args.out} and --resume {args.resume}: a run is resumed in its own folder")
        if args.preset is not None:
            config = resolve(self.default, self.presets, args.preset, args.config, changes, self.instead)
        else:
            from_file = read_yaml(args.config) if args.config is not None else {}
            config = with_changes(with_changes(saved.config, from_file, str(args.config)), changes, "--set")
        found = differences(saved.config, config)
        if found and not args.accept_changes:
            raise UserError(
                f"{saved.path.parents[1]} was trained with different settings: {'; '.join(found)}; keep them, start "
                "another run with --out, or resume with --accept-changes if the weights fit them"
            )
        return config


def _place(args: argparse.Namespace) -> tuple[bool, Path | None]:
    """Whether to resume a run if there is one, and the run's folder; None if the configuration decides."""
    if args.resume is None:
        for name in ("checkpoint", "accept_changes"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')} requires --resume RUN")
        return False, args.out
    if args.resume == Path(AUTO):
        return True, args.out
    return True, args.resume


def _prepare_folder(folder: Path, config: Any, dataset: Dataset) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    if hasattr(dataset, "report"):
        print(dataset.report.summary())
        dataset.report.write(folder / "data-report.txt")


def _same_batches(saved: Saved, trainer: Trainer) -> None:
    before = saved.facts["total_batch"], saved.facts["images"] // saved.facts["total_batch"]
    now = trainer.layout.total, trainer.steps_per_epoch
    for what, old, new in zip(("images in a step", "steps in an epoch"), before, now, strict=True):
        if old != new:
            raise UserError(
                f"the run had {old} {what} and would resume with {new}; expected the same data, and optim.batch and "
                f"optim.accumulate that give the {trainer.layout.processes} processes as many images as before"
            )


def _same_files(saved: Saved, trainer: Trainer, accept: bool) -> None:
    """Compares number and names of the training files, on which the order and the held-out images depend.

    Raises:
        UserError: they differ, and `accept` is false. Otherwise the difference is printed.
    """
    old, new = saved.facts.get("data"), trainer.data
    if old is None or new is None or old == new:  # earlier versions saved none
        return
    found = " -> ".join(f"{known['images']} (hash of their names: {known['names']})" for known in (old, new))
    if not accept:
        raise UserError(
            f"{trainer.run} was trained with different files: images: {found}; restore them, start another run with "
            "--out, or resume with --accept-changes"
        )
    if trainer.accelerator.is_main_process:
        print(f"{trainer.run} continues with different files: images: {found}", flush=True)


def _summary(trainer: Trainer, folder: Path) -> str:
    task, layout, device = trainer.task, trainer.layout, trainer.accelerator.device
    rates = (task.learning_rate(step, trainer.steps_per_epoch, trainer.steps, layout.total) for step in _some(trainer))
    begin = f"from step {trainer.done} " if trainer.done else ""
    return (
        f"{folder}: {task.describe(trainer.stepper.plain)}\n"
        f"{trainer.steps} steps {begin}of {layout.total} images ({layout.batch} a backward, {layout.accumulate} "
        f"backwards a step, {layout.processes} processes), {trainer.steps_per_epoch} to an epoch; learning rate "
        f"at most {max(rates):.3g}; {task.config.run.precision} on {device}, "
        f"{loader.workers(task.config.data)} loading processes each"
    )


def _some(trainer: Trainer) -> range:
    """Returns at most about 1000 evenly spaced steps of the run."""
    return range(0, trainer.steps, max(1, trainer.steps // 1000))


def _dry_run(trainer: Trainer, folder: Path | None) -> None:
    """Reads every file, prints reports on settings and data, and draws some items into the folder, or into a temporary
    one.

    Raises:
        UserError, DataError: the usable items do not fill a step.
    """
    task, dataset = trainer.task, trainer.dataset
    for name, some in (("", dataset), ("to test on: ", task.tested_on)):
        if hasattr(some, "verify"):
            for _ in tqdm(some.verify(), "reading", len(some), unit="pair", disable=not sys.stderr.isatty()):
                pass
        if hasattr(some, "report"):
            print(f"{name}{some.report.summary()}", flush=True)
    loader.steps_per_epoch(task.config.data, dataset, trainer.layout)
    drawn = task.dry_run(dataset, folder or Path(tempfile.mkdtemp(prefix="sgmim-fast-")))
    print(f"settings and data fit: {task.describe(trainer.stepper.plain)}; {drawn}")
