"""`sgmim-fast pretrain`: a run from its first step, or from where it stopped, to an exported encoder."""

from __future__ import annotations

import argparse

from sgmim_fast.engine.command import Command
from sgmim_fast.pretrain.config import Config
from sgmim_fast.pretrain.presets import PRESETS
from sgmim_fast.pretrain.task import Pretraining

SHORT = {name: f"data.{name}" for name in ("images", "structure", "shards", "val_images", "val_structure")}
# the source that is given, in place of a preset's
INSTEAD = {
    "data.images": {"data.scenes": 0, "data.shards": None},
    "data.shards": {"data.scenes": 0, "data.images": None, "data.structure": None},
}
COMMAND = Command("pretrain", Config(), PRESETS, SHORT, Pretraining, INSTEAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", metavar="DIR", help="folder of images")
    parser.add_argument("--structure", metavar="DIR", help="the mirrored folder of structure maps; SimMIM needs none")
    parser.add_argument("--shards", metavar="TARS", help="WebDataset shards, like 'train-{000..099}.tar'")
    parser.add_argument("--val-images", metavar="DIR", help="images to measure the losses on, besides training")
    parser.add_argument("--val-structure", metavar="DIR", help="and their structure maps; or --set data.val=0.02")
    COMMAND.add_arguments(parser, "tiny_demo needs no data")


def run(args: argparse.Namespace) -> int:
    """Raises UserError, or DataError, for what the user can put right."""
    return COMMAND.run(args)
