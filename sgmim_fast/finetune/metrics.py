"""Metrics of depth and segmentation. `compute()` reduces them over processes, as in torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.losses import valid_depth

# (top, bottom, left, right) of the evaluated box, as fractions of height and width
_BOXES = {
    "nyu_eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
CROPS = ("eigen", *_BOXES)


def crop_box(crop: str | None, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the box (top, bottom, left, right), ends exclusive, that a benchmark evaluates.

    - "nyu_eigen": [45:471, 41:601] of 480x640, and in proportion for other sizes.
    - "kitti_eigen", "garg": the boxes of Eigen et al. (2014) and Garg et al. (2016) on KITTI, as fractions of any size.
    - "eigen": the name that both benchmarks use. It is "kitti_eigen" for maps more than twice as wide as high
      (375x1242, or 352x1216 of KITTI's benchmark crop), and else "nyu_eigen" (480x640).
    - None: the whole map.
    """
    if crop is None:
        return 0, height, 0, width
    if crop not in CROPS:
        raise UserError(f"crop is {crop!r}; expected None, {', '.join(CROPS)}")
    if crop == "eigen":
        crop = "kitti_eigen" if width > 2 * height else "nyu_eigen"
    top, bottom, left, right = _BOXES[crop]
    # 1e-4 is added so that rounding errors do not turn 45 / 480 * 480 into 44.
    return int(top * height + 1e-4), int(bottom * height + 1e-4), int(left * width + 1e-4), int(right * width + 1e-4)


