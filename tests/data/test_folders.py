"""Pairs from two folder trees: formats, units, missing values, files left out, and reproducible crops."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from pairs import encoded, photograph, ramp, write, write_trees
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from sgmim_fast import data, standardize_structure
from sgmim_fast.data.map_file import encode_png
from sgmim_fast.data.pictures import save

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
NAMES = ["a/1", "a/2", "b/c/3", "d", "e.x"]


@pytest.fixture
def trees(tmp_path):
    return write_trees(tmp_path, NAMES)


def test_pairs_of_mirrored_trees(trees):
    dataset = data.FolderPairs(*trees)
    assert len(dataset) == len(NAMES) == dataset.report.used
    assert [item["name"] for item in dataset] == sorted(name + ".jpg" for name in NAMES)
    item = dataset[0]
    assert type(item["image"]) is tv_tensors.Image and item["image"].dtype == torch.float32
    assert item["image"].shape == (3, 40, 60) and item["skipped"] == ""
    assert torch.equal(item["structure"][0], torch.from_numpy((ramp(40, 60) + 1).astype(np.float32) / 2**16))
    assert dataset.report.summary() == (
        "5 pairs; left out: nothing; read: 5 images of 8 bits, 5 structure maps of uint16"
    )
    with pytest.raises(IndexError):
        dataset[5]


def test_collates_to_plain_tensors(trees):
    for workers in (0, 1):
        loader = DataLoader(data.FolderPairs(*trees, data.PairTransform(32)), 5, num_workers=workers)
        (batch,) = loader
        assert type(batch["image"]) is torch.Tensor and batch["image"].shape == (5, 3, 32, 32)
        assert type(batch["structure"]) is torch.Tensor and batch["structure"].shape == (5, 1, 32, 32)
        assert len(batch["name"]) == len(batch["skipped"]) == 5


FORMATS = {
    "8-bit PNG": ("png", np.uint8, lambda a: encoded(a, "PNG"), 2**8),
    "16-bit PNG": ("png", np.uint16, lambda a: encoded(a, "PNG"), 2**16),
    "16-bit TIFF": ("tiff", np.uint16, lambda a: encoded(a, "TIFF"), 2**16),
    "packed TIFF": ("tif", np.uint16, lambda a: encoded(a, "TIFF", compression="tiff_deflate"), 2**16),
    "float TIFF": ("tiff", np.float32, lambda a: encoded(a, "TIFF"), 1),
    "PFM": ("pfm", np.float32, lambda a: encoded(a, "PPM"), 1),
    "uint16 npy": ("npy", np.uint16, lambda a: encoded(a, "NPY"), 2**16),
    "int32 npy": ("npy", np.int32, lambda a: encoded(a, "NPY"), 2**16),
    "float16 npy": ("npy", np.float16, lambda a: encoded(a, "NPY"), 1),
    "float64 npy": ("npy", np.float64, lambda a: encoded(a, "NPY"), 1),
    "channel first": ("npy", np.float32, lambda a: encoded(a[None], "NPY"), 1),
    "channel last": ("npy", np.float32, lambda a: encoded(a[..., None], "NPY"), 1),
    "big-endian npy": ("npy", np.dtype(">u2"), lambda a: encoded(a, "NPY"), 2**16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_units(name):
    suffix, dtype, write_map, unit = FORMATS[name]
    values = np.arange(1, 127).reshape(9, 14).astype(dtype)
    values[2, 3] = np.nan if unit == 1 else 0
    file = data.StructureFile(f"map.{suffix}", write_map(values))
    expected = torch.from_numpy(np.arange(1, 127).reshape(1, 9, 14).astype(np.float32) / unit)
    expected[0, 2, 3] = torch.nan
    assert file.size == (9, 14)
    torch.testing.assert_close(file.decode().as_subclass(torch.Tensor), expected, rtol=0, atol=0, equal_nan=True)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    compression=st.sampled_from([0, 1, 6, 9]),
    seed=st.integers(0, 99),
)
def test_own_png_is_read_by_pillow(height, width, compression, seed):
    values = np.random.default_rng(seed).integers(0, 2**16, (height, width), dtype=np.uint16)
    content = encode_png(values, compression=compression, text={"key": "a text"})
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.mode == "I;16" and image.text == {"key": "a text"} and (np.array(image) == values).all()


def test_exr(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR", reason="reads EXR; pip install OpenEXR")
    values = np.linspace(0.5, 9, 12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "map.exr"
    OpenEXR.File({}, {"Z": values}).write(str(path))
    assert torch.equal(data.StructureFile(path).decode()[0], torch.from_numpy(values))


def test_missing_values():
    values = np.array([[0, 1, 7]], np.uint16)
    content = encoded(values, "NPY")

    def read(**arguments):
        return str((data.StructureFile("map.npy", content, **arguments).decode()[0, 0] * 2**16).tolist())

    assert read() == "[nan, 1.0, 7.0]"
    assert read(missing=7) == "[0.0, 1.0, nan]"
    assert read(missing=None) == "[0.0, 1.0, 7.0]"
    floats = data.StructureFile("map.npy", encoded(np.array([[0.0, np.inf, -np.inf, np.nan, 2]]), "NPY")).decode()
    assert floats.isnan().tolist() == [[[False, True, True, True, False]]]


def test_standardises_over_valid_values_alone():
    values = torch.rand(2, 1, 20, 30) * 3
    holes = values.clone()
    holes[0, :, :7] = torch.nan
    out, valid = data.standardize_valid(holes)
    assert torch.equal(valid, holes.isfinite()) and (out[~valid] == 0).all()
    torch.testing.assert_close(out[:1, :, 7:], standardize_structure(values[:1, :, 7:]))
    assert torch.equal(out[1:], standardize_structure(values[1:]))


@given(box=st.tuples(*[st.floats(0, 0.6)] * 2, *[st.floats(0.1, 0.4)] * 2), size=st.integers(1, 30))
def test_part_of_a_file_is_part_of_the_map(box, size):
    file = data.StructureFile("map.npy", encoded(ramp(23, 31), "NPY"))
    box = [share * length for share, length in zip(box, (23, 31, 23, 31), strict=True)]
    whole = data.pair.resample(file.decode(), box, size)
    torch.testing.assert_close(file.resample(box, size), whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_image_formats(kind):
    image = data.ImageFile("x", encoded(photograph(20, 30), kind, **({"lossless": True} if kind == "WEBP" else {})))
    expected = torch.from_numpy(np.array(photograph(20, 30))).permute(2, 0, 1)
    assert image.size == (20, 30) and image.decode().dtype == torch.uint8
    assert (image.decode().int() - expected.int()).abs().max() <= (60 if kind == "GIF" else 0)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "LA", "I;16"])
def test_other_modes_become_rgb(mode):
    for kind in ("PNG", "JPEG", "TIFF"):
        source = Image.fromarray(ramp(20, 30)) if mode == "I;16" else photograph(20, 30).convert(mode)
        try:
            content = encoded(source, kind)
        except (OSError, KeyError):
            continue  # this format has no such mode
        assert data.ImageFile("x", content).decode().shape == (3, 20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photograph(24, 40)
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if back is None else upright.transpose(back)
    file = data.ImageFile("x", encoded(stored, "JPEG", exif=exif, quality=98, subsampling=0))
    assert file.size == (24, 40)
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert (file.decode().int() - expected.int()).abs().float().mean() < 2


def test_exif_may_follow_other_segments():
    """Cameras and editors write previews, profiles and XMP in front of it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(photograph(24, 40), "JPEG", exif=exif)
    segment = b"\xff\xed" + (60_002).to_bytes(2, "big") + bytes(60_000)
    file = data.ImageFile("x", content[:2] + 3 * segment + content[2:])
    assert file.size == (40, 24) and torch.equal(file.decode(), data.ImageFile("x", content).decode())


