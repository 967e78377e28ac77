"""`sgmim-fast reconstruct`: what the model of a run makes of some pairs, as a picture."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from sgmim_fast.engine import loader
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import pictures
from sgmim_fast.pretrain.build import create_dataset, structure_kind
from sgmim_fast.pretrain.runs import find, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the picture")
    parser.add_argument("--images", metavar="DIR", help="other images than those of the run ...")
    parser.add_argument("--structure", metavar="DIR", help="... and their structure maps")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="pairs to draw (default 6)")
    parser.add_argument("--seed", type=int, metavar="N", help="of masks and crops; the run's by default")
    parser.add_argument("--checkpoint", metavar="NAME", help="best or step-00001000; the newest by default")


def run(args: argparse.Namespace) -> None:
    """Raises UserError, or DataError, for what the user can put right."""
    if args.count < 1:
        raise UserError(f"--count is {args.count}; expected at least 1")
    saved = find(args.run, args.checkpoint)
    config = saved.config
    if args.images is not None or args.structure is not None:
        source = {"images": args.images, "structure": args.structure, "shards": None, "scenes": 0}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **source))
    if args.seed is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=args.seed))
    batch = loader.examples(create_dataset(config), args.count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = pictures.panels(load(saved).to(device), batch, config, device)
    try:
        pictures.grid(found, args.out, f"{args.run}, step {saved.facts['step']}", structure_kind(config))
    except (OSError, ValueError) as error:  # matplotlib says with ValueError which endings it knows
        raise UserError(f"cannot write {args.out}: {error}") from error
    print(f"wrote {args.out}")
