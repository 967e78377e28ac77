"""`sgmim-fast tune`: measures the fastest implementation of each op on this machine, for a recipe's model and batch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import sgmim_fast
from sgmim_fast import backends, tuned
from sgmim_fast.engine import settings
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.config import PRESETS, Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser, f"recipe of pretrain to tune for: {', '.join(PRESETS)}", "model.encoder=NAME")
    parser.add_argument("--batch", metavar="N", help="images per process in each forward and backward pass")
    parser.add_argument("--precision", metavar="DTYPE", help="float32, bfloat16 or float16")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device to tune for (default: cuda if available)")
    parser.add_argument(
        "--seconds", type=float, default=120, metavar="S", help="approximate time budget in seconds (default: 120)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError for errors that the user can correct."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda; torch sees no CUDA device")
    if not args.seconds > 0:
        raise UserError(f"--seconds is {args.seconds}; expected more than 0")
    if backends.forced() is not None:
        raise UserError(f"SGMIM_FAST_BACKEND is {backends.forced()}, which leaves nothing to choose; unset it")
    if not tuned.enabled():
        raise UserError("SGMIM_FAST_TUNED is 0, so what is tuned would not be used; unset it")
    given = {"optim.batch": args.batch, "run.precision": args.precision}
    changes = settings.read_assignments(args.set) | {key: value for key, value in given.items() if value is not None}
    config = settings.resolve(Config(), PRESETS, args.preset, args.config, changes)
    _writable(tuned.table_folder(device))
    model = build.create_model(config).to(device)
    batch, size, channels = config.optim.batch, config.data.size, model.structure_channels
    images, structure = torch.randn(batch, model.in_chans, size, size, device=device), None
    if config.model.guidance:
        maps = torch.rand(batch, channels, size, size, device=device)
        structure = sgmim_fast.standardize_structure(maps)
    mask = build.draw_masks(
        config.mask, size, batch, config.run.seed, 0, torch.device(device), stride=config.model.stride
    )
    dtype = getattr(torch, config.run.precision)
    print(f"{config.model.encoder}, {batch} images of {size} pixels, {config.run.precision}, {device}", flush=True)
    sgmim_fast.tune(model, (images, structure, mask), dtype, seconds=args.seconds)


def _writable(folder: Path) -> None:
    """Raises UserError unless the folder is writable, before minutes are spent on results that could not be saved."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; SGMIM_FAST_CACHE names another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}; SGMIM_FAST_CACHE names another folder")
