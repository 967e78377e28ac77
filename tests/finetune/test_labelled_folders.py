"""Depth and labels from mirrored folder trees: formats, units, ids, lists, and files left out."""

from __future__ import annotations

import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from layouts import depth_values, write_image, write_map
from pairs import encoded, write
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from sgmim_fast.data import DataError, StructureFile
from sgmim_fast.data.channel_files import ChannelsFile
from sgmim_fast.data.channel_image import ChannelImage
from sgmim_fast.data.image_file import ImageFile
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data import DenseTransform, DepthFolders, SegmentationFolders

NAMES = ["a/1", "a/2", "b/c/3", "d"]
SIZE = (20, 30)


@pytest.fixture
def depth_trees(tmp_path):
    for seed, name in enumerate(NAMES):
        write_image(tmp_path / "images" / f"{name}.jpg", *SIZE)
        write_map(tmp_path / "depth" / f"{name}.png", depth_values(*SIZE, 1000, seed))
    return tmp_path / "images", tmp_path / "depth"


@pytest.fixture
def label_trees(tmp_path):
    for seed, name in enumerate(NAMES):
        write_image(tmp_path / "images" / f"{name}.jpg", *SIZE)
        write_map(tmp_path / "labels" / f"{name}.png", labels(seed))
    return tmp_path / "images", tmp_path / "labels"


def labels(seed):
    return np.random.default_rng(seed).integers(0, 5, SIZE, dtype=np.uint8)


def one(folder, tmp_path, **files):
    """Writes an image and a map x.* in two trees."""
    write_image(tmp_path / "images" / "x.jpg", *SIZE)
    for suffix, content in files.items():
        write(tmp_path / folder / f"x.{suffix}", content)
    return tmp_path / "images", tmp_path / folder


FORMATS = {
    "16-bit PNG": ("png", np.uint16, "PNG", 1000),
    "8-bit PNG": ("png", np.uint8, "PNG", 50),
    "16-bit TIFF": ("tiff", np.uint16, "TIFF", 256),
    "float TIFF": ("tif", np.float32, "TIFF", None),
    "PFM": ("pfm", np.float32, "PPM", None),
    "float npy": ("npy", np.float64, "NPY", None),
    "half npy": ("npy", np.float16, "NPY", None),
    "centimetres": ("npy", np.float32, "NPY", 100),
    "int32 npy": ("npy", np.int32, "NPY", 1000),
}


@pytest.mark.parametrize("name", FORMATS)
def test_depth_formats_and_units(tmp_path, name):
    suffix, dtype, kind, scale = FORMATS[name]
    metres = np.random.default_rng(0).uniform(0.5, 4, SIZE)
    stored = (metres * (scale or 1)).astype(dtype)
    stored[3, 4:8] = 0
    if np.dtype(dtype).kind == "f":
        stored[5, :3] = np.nan, np.inf, -1
    dataset = DepthFolders(*one("depth", tmp_path, **{suffix: encoded(stored, kind)}), scale=scale)
    out = dataset[0]["depth"]
    assert out.shape == (1, *SIZE) and out.dtype == torch.float32
    expected = stored.astype(np.float32) / np.float32(scale or 1)
    expected[~(expected > 0) | np.isinf(expected)] = np.nan
    np.testing.assert_array_equal(out[0].numpy(), expected)
    assert np.isnan(expected).sum() >= 4


