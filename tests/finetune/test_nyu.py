"""NYU-v2 from its .mat file and from folders: splits, units, borders, and errors of incomplete copies."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
from layouts import depth_values, write_map, write_nyu_folders
from PIL import Image
from torch.utils.data import DataLoader

from sgmim_fast.data import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data import NYU, DenseTransform

h5py = pytest.importorskip("h5py", reason="reads NYU's .mat")
scipy_io = pytest.importorskip("scipy.io", reason="reads NYU's splits.mat")
COUNT, TRAIN, TEST = 5, [1, 4, 5], [2, 3]  # number of images; image numbers, counted as in splits.mat
WHITE = DenseTransform.evaluation("depth", mean=(0, 0, 0), std=(1, 1, 1))  # keeps colours from 0 to 1


def write_mat(root, scale=1.0, **splits):
    """Writes the .mat file with axes in MATLAB's order: (image, channel, column, row)."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (COUNT, 3, 640, 480), dtype=np.uint8)
    filled = (rng.random((COUNT, 640, 480), dtype=np.float32) * 8 + 0.5) * np.float32(scale)
    raw = filled.copy()
    raw[rng.random(raw.shape) < 0.2] = 0
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"], file["rawDepths"] = images, filled, raw
    if splits is not None:
        numbers = {"trainNdxs": np.array(TRAIN)[:, None], "testNdxs": np.array(TEST)[:, None], **splits}
        scipy_io.savemat(root / "splits.mat", numbers)
    return images, filled, raw


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    return root, *write_mat(root)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_nyu_folders(tmp_path_factory.mktemp("folders"))


def test_labelled_splits_axes_and_values(labelled):
    root, images, filled, raw = labelled
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        dataset = NYU(root, split, WHITE)
        assert len(dataset) == len(numbers) == dataset.report.used
        for item, number in zip(dataset, numbers, strict=True):
            assert item["name"] == f"rgb_{number - 1:05d}" and item["skipped"] == ""
            expected = torch.from_numpy(raw[number - 1].T)[None]
            expected[expected == 0] = torch.nan
            torch.testing.assert_close(
                item["depth"].as_subclass(torch.Tensor), expected, rtol=0, atol=0, equal_nan=True
            )
            image = torch.from_numpy(images[number - 1].transpose(0, 2, 1).astype(np.float32)) / 255
            assert item["image"].shape == (3, 480, 640) and item["image"].dtype == torch.float32
            torch.testing.assert_close(item["image"][:, 7:474, 7:632].as_subclass(torch.Tensor), image[:, 7:474, 7:632])
            assert not item["image"][:, :7].any() and not item["image"][:, :, 632:].any()
    whole = NYU(root / "nyu_depth_v2_labeled.mat", "test", WHITE, depths="filled", border="keep")[1]
    assert torch.equal(whole["depth"][0].as_subclass(torch.Tensor), torch.from_numpy(filled[2].T))
    assert whole["image"].min() > 0


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_labelled_is_read_in_workers(labelled, context):
    root = labelled[0]
    dataset = NYU(root, "train", DenseTransform((64, 96), "depth", max_depth=10), seed=3)
    here = [dataset[index]["depth"] for index in range(3)]  # opens the file in this process
    for clone in (dataset, pickle.loads(pickle.dumps(dataset))):
        (batch,) = DataLoader(clone, 3, num_workers=1, multiprocessing_context=context)
        torch.testing.assert_close(batch["depth"], torch.stack(here), rtol=0, atol=0, equal_nan=True)
        assert type(batch["image"]) is torch.Tensor


def test_a_forked_process_opens_the_labelled_file_itself(labelled, monkeypatch):
    mat = NYU(labelled[0], "train")._mat
    here = mat._open()
    assert mat._open() is here
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert mat._open() is not here


def test_folders(folders):
    train, test = NYU(folders, "train", WHITE), NYU(folders, "test", WHITE)
    assert [item["name"] for item in train] == [
        f"sync/{scene}/rgb_{number}.jpg" for scene in ("kitchen_0028b", "cafe_0001a") for number in ("00000", "00045")
    ]
    item = test[1]
    assert item["name"] == "official_splits/test/bathroom/rgb_00045.jpg"
    expected = torch.from_numpy(depth_values(480, 640, 1000, 45) / np.float32(1000))[None]
    expected[expected == 0] = torch.nan
    torch.testing.assert_close(item["depth"].as_subclass(torch.Tensor), expected, rtol=0, atol=0, equal_nan=True)
    assert (test.min_depth, test.max_depth, test.crop, test.task) == (1e-3, 10.0, "eigen", "depth")


def test_folders_go_before_the_mat_beside_them(tmp_path):
    write_nyu_folders(tmp_path)
    write_mat(tmp_path)
    assert NYU(tmp_path, "test").name(0).startswith("official_splits")
    assert NYU(tmp_path / "nyu_depth_v2_labeled.mat", "test").name(0) == f"rgb_{TEST[0] - 1:05d}"


def test_border_is_cut_from_both(folders):
    whole, inside = NYU(folders, "train", WHITE), NYU(folders, "train", WHITE, border="crop")
    a, b = whole[0], inside[0]
    assert b["image"].shape == (3, 427, 565) and b["depth"].shape == (1, 427, 565)
    assert torch.equal(b["image"], a["image"][:, 45:472, 43:608])
    torch.testing.assert_close(b["depth"], a["depth"][:, 45:472, 43:608], equal_nan=True)


