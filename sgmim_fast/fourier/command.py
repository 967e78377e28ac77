"""`sgmim-fast fourier`: draws the relative log amplitudes of several encoders' feature maps in one figure."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgmim_fast.data import IMAGE_SUFFIXES, BrokenFile, ImageFile, Normalize, PairTransform, Scenes
from sgmim_fast.data.files import find_files
from sgmim_fast.errors import UserError
from sgmim_fast.fourier import figure
from sgmim_fast.fourier.blocks import block_spectra
from sgmim_fast.fourier.encoders import Encoder, load
from sgmim_fast.fourier.spectrum import Spectrum

BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "encoders",
        nargs="+",
        metavar="CKPT",
        help="encoder: folder of a run (newest checkpoint), .safetensors file of sgmim-fast export, or timm model name",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of images, searched recursively")
    parser.add_argument("--scenes", type=int, metavar="N", help="use N procedural scenes instead of --images")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("fourier.png"),
        metavar="FIGURE.png",
        help="figure to write, with a CSV file of the same name (default: %(default)s)",
    )
    parser.add_argument(
        "--label", action="append", metavar="TEXT", help="label in the figure; repeat once per CKPT, in the same order"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of images of DIR, evenly spaced (default: 256)",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="image size (default: the input size of each CKPT)")
    parser.add_argument(
        "--pretrained",
        action="store_true",
        help="load timm's pre-trained weights for timm names (default: random weights)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    labels = args.label or [None] * len(args.encoders)
    if len(labels) != len(args.encoders):
        raise UserError(f"--label is given {len(labels)} times; expected once for each of {len(args.encoders)} CKPT")
    if (args.images is None) == (args.scenes is None):
        raise UserError("expected either --images DIR or --scenes N")
    for name in ("scenes", "count", "size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if args.out.suffix == ".csv":
        raise UserError(
            f"--out is {args.out}; expected the name of a figure, such as fourier.png; the CSV is written beside it"
        )
    files = [] if args.images is None else image_files(args.images, args.count)
    spectra: dict[str, list[Spectrum]] = {}
    for name, label in zip(args.encoders, labels, strict=True):
        encoder = load(name, label, args.size, pretrained=args.pretrained)
        if encoder.label in spectra:
            raise UserError(f"two CKPT are called {encoder.label!r}; expected --label for each")
        spectra[encoder.label] = analyse(encoder, files, args.scenes)
        ends = figure.high_frequency(spectra[encoder.label])
        print(f"{encoder.label}: Δ log amplitude at the highest frequency", *(f"{end:.2f}" for end in ends), flush=True)
    table = args.out.with_suffix(".csv")
    try:
        figure.draw(spectra, args.out)
        figure.write_csv(spectra, table)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for unknown suffixes
        raise UserError(f"cannot write {args.out}: {error}") from error
    print(f"wrote {args.out} and {table}")


def image_files(folder: Path, count: int) -> list[str]:
    """Returns at most `count` images of a tree, evenly spaced in the order of their names."""
    found = find_files(folder, "--images", IMAGE_SUFFIXES)
    names = [str(folder / (stem + suffix)) for stem, suffixes in found.items() for suffix in suffixes]
    return [names[int(i)] for i in np.linspace(0, len(names) - 1, min(count, len(names)))]


def analyse(encoder: Encoder, files: list[str], scenes: int | None) -> list[Spectrum]:
    """Computes the spectra of an encoder's blocks over `scenes` procedural scenes; None: over the files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    broken: list[str] = []
    images = _scenes(encoder, scenes) if scenes else _images(encoder, files, broken)
    try:
        return block_spectra(encoder.model.to(device), (batch.to(device) for batch in _batches(images)))
    except ValueError as error:
        if broken and len(broken) == len(files):
            raise UserError(f"--images: none of {len(files)} images can be read, for instance {files[0]}") from error
        raise
    finally:
        for name in broken:
            print(f"skipped {name}: it cannot be read", flush=True)


def _scenes(encoder: Encoder, count: int) -> Iterator[Tensor]:
    found = Scenes(count, encoder.size, transform=Normalize(encoder.mean, encoder.std))
    return (found[index]["image"] for index in range(count))


def _images(encoder: Encoder, files: list[str], broken: list[str]) -> Iterator[Tensor]:
    """Yields the largest central square of each file, resized; adds unreadable files to `broken`."""
    transform = PairTransform.evaluation(encoder.size, mean=encoder.mean, std=encoder.std)
    for name in files:
        try:
            yield transform(ImageFile(name))[0]
        except BrokenFile:
            broken.append(name)


def _batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for image in images:
        batch.append(image.as_subclass(Tensor))
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)
