"""`sgmim-fast data check`: reads every file of a data set once, and reports what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sgmim_fast.data.files import find_files, match
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.pairs import kinds
from sgmim_fast.data.report import BrokenFile, Report
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.errors import UserError

BATCH = 8  # entries that a process hands over at a time


class Seen(NamedTuple):
    """What became of an image, a map or a pair."""

    pair: bool
    broken: dict[str, str]
    kinds: list[str]


class Entries(Dataset):
    """(image, map), one of which may be None, read and forgotten."""

    def __init__(self, entries: list[tuple[str | None, str | None]], missing: float | None) -> None:
        self.entries, self.missing = entries, missing

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Seen:
        image, structure = self.entries[index]
        broken: dict[str, str] = {}
        files: list[ImageFile | StructureFile] = []
        for path, read in ((image, ImageFile), (structure, lambda name: StructureFile(name, missing=self.missing))):
            try:
                if path is not None:
                    file = read(path)
                    file.decode()
                    files.append(file)
                if len(files) == 2:
                    files[1].check_shape(files[0].size)
            except BrokenFile as error:
                broken[error.name] = error.reason
        return Seen(None not in (image, structure) and not broken, broken, kinds(*files))


def check(
    images: Path, structure: Path | None = None, *, missing: float | None = 0, workers: int = 0, progress: bool = False
) -> Report:
    """Reads all files of a folder of images, or of a mirrored folder of maps too, paired or not.

    Args:
        images, structure, missing: see `FolderPairs`.
        workers: processes that read; 0: this one.
        progress: shows a bar.

    Raises:
        DataError: there are none, or none of them pair.
    """
    report = Report()
    found = find_files(images, "images", IMAGE_SUFFIXES, report)
    if structure is None:
        entries = [(str(images / (stem + end)), None) for stem, suffixes in found.items() for end in suffixes]
    else:
        maps = find_files(structure, "structure", MAP_SUFFIXES, report)
        pairs = match(found, maps, images, structure, StructureFile.kind, report)
        entries = [(str(images / os.fsdecode(a)), str(structure / os.fsdecode(b))) for a, b in pairs]
        entries += [(str(images / name), None) for name in report.images_without_map]
        entries += [(None, str(structure / name)) for name in report.maps_without_image]
    loader = DataLoader(Entries(entries, missing), BATCH, num_workers=workers, collate_fn=list)
    with tqdm(desc="reading", total=len(entries), unit="file", disable=not progress) as bar:
        for batch in loader:
            for seen in batch:
                report.used += seen.pair
                report.broken |= seen.broken
                report.kinds.update(seen.kinds)
            bar.update(len(batch))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "read every file once, and report what is wrong; exit code 1 where a file is broken"
    parser = actions.add_parser("check", help=what, description=what[0].upper() + what[1:] + ".")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of images, and the mirrored one of maps")
    parser.add_argument("--report", type=Path, default=Path("data-report.txt"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read; one for each core by default")


def run(args: argparse.Namespace) -> int:
    """Raises UserError, or DataError, for what the user can put right."""
    if len(args.folders) > 2:
        raise UserError(f"there are {len(args.folders)} DIR; expected one of images, or that and one of structure maps")
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 0:
        raise UserError(f"--workers is {workers}; expected 0 or more")
    report = check(*args.folders, workers=workers, progress=sys.stderr.isatty())
    try:
        report.write(args.report)
    except OSError as error:
        raise UserError(f"cannot write {args.report}: {error.strerror}") from error
    print(f"{report.summary()}\nwrote {args.report}")
    return 1 if report.broken else 0
