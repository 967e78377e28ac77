"""Hostile files: decompression bombs, pipes, loops of links, images of 16 bits, maps without a value."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import resource
import struct
import tarfile
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from pairs import encoded, photograph, ramp, write, write_trees
from PIL import Image
from torchvision.transforms import v2

from sgmim_fast import cli, data
from sgmim_fast.data import limits
from sgmim_fast.data.files import find_files
from sgmim_fast.data.shards import samples

MIB = 2**20


def png(height: int, width: int, colour: int = 6, bits: int = 8) -> bytes:
    """Returns a PNG of zeros, which is compressed to a small file at any size."""
    row = bytes(1 + width * {0: 1, 2: 3, 6: 4}[colour] * bits // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg(side: int) -> bytes:
    """Returns a small JPEG whose header declares a large image."""
    content = bytearray(encoded(photograph(8, 8), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(content)


def npy(shape: tuple[int, ...]) -> bytes:
    """Returns only the header of an NPY file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(64)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


BOMBS = {
    "JPEG": lambda: data.ImageFile("a.jpg", jpeg(30000)),
    "PNG": lambda: data.ImageFile("a.png", png(2, 45_000_000)),
    "PNG below Pillow's limit": lambda: data.ImageFile("a.png", png(13000, 13000, 0)),
    "map": lambda: data.StructureFile("a.png", png(10000, 10000, 0, 16)),
    "npy": lambda: data.StructureFile("a.npy", npy((100_000, 100_000))),
    "npy of no numbers": lambda: data.StructureFile("a.npy", npy((2**40, 0))),
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs_are_broken_files(what):
    before = peak()
    with pytest.raises(data.BrokenFile) as error:
        BOMBS[what]()
    assert "pixels" in error.value.reason or "shape" in error.value.reason
    assert peak() - before < 64


def test_the_limit_is_a_setting(monkeypatch):
    content = encoded(photograph(40, 60), "PNG")
    monkeypatch.setenv(limits.PIXELS, "2400")
    data.ImageFile("a.png", content).decode()
    monkeypatch.setenv(limits.PIXELS, "2399")
    with pytest.raises(data.BrokenFile, match=r"has 40×60 pixels, more than 2399 \(SGMIM_FAST_MAX_PIXELS"):
        data.ImageFile("a.png", content)
    monkeypatch.setenv(limits.PIXELS, "many")
    with pytest.raises(data.BrokenFile, match="'many'; expected a positive number"):
        data.ImageFile("a.png", content)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large", "gone", "empty"])
def test_files_that_are_none(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(2**40)  # a sparse file
    elif kind == "empty":
        path.touch()
    for read in (data.ImageFile, data.StructureFile):
        with pytest.raises(data.BrokenFile) as error:
            read(path if read is data.ImageFile else path.rename(tmp_path / "a.png") if path.exists() else path)
        assert error.value.reason


def shard(path, members: dict[str, bytes], opener=open, kind: bytes = tarfile.REGTYPE) -> str:
    with opener(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), kind
            tar.addfile(info, io.BytesIO(content))
    return str(path)


GOOD = {"a.jpg": encoded(photograph(20, 30), "JPEG"), "a.depth.png": encoded(ramp(20, 30), "PNG")}


@pytest.mark.parametrize(
    "opener", [partial(gzip.open, compresslevel=1), bz2.open, partial(lzma.open, preset=0)], ids=["gz", "bz2", "xz"]
)
@pytest.mark.parametrize("kind", ["one file", "many files", "a long name", "no image"])
def test_a_shard_that_grows_is_cut_off(tmp_path, opener, kind):
    """The valid pair before the cut is used, and the shard is named."""
    zeros = bytes(100 * MIB)
    path = tmp_path / "x.tar"
    if kind == "a long name":
        with opener(path, "wb") as file:
            file.write(_tar(GOOD) + _header(b"L", len(zeros)) + zeros)
    else:
        names = ["b.jpg"] if kind == "one file" else [f"{i}.txt" for i in range(9)]
        names = [f"{i}.jpg" for i in range(25)] if kind == "many files" else names
        with opener(path, "wb") as file:
            file.write(_tar(GOOD | {name: zeros[: 100 * MIB // len(names)] for name in names}))
    assert path.stat().st_size < MIB
    del zeros
    before = peak()
    dataset = data.ShardPairs(str(path), shuffle=0, length=1)
    assert next(iter(dataset))["name"].endswith("::a")
    skipped: list[data.BrokenFile] = []
    assert len(list(samples([str(path)], skipped.append))) >= 1
    assert any(broken.name == str(path) and limits.EXPANSION in broken.reason for broken in skipped), skipped
    assert peak() - before < 150


def _tar(members: dict[str, bytes]) -> bytes:
    """Returns a tar file without the end marker, so that more can be appended."""
    content = b""
    for name, data_of_it in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(data_of_it)
        content += info.tobuf() + data_of_it + bytes(-len(data_of_it) % tarfile.BLOCKSIZE)
    return content


def _header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_large_file_in_a_shard_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv(limits.FILE_MIB, "1")
    path = shard(tmp_path / "x.tar", {"0.jpg": bytes(2 * MIB), "0.depth.png": GOOD["a.depth.png"], **GOOD})
    (item,) = data.ShardPairs(path, shuffle=0)
    assert item["name"] == f"{path}::a"
    assert f"{path}::0.jpg\thas 2 MiB, more than 1 (SGMIM_FAST_MAX_FILE_MIB)" in data.skipped_lines([item["skipped"]])


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
def test_compressed_shards_are_read(tmp_path, opener):
    (item,) = data.ShardPairs(shard(tmp_path / "x.tar", GOOD, opener), shuffle=0)
    assert item["skipped"] == ""


VALUES = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
DEEP = {
    "PNG": ("PNG", VALUES, VALUES / 65535),
    "TIFF": ("TIFF", VALUES, VALUES / 65535),
    "big-endian TIFF": ("TIFF", VALUES.astype(">u2"), VALUES / 65535),
    "PGM": ("PPM", VALUES, VALUES / 65535),
    "float TIFF": ("TIFF", (VALUES / 65535).astype(np.float32), VALUES / 65535),
}


@pytest.mark.parametrize("what", DEEP)
def test_deep_images_keep_their_range(what):
    kind, values, expected = DEEP[what]
    file = data.ImageFile("a", encoded(values, kind))
    image = file.decode()
    assert file.size == (3, 4) and image.shape == (3, 3, 4) and image.dtype == torch.float32 and "16" in file.kind
    torch.testing.assert_close(image, torch.from_numpy(expected).float().expand(3, 3, 4), rtol=0, atol=1e-6)
    normal = data.Normalize()(data.ImageFile("a", encoded(values, kind)))[0]
    bright = data.Normalize()(data.ImageFile("a", encoded(Image.new("RGB", (4, 3), "white"), "PNG")))[0]
    torch.testing.assert_close(normal[:, -1, -1], bright[:, -1, -1])  # 255 in 8 bits


@pytest.mark.parametrize(
    "values", [np.array([[0, 7]], np.int32), np.array([[0, 255.0]], np.float32), np.array([[0, np.nan]], np.float32)]
)
def test_images_of_unknown_range_are_refused(values):
    with pytest.raises(data.BrokenFile, match="expected"):
        data.ImageFile("a", encoded(values, "TIFF"))


def test_kinds_are_counted(tmp_path):
    images, maps = write_trees(tmp_path, ["a", "b"])
    write(images / "c.png", encoded(ramp(40, 60), "PNG"))
    write(maps / "c.npy", encoded(ramp(40, 60).astype(np.float32), "NPY"))
    dataset = data.FolderPairs(images, maps, data.PairTransform(16))
    assert dataset.report.summary().endswith(
        "read: 1 images of 16 bits or float, grey, 2 images of 8 bits, 1 structure maps of float32, "
        "2 structure maps of uint16"
    )
    assert dataset[2]["image"].dtype == torch.float32


LINKS = {
    "to the root": {"loop": "."},
    "to itself": {"self": "self"},
    "each other": {"a/up": "..", "b/up": ".."},
    "twice": {"x": "a", "y": "a"},
    "in front of its target": {"0": "b"},
    "a chain": {"x": "y", "y": "a"},
}


@pytest.mark.parametrize("what", LINKS)
def test_links_add_nothing_that_is_there(tmp_path, what):
    images, maps = write_trees(tmp_path, ["a/1", "a/2", "b/1"])
    for root in (images, maps):
        for name, target in LINKS[what].items():
            (root / name).symlink_to(root / target if target != ".." else root)
    report = data.FolderPairs(images, maps).report
    assert report.used == 3
    expected = {str(root / name) for root in (images, maps) for name in LINKS[what] if what != "to itself"}
    assert set(report.again) == expected
    assert ("folders that are there already" in report.summary()) == bool(expected)


def test_links_to_other_folders_are_followed_once(tmp_path):
    images, maps = write_trees(tmp_path / "real", ["a/1", "2"])
    for name, target in (("images", images), ("maps", maps)):
        (tmp_path / name).mkdir()
        for link in ("x", "y"):
            (tmp_path / name / link).symlink_to(target)
        (target / "back").symlink_to(tmp_path / name)
    report = data.FolderPairs(tmp_path / "images", tmp_path / "maps").report
    assert report.used == 2 and len(report.again) == 4
    (tmp_path / "link").symlink_to(images)
    assert set(find_files(tmp_path / "link", "images", data.IMAGE_SUFFIXES)) == {"a/1", "2"}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, capsys, monkeypatch):
    images, maps = write_trees(tmp_path, ["a/1", "b/1"])
    scandir = os.scandir

    def refuse(path):  # root, as which tests may run, can read every folder
        if str(path) == str(maps / "b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.DataError, match=f"^cannot read the folder {maps / 'b'}: Permission denied"):
        data.FolderPairs(images, maps)
    for folders in ((images, maps), (maps,)):
        assert cli.main(["data", "check", *map(str, folders)]) == 2
        assert f"cannot read the folder {maps / 'b'}" in capsys.readouterr().err


NOTHING = {
    "NaN": (np.full((40, 60), np.nan, np.float32), "is NaN or infinite everywhere"),
    "infinite": (np.full((40, 60), np.inf, np.float32), "is NaN or infinite everywhere"),
    "zero": (np.zeros((40, 60), np.uint16), "is 0, missing, everywhere"),
    "constant": (np.full((40, 60), 7, np.uint16), "is 7 wherever it has a value: constant"),
    "float zero": (np.zeros((40, 60), np.float32), "is 0 wherever it has a value: constant"),
    "constant with holes": (np.where(np.arange(2400).reshape(40, 60) % 2, 7, 0).astype(np.uint16), "is 7 wherever"),
}


@pytest.mark.parametrize("what", NOTHING)
def test_maps_with_nothing_to_learn_are_named(tmp_path, what):
    images, maps = write_trees(tmp_path, ["a", "b", "c"])
    values, reason = NOTHING[what]
    (maps / "b.png").unlink()
    write(maps / "b.npy", encoded(values, "NPY"))
    dataset = data.FolderPairs(images, maps)
    assert reason in dataset.report.broken[str(maps / "b.npy")]
    assert reason in dataset[1]["skipped"] and dataset[1]["name"] == "c.jpg"


def test_one_other_pixel_is_something(tmp_path):
    values = np.full((40, 60), 7, np.uint16)
    values[3, 5] = 8
    data.StructureFile("a.npy", encoded(values, "NPY"))
    values[:] = 0
    values[0, 0] = 1
    data.StructureFile("a.npy", encoded(values, "NPY"), missing=None)


def test_maps_saved_as_jpeg_are_named(tmp_path):
    images, maps = write_trees(tmp_path, ["a", "b", "c"])
    (maps / "b.png").unlink()
    write(maps / "b.JPG", encoded(photograph(40, 60), "JPEG"))
    report = data.FolderPairs(images, maps).report
    assert report.used == 2 and report.images_without_map == []
    assert "is a map saved as .JPG, which changes its values; expected .png" in report.broken[str(maps / "b.JPG")]
    with pytest.raises(data.DataError, match=r"found 3 × \.jpg; maps saved as JPEG"):
        data.FolderPairs(images, images)
    path = shard(tmp_path / "x.tar", {"0.jpg": GOOD["a.jpg"], "0.depth.jpg": GOOD["a.jpg"], **GOOD})
    (item,) = data.ShardPairs(path, shuffle=0)
    assert f"{path}::0.depth.jpg\tis a map saved as .jpg" in item["skipped"]


def test_names_with_tabs_and_newlines_are_one_line(tmp_path):
    images, maps = write_trees(tmp_path, ["a", "b\n\tc", "d"])
    dataset = data.FolderPairs(images, maps)
    write(images / "b\n\tc.jpg", b"torn")
    (line,) = data.skipped_lines([dataset[1]["skipped"]])
    assert line.count("\t") == 1 and r"b\n\tc.jpg" in line


@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_check(tmp_path, capsys, workers):
    images, maps = write_trees(tmp_path, [f"a/{i}" for i in range(20)])
    words = ["data", "check", str(images), str(maps), f"--workers={workers}", f"--report={tmp_path / 'report.txt'}"]
    assert cli.main(words) == 0
    assert "20 pairs; left out: nothing; read: 20 images of 8 bits, 20 structure maps" in capsys.readouterr().out
    write(images / "a/3.jpg", b"torn")
    write(maps / "a/3.png", encoded(np.zeros((40, 60), np.uint16), "PNG"))
    write(maps / "a/4.png", encoded(ramp(60, 40), "PNG"))
    write(images / "alone.jpg", b"")
    write(maps / "alone.npy", b"torn") if workers == "2" else write(maps / "other.npy", b"torn")
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    report = (tmp_path / "report.txt").read_text()
    for name in ("a/3.jpg", "a/3.png", "a/4.png", "alone.jpg", ".npy"):
        (line,) = [line for line in report.splitlines() if line.startswith("broken") and name in line]
        assert line.count("\t") == 2 and "object at" not in line
    assert "18 pairs" in out and "5 broken files" in out
    assert cli.main(["data", "check", str(images), f"--report={tmp_path / 'report.txt'}", "--workers=0"]) == 1
    assert "2 broken files" in capsys.readouterr().out
    for wrong in (["nowhere"], ["a", "b", "c"], [str(images), "--workers=-1"], [str(images), "--report=/proc/x"]):
        assert cli.main(["data", "check", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_data_check_of_shards(tmp_path, capsys, workers, monkeypatch):
    """Checks every sample once. There are also a truncated shard, a file that is no shard, and one without samples."""
    pytest.importorskip("webdataset", reason="reads shards")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "x").mkdir(parents=True)
    jpeg, depth = GOOD["a.jpg"], GOOD["a.depth.png"]
    good = {f"{i}{end}": content for i in range(9) for end, content in ((".jpg", jpeg), (".depth.png", depth))}
    for number in range(3):
        shard(tmp_path / "in" / "x" / f"{number}.tar", good)
    words = ["data", "check", f"--workers={workers}"]
    for given in ("in", "in/x/{0..2}.tar"):
        assert cli.main([*words, given]) == 0
        assert "27 pairs; left out: nothing; read: 27 images of 8 bits, 27 structure maps" in capsys.readouterr().out
    members = good | {
        "2.depth.png": b"torn",
        "4.jpg": jpeg[: len(jpeg) // 2],
        "a.jpg": jpeg,
        "b.depth.png": depth,
        "c.jpg": jpeg,
        "c.depth.jpg": jpeg,
        "d.jpg": b"",
        "d.depth.png": encoded(np.full((20, 30), 7, np.uint16), "PNG"),
        "e.1.normals.png": depth,
        "e.2.jpg": jpeg,
    }
    shard(tmp_path / "bad.tar", members)
    shard(tmp_path / "other.tar", {"0.txt": b"text"})
    content = (tmp_path / "in/x/0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 2 + 7])
    (tmp_path / "none.tar").write_bytes(b"no shard" * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert cli.main([*words, "{bad,other,cut,none,empty}.tar", "in"]) == 1
    capsys.readouterr()
    lines = (tmp_path / "data-report.txt").read_text().splitlines()
    broken = {name: reason for kind, name, reason in (line.split("\t") for line in lines if line.startswith("broken"))}
    for name in ("2.depth.png", "4.jpg", "c.depth.jpg", "d.jpg", "d.depth.png"):
        assert f"bad.tar::{name}" in broken
    assert {"other.tar", "cut.tar", "none.tar", "empty.tar"} <= broken.keys()
    assert "image without a map\tbad.tar::e.2" in lines and "has no image" in broken["bad.tar::e.1"]
    assert "image without a map\tbad.tar::a" in lines and "map without an image\tbad.tar::b" in lines
    with tarfile.open(tmp_path / "in/x/0.tar") as tar:
        before = sum(file.offset_data + file.size <= len(content) // 2 for file in tar.getmembers()[1::2])
    assert lines[0].startswith(f"{3 * 9 + 7 + before} pairs") and all(broken.values())
    assert cli.main([*words, "in", "bad.tar", "nowhere.tar"]) == 2
    assert "1 of 5 shards do not exist: nowhere.tar" in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg)
    assert cli.main([*words, "in", "photos"]) == 2
    assert "are shards and folders of files; expected only one of them" in capsys.readouterr().err


def test_data_check_of_other_kinds(tmp_path, capsys):
    images, maps = write_trees(tmp_path, ["a", "b"])
    for name, most in (("a", 3), ("b", 4)):
        ids = (np.arange(2400).reshape(40, 60) % (most + 1)).astype(np.uint8)
        write(maps / f"{name}.png", encoded(ids, "PNG"))
    words = ["data", "check", str(images), str(maps), f"--report={tmp_path / 'report.txt'}", "--workers=0"]
    words.append("--structure-kind=semantic")
    assert cli.main([*words, "--classes=5"]) == 0
    assert "2 pairs; left out: nothing; read: 2 images of 8 bits, 2 label maps of uint8" in capsys.readouterr().out
    assert cli.main([*words, "--classes=4"]) == 1
    assert "b.png: class ids out of range: 4 (480 pixels); expected 0 to 3, or 255 for none" in capsys.readouterr().out
    assert cli.main([*words, "--classes=4", "--ignore=4"]) == 0
    assert cli.main(words) == 2 and "--classes is missing" in capsys.readouterr().err


def test_images_alone(tmp_path):
    images, _ = write_trees(tmp_path, ["a", "b"])
    for transform in (None, data.PairTransform(16), v2.Compose([v2.Resize((16, 16)), v2.ToDtype(torch.float32)])):
        dataset = data.FolderPairs(images, None, transform)
        assert set(dataset[0]) == {"image", "name", "skipped"} and len(dataset) == 2
    assert dataset.report.summary() == "2 pairs; left out: nothing; read: 2 images of 8 bits"
    data.sheet(data.FolderPairs(images, None), tmp_path / "sheet.png")
    path = shard(tmp_path / "x.tar", {"0.jpg": GOOD["a.jpg"], **GOOD})
    assert len(list(data.ShardPairs(path, structure=None))) == 2