def test_depth_from_exr(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR", reason="reads EXR; pip install OpenEXR")
    values = np.linspace(0.5, 9, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    trees = one("depth", tmp_path)
    trees[1].mkdir()
    OpenEXR.File({}, {"Z": values}).write(str(trees[1] / "x.exr"))
    np.testing.assert_array_equal(DepthFolders(*trees)[0]["depth"][0].numpy(), values)


def test_integers_need_a_scale_and_the_right_one(depth_trees):
    with pytest.raises(DataError, match=r"a/1\.png: depth map holds uint16, of unknown unit; expected scale="):
        DepthFolders(*depth_trees)
    with pytest.raises(
        DataError, match=r"\.png: the median depth is [23]\.?\d*e\+03 m at 1 to the metre; expected 0\.1 to 15"
    ):
        DepthFolders(*depth_trees, scale=1)
    assert len(DepthFolders(*depth_trees, scale=1, max_depth=5000)) == 4
    dataset = DepthFolders(*depth_trees, scale=1, check_units=False, crop="garg", min_depth=2, max_depth=3)
    assert (dataset.min_depth, dataset.max_depth, dataset.crop) == (2, 3, "garg")


def test_one_odd_map_is_no_other_unit(depth_trees):
    """One close-up among ordinary maps does not change the unit."""
    write_map(depth_trees[1] / "a/1.png", np.full(SIZE, 30, np.uint16))
    assert len(DepthFolders(*depth_trees, scale=1000)) == 4


def test_what_does_not_fit_is_left_out(depth_trees):
    images, maps = depth_trees
    write_image(images / "lonely.jpg", *SIZE)
    write_map(maps / "alone.png", depth_values(*SIZE, 1000))
    write_map(maps / "a/2.png", depth_values(10, 15, 1000))
    write(maps / "d.png", encoded(Image.new("P", SIZE[::-1]), "PNG"))
    dataset = DepthFolders(images, maps, scale=1000)
    assert dataset.report.images_without_map == ["lonely.jpg"]
    assert dataset.report.maps_without_image == ["alone.png"]
    assert dataset.report.broken == {
        str(maps / "a/2.png"): "depth map is 10×15, its image 20×30; expected the same size",
        str(maps / "d.png"): "depth map is a colour image (P); expected one channel, such as 16-bit grey",
    }
    assert dataset[1]["name"] == "b/c/3.jpg" and dataset[1]["skipped"].startswith(f"{maps / 'a/2.png'}\t")
    assert [*dataset.verify()] == [1, 2, 3, 4] and [item["name"] for item in dataset] == ["a/1.jpg", "b/c/3.jpg"]


@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_lists_of_names(depth_trees, tmp_path, suffix):
    (tmp_path / "train.txt").write_text(f"d{suffix}\n\na/1{suffix}\n./b/c/3{suffix}\nx/gone{suffix}\n")
    dataset = DepthFolders(*depth_trees, scale=1000, names=tmp_path / "train.txt")
    assert [item["name"] for item in dataset] == ["a/1.jpg", "b/c/3.jpg", "d.jpg"]
    assert list(dataset.report.broken) == [f"x/gone{suffix}"]
    with pytest.raises(DataError, match=r"names is .*test\.txt; expected a file, found nothing"):
        DepthFolders(*depth_trees, scale=1000, names=tmp_path / "test.txt")
    (tmp_path / "test.txt").write_text("e\nf\n")
    with pytest.raises(DataError, match=r"none of the 2 images that .*test\.txt lists is in .*images; such as e$"):
        DepthFolders(*depth_trees, scale=1000, names=tmp_path / "test.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "scale is 0; expected the stored value of one metre"),
        ({"min_depth": 0}, "depth range is 0 to 10.0 m"),
        ({"max_depth": 1e-4}, "expected 0 < min_depth < max_depth"),
        ({"crop": "centre"}, "crop is 'centre'; expected None, 'eigen' or 'garg'"),
    ],
    ids=str,
)
def test_bad_depth_arguments(depth_trees, arguments, message):
    with pytest.raises(UserError, match=message):
        DepthFolders(*depth_trees, **{"scale": 1000, **arguments})


def test_labels(label_trees):
    dataset = SegmentationFolders(*label_trees, classes=5, class_names="abcde")
    assert (len(dataset), dataset.task, dataset.classes, dataset.class_names) == (4, "segmentation", 5, list("abcde"))
    item = dataset[2]
    assert item["name"] == "b/c/3.jpg" and item["labels"].dtype == torch.int64
    np.testing.assert_array_equal(item["labels"].numpy(), labels(2))
    np.testing.assert_array_equal(item["image"].shape, (3, *SIZE))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"ignore": 255}, [0, 1, 2, 3, 255]),
        ({"ignore": 2}, [0, 1, 255, 3, None]),
        ({"ignore": 255, "reduce_zero": True}, [255, 0, 1, 2, 255]),
        ({"ignore": None, "reduce_zero": True}, [255, 0, 1, 2, None]),
        ({"ignore": None}, [0, 1, 2, 3, None]),
    ],
    ids=str,
)
def test_ignored_ids(tmp_path, arguments, expected):
    stored = np.resize(np.array([0, 1, 2, 3, 255][: 4 if expected[-1] is None else 5], np.uint8), SIZE)
    dataset = SegmentationFolders(*one("labels", tmp_path, png=encoded(stored, "PNG")), classes=4, **arguments)
    wanted = np.resize([value for value in expected if value is not None], SIZE)
    np.testing.assert_array_equal(dataset[0]["labels"].numpy(), wanted)


