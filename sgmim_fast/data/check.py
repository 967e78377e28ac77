"""`sgmim-fast data check`: reads every file of a data set once, and reports what is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from sgmim_fast.data import shards, stats
from sgmim_fast.data.files import find_files, match, walk
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.pairs import kinds
from sgmim_fast.data.report import BrokenFile, Report
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.structure_kind import DEPTH, NAMES, StructureKind, structure_kind
from sgmim_fast.errors import UserError

BATCH = 8  # reports per message from a worker
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


class Reader:
    """Reads single images, single maps or pairs, and reports on each."""

    def __init__(self, kind: StructureKind, missing: float | None) -> None:
        self.kind, self.missing = kind, missing

    def read(self, image: tuple[str, ...] | None, structure: tuple[str, ...] | None) -> Report:
        """Reads one image, one map, or both.

        Args:
            image, structure: (name,) of a file, or (name, content). None: absent.
        """
        report = Report()
        files: list[ImageFile | StructureFile] = []
        for given, read in ((image, ImageFile), (structure, self._map)):
            try:
                if given is not None:
                    file = read(*given)
                    file.decode()
                    files.append(file)
                if len(files) == 2:
                    files[1].check_shape(files[0].size)
            except BrokenFile as error:
                report.broken[error.name] = error.reason
        report.used = int(len(files) == 2 and not report.broken)
        report.kinds.update(kinds(*files))
        return report

    def _map(self, name: str, content: bytes | None = None) -> StructureFile:
        return self.kind.read(name, content, missing=self.missing)


class Entries(Dataset):
    """Map-style data set of reports on (image, map) file names. One name of each entry may be None."""

    def __init__(self, entries: list[tuple[str | None, str | None]], reader: Reader) -> None:
        self.entries, self.reader = entries, reader

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Report:
        image, structure = ((name,) if name is not None else None for name in self.entries[index])
        return self.reader.read(image, structure)


class Samples(IterableDataset):
    """Iterable data set of reports on the samples of shards. The shards are split over the workers."""

    def __init__(self, urls: list[str], reader: Reader) -> None:
        self.urls, self.reader = urls, reader

    def __iter__(self) -> Iterator[Report]:
        worker = get_worker_info()
        for url in self.urls if worker is None else self.urls[worker.id :: worker.num_workers]:
            yield from self._shard(url)

    def _shard(self, url: str) -> Iterator[Report]:
        broken = Report()

        def skip(error: BrokenFile) -> None:
            broken.broken[error.name] = error.reason

        nothing, others = True, {}
        absent = f"has no image and no KEY.{self.reader.kind.name}.png (or .npy, ...)"
        for sample in shards.samples([url], skip):
            try:
                name, image, structure = shards.members(sample, self.reader.kind.name)
            except BrokenFile as error:
                skip(error)
                nothing = False
                continue
            if image is not None or structure is not None:
                nothing = False
                report = self.reader.read(image, structure)
                if structure is None:
                    report.images_without_map.append(name)
                if image is None:
                    report.maps_without_image.append(name)
                yield report
            else:
                others[name] = absent
        broken.broken |= {url: absent} if nothing and not broken.broken else others
        yield broken


def check(
    images: Path,
    structure: Path | None = None,
    *,
    missing: float | None = 0,
    kind: StructureKind = DEPTH,
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Reads all files of a folder of images and of an optional mirrored folder of maps, with or without a partner.

    Args:
        images, structure, missing, kind: see `FolderPairs`.
        workers: number of worker processes. 0: reads in this process.
        progress: shows a progress bar.

    Raises:
        DataError: there are no files, or no pairs.
    """
    report = Report()
    found = find_files(images, "images", IMAGE_SUFFIXES, report)
    if structure is None:
        entries = [(str(images / (stem + end)), None) for stem, suffixes in found.items() for end in suffixes]
    else:
        maps = find_files(structure, "structure", MAP_SUFFIXES, report)
        pairs = match(found, maps, images, structure, kind.word, report)
        entries = [(str(images / os.fsdecode(a)), str(structure / os.fsdecode(b))) for a, b in pairs]
        entries += [(str(images / name), None) for name in report.images_without_map]
        entries += [(None, str(structure / name)) for name in report.maps_without_image]
    return _read_all(Entries(entries, Reader(kind, missing)), report, workers, progress, len(entries))


