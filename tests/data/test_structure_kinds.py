"""Structure maps of other kinds than depth: files, mirrored pairs, inputs of the model, and runs by the command."""

from __future__ import annotations

import io
import math
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
from pretraining import arguments, fresh_accelerate, same, tiny, weights
from torchvision.transforms import v2

from sgmim_fast import cli, data
from sgmim_fast.engine import log
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.build import find, load

HEIGHT, WIDTH, CLASSES = 80, 96, 5


def channels(count: int, dtype=np.float32) -> np.ndarray:
    """Returns values (C, H, W)."""
    values = np.random.default_rng(count).random((count, HEIGHT, WIDTH), dtype=np.float32)
    return values if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


def vectors() -> np.ndarray:
    """Returns unit vectors (3, H, W) whose x increases to the right."""
    x, y = np.meshgrid(np.linspace(-0.7, 0.7, WIDTH), np.linspace(-0.5, 0.5, HEIGHT))
    return np.stack([x, y, np.sqrt(1 - x**2 - y**2)]).astype(np.float32)


def labels(number: int = 0) -> np.ndarray:
    """Returns classes (H, W) uint8 in vertical stripes, with unknown pixels in the upper left."""
    ids = np.broadcast_to(np.arange(WIDTH) * CLASSES // WIDTH, (HEIGHT, WIDTH)).astype(np.uint8)
    ids = np.roll(ids, number, 1).copy()
    ids[:8, :8] = 255
    return ids


def numpy_file(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def picture(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pages(values: np.ndarray) -> bytes:
    """Returns a TIFF file with a page for each channel."""
    first, *others = map(Image.fromarray, values)
    return picture(first, "TIFF", save_all=True, append_images=others)


def deep_png(values: np.ndarray) -> bytes:
    """Encodes (H, W, C) uint16 as PNG, which Pillow does not support."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, count = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encode(normals: np.ndarray, dtype) -> np.ndarray:
    """Encodes normals (3, H, W) as (H, W, 3) integers."""
    most = np.iinfo(dtype).max
    return np.moveaxis(np.round((normals + 1) / 2 * most), 0, 2).astype(dtype)


# name -> content of the file, and its values (C, H, W)
def several() -> dict[str, tuple[bytes, np.ndarray]]:
    floats, bytes_, deep = channels(3), channels(3, np.uint8), channels(3, np.uint16)
    four, two = channels(4, np.uint8), channels(2, np.uint8)
    found = {
        "first.npy": (numpy_file(floats), floats),
        "last.npy": (numpy_file(np.moveaxis(floats, 0, 2)), floats),
        "fortran.npy": (numpy_file(np.asfortranarray(floats)), floats),
        "sixteen.npy": (numpy_file(deep), deep / 2**16),
        "many.npy": (numpy_file(channels(7)), channels(7)),
        "pages.tiff": (pages(floats), floats),
        "two pages.tif": (pages(channels(2)), channels(2)),
        "rgb.png": (picture(Image.fromarray(np.moveaxis(bytes_, 0, 2)), "PNG"), bytes_ / 2**8),
        "rgb.tiff": (picture(Image.fromarray(np.moveaxis(bytes_, 0, 2)), "TIFF"), bytes_ / 2**8),
        "rgba.png": (picture(Image.fromarray(np.moveaxis(four, 0, 2)), "PNG"), four / 2**8),
        "la.png": (picture(Image.fromarray(np.moveaxis(two, 0, 2)), "PNG"), two / 2**8),
        "deep.png": (deep_png(np.moveaxis(deep, 0, 2)), deep / 2**16),
    }
    return {
        name: (
            content,
            np.where(values == 0, np.nan, values) if name.split(".")[1] != "npy" or "six" in name else values,
        )
        for name, (content, values) in found.items()
    }


@pytest.mark.parametrize("name", several())
def test_files_of_several_channels(name):
    content, values = several()[name]
    file = data.Channels(len(values)).read(name, content)
    assert file.size == (HEIGHT, WIDTH)
    expected = torch.from_numpy(values.astype(np.float32))
    assert torch.equal(file.decode().nan_to_num(-1), expected.nan_to_num(-1))
    part = file.resample((10.5, 20.25, 33, 41), 16)
    other = v2.functional.resized_crop(file.decode(), 10, 20, 33, 41, [16, 16])
    assert part.shape == other.shape == (len(values), 16, 16)
    with pytest.raises(data.BrokenFile, match=f"expected {len(values) + 1} channels"):
        data.Channels(len(values) + 1).read(name, content)
    with pytest.raises(data.BrokenFile, match=r"one channel|expected one"):
        data.Depth().read(name, content)


def test_exr_of_several_channels(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR", reason="reads EXR")
    values = channels(3)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    for name, planes in (
        ("rgb.exr", {"RGB": np.moveaxis(values, 0, 2).copy()}),
        ("xyz.exr", dict(zip("XYZ", values, strict=True))),
    ):
        with OpenEXR.File(header, planes) as exr:
            exr.write(str(tmp_path / name))
        assert torch.equal(data.Channels(3).read(tmp_path / name).decode(), data.Structure(torch.from_numpy(values)))
        with pytest.raises(data.BrokenFile, match=r"one channel|expected one"):
            data.Depth().read(tmp_path / name)


def normals() -> dict[str, tuple[bytes, float]]:
    """Returns name -> content of the file, and the maximum error of its vectors."""
    n = vectors()
    return {
        "float.npy": (numpy_file(n), 1e-6),
        "last.npy": (numpy_file(np.moveaxis(n, 0, 2).astype(np.float64)), 1e-6),
        "rgb.png": (picture(Image.fromarray(encode(n, np.uint8)), "PNG"), 8e-3),
        "deep.png": (deep_png(encode(n, np.uint16)), 4e-5),
        "pages.tiff": (pages(n), 1e-6),
    }


@pytest.mark.parametrize("name", normals())
def test_normals(name):
    content, off = normals()[name]
    decoded = data.Surface().read(name, content).decode()
    assert torch.allclose(decoded.norm(dim=0), torch.ones(()), atol=1e-5)
    assert (decoded - torch.from_numpy(vectors())).abs().max() < off
    standardized, valid = data.Surface().standardize(decoded[None].as_subclass(Tensor))
    assert valid.all() and torch.allclose(standardized.square().mean(1), torch.ones(()), atol=1e-5)
    # Mirroring a surface mirrors its normals. These normals are those of a ball, which equals its mirror image.
    for mirrored in (v2.functional.horizontal_flip(decoded), v2.RandomHorizontalFlip(1)(decoded)):
        assert (mirrored - decoded).abs().max() < 2 * off


def test_pixels_without_a_normal():
    n, pixels = vectors(), encode(vectors(), np.uint8)
    n[:, 0], n[:, 1], n[0, 2], pixels[0] = 0, np.nan, np.inf, 0
    for content, name, rows in ((numpy_file(n), "a.npy", 3), (picture(Image.fromarray(pixels), "PNG"), "a.png", 1)):
        decoded = data.Surface().read(name, content).decode()
        assert decoded[:, :rows].isnan().all() and decoded[:, rows:].isfinite().all()
        standardized, valid = data.Surface().standardize(decoded[None].as_subclass(Tensor))
        assert not standardized[:, :, :rows].any() and torch.equal(valid[0], decoded.isfinite())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (numpy_file((vectors() + 1) / 2), r"vectors of length .* \(median\); expected 1"),
        (numpy_file(5 * vectors()), r"vectors of length 5 \(median\); expected 1"),
        (numpy_file(np.zeros((3, 8, 8), np.float32)), "has no vector longer than 0.1 anywhere"),
        (numpy_file(np.zeros((3, 8, 8), np.uint8)), "has no vector longer than 0.1 anywhere"),
        (numpy_file(vectors().astype(np.int16)), "dtype int16; expected uint8, uint16 or floating"),
        (numpy_file(vectors()[:2]), "expected 3 channels"),
    ],
)
def test_what_are_no_normals(content, message):
    with pytest.raises(data.BrokenFile, match=message):
        data.Surface().read("a.npy", content)


def label_files() -> dict[str, bytes]:
    ids = labels()
    palette = Image.fromarray(ids, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return {
        "palette.png": picture(palette, "PNG"),
        "grey.png": picture(Image.fromarray(ids), "PNG"),
        "deep.png": picture(Image.fromarray(ids.astype(np.uint16)), "PNG"),
        "grey.tiff": picture(Image.fromarray(ids), "TIFF"),
        "int64.npy": numpy_file(ids.astype(np.int64)),
        "one more.npy": numpy_file(ids[None].astype(np.int32)),
    }


@pytest.mark.parametrize("name", label_files())
def test_classes(name):
    kind = data.Semantic(CLASSES)
    ids = torch.from_numpy(labels())
    decoded = kind.read(name, label_files()[name]).decode()
    assert torch.equal(decoded[0].nan_to_num(255), ids.float())
    standardized, valid = kind.standardize(decoded[None].as_subclass(Tensor))
    assert standardized.shape == valid.shape == (1, CLASSES, HEIGHT, WIDTH) and valid.dtype == torch.bool
    known = ids != 255
    assert torch.equal(valid[0], known.expand(CLASSES, -1, -1))
    inside = standardized[0][:, known]
    assert torch.equal(inside.argmax(0), ids[known].long()) and not standardized[0][:, ~known].any()
    assert torch.allclose(inside.mean(0), torch.zeros(()), atol=1e-5)
    assert torch.allclose(inside.var(0, correction=0), torch.ones(()), atol=1e-5)
    # Resampling does not interpolate between two classes.
    small = kind.read(name, label_files()[name]).resample((3.3, 5.7, 60, 70), 17)
    assert set(small.nan_to_num(255).unique().tolist()) <= {*map(float, range(CLASSES)), 255.0}


def test_ids_that_mean_nothing():
    ids = labels()
    with pytest.raises(data.BrokenFile, match=r"class ids out of range: 4 \(\d+ pixels\); expected 0 to 3, or 255"):
        data.Semantic(4).read("a.npy", numpy_file(ids))
    with pytest.raises(data.BrokenFile, match=r"255 \(64 pixels\); expected 0 to 4$"):
        data.Semantic(CLASSES, ignore=None).read("a.npy", numpy_file(ids))
    with pytest.raises(data.BrokenFile, match=r"class ids out of range: -1 "):
        data.Semantic(2).read("a.npy", numpy_file(np.array([[-1, 0, 1]])))
    minus = data.Semantic(2, ignore=-1).read("a.npy", numpy_file(np.array([[-1, 0, 1]]))).decode()
    assert minus.isnan().tolist() == [[[True, False, False]]]
    with pytest.raises(data.BrokenFile, match="label map is 255, no class, everywhere"):
        data.Semantic(4).read("a.npy", numpy_file(np.full((4, 4), 255)))
    data.Semantic(4).read("a.npy", numpy_file(np.full((4, 4), 2)))  # a single class can be predicted
    with pytest.raises(data.BrokenFile, match="dtype float32; expected integers, the ids of classes"):
        data.Semantic(4).read("a.npy", numpy_file(ids.astype(np.float32)))
    with pytest.raises(data.BrokenFile, match=r"colour image \(RGB\); expected one channel, such as 8-bit grey"):
        data.Semantic(4).read("a.png", picture(Image.fromarray(ids).convert("RGB"), "PNG"))


def test_one_channel_without_values_among_others():
    """The channel is ignored. A map without values in any channel is broken."""
    values = channels(3)
    values[1] = np.nan
    values[2] = 0.5
    decoded = data.Channels(3).read("a.npy", numpy_file(values)).decode()
    standardized, valid = data.Channels(3).standardize(decoded[None].as_subclass(Tensor))
    assert standardized.isfinite().all() and valid.flatten(2).any(2).tolist() == [[True, False, True]]
    assert standardized[0, 2].abs().max() < 1e-2
    with pytest.raises(data.BrokenFile, match=r"is 0\.5 wherever it has a value: constant"):
        data.Channels(2).read("a.npy", numpy_file(values[1:]))


KINDS = {
    "semantic": (data.Semantic(CLASSES), {"data__classes": CLASSES}),
    "normals": (data.Surface(), {}),
    "channels": (data.Channels(2), {"data__channels": 2}),
}


def of_kind(kind: str, number: int) -> tuple[str, bytes]:
    """Returns suffix and content of a map."""
    if kind == "semantic":
        palette = Image.fromarray(labels(number), "P")
        palette.putpalette(bytes(range(256)) * 3)
        return ".png", picture(palette, "PNG")
    if kind == "normals":
        return ".png", picture(Image.fromarray(encode(vectors(), np.uint8)), "PNG")
    return ".npy", numpy_file(channels(2) + number)


@pytest.fixture(params=KINDS)
def folders(request, tmp_path):
    """Writes twelve pairs, one of them truncated, and returns the settings of their kind."""
    kind, rng = request.param, np.random.default_rng(0)
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    for number in range(12):
        photo = Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        photo.save(tmp_path / "images" / f"{number:02}.jpg")
        suffix, content = of_kind(kind, number)
        (tmp_path / "maps" / f"{number:02}{suffix}").write_bytes(b"torn" if number == 5 else content)
    changes = {"data__scenes": 0, "data__structure_kind": kind, "data__val": 0.2, **KINDS[kind][1]}
    return tmp_path, KINDS[kind][0], changes


@pytest.mark.parametrize("flip", [0, 1])
def test_image_and_map_are_cut_and_mirrored_together(folders, flip):
    tmp_path, kind, _ = folders
    transform = data.PairTransform(32, scale=(0.5, 0.8), flip=flip)
    dataset = data.FolderPairs(tmp_path / "images", tmp_path / "maps", transform, kind=kind)
    item, plain = dataset[2], data.PairTransform(32, scale=(0.5, 0.8), flip=0)
    dataset.transform = plain
    other = dataset[2]
    assert item["structure"].shape == (kind.stored, 32, 32)
    if flip:
        expected = v2.functional.horizontal_flip(other["structure"])
        if kind.name == "normals":
            expected = other["structure"].as_subclass(Tensor).flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None]
        assert torch.equal(item["structure"].nan_to_num(-9), expected.nan_to_num(-9))
        assert torch.equal(item["image"], other["image"].flip(-1))


def test_run(folders, capsys):
    """From the dry run to an exported encoder; a run that is stopped and resumed has the same bits."""
    tmp_path, kind, changes = folders
    words = ["pretrain", f"--images={tmp_path / 'images'}", f"--structure={tmp_path / 'maps'}"]
    words += arguments(**changes, optim__epochs=2, run__checkpoint_every=2)
    with fresh_accelerate():
        assert cli.main([*words, "--dry-run", f"--out={tmp_path / 'dry'}"]) == 0
    assert "settings and data fit" in capsys.readouterr().out and os.listdir(tmp_path / "dry") == ["pairs.png"]
    run = tmp_path / "run"
    with fresh_accelerate():
        assert cli.main([*words, f"--out={run}"]) == 0
    steps = log.read(run)[-1]["step"]
    tests = log.read(run, log.METRICS)
    assert all(math.isfinite(line["val_structure_loss"]) and line["val_structure_loss"] > 0 for line in tests)
    model = load(find(run))
    assert model.structure_channels == kind.channels and (run / "encoder.safetensors").is_file()
    assert f"structure maps ({kind.name}) of" in (run / "encoder.md").read_text()
    assert (tmp_path / "maps" / "05").name in (run / "skipped-files.txt").read_text()
    whole = weights(run, steps)
    with fresh_accelerate():
        assert cli.main(["pretrain", f"--resume={run}", f"--checkpoint=step-{steps - 2:08d}"]) == 0
        assert same(whole, weights(run, steps))
        assert cli.main(["reconstruct", str(run), str(tmp_path / "seen.png"), "--count=3"]) == 0
    assert (tmp_path / "seen.png").is_file()
    with fresh_accelerate():
        assert cli.main(["pretrain", f"--resume={run}", "--set=data.structure_kind=depth"]) == 2


def test_shards(folders):
    pytest.importorskip("webdataset", reason="reads shards")
    tmp_path, kind, _ = folders
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted((tmp_path / "maps").iterdir()):
            tar.add(tmp_path / "images" / f"{path.stem}.jpg", f"{path.stem}.jpg")
            tar.add(path, f"{path.stem}.{kind.name}{path.suffix}")
    changes = {"data__scenes": 0, "data__shards": str(tmp_path / "x.tar"), "data__epoch_images": 11}
    config = tiny(**changes, data__structure_kind=kind.name, **KINDS[kind.name][1])
    items = list(build.create_dataset(config))
    assert len(items) == 11 and items[0]["structure"].shape == (kind.stored, 64, 64)


def test_pictures(folders):
    """A map and a correct prediction of it are drawn in the same way."""
    tmp_path, kind, _ = folders
    dataset = data.FolderPairs(tmp_path / "images", tmp_path / "maps", kind=kind)
    structure, valid = kind.standardize(dataset[1]["structure"][None].as_subclass(Tensor))
    colours = kind.colours(structure)
    assert colours.shape == (1, 3, HEIGHT, WIDTH) and colours.min() >= 0 and colours.max() <= 1
    assert torch.equal(kind.colours(structure + 0.01 * structure.sign()), colours) or kind.name != "semantic"
    assert len(colours[0].flatten(1).unique(dim=1).T) >= (CLASSES if kind.name == "semantic" else 20)
    data.sheet(dataset, tmp_path / "sheet.png", kind=kind)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG") and valid.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure_kind": "semantic"}, "data.classes is missing; expected the number of classes, at least 2"),
        ({"structure_kind": "semantic", "classes": 1}, "data.classes is 1; expected the number of classes, at least 2"),
        ({"structure_kind": "channels"}, "data.channels is missing; expected the number of channels, at least 1"),
        ({"classes": 4}, "data.classes is 4 with maps of depth; expected the kind semantic with it"),
        ({"structure_kind": "normals", "channels": 3}, "data.channels is 3 with maps of normals"),
        ({"structure_kind": "normals"}, "data.structure_kind is normals with data.scenes, which have depth"),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    config = tiny(**{f"data__{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=message):
        build.create_dataset(config)
