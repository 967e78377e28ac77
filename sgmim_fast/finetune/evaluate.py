"""`sgmim-fast evaluate`: computes the metrics of a fine-tuned model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sgmim_fast.engine import checkpoint
from sgmim_fast.engine.launch import create_accelerator
from sgmim_fast.engine.settings import add_set, read_assignments, with_changes
from sgmim_fast.errors import UserError
from sgmim_fast.finetune import build
from sgmim_fast.finetune.config import Config
from sgmim_fast.finetune.task import OPTIONS, Finetuning

SHORT = {name: OPTIONS[name] for name in ("root", "test_images", "test_maps")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of sgmim-fast finetune")
    for name, (_, metavar, what) in SHORT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=f"{what} (default: as in the run)")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="checkpoint to load, best or for example step-00001000 (default: newest)"
    )
    add_set(parser, "evaluation.flip=false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw some predictions to this file")


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    saved = checkpoint.find(args.run, args.checkpoint, Config, Finetuning.command)
    changes = {SHORT[name][0]: getattr(args, name) for name in SHORT if getattr(args, name) is not None}
    config = with_changes(saved.config, changes | read_assignments(args.set), "--set")
    build.check(config)
    task = Finetuning(config, saved.facts)
    accelerator = create_accelerator(config.run.precision)
    model = task.create_model()
    model.load_state_dict(checkpoint.weights_for(model, config, saved))
    model.to(accelerator.device).eval()
    _, found = task.evaluate(model, accelerator, images=len(task.test_set), progress=sys.stderr.isatty())
    if not accelerator.is_main_process:
        return
    step = saved.facts["step"]
    print(f"{args.run}, step {step}, {len(task.test_set)} images:")
    for name, value in found.items():
        print(f"  {name:9} {value:.4f}" if isinstance(value, float) else f"  {name:9} {value}")
    try:
        if args.json is not None:
            args.json.write_text(json.dumps({"run": str(args.run), "step": step, **found}, indent=1) + "\n")
        if args.picture is not None:
            panels = task.draw_picture(model, task.examples(task.test_set, config.run.pictures), accelerator)
            task.save_picture(panels, args.picture, f"{args.run}, step {step}")
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for unknown suffixes
        raise UserError(f"cannot write {args.json} or {args.picture}: {error}") from error
