"""Data set of pairs from WebDataset shards, which are tar files streamed from disk or over a network."""

from __future__ import annotations

import lzma
import os
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from sgmim_fast.data.files import LOSSY
from sgmim_fast.data.image_file import IMAGE_SUFFIXES, ImageFile
from sgmim_fast.data.map_file import MAP_SUFFIXES
from sgmim_fast.data.pair import Item, make_item
from sgmim_fast.data.report import BrokenFile, DataError, Report
from sgmim_fast.data.seeds import Seeded, seeded
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.structure_kind import DEPTH, NAMES, StructureKind
from sgmim_fast.data.tar_files import files
from sgmim_fast.data.transform import Normalize, transformed

TRIED = 100  # number of samples of the first shard that the constructor tries
Sample = dict[str, Any]  # "__key__", "__url__", and suffix -> content


class ShardPairs(Seeded, IterableDataset):
    """Pairs from tar files in which KEY.jpg (or another image) and KEY.depth.png (or .npy, ...) follow each other.

    Shards are split over all workers of all processes, so there must be at least as many shards as workers. The order
    of pairs depends on (seed, epoch) and on the number of workers. Rank and world size are read from torch.distributed
    or its environment variables; do not split the data again with a sampler or wrapper. Broken and incomplete samples
    are left out, and named in the next item's "skipped", for `report.add_skipped`.

    Args:
        urls: paths or URLs as in webdataset: one, with braces such as "train-{0000..1023}.tar", or a list.
        transform: see `FolderPairs`; seeded for each item from (seed, epoch, pass, name).
        length: pairs per epoch over all processes. If the shards have fewer pairs, they are read repeatedly, in
            different orders. None: an epoch is one pass, and processes may yield different numbers of pairs.
        structure: part of a map's name between key and suffix. None: images alone, see `FolderPairs`.
        shuffle: size of each worker's shuffle buffer. 0: no shuffling.
        seed: seed of the order and of the transform.
        missing: integer that marks missing values in maps. None: no integer does.
        kind: kind of the structure maps.

    Raises:
        DataError: a local shard does not exist, or the first shard has no pair. Iteration raises it if there are fewer
            shards than workers, or if no shard of a worker has a pair.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        transform: Callable[..., Sequence[Tensor]] | None = None,
        *,
        length: int | None = None,
        structure: str | None = "depth",
        shuffle: int = 1000,
        seed: int = 0,
        missing: float | None = 0,
        kind: StructureKind = DEPTH,
    ) -> None:
        super().__init__(seed)
        if length is not None and length < 1:
            raise ValueError(f"length is {length}; expected a positive number of pairs, or None")
        self.urls = expand([urls] if isinstance(urls, str) else urls)
        self.transform = Normalize() if transform is None else transform
        self.length, self.structure, self.shuffle, self.missing = length, structure, shuffle, missing
        self.kind = kind
        self.report = Report(used=length or 0)
        self._try_first()

    def _try_first(self) -> None:
        self.report.broken |= truncated(self.urls)
        found: set[str] = set()
        broken: list[str] = []
        for sample in islice(samples(self.urls[:1], lambda error: broken.append(str(error)), self.structure), TRIED):
            found.update(suffix for suffix in sample if not suffix.startswith("__"))
            try:
                self._files(sample)
                return
            except BrokenFile as error:
                broken.append(str(error))
        raise DataError(
            f"no pair in {self.urls[0]}: looked for KEY.jpg (or {', '.join(IMAGE_SUFFIXES[1:])})"
            + (f" with KEY.{self.structure}.png (or {', '.join(MAP_SUFFIXES[1:])})" if self.structure else "")
            + ", found "
            f"{', '.join(f'KEY.{suffix}' for suffix in sorted(found)) or 'no samples'}"
            + (f"; the last: {broken[-1]}" if broken else "")
        )

    def __len__(self) -> int:
        """Returns the number of pairs per epoch on this process. Raises TypeError without a `length`."""
        if self.length is None:
            raise TypeError("the length of shards is unknown; expected length=")
        return self.length // _webdataset().utils.pytorch_worker_info()[1]

    def __iter__(self) -> Iterator[Item]:
        rank, processes, worker, workers = _webdataset().utils.pytorch_worker_info()
        self.check_parts(processes, workers)
        if self.length is None:
            return self._one_pass(0, rank * workers + worker, processes * workers)
        share = self.length // processes
        share = share // workers + (worker < share % workers)
        return islice(self._passes(rank * workers + worker, processes * workers), share)

    def _passes(self, part: int, parts: int) -> Iterator[Item]:
        for number in count():
            nothing = True
            for item in self._one_pass(number, part, parts):
                nothing = False
                yield item
            if nothing:
                raise DataError(f"no pair that can be used in {len(self.urls[part::parts])} shards of one worker")

    def _one_pass(self, number: int, part: int, parts: int) -> Iterator[Item]:
        """Yields the items of part `part` of `parts` of the shards. `number` counts the passes within an epoch."""
        epoch, urls = self._epoch.get(), list(self.urls)
        rng = random.Random(f"{self.seed} {epoch} {number}")
        if self.shuffle:
            rng.shuffle(urls)  # to the same order in all workers
        rng.seed(f"{self.seed} {epoch} {number} {part}")
        skipped: list[str] = []
        found = samples(urls[part::parts], lambda broken: skipped.append(broken.line), self.structure)
        if self.shuffle:
            found = _webdataset().shuffle(self.shuffle, rng=rng)(found)
        for sample in found:
            try:
                name, *pair = self._files(sample)
                with seeded(self.seed, epoch, number, zlib.crc32(name.encode())):
                    tensors = transformed(self.transform, *pair)
                yield make_item(tensors, name, skipped, self.kind.stored)
                skipped.clear()
            except BrokenFile as broken:
                skipped.append(broken.line)

    def check_parts(self, processes: int, workers: int) -> None:
        """Raises DataError if there are fewer shards than workers on all processes together."""
        if len(self.urls) < processes * workers:
            raise DataError(
                f"{len(self.urls)} shards cannot be split over {processes} processes with {workers} workers each; "
                f"expected at least {processes * workers}"
            )

    def _files(self, sample: Sample) -> tuple[str, ImageFile] | tuple[str, ImageFile, StructureFile]:
        """Returns name, image and map of a sample. Raises BrokenFile."""
        name, image, structure = members(sample, self.structure)
        if self.structure is None:
            if image is None:
                raise BrokenFile(name, "has no image")
            return name, ImageFile(*image)
        if image is None or structure is None:
            raise BrokenFile(name, f"has no {'image' if image is None else 'structure map'}")
        image_file = ImageFile(*image)
        structure_file = self.kind.read(*structure, missing=self.missing)
        structure_file.check_shape(image_file.size)
        return name, image_file, structure_file


def expand(urls: Sequence[str]) -> list[str]:
    """Expands braces in URLs.

    Raises:
        DataError: there are no shards, or a local one does not exist.
    """
    found = [url for given in urls for url in _webdataset().shardlists.expand_urls(given)]
    absent = [url for url in _local(found) if not os.path.isfile(url)]
    if not found or absent:
        raise DataError(f"{len(absent)} of {len(found)} shards do not exist: {', '.join(absent[:3]) or 'none given'}")
    return found


def truncated(urls: Sequence[str]) -> dict[str, str]:
    """Returns the local shards that are truncated, with reasons. tarfile does not always raise for them."""
    ends = "truncated: the size of a tar file is a multiple of 512 bytes"
    return {url: ends for url in _local(urls) if url.endswith(".tar") and os.path.getsize(url) % tarfile.BLOCKSIZE}


def _local(urls: Sequence[str]) -> list[str]:
    return [url for url in urls if ":" not in url]


def samples(urls: Sequence[str], skip: Callable[[BrokenFile], None], structure: str | None = None) -> Iterator[Sample]:
    """Yields the samples of shards in order. Calls `skip` for each shard or member that cannot be read.

    `structure` is the part of a map's name between key and suffix, in addition to the names of kinds.
    """
    webdataset = _webdataset()
    for url in urls:

        def cut_off(url: str = url) -> Iterator[dict[str, Any]]:
            try:
                with webdataset.gopen(url) as stream:
                    yield from files(stream, url, _wanted, skip)
            except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
                skip(BrokenFile(url, error))

        def skip_file(error: Exception, url: str = url) -> bool:
            skip(BrokenFile(url, error))
            return True

        yield from webdataset.tariterators.group_by_keys(cut_off(), _keys(structure), handler=skip_file)


def _keys(structure: str | None) -> Callable[[str], tuple[str | None, str | None]]:
    """Returns a function that splits the names of a shard's members, called in order, into key and rest.

    A key may contain dots, unlike in webdataset. It ends before the suffix of an image, or before .depth.png and other
    endings of maps. A name that continues the last key, such as KEY.mask.png, belongs to it.
    """
    parts = {*NAMES, structure or DEPTH.name}, MAP_SUFFIXES + LOSSY
    words, suffixes = ("|".join(map(re.escape, part)) for part in parts)
    ending = re.compile(rf"\.({words})({suffixes})$", re.IGNORECASE)
    key: str | None = None

    def split(name: str) -> tuple[str | None, str | None]:
        nonlocal key
        stem, suffix = os.path.splitext(name)
        if os.path.basename(name).startswith("."):
            return None, None
        if found := ending.search(name):
            key = name[: found.start()]
        elif key is None or not name.startswith(f"{key}."):
            if suffix.lower() not in IMAGE_SUFFIXES:
                return None, None
            key = stem
        return key, name[len(key) + 1 :]

    return split


def members(sample: Sample, structure: str | None) -> tuple[str, tuple[str, bytes] | None, tuple[str, bytes] | None]:
    """Returns the name of a sample, and (name, content) of its image and of its map, None where it has none.

    Raises:
        BrokenFile: the map has a lossy format.
    """
    name = f"{sample['__url__']}::{sample['__key__']}"
    image = next(((name + suffix, sample[suffix[1:]]) for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), None)
    if structure is None:
        return name, image, None
    ends = [suffix for suffix in MAP_SUFFIXES if structure + suffix in sample]
    lossy = [suffix for suffix in LOSSY if structure + suffix in sample]
    if lossy and not ends:
        raise BrokenFile(
            f"{name}.{structure}{lossy[0]}",
            f"is a map saved as {lossy[0]}, which changes its values; expected {', '.join(MAP_SUFFIXES)}",
        )
    return name, image, (f"{name}.{structure}{ends[0]}", sample[structure + ends[0]]) if ends else None


def _wanted(name: str) -> bool:
    """Returns whether a member is an image or a map, judged by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in IMAGE_SUFFIXES or suffix in MAP_SUFFIXES


def _webdataset() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ShardPairs needs webdataset, which is not installed: pip install 'sgmim_fast[train]'", name="webdataset"
        ) from None
    return webdataset