def test_unpaired_files_are_named(trees, tmp_path):
    images, maps = trees
    write(images / "a" / "lonely.PNG", encoded(photograph(8, 8), "PNG"))
    write(maps / "z" / "alone.npy", encoded(ramp(8, 8), "NPY"))
    write(maps / "d.tiff", encoded(ramp(40, 60), "TIFF"))  # a second map for d.jpg
    write(images / ".hidden.jpg", b"")
    write(images / "list.txt", b"")
    dataset = data.FolderPairs(images, maps, report=tmp_path / "report.txt")
    assert dataset.report.used == len(NAMES)
    assert dataset.report.images_without_map == ["a/lonely.PNG"]
    assert dataset.report.maps_without_image == ["d.tiff", "z/alone.npy"]
    text = (tmp_path / "report.txt").read_text()
    assert "image without a map\ta/lonely.PNG\n" in text and "map without an image\tz/alone.npy\n" in text
    assert "1 images without a map (a/lonely.PNG), 2 maps without an image" in dataset.report.summary()


@pytest.mark.parametrize("image", ["jpg", "png"])
def test_one_folder_of_images_and_maps(tmp_path, image):
    """What can only be an image or only a map tells what the other file of that name is."""
    for name in ("a/1", "a/2", "3"):
        write(tmp_path / f"{name}.{image}", encoded(photograph(40, 60), "JPEG" if image == "jpg" else "PNG"))
        kind = "PNG" if image == "jpg" else "NPY"
        write(tmp_path / f"{name}.{kind.lower()}", encoded(ramp(40, 60) + 1, kind))
    write(tmp_path / "alone.png", encoded(photograph(40, 60), "PNG"))
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (tmp_path, tmp_path / "link"):
        dataset = data.FolderPairs(tmp_path, other)
        assert [item["name"] for item in dataset] == [f"{name}.{image}" for name in ("3", "a/1", "a/2")]
        assert dataset.report.images_without_map == ["alone.png"]
        assert not dataset.report.maps_without_image and not dataset.report.broken


