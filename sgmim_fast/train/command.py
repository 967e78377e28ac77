"""What `sgmim-fast pretrain` and `sgmim-fast finetune` share: options, resuming, and a run from beginning to end."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.utils.data import Dataset

from sgmim_fast.errors import UserError
from sgmim_fast.train import checkpoint, loader, log
from sgmim_fast.train.engine import Trainer
from sgmim_fast.train.runs import Saved, find
from sgmim_fast.train.settings import differences, read_assignments, read_yaml, resolve, to_yaml, with_changes
from sgmim_fast.train.task import Task

# option -> the setting it stands for
SHORT = {
    "epochs": "optim.epochs",
    "batch": "optim.batch",
    "workers": "data.workers",
    "precision": "run.precision",
    "seed": "run.seed",
}
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Command:
    """One of the commands that train.

    Attributes:
        name: of the subcommand, and of the runs it makes.
        default: the configuration before any preset.
        presets: name -> nested settings.
        short: option -> the setting it stands for, beside `SHORT`.
        task: makes the task of a configuration and a checkpoint's facts.
    """

    name: str
    default: Any
    presets: Mapping[str, Any]
    short: Mapping[str, str]
    task: Callable[..., Task]

    def add_arguments(self, parser: argparse.ArgumentParser, hint: str) -> None:
        """The options that both commands have. `hint`: what to say of the presets."""
        parser.add_argument("--preset", help=f"a recipe: {', '.join(self.presets)} ({hint})")
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with settings over the preset's")
        parser.add_argument(
            *("--set", "-s"), action="append", default=[], metavar="KEY=VALUE", help="one setting, like optim.lr=1e-4"
        )
        parser.add_argument("--epochs", metavar="N")
        parser.add_argument("--batch", metavar="N", help="images for each process and backward")
        parser.add_argument("--workers", metavar="N", help="loading processes for each training process")
        parser.add_argument("--precision", help="float32, bfloat16 or float16")
        parser.add_argument("--seed", metavar="N")
        parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run, by default runs/PRESET")
        parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run")
        parser.add_argument("--checkpoint", metavar="NAME", help="resume from this one: best or step-00001000")
        parser.add_argument("--accept-changes", action="store_true", help="resume with other settings than before")
        parser.add_argument(
            "--dry-run", action="store_true", help="check settings and data, draw some of it, train nothing"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Raises UserError, or DataError, for what the user can put right."""
        saved = None
        if args.resume is not None:
            saved = find(args.resume, args.checkpoint, type(self.default), self.name)
        config = self._configuration(args, saved)
        task = self.task(config, saved.facts if saved else None)
        if args.dry_run:
            return _dry_run(task, args.resume or args.out or Path())
        folder = args.resume or args.out or Path("runs", task.name)
        if saved is None and checkpoint.steps(folder / "checkpoints"):
            raise UserError(
                f"{folder} holds a run already; --resume {folder} goes on with it, --out starts another one"
            )
        task.check()
        accelerator = _accelerator(config.run)
        dataset = task.create_dataset()
        main = accelerator.is_main_process
        trainer = Trainer(task, folder, accelerator, dataset, saved)
        if saved is not None:
            _same_batches(saved, trainer)
        if main:
            _prepare_folder(folder, config, dataset)
            print(_summary(trainer, folder), flush=True)
        accelerator.wait_for_everyone()
        stopped = trainer.train()
        if main and stopped:
            again = f"sgmim-fast {self.name} --resume {shlex.quote(str(folder))}"
            print(f"stopped by {stopped} after step {trainer.done}, which is saved; to go on: {again}", flush=True)
        elif main:
            print(task.finish(folder, log.read(folder)), flush=True)
        accelerator.end_training()
        return 0

    def _configuration(self, args: argparse.Namespace, saved: Saved | None) -> Any:
        short = {**SHORT, **self.short}
        changes = {key: getattr(args, name) for name, key in short.items() if getattr(args, name) is not None}
        changes |= read_assignments(args.set)
        if saved is None:
            for name in ("checkpoint", "accept_changes"):
                if getattr(args, name):
                    raise UserError(f"--{name.replace('_', '-')} goes with --resume RUN")
            return resolve(self.default, self.presets, args.preset, args.config, changes)
        if args.out is not None and args.out != args.resume:
            raise UserError(f"--out {args.out} and --resume {args.resume}: a run goes on in its own folder")
        if args.preset is not None:
            config = resolve(self.default, self.presets, args.preset, args.config, changes)
        else:
            from_file = read_yaml(args.config) if args.config is not None else {}
            config = with_changes(with_changes(saved.config, from_file, str(args.config)), changes, "--set")
        found = differences(saved.config, config)
        if found and not args.accept_changes:
            raise UserError(
                f"{args.resume} was trained with other settings: {'; '.join(found)}; leave them as they were, start "
                "another run with --out, or go on with --accept-changes"
            )
        return config


def _accelerator(settings: Any) -> Accelerator:
    if settings.precision == "float16":
        if settings.fsdp:
            raise UserError("run.precision is float16 with run.fsdp; expected bfloat16, which needs no loss scaling")
        if not torch.cuda.is_available():
            raise UserError("run.precision is float16, which needs a GPU; expected float32 or bfloat16")
    accelerator = Accelerator(
        mixed_precision=PRECISION[settings.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate was launched with {accelerator.distributed_type.value}; expected a plain launch, with "
            "--set run.fsdp=true for shards"
        )
    if settings.fsdp and accelerator.num_processes == 1:
        raise UserError("run.fsdp is true with one process; expected several, started by torchrun or accelerate launch")
    return accelerator


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
                f"the run had {old} {what} and would go on with {new}; expected the same data, and optim.batch and "
                f"optim.accumulate such that the {trainer.layout.processes} processes have as many images as before"
            )


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
    """Steps from all over the run, among them those at which epochs begin, where it is short."""
    return range(0, trainer.steps, max(1, trainer.steps // 1000))


def _dry_run(task: Task, folder: Path) -> int:
    task.check()
    dataset = task.create_dataset()
    model = task.create_model()
    if hasattr(dataset, "report"):
        print(dataset.report.summary())
    folder.mkdir(parents=True, exist_ok=True)
    drawn = task.dry_run(dataset, folder)
    print(f"settings and data fit: {task.describe(model)}; {drawn}")
    return 0
