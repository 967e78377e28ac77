"""`sgmim-fast pretrain`: a run from its first step, or from where it stopped, to an exported encoder."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.utils.data import Dataset
from tqdm import tqdm

from sgmim_fast.errors import UserError
from sgmim_fast.train import checkpoint, export, log, pictures
from sgmim_fast.train.build import check, create_dataset, create_model, workers
from sgmim_fast.train.config import Config, differences, read_assignments, read_yaml, to_yaml, with_changes
from sgmim_fast.train.engine import Trainer
from sgmim_fast.train.optimizer import learning_rate
from sgmim_fast.train.presets import PRESETS, resolve
from sgmim_fast.train.runs import Saved, find

# option -> the setting it stands for
SHORT = {
    "images": "data.images",
    "structure": "data.structure",
    "shards": "data.shards",
    "epochs": "optim.epochs",
    "batch": "optim.batch",
    "workers": "data.workers",
    "precision": "run.precision",
    "seed": "run.seed",
}
PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help=f"a recipe: {', '.join(PRESETS)} (tiny_demo needs no data)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with settings over the preset's")
    parser.add_argument(
        *("--set", "-s"), action="append", default=[], metavar="KEY=VALUE", help="one setting, like optim.lr=1e-4"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of images")
    parser.add_argument("--structure", metavar="DIR", help="the mirrored folder of structure maps")
    parser.add_argument("--shards", metavar="TARS", help="WebDataset shards, like 'train-{000..099}.tar'")
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
        "--dry-run", action="store_true", help="check settings and data, draw some pairs, train nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Raises UserError, or DataError, for what the user can put right."""
    saved = find(args.resume, args.checkpoint) if args.resume is not None else None
    config = _configuration(args, saved)
    if args.dry_run:
        return _dry_run(config, args)
    folder = args.resume or args.out or Path("runs", config.preset or "run")
    if saved is None and checkpoint.steps(folder / "checkpoints"):
        raise UserError(f"{folder} holds a run already; --resume {folder} goes on with it, --out starts another one")
    check(config)
    accelerator = _accelerator(config)
    dataset = create_dataset(config)
    main = accelerator.is_main_process
    trainer = Trainer(config, folder, accelerator, dataset, saved)
    if saved is not None:
        _same_batches(saved, trainer)
    if main:
        _prepare_folder(folder, config, dataset)
        print(_summary(trainer, folder), flush=True)
    accelerator.wait_for_everyone()
    stopped = trainer.train()
    if main and stopped:
        print(f"stopped by {stopped} after step {trainer.done}, which is saved; to go on: {_again(folder)}", flush=True)
    elif main:
        _finish(folder)
    accelerator.end_training()
    return 0


def _configuration(args: argparse.Namespace, saved: Saved | None) -> Config:
    changes: dict[str, Any] = {
        key: getattr(args, name) for name, key in SHORT.items() if getattr(args, name) is not None
    }
    changes |= read_assignments(args.set)
    if saved is None:
        for name in ("checkpoint", "accept_changes"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')} goes with --resume RUN")
        return resolve(args.preset, args.config, changes)
    if args.out is not None and args.out != args.resume:
        raise UserError(f"--out {args.out} and --resume {args.resume}: a run goes on in its own folder")
    if args.preset is not None:
        config = resolve(args.preset, args.config, changes)
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


def _accelerator(config: Config) -> Accelerator:
    if config.run.precision == "float16":
        if config.run.fsdp:
            raise UserError("run.precision is float16 with run.fsdp; expected bfloat16, which needs no loss scaling")
        if not torch.cuda.is_available():
            raise UserError("run.precision is float16, which needs a GPU; expected float32 or bfloat16")
    accelerator = Accelerator(
        mixed_precision=PRECISION[config.run.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate was launched with {accelerator.distributed_type.value}; expected a plain launch, with "
            "--set run.fsdp=true for shards"
        )
    if config.run.fsdp and accelerator.num_processes == 1:
        raise UserError("run.fsdp is true with one process; expected several, started by torchrun or accelerate launch")
    return accelerator


def _prepare_folder(folder: Path, config: Config, dataset: Dataset) -> None:
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
    config, layout, device = trainer.config, trainer.layout, trainer.accelerator.device
    parameters = sum(p.numel() for p in trainer.stepper.plain.parameters()) / 1e6
    encoder = sum(p.numel() for p in trainer.stepper.plain.encoder.parameters()) / 1e6
    warm = min(round(config.optim.warmup_epochs * trainer.steps_per_epoch), trainer.steps - 1)
    lr = learning_rate(config.optim, warm, trainer.steps_per_epoch, layout.total)
    begin = f"from step {trainer.done} " if trainer.done else ""
    return (
        f"{folder}: {config.model.encoder}, {parameters:.1f} M parameters, {encoder:.1f} M of them the encoder's\n"
        f"{trainer.steps} steps {begin}of {layout.total} images ({layout.batch} a backward, {layout.accumulate} "
        f"backwards a step, {layout.processes} processes), {trainer.steps_per_epoch} to an epoch; learning rate "
        f"{lr:.3g} after warm-up; {config.run.precision} on {device}, {workers(config)} loading processes each"
    )


def _finish(folder: Path) -> None:
    pictures.curves(log.read(folder), folder / "losses.png")
    encoder = folder / "encoder.safetensors"
    card = export.export(find(folder), encoder)
    last = max((folder / "pictures").glob("*.png"), default=None)
    print(f"wrote {encoder} and {card.name}; look at {folder / 'losses.png'} and {last}", flush=True)


def _dry_run(config: Config, args: argparse.Namespace) -> int:
    from sgmim_fast import data

    check(config)
    dataset = create_dataset(config)
    model = create_model(config)
    if hasattr(dataset, "verify"):
        for _ in tqdm(dataset.verify(), "reading", len(dataset), unit="pair", disable=not sys.stderr.isatty()):
            pass
    if hasattr(dataset, "report"):
        print(dataset.report.summary())
    folder = args.resume or args.out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    sheet = folder / "pairs.png"
    data.sheet(dataset, sheet)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"settings and data fit: {config.model.encoder}, {parameters:.1f} M parameters; {sheet} shows some pairs")
    return 0


def _again(folder: Path) -> str:
    return f"sgmim-fast pretrain --resume {shlex.quote(str(folder))}"