def test_one_folder_in_which_nothing_tells_images_from_maps(tmp_path):
    write(tmp_path / "a.jpg", encoded(photograph(40, 60), "JPEG"))
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", encoded(ramp(40, 60), "PNG"))
    assert len(data.FolderPairs(tmp_path, tmp_path)) == 1
    write(tmp_path / "b.tif", encoded(ramp(40, 60), "TIFF"))
    with pytest.raises(data.DataError, match=r"images and of structure maps, and b\.png and b\.tif could be either; "):
        data.FolderPairs(tmp_path, tmp_path)
    (tmp_path / "b.tif").unlink()
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(data.DataError, match=r"and a\.png could be either; expected a folder for each"):
        data.FolderPairs(tmp_path, tmp_path)


def truncated(content):
    return content[: len(content) // 2]


BROKEN = {
    "truncated image": ("images/a/2.jpg", lambda: truncated(encoded(photograph(40, 60), "JPEG"))),
    "empty image": ("images/a/2.jpg", lambda: b""),
    "no image": ("images/a/2.jpg", lambda: b"<html>not found</html>"),
    "truncated map": ("maps/a/2.png", lambda: truncated(encoded(ramp(40, 60), "PNG"))),
    "colour map": ("maps/a/2.png", lambda: encoded(photograph(40, 60), "PNG")),
    "other shape": ("maps/a/2.png", lambda: encoded(ramp(60, 40), "PNG")),
    "bool map": ("maps/a/2.png", lambda: encoded(ramp(40, 60) > 9, "PNG")),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("transform", [None, data.PairTransform(16), v2.ToDtype(torch.float32, scale=True)])
def test_a_broken_file_is_replaced_by_the_next_pair_and_named(trees, what, transform):
    images, maps = trees
    dataset = data.FolderPairs(images, maps, transform)
    name, content = BROKEN[what]
    write(images.parent / name, content())  # after construction, so found during training
    item = dataset[1]
    assert item["name"] == dataset[2]["name"] == "b/c/3.jpg" and dataset[2]["skipped"] == ""
    broken, _, reason = item["skipped"].partition("\t")
    assert broken == str(images.parent / name) and reason and "object at" not in reason
    dataset.report.add_skipped([item["skipped"], "", item["skipped"]])
    assert dataset.report.broken == {str(images.parent / name): reason}

    again = data.FolderPairs(images, maps)  # found at construction
    assert list(again.report.broken) == [str(images.parent / name)]
    assert list(again.verify()) == [1, 2, 3, 4, 5]
    assert len(again) == 4 == again.report.used and all(item["skipped"] == "" for item in again)
    assert "1 broken files" in again.report.summary()


def test_colour_maps_say_so(trees):
    images, _ = trees
    with pytest.raises(data.DataError, match=r"none of 5 pairs.*colour image \(RGB\); expected one channel"):
        data.FolderPairs(images, write_colour_maps(images))


def write_colour_maps(images):
    for name in NAMES:
        write(images.parent / "colour" / f"{name}.png", encoded(photograph(40, 60), "PNG"))
    return images.parent / "colour"


def test_empty_and_mismatched_trees_say_what_was_found(trees, tmp_path):
    images, maps = trees
    (tmp_path / "empty").mkdir()
    write(tmp_path / "texts" / "deep" / "a.txt", b"")
    write(tmp_path / "other" / "x.png", encoded(ramp(4, 4), "PNG"))
    for arguments, message in (
        ((tmp_path / "nowhere", maps), "expected a folder, found nothing"),
        ((tmp_path / "empty", maps), r"ends in \.jpg, .*found no files"),
        ((tmp_path / "texts", maps), r"found 1 × \.txt"),
        ((images, tmp_path / "texts"), r"structure: no file in .* ends in \.png, \.npy"),
        (
            (images, tmp_path / "other"),
            r"5 images in .*such as a/1\.jpg; 1 maps .* such as x\.png; expected .* a/1\.png",
        ),
    ):
        with pytest.raises(data.DataError, match=message) as error:
            data.FolderPairs(*arguments)
        assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_gives_up_when_everything_breaks(trees):
    images, maps = trees
    dataset = data.FolderPairs(images, maps)
    for name in NAMES:
        (images / f"{name}.jpg").unlink()
    with pytest.raises(data.DataError, match=r"5 pairs in a row.*No such file"):
        dataset[0]


def test_a_wrong_transform_is_named(trees):
    with pytest.raises(TypeError, match=r"transform returned image as torch.uint8 \(3, 40, 60\); expected float32"):
        data.FolderPairs(*trees, transform=lambda *pair: pair)[0]


def crops(dataset, workers, epochs, order=None):
    loader = DataLoader(
        dataset, 2, num_workers=workers, persistent_workers=workers > 0, sampler=order or range(len(dataset))
    )
    seen = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        seen.append(torch.cat([batch["structure"] for batch in loader]))
    return seen


def test_crops_depend_on_seed_epoch_and_index_alone(trees):
    def make(seed=0):
        return data.FolderPairs(*trees, data.PairTransform(16), seed=seed)

    first, second = crops(make(), 0, [0, 1])
    torch.rand(7)  # other random numbers do not matter
    workers_first, workers_second = crops(make(), 2, [0, 1])  # persistent workers notice the change of epoch
    assert torch.equal(first, workers_first) and torch.equal(second, workers_second)
    assert not torch.equal(first, second) and not torch.equal(first, crops(make(1), 0, [0])[0])
    assert torch.equal(second, crops(make(), 0, [1])[0])  # resumed in the second epoch
    assert torch.equal(first.flip(0), crops(make(), 0, [0], order=[4, 3, 2, 1, 0])[0])


def test_leaves_torchs_generator_alone(trees):
    dataset = data.FolderPairs(*trees, data.PairTransform(16))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[0]
    assert torch.equal(torch.rand(3), expected)


def test_copies_share_the_epoch_with_their_workers(trees):
    dataset = data.FolderPairs(*trees, data.PairTransform(16))
    dataset.set_epoch(3)
    for clone in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert torch.equal(clone[0]["structure"], dataset[0]["structure"])
        (seen,) = crops(clone, 1, [4])
        assert torch.equal(seen, crops(dataset, 0, [4])[0])
        dataset.set_epoch(3)


def test_own_transforms(trees):
    own = v2.Compose([v2.RandomResizedCrop(24, antialias=True), v2.ToDtype(torch.float32, scale=True)])
    dataset = data.FolderPairs(*trees, own)
    assert torch.equal(dataset[1]["structure"], dataset[1]["structure"])
    assert dataset[1]["image"].shape == (3, 24, 24)


def test_sheet_of_pairs(trees, tmp_path):
    data.sheet(data.FolderPairs(*trees, data.PairTransform(16)), tmp_path / "sheet.png", count=3)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > image.height > 100


def test_sheet_marks_missing_values(tmp_path):
    item = {"image": torch.zeros(3, 8, 8), "structure": torch.ones(1, 8, 8), "name": "x", "skipped": ""}
    item["structure"][0, :4, :4] = torch.nan
    data.sheet([item], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.array(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 255)).all(1).mean() > 0.01
    with pytest.raises(data.DataError, match="nothing to draw"):
        data.sheet([], tmp_path / "none.png")


@pytest.mark.parametrize("name", ["cost $5_$.jpg", "$x$", os.fsdecode(b"caf\xe9.jpg")])
def test_names_are_drawn_as_they_are(tmp_path, name):
    item = {"image": torch.zeros(3, 8, 8), "structure": torch.ones(1, 8, 8), "name": name, "skipped": ""}
    data.sheet([item], tmp_path / "sheet.png")
    figure = Figure()
    title = figure.suptitle(name)
    save(figure, tmp_path / "title.png")
    assert title.get_text() == name.replace("\udce9", "?") and not title.get_parse_math()


def test_is_not_imported_with_the_package_and_names_what_is_missing():
    code = (
        "import sys, sgmim_fast\n"
        "assert 'sgmim_fast.data' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.modules['simplejpeg'] = None\n"
        "try: import sgmim_fast.data\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "pip install 'sgmim_fast[train]'" in done.stdout
