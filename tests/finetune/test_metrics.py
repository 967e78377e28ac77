"""Metrics, compared with numbers computed by hand, and with the formulas in NumPy, one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.metrics import DepthMetrics, SegmentationMetrics, crop_box

NAN = float("nan")


def maps(*images: list[float]) -> torch.Tensor:
    """Returns maps (B, 1, 1, W) with one row per image."""
    return torch.tensor(images)[:, None, None, :]


def test_depth_by_hand() -> None:
    """One image with three pixels: 2 for 1, 2 for 4 and 5.5 for 5."""
    metric = DepthMetrics(0.5, 10)
    metric.update(maps([2.0, 2.0, 5.5, 3.0]), maps([1.0, 4.0, 5.0, NAN]))
    found = {name: value.item() for name, value in metric.compute().items()}
    two, eleven = math.log(2), math.log(1.1)
    mean = eleven / 3
    expected = {
        "d1": 1 / 3,
        "d2": 1 / 3,  # 2 exceeds 1.5625
        "d3": 1 / 3,  # and 1.953125
        "abs_rel": (1 + 0.5 + 0.1) / 3,
        "sq_rel": (1 + 1 + 0.05) / 3,
        "rmse": math.sqrt((1 + 4 + 0.25) / 3),
        "rmse_log": math.sqrt((2 * two**2 + eleven**2) / 3),
        "log10": (2 * math.log10(2) + math.log10(1.1)) / 3,
        "silog": 100 * math.sqrt((2 * two**2 + eleven**2) / 3 - mean**2),
        "images": 1,
        "skipped": 0,
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_thresholds_of_depth() -> None:
    """Ratios of 1.2, 1.5, 1.9 and 3 in both directions."""
    metric = DepthMetrics(0.1, 100)
    metric.update(maps([1.2, 1.5, 1.9, 3.0, 1.0, 1.0, 1.0, 1.0]), maps([1.0, 1.0, 1.0, 1.0, 1.2, 1.5, 1.9, 3.0]))
    found = metric.compute()
    assert [found[name].item() for name in ("d1", "d2", "d3")] == [0.25, 0.5, 0.75]


def test_depth_is_a_mean_over_images() -> None:
    """Errors of 1 for one pixel and of 3 for two give (1 + 3) / 2, not 7 / 3. Images without values are skipped."""
    metric = DepthMetrics(0.5, 10)
    metric.update(maps([2.0, 1.0]), maps([1.0, NAN]))
    metric.update(maps([4.0, 4.0], [9.0, 9.0]), maps([1.0, 1.0], [NAN, 11.0]))
    found = metric.compute()
    assert found["rmse"].item() == pytest.approx(2.0)
    assert found["images"] == 2 and found["skipped"] == 1
    empty = DepthMetrics(0.5, 10)
    empty.update(maps([1.0]), maps([NAN]))
    assert empty.compute()["rmse"].isnan() and empty.compute()["skipped"] == 1


def test_depth_clamps_predictions_and_ignores_what_is_out_of_range() -> None:
    metric = DepthMetrics(1, 10)
    metric.update(maps([0.0, 50.0, NAN, float("inf"), 7.0, 7.0]), maps([2.0, 9.0, 2.0, 9.0, 1.0, 10.0]))
    assert metric.compute()["rmse"].item() == pytest.approx(1.0)


def test_median_alignment() -> None:
    """Predictions of three times the depth are right after alignment. The median is over valid pixels."""
    target = maps([1.0, 2.0, 3.0, 8.0, NAN], [2.0, 4.0, NAN, NAN, NAN])
    metric = DepthMetrics(0.1, 10, align="median")
    prediction = torch.tensor([3.0, 0.5]).reshape(2, 1, 1, 1) * target.nan_to_num(90.0)
    metric.update(prediction, target)
    assert metric.compute()["rmse"].item() == pytest.approx(0.0, abs=1e-6)


def by_numpy(prediction: NDArray, target: NDArray, low: float, high: float) -> dict[str, float] | None:
    """Returns the metrics of one image in float64."""
    valid = (target > low) & (target < high)
    if not valid.any():
        return None
    p, t = np.clip(prediction[valid], low, high), target[valid]
    ratio, d = np.maximum(p / t, t / p), np.log(p) - np.log(t)
    return {
        "d1": (ratio < 1.25).mean(),
        "d2": (ratio < 1.25**2).mean(),
        "d3": (ratio < 1.25**3).mean(),
        "abs_rel": np.mean(np.abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "rmse_log": np.sqrt(np.mean(d**2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(t))),
        "silog": 100 * np.std(d),
    }


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    missing=st.floats(0, 1),
    crop=st.sampled_from([None, "eigen", "nyu_eigen", "kitti_eigen", "garg"]),
)
def test_depth_is_its_formulas(seed: int, shape: tuple[int, int, int], missing: float, crop: str | None) -> None:
    rng = np.random.default_rng(seed)
    # Float32 values, so that both compute the same ratios near a threshold.
    prediction, target = (rng.uniform(0.2, 12, shape).astype(np.float32).astype(np.float64) for _ in range(2))
    target[rng.uniform(size=shape) < missing] = np.nan
    top, bottom, left, right = crop_box(crop, *shape[1:])
    each = [
        by_numpy(p[top:bottom, left:right], t[top:bottom, left:right], 0.5, 10)
        for p, t in zip(prediction, target, strict=True)
    ]
    seen = [one for one in each if one is not None]
    metric = DepthMetrics(0.5, 10, crop)
    for p, t in zip(prediction, target, strict=True):
        metric.update(*(torch.tensor(x, dtype=torch.float32)[None, None] for x in (p, t)))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found.pop("images") == len(seen) and found.pop("skipped") == len(each) - len(seen)
    if seen:
        assert found == pytest.approx({name: np.mean([one[name] for one in seen]) for name in found}, rel=1e-4)
    else:
        assert all(math.isnan(value) for value in found.values())
    together = DepthMetrics(0.5, 10, crop)
    together.update(*(torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in (prediction, target)))
    joined = {name: together.compute()[name].item() for name in found}
    assert joined == pytest.approx(found, rel=1e-5, nan_ok=True)


def test_crop_boxes() -> None:
    assert crop_box(None, 7, 9) == (0, 7, 0, 9)
    assert crop_box("nyu_eigen", 480, 640) == (45, 471, 41, 601) == crop_box("eigen", 480, 640)
    assert crop_box("nyu_eigen", 240, 320) == (22, 235, 20, 300)
    # 375 x 1242 is KITTI's most frequent size; computed by hand from the fractions.
    assert crop_box("kitti_eigen", 375, 1242) == (124, 342, 44, 1197) == crop_box("eigen", 375, 1242)
    assert crop_box("garg", 375, 1242) == (153, 371, 44, 1197)
    assert crop_box("garg", 352, 1216) == (143, 349, 43, 1172)


def test_crop_decides_what_is_evaluated() -> None:
    target = torch.full((1, 1, 480, 640), NAN)
    target[..., 45:471, 41:601] = 2.0
    target[..., 44, :] = 3.0
    metric = DepthMetrics(0.1, 10, "eigen")
    metric.update(torch.full_like(target, 2.0), target)
    assert metric.compute()["rmse"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 10), "expected 0 < min_depth"),
        ((1, 10, "eigne"), "crop is 'eigne'; expected None, eigen, nyu_eigen"),
        ((1, 10, None, "mean"), "align is 'mean'"),
    ],
)
def test_bad_arguments(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words):
        DepthMetrics(*arguments)


def test_shapes_of_depth() -> None:
    with pytest.raises(ValueError, match=r"got \(1, 1, 2, 2\) and \(1, 2, 2\)"):
        DepthMetrics(1, 10).update(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2))


def test_processes_are_reduced() -> None:
    """The merged metrics of two processes are those of a single process."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(2, 2, 1, 5, 5, generator=generator) * 9 + 0.6 for _ in range(2)]
    one, *others = (DepthMetrics(0.5, 10) for _ in range(3))
    for other, (prediction, target) in zip(others, batches, strict=True):
        one.update(prediction, target)
        other.update(prediction, target)
    others[0].merge_state(others[1])
    torch.testing.assert_close(others[0].compute(), one.compute())