def check_shards(
    urls: Sequence[str],
    *,
    missing: float | None = 0,
    kind: StructureKind = DEPTH,
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Reads all samples of shards, including incomplete ones. For the arguments see `ShardPairs` and `check`.

    Raises:
        DataError: a local shard does not exist.
    """
    found = shards.expand(urls)
    report = Report(broken=shards.truncated(found))
    return _read_all(Samples(found, Reader(kind, missing)), report, min(workers, len(found)), progress)


def _read_all(dataset: Dataset, report: Report, workers: int, progress: bool, total: int | None = None) -> Report:
    loader = DataLoader(dataset, BATCH, num_workers=workers, collate_fn=list)
    unit = "sample" if total is None else "file"
    with tqdm(desc="reading", total=total, unit=unit, disable=not progress) as bar:
        for batch in loader:
            for found in batch:
                report.add(found)
            bar.update(len(batch))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "measure the mean and standard deviation of each channel of the images"
    stats.add_arguments(actions.add_parser("stats", help=what, description=what[0].upper() + what[1:] + "."))
    what = "read every file once and report errors; the exit code is 1 if a file is broken"
    parser = actions.add_parser("check", help=what, description=what[0].upper() + what[1:] + ".")
    help = "folder of images, and optionally the folder of their maps; or shards, for example 'train-{000..099}.tar'"
    parser.add_argument("folders", nargs="+", metavar="DIR", help=help)
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("data-report.txt"),
        metavar="FILE",
        help="report to write (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read files (default: one per core)")
    parser.add_argument(
        "--structure-kind", choices=NAMES, default=DEPTH.name, help="kind of structure maps (default: %(default)s)"
    )
    parser.add_argument(
        "--channels", type=int, metavar="N", help="number of channels of the maps, for the kind channels"
    )
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes in the maps, for the kind semantic")
    parser.add_argument(
        "--ignore",
        type=int,
        default=255,
        metavar="ID",
        help="class id of pixels without a label, for the kind semantic (default: %(default)s)",
    )
    parser.add_argument(
        "--missing",
        type=int,
        default=0,
        metavar="N",
        help="value of pixels without a measurement, for the other kinds (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises UserError or DataError for errors that the user can correct."""
    if args.action == "stats":
        return stats.run(args)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    if workers < 0:
        raise UserError(f"--workers is {workers}; expected 0 or more")
    numbers = {"channels": args.channels, "classes": args.classes, "ignore": args.ignore}
    kind = structure_kind(args.structure_kind, **numbers, prefix="--")
    how = {"missing": args.missing, "kind": kind, "workers": workers, "progress": sys.stderr.isatty()}
    tars = [_shards(folder) for folder in args.folders]
    if all(tars):
        report = check_shards([url for urls in tars for url in urls], **how)
    elif any(tars):
        raise UserError(f"{' and '.join(args.folders)} are shards and folders of files; expected only one of them")
    elif len(args.folders) > 2:
        raise UserError(f"got {len(args.folders)} DIR; expected a folder of images, or one of images and one of maps")
    else:
        report = check(*map(Path, args.folders), **how)
    try:
        report.write(args.report)
    except OSError as error:
        raise UserError(f"cannot write {args.report}: {error.strerror}") from error
    print(f"{report.summary()}\nwrote {args.report}")
    return 1 if report.broken else 0


def _shards(folder: str) -> list[str]:
    """Returns the shards that a command-line argument names, or an empty list for a folder of images or maps."""
    if not os.path.isdir(folder):
        return [folder] if folder.endswith(TARS) or "{" in folder or ":" in folder else []
    files = [os.path.join(folder, inside, name) for inside, names in walk(Path(folder), Report()) for name in names]
    if any(os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES + MAP_SUFFIXES for file in files):
        return []
    return sorted(file for file in files if file.endswith(TARS))