class DepthMetrics(Metric):
    """Depth errors, computed over the valid pixels of each image and averaged over images, as in BTS and GLPDepth.

    With the prediction p, the target t, d = log p - log t, and means over the valid pixels of one image:

    - "d1", "d2", "d3": share of pixels with max(p / t, t / p) < 1.25, 1.25^2, 1.25^3
    - "abs_rel": mean |p - t| / t · "sq_rel": mean (p - t)^2 / t, metres · "rmse": sqrt mean (p - t)^2, metres
    - "rmse_log": sqrt mean d^2 · "log10": mean |log10 p - log10 t|
    - "silog": 100 sqrt(mean d^2 - (mean d)^2), as in BTS and KITTI's benchmark. (GLPDepth's code, and the MIM depth
      protocol's, which is based on it, print sqrt(mean d^2 - (mean d)^2 / 2) under that name.)

    A pixel is valid if it is inside the crop and its target is strictly between min_depth and max_depth. Predictions
    are first clamped to that range; NaN becomes min_depth. Images without a valid pixel are left out of the means, and
    counted as "skipped".

    Args:
        min_depth, max_depth: range of valid depth, metres.
        crop: see `crop_box`.
        align: None, or "median": predictions are first multiplied by median(target) / median(prediction) of the image's
            valid pixels, for models that predict depth up to a scale.

    Raises:
        UserError: crop or align is unknown, or the range does not start above 0.
    """

    full_state_update = False
    is_differentiable = False
    NAMES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")

    def __init__(
        self,
        min_depth: float,
        max_depth: float,
        crop: str | None = None,
        align: str | None = None,
        **torchmetrics: object,
    ) -> None:
        super().__init__(**torchmetrics)
        if not 0 < min_depth < max_depth:
            raise UserError(f"min_depth and max_depth are {min_depth}, {max_depth}; expected 0 < min_depth < max_depth")
        if crop is not None and crop not in CROPS:
            raise UserError(f"crop is {crop!r}; expected None, {', '.join(CROPS)}")
        if align not in (None, "median"):
            raise UserError(f"align is {align!r}; expected None or 'median'")
        self.min_depth, self.max_depth, self.crop, self.align = min_depth, max_depth, crop, align
        self.add_state("sums", torch.zeros(len(self.NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds images. Prediction and target are (B, 1, H, W), metres; NaN in the target marks missing values.

        Raises:
            ValueError: the shapes differ, or are not (B, 1, H, W).
        """
        if prediction.shape != target.shape or target.ndim != 4 or target.shape[1] != 1:
            raise ValueError(
                f"prediction and target must both have shape (B, 1, H, W), got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}"
            )
        top, bottom, left, right = crop_box(self.crop, *target.shape[2:])
        p, t = (x[:, :, top:bottom, left:right].flatten(1).float() for x in (prediction, target))
        valid = valid_depth(t, self.min_depth, self.max_depth)
        if self.align == "median":
            p = p * _median(t, valid) / _median(p, valid)
        p = p.nan_to_num(self.min_depth, self.max_depth, self.min_depth).clamp(self.min_depth, self.max_depth)
        errors, seen = depth_errors(p, t, valid), valid.any(1)
        self.sums += torch.where(seen[:, None], errors, 0.0).sum(0).to(self.sums.dtype)
        self.images += seen.sum()
        self.skipped += (~seen).sum()

    def compute(self) -> dict[str, Tensor]:
        """Returns the mean over images of each of `NAMES` (NaN without images), and counts "images" and "skipped"."""
        means = self.sums / self.images
        return {
            **dict(zip(self.NAMES, means, strict=True)),
            "images": self.images.clone(),
            "skipped": self.skipped.clone(),
        }


def depth_errors(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Computes (B, 9) errors, in the order of `DepthMetrics.NAMES`, over the valid entries of each row of (B, N)."""
    p, t = torch.where(valid, prediction, 1.0), torch.where(valid, target, 1.0)  # invalid pixels have no error
    count = valid.sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum(1) / count

    ratio, difference = torch.maximum(p / t, t / p), p - t
    d = p.log() - t.log()
    return torch.stack(
        [
            *(mean((ratio < 1.25**power).float()) for power in (1, 2, 3)),
            mean(difference.abs() / t),
            mean(difference.square() / t),
            mean(difference.square()).sqrt(),
            mean(d.square()).sqrt(),
            mean((p.log10() - t.log10()).abs()),
            100 * mean((d - mean(d)[:, None]).square()).sqrt(),  # the standard deviation of d, without cancellation
        ],
        1,
    )


def _median(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, torch.nan).nanquantile(0.5, 1, keepdim=True)


class SegmentationMetrics(MulticlassConfusionMatrix):
    """mIoU, mAcc and aAcc over all pixels of all images together, as in mmsegmentation, from 0 to 1.

    A class that occurs in no label and no prediction has no IoU and is left out of mIoU. A class that occurs in no
    label is left out of mAcc. The counts are torchmetrics' confusion matrix; its MeanIoU would average over images
    first.

    Args:
        classes: number of classes, 2 or more.
        ignore: label of pixels that are not evaluated.
    """

    def __init__(self, classes: int, ignore: int = 255, **torchmetrics: object) -> None:
        if classes < 2:
            raise UserError(f"classes is {classes}; expected 2 or more")
        super().__init__(classes, ignore_index=ignore, validate_args=False, **torchmetrics)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Adds images.

        Args:
            prediction: (B, H, W) class ids, or (B, classes, H, W) logits, of which the argmax is taken.
            labels: (B, H, W) class ids or `ignore`.

        Raises:
            ValueError: a label or a predicted class is outside 0 to classes - 1, or the shapes differ.
        """
        if prediction.ndim == labels.ndim + 1:
            prediction = prediction.argmax(1)
        if prediction.shape != labels.shape:
            raise ValueError(
                f"prediction and labels must have one shape, got {tuple(prediction.shape)} and {tuple(labels.shape)}"
            )
        for what, values in (("labels", labels[labels != self.ignore_index]), ("prediction", prediction)):
            if values.numel() and (values.min() < 0 or values.max() >= self.num_classes):
                found = f"{int(values.min())} to {int(values.max())}"
                raise ValueError(f"{what} must have classes 0 to {self.num_classes - 1}, got {found}")
        super().update(prediction, labels)

    def compute(self) -> dict[str, Tensor]:
        """Returns the scalars "mIoU", "mAcc" and "aAcc", and "IoU" and "Acc", (classes,), NaN where undefined."""
        confusion = super().compute().double()  # rows: labels, columns: predictions
        hit, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        iou, accuracy = hit / (labelled + predicted - hit), hit / labelled
        return {
            "mIoU": iou.nanmean(),
            "mAcc": accuracy.nanmean(),
            "aAcc": hit.sum() / labelled.sum(),
            "IoU": iou,
            "Acc": accuracy,
        }
