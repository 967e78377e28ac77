"""ADE20K: the shift of its labels, its class names, and errors of incomplete copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layouts import write_ade20k, write_map

from sgmim_fast.data import DataError
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data import ADE20K


@pytest.fixture
def root(tmp_path):
    return write_ade20k(tmp_path)


@pytest.mark.parametrize("folder", [".", "ADEChallengeData2016"])
def test_labels_and_names(root, folder):
    dataset = ADE20K(root / folder, "test")
    assert (len(dataset), dataset.task, dataset.classes) == (1, "segmentation", 150)
    item = dataset[0]
    assert item["name"] == "ADE_val_00000001.jpg" and item["image"].shape == (3, 30, 40)
    stored = torch.arange(1200).reshape(30, 40) % 151
    assert item["labels"].dtype == torch.int64
    assert torch.equal(item["labels"].as_subclass(torch.Tensor), torch.where(stored == 0, 255, stored - 1))
    assert dataset.class_names[:2] == ["thing 1, other name", "thing 2, other name"] and len(dataset.class_names) == 150
    assert [item["name"] for item in ADE20K(root, "train")] == ["ADE_train_00000001.jpg", "ADE_train_00000002.jpg"]


def test_without_and_with_wrong_names(root):
    names = root / "ADEChallengeData2016" / "objectInfo150.txt"
    text = names.read_text().splitlines()
    names.write_text("\n".join(text[:-1]))
    with pytest.raises(DataError, match=r"objectInfo150.txt: found 149 classes; expected a header"):
        ADE20K(root, "train")
    names.unlink()
    assert ADE20K(root, "train").class_names is None


def test_missing(root):
    with pytest.raises(UserError, match="split is 'validation'; expected train or test"):
        ADE20K(root, "validation")
    labels = root / "ADEChallengeData2016" / "annotations" / "training"
    labels.rename(labels.parent / "elsewhere")
    with pytest.raises(DataError, match=r"no .*annotations/training; expected images/ and annotations/ with training/"):
        ADE20K(root, "train")


def test_ids_out_of_range(root):
    path = root / "ADEChallengeData2016" / "annotations" / "training" / "ADE_train_00000002.png"
    labels = np.ones((24, 18), np.uint8)
    labels[:2, :5] = 151
    write_map(path, labels)
    with pytest.raises(DataError) as error:
        ADE20K(root, "train")
    assert str(error.value) == (
        f"{path}: class ids out of range: 151 (10 pixels); expected 1 to 150, or 0 or 255 for ignored"
    )
