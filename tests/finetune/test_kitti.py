"""KITTI with the Eigen split: lists, file locations, units, and the crop of the benchmark."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layouts import DRIVES, depth_values, write_image, write_kitti, write_map
from PIL import Image
from torchvision.transforms import v2

from sgmim_fast.data import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data import KITTI, DenseTransform

PLAIN = DenseTransform.evaluation("depth", mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_kitti(tmp_path_factory.mktemp("kitti"))


def test_values_crop_and_what_has_no_ground_truth(root):
    dataset = KITTI(root, "test", PLAIN)
    drive = DRIVES["test"]
    assert len(dataset) == 2 and dataset.report.images_without_map == [
        f"2011_09_26/{drive}/image_02/data/0000000075.png"
    ]
    assert "1 images without a map" in dataset.report.summary()
    item = dataset[0]
    assert item["name"] == f"2011_09_26/{drive}/image_02/data/0000000069.png"
    top, left = 375 - 352, (1242 - 1216) // 2
    expected = depth_values(375, 1242, 256 * 6, 69)[top:, left : left + 1216] / np.float32(256)
    expected[expected == 0] = np.nan
    assert item["depth"].shape == (1, 352, 1216)
    np.testing.assert_array_equal(item["depth"][0].numpy(), expected)
    with Image.open(root / item["name"]) as image:
        pixels = np.array(image)[top:, left : left + 1216]
    np.testing.assert_allclose(item["image"].numpy() * 255, pixels.transpose(2, 0, 1), atol=1e-3)
    assert (dataset.min_depth, dataset.max_depth, dataset.crop, dataset.scale) == (1e-3, 80.0, "garg", 256)


def test_own_transforms_crop_both(root):
    """torchvision's transforms do not change tensors that they do not know to be maps."""
    item = KITTI(root, "train", v2.Compose([v2.RandomCrop((30, 40)), v2.ToDtype(torch.float32, scale=True)]))[0]
    assert item["image"].shape == (3, 30, 40) and item["depth"].shape == (1, 30, 40)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"raw": "raw", "depth": "gts"},
        {"raw": "raw_data", "depth": "data_depth_annotated"},
        {"depth": "{part}"},
        {"raw": "raw", "suffix": ".jpg"},
    ],
    ids=str,
)
def test_usual_places(tmp_path, layout):
    dataset = KITTI(write_kitti(tmp_path, **layout), "train")
    assert len(dataset) == 2
    assert dataset[1]["name"].startswith(layout.get("raw", "2011")) and dataset[1]["skipped"] == ""


def test_lists_with_whole_paths(tmp_path):
    """As in GLPDepth."""
    write_kitti(tmp_path, raw="raw_data")
    drive = DRIVES["test"]
    line = (
        f"/raw_data/2011_09_26/{drive}/image_02/data/0000000054.png "
        f"/data_depth_annotated/val/{drive}/proj_depth/groundtruth/image_02/0000000054.png"
    )
    (tmp_path / "splits" / "eigen_benchmark").mkdir(parents=True)
    (tmp_path / "splits" / "eigen_benchmark" / "test_list.txt").write_text(line)
    (tmp_path / "eigen_test_files_with_gt.txt").unlink()
    assert [item["name"][-8:] for item in KITTI(tmp_path, "test")] == ["0054.png"]


def test_a_given_list_with_right_images_too(root, tmp_path):
    """Lines of BTS's training list name the pair of the right camera in further columns, which are ignored."""
    line = (root / "eigen_train_files_with_gt.txt").read_text().splitlines()[0]
    (tmp_path / "mine.txt").write_text(f"{line} 2011_09_26/x/image_03/1.png x/image_03/1.png\n\n")
    dataset = KITTI(root, "train", split_file=tmp_path / "mine.txt")
    assert len(dataset) == 1 and "image_02" in dataset[0]["name"]


def raises(kind, message, *arguments, **options):
    with pytest.raises(kind, match=message) as error:
        KITTI(*arguments, **options)
    assert "\n" not in str(error.value)


def test_missing_and_wrong(root, tmp_path):
    raises(UserError, "split is 'validation'", root, "validation")
    raises(DataError, "root is .*nowhere; expected the folder of KITTI, found nothing", tmp_path / "nowhere", "test")
    names = r"eigen_test_files_with_gt\.txt and kitti_eigen_test_files_with_gt\.txt and eigen_benchmark/test_list\.txt"
    raises(DataError, f"no split file: looked for {names} in .*; give split_file", tmp_path, "test")
    raises(
        DataError,
        r"none of the pairs in .* exists: looked for images such as 2011_09_26/.*0069\.png in .*raw_data/, and for "
        r"depth maps such as 2011_09_26_drive_0002_sync/.* in .*data_depth_annotated/val/",
        tmp_path,
        "test",
        split_file=root / "eigen_test_files_with_gt.txt",
    )


def test_depth_in_another_unit(tmp_path):
    write_kitti(tmp_path)
    for path in (tmp_path / "data_depth_annotated").rglob("*.png"):
        write_map(path, depth_values(375, 1242, 2).astype(np.uint16))
    raises(DataError, r"median depth is 0\.0\d+ m at 256 to the metre; expected 0\.8 to 120 m", tmp_path, "test")
    for path in (tmp_path / "data_depth_annotated").rglob("*.png"):
        write_map(path, np.zeros((375, 1242), np.uint16))
    raises(DataError, r"no pixel has a value in 2 depth maps tried", tmp_path, "test")


def test_image_and_map_must_fit(tmp_path):
    write_kitti(tmp_path)
    dataset = KITTI(tmp_path, "test")
    first = tmp_path / dataset.name(0)
    write_image(first, 370, 1226)
    assert "00054" in dataset[0]["name"] and "0069" in dataset[0]["skipped"]
    list(dataset.verify())
    assert len(dataset) == 1
    assert list(dataset.report.broken.values()) == ["depth map is 375×1242, its image 370×1226; expected the same size"]
    for path in tmp_path.rglob("*.png"):
        if "proj_depth" in str(path):
            write_map(path, depth_values(300, 1242, 2000))
        else:
            write_image(path, 300, 1242)
    raises(
        DataError,
        "none of 2 pairs tried can be used; .*image is 300×1242; expected at least the benchmark's crop, 352×1216",
        tmp_path,
        "test",
    )


def test_map_of_8_bits_is_of_another_unit(tmp_path):
    write_kitti(tmp_path)
    for path in (tmp_path / "data_depth_annotated").rglob("*.png"):
        write_map(path, np.full((375, 1242), 40, np.uint8))
    raises(DataError, "median depth is 0.156 m", tmp_path, "train")
    assert float(KITTI(tmp_path, "train", check_units=False)[0]["depth"].max()) == torch.tensor(40 / 256)
