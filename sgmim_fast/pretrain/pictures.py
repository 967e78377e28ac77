"""`sgmim-fast reconstruct`: draws the predictions of a pre-trained model for some pairs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from sgmim_fast.data import StructureKind, structure_of
from sgmim_fast.data.pictures import save, visible
from sgmim_fast.data.structure_kind import DEPTH
from sgmim_fast.engine import loader
from sgmim_fast.errors import UserError
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.config import Config
from sgmim_fast.reference import pixel_mask


class Panels(NamedTuple):
    """Images (normalised), structure maps (standardised), masks and predictions for a picture, all on the CPU."""

    images: Tensor  # (B, 3, H, W)
    masked: Tensor  # (B, 1, H, W) bool, True = masked
    image: Tensor  # (B, 3, H, W), predicted image
    structure: Tensor | None  # (B, S, H, W); None without maps
    valid: Tensor | None  # (B, S, H, W) bool
    shown: Tensor  # (B, 1, H, W) bool, True = shown: the branch may read the map
    guess: Tensor | None  # (B, S, H, W), predicted structure map; None without guidance


@torch.no_grad()
def panels(model: SGMIM, batch: dict[str, Any], config: Config, device: torch.device) -> Panels:
    """Predicts a batch of items of `sgmim_fast.data`, with masks that depend on the seed alone."""
    training = model.training
    model.eval()
    images = batch["image"].to(device)
    structure, valid = structure_of(batch, device, build.structure_kind(config))
    drawn = build.draw_step(config, len(images), config.run.seed, 0, device)
    mask = build.masks_of(drawn, config, model, images)
    image, guess = model.predict(images, structure, mask, structure_valid=valid)
    model.train(training)
    masked, shown = (pixel_mask(m, images).bool() for m in (mask.mask, mask.structure))
    found = Panels(images, masked, image.float(), structure, valid, shown, None if guess is None else guess.float())
    return Panels(*(None if t is None else t.cpu() for t in found))


def grid(
    found: Panels,
    path: Path,
    title: str = "",
    kind: StructureKind = DEPTH,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> None:
    """Draws one row per pair. Grey pixels are masked or hidden, white ones are missing values. The reconstruction shows
    predictions at masked pixels, and the predicted structure shows them at visible pixels; elsewhere both show the
    true values.

    mean, std: mean and standard deviation with which the images were normalised.
    """

    def colours(image: Tensor) -> Tensor:
        return visible(image, mean, std)

    grey, white = torch.full((3, 1, 1), 0.6), torch.ones(3, 1, 1)
    columns = {
        "image": colours(found.images),
        "masked image": colours(found.images).where(~found.masked, grey),
        "reconstruction": colours(found.image).where(found.masked, colours(found.images)),
    }
    if found.guess is not None:
        truth = kind.colours(found.structure).where(found.valid.all(1, keepdim=True), white)
        columns |= {
            "structure shown": truth.where(found.shown, grey),
            "structure predicted": kind.colours(found.guess).where(~found.masked, truth),
            "structure truth": truth,
        }
    rows = len(found.images)
    figure = Figure((1.6 * len(columns), 1.65 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(label, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of sgmim-fast pretrain")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="image file to write")
    parser.add_argument("--images", metavar="DIR", help="folder of images (default: those of the run)")
    parser.add_argument("--structure", metavar="DIR", help="folder of structure maps of --images")
    parser.add_argument("--count", type=int, default=6, metavar="N", help="number of pairs to draw (default: 6)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of masks and crops (default: as in the run)")
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="checkpoint to load, best or for example step-00001000 (default: newest)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    if args.count < 1:
        raise UserError(f"--count is {args.count}; expected at least 1")
    saved = build.find(args.run, args.checkpoint)
    config = saved.config
    if args.images is not None or args.structure is not None:
        read = ("images", "structure") if config.model.guidance else ("images",)
        for name in read:
            if getattr(args, name) is None:
                raise UserError(f"--{name} is missing; expected {' with '.join(f'--{each} DIR' for each in read)}")
        source = {"images": args.images, "structure": args.structure, "shards": None, "scenes": 0}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **source))
    if args.seed is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=args.seed))
    batch = loader.examples(build.create_dataset(config), args.count)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = panels(build.load(saved).to(device), batch, config, device)
    try:
        title = f"{args.run}, step {saved.facts['step']}"
        grid(found, args.out, title, build.structure_kind(config), **build.normalisation(config))
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for unknown suffixes
        raise UserError(f"cannot write {args.out}: {error}") from error
    print(f"wrote {args.out}")
