"""Loads the encoders of `sgmim-fast fourier` from a run's folder, an exported file, or by a timm name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from sgmim_fast.encoders import create_encoder
from sgmim_fast.errors import UserError, nearest
from sgmim_fast.exported import ERRORS_OF_TIMM, describe, normalisation, require_rgb
from sgmim_fast.pretrain import build

Triple = tuple[float, float, float]


class Encoder(NamedTuple):
    """A timm module, with the size and normalisation of its images."""

    label: str
    model: nn.Module
    size: int  # pixels along each side
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD


def load(name: str, label: str | None = None, size: int | None = None, *, pretrained: bool = False) -> Encoder:
    """Loads an encoder, on the CPU, in evaluation mode.

    Args:
        name: folder of a run (its newest checkpoint), file of `sgmim_fast.checkpoints.export_timm`, or timm name.
        label: label in the figure. None: the name of the folder, the file or the timm model.
        size: pixels along each side of an image. None: the size with which the encoder was pre-trained.
        pretrained: for a timm name, downloads timm's weights. False: random weights.

    Raises:
        UserError: the encoder does not exist, cannot be loaded, or does not fit the size.
    """
    path = Path(name)
    if path.is_dir():
        return _from_run(path, label or path.resolve().name, size)
    if path.suffix == ".safetensors" or path.is_file():
        return _from_file(path, label or path.stem, size)
    base = name.split(".")[0]
    if not timm.is_model(base):
        known = timm.list_models(["swin*", "beit*", "vit_*", "deit_*"])
        raise UserError(
            f"{name} is not the folder of a run, a .safetensors file or the name of a timm model{nearest(base, known)}"
        )
    found = _create(name, {"pretrained": pretrained}, size)
    config = found.model.pretrained_cfg
    note = "" if pretrained else ", random"
    return found._replace(label=label or name + note, mean=config["mean"], std=config["std"])


def _from_run(folder: Path, label: str, size: int | None) -> Encoder:
    saved = build.find(folder)
    trained = saved.config.data.size
    if size not in (None, trained):
        raise UserError(
            f"--size is {size}; expected {trained}, with which {folder} was pre-trained, or an exported file"
        )
    require_rgb(str(folder), saved.config.data.image_channels or 3)
    return Encoder(label, build.load(saved).encoder.model, trained, **build.normalisation(saved.config))


def _from_file(path: Path, label: str, size: int | None) -> Encoder:
    if path.suffix != ".safetensors":  # timm would read a file with another suffix as a pickle
        raise UserError(f"{path} has the ending {path.suffix!r}; expected .safetensors, a file of sgmim-fast export")
    name, arguments = describe(path)
    if name is None:
        raise UserError(f"{path} does not name its timm model; expected a file of sgmim-fast export")
    images = normalisation(path)
    for channels in (arguments.get("in_chans", 3), len(images["mean"])):
        require_rgb(str(path), channels)
    arguments.pop("num_classes", None)
    # Loading through timm resizes positions and drops the classifier.
    overlay = {"file": str(path), "custom_load": False}
    arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    return _create(name, arguments, size)._replace(label=label, **images)


def _create(name: str, arguments: dict[str, object], size: int | None) -> Encoder:
    given = arguments if size is None else {**arguments, "img_size": size}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that random weights are the same in every call
            encoder = create_encoder(name, **given)
    except (*ERRORS_OF_TIMM, OSError) as error:
        raise UserError(f"{name}{'' if size is None else f' with --size {size}'}: {error}") from error
    height, width = encoder.model.patch_embed.img_size
    if height != width:
        raise UserError(f"{name} takes images of {height}x{width} pixels; expected square ones, or --size")
    patch = encoder.patch_size
    if height % patch:
        raise UserError(f"--size is {height}; expected a multiple of {patch}, the patch size of {name}")
    return Encoder(name, encoder.model.eval(), height)