def test_scenes_beside_the_lists(tmp_path):
    """As in GLPDepth: nyu_depth_v2/SCENE for training, lists elsewhere."""
    write_nyu_folders(tmp_path)
    for scene in (tmp_path / "sync").iterdir():
        scene.rename(tmp_path / scene.name)
    (tmp_path / "sync").rmdir()
    (tmp_path / "filenames" / "nyudepthv2").mkdir(parents=True)
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").rename(tmp_path / "filenames" / "nyudepthv2" / "train_list.txt")
    assert NYU(tmp_path, "train")[0]["name"] == "kitchen_0028b/rgb_00000.jpg"
    assert len(NYU(tmp_path, "test")) == 2


def test_what_is_listed_but_not_there_is_named(tmp_path):
    write_nyu_folders(tmp_path)
    for number in ("00000", "00045"):
        (tmp_path / "sync" / "kitchen_0028b" / f"rgb_{number}.jpg").unlink()
    dataset = NYU(tmp_path, "train")  # all files that are probed are missing
    assert len(dataset) == 2 and dataset.report.images_without_map == []
    assert list(dataset.report.broken) == ["kitchen_0028b/rgb_00000.jpg", "kitchen_0028b/rgb_00045.jpg"]
    (tmp_path / "sync" / "cafe_0001a" / "sync_depth_00045.png").unlink()
    dataset = NYU(tmp_path, "train")
    assert len(dataset) == 1 and dataset.report.images_without_map == ["cafe_0001a/rgb_00045.jpg"]


def raises(kind, message, *arguments, **options):
    with pytest.raises(kind, match=message) as error:
        NYU(*arguments, **options)
    assert "\n" not in str(error.value)


def test_bad_arguments(folders):
    raises(UserError, "split is 'val'; expected train or test", folders, "val")
    raises(UserError, "depths is 'x'; expected raw or filled", folders, "test", depths="x")
    raises(UserError, "border is 'x'; expected published, keep, crop", folders, "test", border="x")


def test_missing_files_are_named(tmp_path, folders):
    raises(
        DataError, "root is .*nowhere; expected nyu_depth_v2_labeled.mat or the folder", tmp_path / "nowhere", "test"
    )
    raises(DataError, "no NYU-v2 in .*: looked for nyu_depth_v2_labeled.mat, for the folders sync", tmp_path, "test")
    raises(DataError, r"split_file is .*x\.txt; expected a file, found nothing", folders, "test", split_file="x.txt")
    (tmp_path / "sync").mkdir()
    raises(
        DataError,
        r"no split file: looked for nyudepthv2_test_files_with_gt\.txt and nyudepthv2/test_list\.txt in .*split_file",
        tmp_path,
        "test",
    )
    for text, message in (
        ("", "is empty; expected an image and its map in each line"),
        ("a.jpg b.png\nonly.jpg", "line 2: found 'only.jpg'; expected an image and its map"),
        ("/a/b.jpg /a/b.png", "none of the pairs in .* exists: looked for images such as a/b.jpg in .* sync/"),
    ):
        (tmp_path / "list.txt").write_text(text)
        raises(DataError, message, tmp_path, "train", split_file=tmp_path / "list.txt")


def test_bad_mat_files(tmp_path):
    mat = tmp_path / "nyu_depth_v2_labeled.mat"
    mat.write_bytes(b"MATLAB 5.0 MAT-file")
    raises(DataError, "expected HDF5, a MATLAB file of version 7.3", tmp_path, "test")
    with h5py.File(mat, "w") as file:
        file["depths"] = np.ones((1, 4, 3))
    raises(DataError, r"found depths \(1, 4, 3\); expected images, of 4 dimensions", tmp_path, "test")
    write_mat(tmp_path)
    (tmp_path / "splits.mat").unlink()
    raises(DataError, r"no split file: looked for splits.mat in .*; give split_file", tmp_path, "test")
    write_mat(tmp_path, testNdxs=np.array([[0], [2]]))
    raises(DataError, "testNdxs has 2 numbers; expected some, each 1 to 5", tmp_path, "test")
    scipy_io.savemat(tmp_path / "splits.mat", {"other": 1})
    raises(DataError, "'testNdxs'; expected a MATLAB file with trainNdxs and testNdxs", tmp_path, "test")
    write_mat(tmp_path, scale=1000)
    raises(DataError, r"rawDepths \d: the median depth is [\d.e+]+ m as stored; expected 0.1 to 15 m", tmp_path, "test")


@pytest.mark.parametrize("package", ["h5py", "scipy"])
def test_a_missing_package_is_named(labelled, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "scipy.io" if package == "scipy" else package, None)
    with pytest.raises(
        ModuleNotFoundError, match=f"need {package}, which is not installed: .*'sgmim_fast.downstream.'"
    ):
        NYU(labelled[0], "train")


def test_depth_in_another_unit(tmp_path):
    write_nyu_folders(tmp_path)
    for path in (tmp_path / "sync").rglob("*.png"):
        write_map(path, depth_values(480, 640, 1))  # metres as integers
    raises(
        DataError,
        r"sync_depth_\d+\.png: the median depth is 0\.002 m at 1000 to the metre; expected 0\.1 to 15 m .*units=False",
        tmp_path,
        "train",
    )
    assert len(NYU(tmp_path, "train", check_units=False)) == 4


def test_a_broken_map_is_replaced(tmp_path):
    dataset = NYU(write_nyu_folders(tmp_path), "train")
    broken = tmp_path / "sync" / "kitchen_0028b" / "sync_depth_00000.png"
    Image.new("RGB", (640, 480)).save(broken)
    item = dataset[0]
    assert item["skipped"].startswith(f"{broken}\t") and item["name"] == "sync/kitchen_0028b/rgb_00045.jpg"