def test_palettes_are_read_by_index(tmp_path):
    stored = np.resize(np.arange(3, dtype=np.uint8), SIZE)
    image = Image.fromarray(stored, "P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    dataset = SegmentationFolders(*one("labels", tmp_path, png=encoded(image, "PNG")), classes=3)
    np.testing.assert_array_equal(dataset[0]["labels"].numpy(), stored)


LABEL_FORMATS = {
    "int64 npy": ("npy", np.int64, "NPY"),
    "16-bit PNG": ("png", np.uint16, "PNG"),
    "TIFF": ("tif", np.uint8, "TIFF"),
    "bits": ("png", bool, "PNG"),
    "bool npy": ("npy", bool, "NPY"),
}


@pytest.mark.parametrize("name", LABEL_FORMATS)
def test_label_formats(tmp_path, name):
    suffix, dtype, kind = LABEL_FORMATS[name]
    stored = np.resize(np.arange(2), SIZE).astype(dtype)
    dataset = SegmentationFolders(*one("labels", tmp_path, **{suffix: encoded(stored, kind)}), classes=2)
    np.testing.assert_array_equal(dataset[0]["labels"].numpy(), stored.astype(int))


def grey(values, bits, kind):
    """Returns a grey PNG or TIFF of fewer than 8 bits, which Pillow does not write."""
    (height, width), bands = values.shape, np.unpackbits(values[..., None], axis=2)[..., -bits:]
    rows = np.packbits(bands.reshape(height, -1), axis=1)
    if kind == "tif":
        sizes = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 122), (278, height)]
        tags = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*sizes, (279, rows.size)]]
        return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(tags) + bytes(16) + rows.tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    lines = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    chunks = [(b"IHDR", header), (b"IDAT", lines), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_read_as_stored(tmp_path, kind, bits):
    """Photographs of as few bits have the whole range of grey."""
    stored = np.resize(np.arange(2**bits, dtype=np.uint8), SIZE)
    content = grey(stored, bits, kind)
    trees = one("labels", tmp_path, **{kind: content})
    np.testing.assert_array_equal(SegmentationFolders(*trees, classes=16)[0]["labels"].numpy(), stored)
    if bits > 1:
        np.testing.assert_array_equal(StructureFile(f"x.{kind}", content).pixels, stored)
        np.testing.assert_array_equal(ChannelsFile(f"x.{kind}", content, channels=1).pixels[..., 0], stored)
        np.testing.assert_array_equal(
            ChannelImage(f"x.{kind}", content, channels=1).decode()[0].numpy(), stored * (255 // (2**bits - 1))
        )
    np.testing.assert_array_equal(ImageFile("x", content).decode()[0].numpy(), stored * (255 // (2**bits - 1)))


@pytest.mark.parametrize(
    ("stored", "kind", "message"),
    [
        (
            np.zeros((*SIZE, 3), np.uint8),
            "PNG",
            r"label map is a colour image \(RGB\); expected one channel, such as 8-bit",
        ),
        (np.zeros((*SIZE, 4), np.uint8), "PNG", r"label map is a colour image \(RGBA\)"),
        (np.zeros(SIZE, np.float32), "NPY", "label map has dtype float32; expected integers, the ids of classes"),
        (np.zeros((*SIZE, 2), np.uint8), "NPY", r"label map has shape \(20, 30, 2\); expected one channel"),
        (np.zeros((30, 20), np.uint8), "PNG", "label map is 30×20, its image 20×30; expected the same size"),
    ],
    ids=["colour", "transparent", "float", "channels", "turned"],
)
def test_wrong_label_maps(tmp_path, stored, kind, message):
    with pytest.raises(DataError, match=f"none of 1 pairs tried can be used; the last: .*x.*: {message}"):
        SegmentationFolders(*one("labels", tmp_path, **{kind.lower(): encoded(stored, kind)}), classes=3)


def test_ids_out_of_range_name_id_file_and_pixels(tmp_path):
    stored = np.zeros(SIZE, np.uint8)
    stored[0, :3], stored[1, :2], stored[2, 0], stored[3, :] = 5, 7, 9, 200
    trees = one("labels", tmp_path, png=encoded(stored, "PNG"))
    with pytest.raises(DataError) as error:
        SegmentationFolders(*trees, classes=5)
    assert str(error.value) == (
        f"{trees[1] / 'x.png'}: class ids out of range: 5 (3 pixels), 7 (2 pixels), 9 (1 pixels), ...; "
        "expected 0 to 4, or 255 for ignored"
    )


def test_labels_that_are_all_ignored_are_refused(label_trees):
    for name in NAMES:
        write_map(label_trees[1] / f"{name}.png", np.full(SIZE, 3 if name == "d" else 255, np.uint8))
    assert SegmentationFolders(*label_trees, classes=5)[0]["labels"].eq(255).all()  # one map has labels
    write_map(label_trees[1] / "d.png", np.full(SIZE, 255, np.uint8))
    with pytest.raises(DataError, match=r"no pixel has a label in 4 label maps tried; .*a/1\.png"):
        SegmentationFolders(*label_trees, classes=5)


def test_ids_out_of_range_are_raised_later_too(label_trees):
    dataset = SegmentationFolders(*label_trees, classes=5)
    write_map(label_trees[1] / "a/2.png", np.full(SIZE, 6, np.uint8))
    for read in (lambda: dataset[1], lambda: list(dataset.verify())):
        with pytest.raises(DataError, match=r"a/2\.png: class ids out of range: 6 \(600 pixels\)"):
            read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes is 0; expected 1 to 255"),
        ({"classes": 256}, "classes is 256; expected 1 to 255"),
        ({"classes": 5, "class_names": ["a"]}, "class_names has 1 names; expected 5"),
    ],
    ids=str,
)
def test_bad_label_arguments(label_trees, arguments, message):
    with pytest.raises(UserError, match=message):
        SegmentationFolders(*label_trees, **arguments)


def whole_epoch(dataset, epoch, workers=0):
    """Returns all numbers of an epoch in one row."""
    dataset.set_epoch(epoch)
    (batch,) = DataLoader(dataset, len(dataset), num_workers=workers)
    return torch.cat([value.float().flatten() for value in batch.values() if torch.is_tensor(value)]).nan_to_num(-1)


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_items_depend_on_seed_epoch_and_index_alone(task, depth_trees, label_trees):
    def make(seed=0):
        if task == "depth":
            return DepthFolders(*depth_trees, DenseTransform(12, task, max_depth=10), scale=1000, seed=seed)
        return SegmentationFolders(*label_trees, DenseTransform(12, task), classes=5, seed=seed)

    first = whole_epoch(make(), 0)
    torch.rand(3)  # other random numbers do not matter
    assert torch.equal(first, whole_epoch(make(), 0)) and torch.equal(first, whole_epoch(make(), 0, workers=2))
    assert torch.equal(first, whole_epoch(pickle.loads(pickle.dumps(make())), 0))
    assert not torch.equal(first, whole_epoch(make(), 1)) and not torch.equal(first, whole_epoch(make(1), 0))


def test_own_transforms(depth_trees, label_trees):
    own = v2.Compose([v2.RandomCrop((8, 9)), v2.ToDtype(torch.float32, scale=True)])
    item = DepthFolders(*depth_trees, own, scale=1000)[0]
    assert item["image"].shape == (3, 8, 9) and item["depth"].shape == (1, 8, 9)
    with pytest.raises(TypeError, match=r"labels as torch.float32 \(20, 30\); expected int64 \(H, W\)"):
        SegmentationFolders(*label_trees, lambda image, labels: (image / 1.0, labels.float()), classes=5)[0]


def test_images_are_as_decoded(label_trees):
    plain = DenseTransform.evaluation("segmentation", mean=(0, 0, 0), std=(1, 1, 1))
    item = SegmentationFolders(*label_trees, plain, classes=5)[0]
    torch.testing.assert_close(item["image"] * 255, ImageFile(label_trees[0] / "a/1.jpg").decode().float())
