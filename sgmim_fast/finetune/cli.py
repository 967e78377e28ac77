"""`sgmim-fast finetune`: an encoder and a head, trained on depth or labels and tested."""

from __future__ import annotations

import argparse

from sgmim_fast.engine.command import Command
from sgmim_fast.finetune.config import Config
from sgmim_fast.finetune.presets import PRESETS
from sgmim_fast.finetune.task import Finetuning

# option -> the setting it stands for, and its help
OPTIONS = {
    "encoder": ("model.encoder", "RUN|FILE|NAME", "a finished run of pretrain, an exported file, or a timm name"),
    "head": ("model.head", "HEAD", "deconv, dpt or upernet"),
    "source": ("data.source", "NAME", "nyu, kitti, ade20k, folders or scenes"),
    "root": ("data.root", "DIR", "of nyu, kitti or ade20k"),
    "images": ("data.images", "DIR", "of folders: images to train on"),
    "maps": ("data.maps", "DIR", "the mirrored folder of depth or label maps"),
    "test_images": ("data.test_images", "DIR", "images to test on"),
    "test_maps": ("data.test_maps", "DIR", "and their maps"),
    "classes": ("data.classes", "N", "of folders of labels"),
}
SHORT = {"task": "data.task"} | {name: setting for name, (setting, _, _) in OPTIONS.items()}
INSTEAD = {"data.images": {"data.source": "folders"}}  # of a preset's
COMMAND = Command("finetune", Config(), PRESETS, SHORT, Finetuning, INSTEAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["depth", "segmentation"])
    for name, (_, metavar, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=what)
    COMMAND.add_arguments(parser, "tiny_demo needs no data")


def run(args: argparse.Namespace) -> int:
    """Raises UserError, or DataError, for what the user can put right."""
    return COMMAND.run(args)
