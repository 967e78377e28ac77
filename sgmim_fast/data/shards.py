"""Pairs from WebDataset shards: tar files read from one end to the other, from disks or over a network."""

from __future__ import annotations

import lzma
import os
import random
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
from sgmim_fast.data.seeding import Seeded, seeded
from sgmim_fast.data.structure_file import StructureFile
from sgmim_fast.data.structure_kind import DEPTH, StructureKind
from sgmim_fast.data.tar_files import files
from sgmim_fast.data.transform import Normalize, transformed

TRIED = 100  # samples of the first shard, at construction
Sample = dict[str, Any]  # "__key__", "__url__", and the content of each file under its suffix


class ShardPairs(Seeded, IterableDataset):
    """Pairs from tar files in which KEY.jpg (or another image) and KEY.depth.png (or .npy, ...) follow each other.

    Shards are split over processes and workers, so there must be at least as many; the order depends on (seed, epoch)
    and on that number. Processes are told apart by torch.distributed or its environment variables: no sampler and no
    other wrapper may split the data again. Broken and incomplete samples are left out, and named in the next item's
    "skipped", from where `report.add_skipped` takes them.

    Args:
        urls: as in webdataset: paths or URLs, one with braces such as "train-{0000..1023}.tar", or several in a list.
        transform: see `FolderPairs`; seeded for every item from (seed, epoch, its name).
        length: pairs of an epoch, of all processes together; shards are read again, in another order, where there are
            fewer. None: an epoch is every pair once, which lets processes finish after different numbers of steps.
        structure: what stands between the key of a map and its suffix. None: images alone, see `FolderPairs`.
        shuffle: samples that a worker keeps to draw from; 0: shards are read in order.
        seed: of order and transform.
        missing: integer that means "no value" in maps; None: none does.
        kind: what the maps hold.

    Raises:
        DataError: a local shard is not there, or the first shard has no pair; on iterating: fewer shards than workers,
            or no pair in all shards of a worker.
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
        webdataset = _webdataset()
        self.urls = [
            url
            for given in ([urls] if isinstance(urls, str) else urls)
            for url in webdataset.shardlists.expand_urls(given)
        ]
        self.transform = Normalize() if transform is None else transform
        self.length, self.structure, self.shuffle, self.missing = length, structure, shuffle, missing
        self.kind = kind
        self.report = Report(used=length or 0)
        self._try_first()

    def _try_first(self) -> None:
        local = [url for url in self.urls if ":" not in url]
        absent = [url for url in local if not os.path.isfile(url)]
        if not self.urls or absent:
            raise DataError(
                f"{len(absent)} of {len(self.urls)} shards are not there: {', '.join(absent[:3]) or 'none given'}"
            )
        for url in local:
            if url.endswith(".tar") and os.path.getsize(url) % tarfile.BLOCKSIZE:  # tarfile may not say so
                self.report.broken[url] = "truncated: the size of a tar file is a multiple of 512 bytes"
        found: set[str] = set()
        broken: list[str] = []
        for sample in islice(self._samples(self.urls[:1], broken), TRIED):
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
        """Pairs that this process gets in an epoch."""
        if self.length is None:
            raise TypeError("shards have no length: give one, length=")
        return self.length // _webdataset().utils.pytorch_worker_info()[1]

    def __iter__(self) -> Iterator[Item]:
        rank, processes, worker, workers = _webdataset().utils.pytorch_worker_info()
        if len(self.urls) < processes * workers:
            raise DataError(
                f"{len(self.urls)} shards cannot be split over {processes} processes with {workers} workers each; "
                f"expected at least {processes * workers}"
            )
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
        """The items of one of `parts` parts of the shards; `number` counts the passes of an epoch."""
        epoch, urls = self._epoch.get(), list(self.urls)
        rng = random.Random(f"{self.seed} {epoch} {number}")
        if self.shuffle:
            rng.shuffle(urls)  # the same in all workers
        rng.seed(f"{self.seed} {epoch} {number} {part}")
        skipped: list[str] = []
        samples = self._samples(urls[part::parts], skipped)
        if self.shuffle:
            samples = _webdataset().shuffle(self.shuffle, rng=rng)(samples)
        for sample in samples:
            try:
                name, *pair = self._files(sample)
                with seeded(self.seed, epoch, number, zlib.crc32(name.encode())):
                    tensors = transformed(self.transform, *pair)
                yield make_item(tensors, name, skipped, self.kind.stored)
                skipped.clear()
            except BrokenFile as broken:
                skipped.append(broken.line)

    def _samples(self, urls: Sequence[str], skipped: list[str]) -> Iterator[Sample]:
        """The samples of some shards, one shard after the other; adds what cannot be read to `skipped`."""
        webdataset = _webdataset()

        def skip(broken: BrokenFile) -> None:
            skipped.append(broken.line)

        for url in urls:

            def cut_off(url: str = url) -> Iterator[dict[str, Any]]:
                try:
                    with webdataset.gopen(url) as stream:
                        yield from files(stream, url, self._wanted, skip)
                except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
                    skip(BrokenFile(url, error))

            def skip_file(error: Exception, url: str = url) -> bool:
                skip(BrokenFile(url, error))
                return True

            yield from webdataset.tariterators.group_by_keys(cut_off(), handler=skip_file)

    def _wanted(self, name: str) -> bool:
        """Whether it is an image or a map."""
        suffix = os.path.splitext(name)[1].lower()
        return suffix in IMAGE_SUFFIXES or suffix in MAP_SUFFIXES

    def _files(self, sample: Sample) -> tuple[str, ImageFile] | tuple[str, ImageFile, StructureFile]:
        """Name, image and map of a sample."""
        name = f"{sample['__url__']}::{sample['__key__']}"
        image = next((suffix for suffix in IMAGE_SUFFIXES if suffix[1:] in sample), None)
        if self.structure is None:
            if image is None:
                raise BrokenFile(name, "has no image")
            return name, ImageFile(name + image, sample[image[1:]])
        structure = next((suffix for suffix in MAP_SUFFIXES if self.structure + suffix in sample), None)
        lossy = next((suffix for suffix in LOSSY if self.structure + suffix in sample), None)
        if structure is None and lossy is not None:
            raise BrokenFile(
                f"{name}.{self.structure}{lossy}",
                f"is a map saved as {lossy}, which changes its values; expected {', '.join(MAP_SUFFIXES)}",
            )
        if image is None or structure is None:
            raise BrokenFile(name, f"has no {'image' if image is None else 'structure map'}")
        image_file = ImageFile(name + image, sample[image[1:]])
        content = sample[self.structure + structure]
        structure_file = self.kind.read(f"{name}.{self.structure}{structure}", content, missing=self.missing)
        structure_file.check_shape(image_file.size)
        return name, image_file, structure_file


def _webdataset() -> Any:
    try:
        import webdataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "ShardPairs needs webdataset, which is not installed: pip install 'sgmim_fast[train]'", name="webdataset"
        ) from None
    return webdataset
