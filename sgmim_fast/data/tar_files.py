"""The files of a shard, one after the other, and no more of them than a machine can hold."""

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

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by how a file begins
ALWAYS = 64 * 2**20  # so many bytes may any shard grow to
META = re.compile(r"__[^/]*__($|/)")  # webdataset's names for what is no sample


def files(
    stream: BinaryIO, url: str, wanted: Callable[[str], bool], skip: Callable[[BrokenFile], None]
) -> Iterator[dict]:
    """What webdataset groups to samples: {"fname", "data", "__url__"}.

    Args:
        stream: of a tar file, plain or compressed by gzip, bzip2 or xz.
        wanted: whether the content of a file of this name is needed; otherwise it is b"".
        skip: is told of what is left out.

    Raises:
        OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error: the rest cannot be read.
    """
    with tarfile.open(fileobj=_Expanded(stream), mode="r|") as tar:
        for member in tar:
            tar.members = []  # it would keep them all
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
    """Counts what is read of a stream."""

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
    """A stream as it was before it was compressed, up to a number of times its size."""

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
        most = limits.limit(limits.EXPANSION)
        if self.count > max(ALWAYS, most * self.raw.count):
            raise ValueError(f"grows to more than {most} times its size ({limits.EXPANSION})")
        return content
