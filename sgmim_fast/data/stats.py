"""`sgmim-fast data stats`: measures mean and standard deviation of each channel of a folder of images."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sgmim_fast.data.channel_image import ChannelImage
from sgmim_fast.data.files import find_files
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.report import BrokenFile, DataError, Report
from sgmim_fast.errors import UserError


class Stats(NamedTuple):
    """Statistics over the pixels of all images together."""

    mean: list[float]  # of each channel
    std: list[float]
    images: int  # number of images read
    broken: dict[str, str]  # name -> reason


class _Sums(Dataset):
    def __init__(self, paths: list[str], channels: int | None) -> None:
        self.paths, self.channels = paths, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        """Returns the number of pixels, the sum and the sum of squares of each channel, (3, C) float64; or name and
        reason of a broken image."""
        path = self.paths[index]
        try:
            image = ImageFile(path) if self.channels is None else ChannelImage(path, channels=self.channels)
            pixels = image.decode()
        except BrokenFile as error:
            return error.name, error.reason
        values = pixels.double().flatten(1) / (1 if pixels.is_floating_point() else 255)
        count = torch.full((len(values),), values.shape[1], dtype=torch.float64)
        return torch.stack([count, values.sum(1), values.square().sum(1)])


def suffixes(channels: int | None) -> tuple[str, ...]:
    """Returns the suffixes of image files, for `ImageFile` or for `ChannelImage`."""
    return IMAGE_SUFFIXES if channels is None else MAP_SUFFIXES


def measure(images: Path, channels: int | None = None, *, workers: int = 0, progress: bool = False) -> Stats:
    """Measures the images of a folder. Integers are scaled to [0, 1].

    Args:
        images: folder of images, searched recursively.
        channels: number of channels, for `ChannelImage`. None: RGB photographs.
        workers: number of worker processes. 0: reads in this process.
        progress: shows a progress bar.

    Raises:
        DataError: there are no images, or none can be read.
    """
    found = find_files(images, "images", suffixes(channels), Report())
    paths = [str(images / (stem + end)) for stem, ends in found.items() for end in ends]
    total, count, broken = None, 0, {}
    loader = DataLoader(_Sums(paths, channels), batch_size=None, num_workers=workers)
    for sums in tqdm(loader, "reading", unit="image", disable=not progress):
        if isinstance(sums, Tensor):
            total, count = sums if total is None else total + sums, count + 1
        else:
            broken[sums[0]] = sums[1]
    if total is None:
        raise DataError(f"none of {len(paths)} images can be read; the last: {': '.join([*broken.items()][-1])}")
    pixels, values, squares = total
    mean = values / pixels
    return Stats(mean.tolist(), (squares / pixels - mean.square()).clamp_min(0).sqrt().tolist(), count, broken)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="DIR", help="folder of images")
    parser.add_argument("--channels", type=int, metavar="N", help="number of channels of the images (default: 3, RGB)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read files (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    for name, least in (("workers", 0), ("channels", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; expected {least} or more")
    found = measure(args.images, args.channels, workers=workers, progress=sys.stderr.isatty())
    mean, std = (f"[{','.join(f'{value:.6g}' for value in values)}]" for values in (found.mean, found.std))
    print(f"{found.images} images of {len(found.mean)} channels; {len(found.broken)} cannot be read")
    for name, reason in list(found.broken.items())[:8]:
        print(f"{name}: {reason}")
    channels = "" if args.channels is None else f"--set data.image_channels={args.channels} "
    print(f"{channels}--set data.mean={mean} --set data.std={std}")
    if flat := [str(i) for i, value in enumerate(found.std) if value == 0]:
        print(f"constant channels, which should be removed from the images: {', '.join(flat)}")
    return 1 if found.broken else 0