def test_segmentation_by_hand() -> None:
    """Labels 0 0 1 1 and one ignored, predictions 0 1 1 1 and 2: class 2 only occurs where ignored, class 3 nowhere."""
    metric = SegmentationMetrics(4)
    metric.update(torch.tensor([[[0, 1, 1, 1, 2]]]), torch.tensor([[[0, 0, 1, 1, 255]]]))
    found = metric.compute()
    assert found["IoU"].tolist()[:2] == pytest.approx([1 / 2, 2 / 3]) and found["IoU"][2:].isnan().all()
    assert found["mIoU"].item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mAcc"].item() == pytest.approx((1 / 2 + 1) / 2)
    assert found["aAcc"].item() == pytest.approx(3 / 4)
    # A class that is only predicted has an IoU of 0 and no accuracy.
    metric.update(torch.tensor([[[3]]]), torch.tensor([[[1]]]))
    found = metric.compute()
    assert found["mIoU"].item() == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)
    assert found["mAcc"].item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["aAcc"].item() == pytest.approx(3 / 5)


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 6), images=st.integers(1, 4), logits=st.booleans())
def test_segmentation_is_mmsegmentations(seed: int, classes: int, images: int, logits: bool) -> None:
    """Intersections and unions over all images, computed with NumPy sets."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (images, 3, 4))
    labels[rng.uniform(size=labels.shape) < 0.3] = 9
    scores = rng.normal(size=(images, classes, 3, 4))
    prediction = scores.argmax(1)
    metric = SegmentationMetrics(classes, ignore=9)
    for index in range(images):
        given_prediction = torch.tensor(scores if logits else prediction)[index : index + 1]
        metric.update(given_prediction, torch.tensor(labels)[index : index + 1])
    found = metric.compute()
    counted = labels != 9
    hit = counted & (labels == prediction)
    ious, accuracies = [], []
    for one in range(classes):
        wanted, claimed = counted & (labels == one), counted & (prediction == one)
        ious.append((wanted & claimed).sum() / (wanted | claimed).sum() if (wanted | claimed).any() else np.nan)
        accuracies.append((wanted & claimed).sum() / wanted.sum() if wanted.any() else np.nan)
    assert found["IoU"].tolist() == pytest.approx(ious, nan_ok=True)
    assert found["Acc"].tolist() == pytest.approx(accuracies, nan_ok=True)
    if counted.any():
        expected = [np.nanmean(ious), np.nanmean(accuracies), hit.sum() / counted.sum()]
        assert [found[name].item() for name in ("mIoU", "mAcc", "aAcc")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "labels", "words"),
    [
        ([[[0, 1]]], [[[0, 3]]], "labels must have classes 0 to 2, got 0 to 3"),
        ([[[0, 255]]], [[[0, 1]]], "prediction must have classes 0 to 2, got 0 to 255"),
        ([[[0, 1]]], [[[0, 1, 2]]], "one shape"),
    ],
)
def test_bad_classes(prediction: list, labels: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SegmentationMetrics(3).update(torch.tensor(prediction), torch.tensor(labels))
