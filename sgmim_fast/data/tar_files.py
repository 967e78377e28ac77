"""Streams the members of tar shards, with limits on their size."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sgmim_fast.data import limits
from sgmim_fast.data.report import BrokenFile

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # magic bytes -> decompressor
MIN_LIMIT = 64 * 2**20  # bytes to which any shard may expand, whatever its compressed size
META = re.compile(r"__[^/]*__($|/)")  # names that webdataset uses for metadata


def files(
    stream: BinaryIO, url: str, wanted: Callable[[str], bool], skip: Callable[[BrokenFile], None]
) -> Iterator[dict]:
    """Yields the members that webdataset groups into samples: {"fname", "data", "__url__"}.

    Args:
        stream: stream of a tar file, plain or compressed by gzip, bzip2 or xz.
        url: name of the tar file.
        wanted: predicate of a member's name; the content of other members is not read, and yielded as b"".
        skip: called for each member that exceeds the size limit.

    Raises:
        OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error: the rest of the tar file cannot be
            read.
    """
    with tarfile.open(fileobj=_Expanded(stream), mode="r|") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep a record of every member
            if not member.isreg() or META.match(member.name):
                continue
            content = b""
            if wanted(member.name):
                try:
                    limits.check_bytes(member.size)
                except ValueError as error:
                    skip(BrokenFile(f"{url}::{member.name}", error))
                    continue
                content = tar.extractfile(member).read()
            yield {"fname": member.name, "data": content, "__url__": url}


class _Counted(io.RawIOBase):
    """Counts the bytes read from a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.count = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.stream.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        return len(content)


class _Expanded:
    """Decompresses a stream. Raises ValueError when the output exceeds a multiple of the input's size."""

    def __init__(self, stream: BinaryIO) -> None:
        self.raw = _Counted(stream)
        buffered = io.BufferedReader(self.raw)
        begin = buffered.peek(8)
        opener = next((opener for magic, opener in OPENERS.items() if begin.startswith(magic)), None)
        self.file = buffered if opener is None else opener(buffered)
        self.count = 0

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.count += len(content)
        ratio = limits.limit(limits.EXPANSION)
        if self.count > max(MIN_LIMIT, ratio * self.raw.count):
            raise ValueError(f"grows to more than {ratio} times its size ({limits.EXPANSION})")
        return content
