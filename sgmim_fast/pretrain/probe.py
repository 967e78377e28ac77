"""A linear probe of frozen features on labelled pairs, measured repeatedly during pre-training.

Ridge regression, in closed form, predicts the mean of the labels in a cell from the encoder's token of that cell in the
unmasked image. It is fitted on every other image and evaluated on the rest. While the metric rises, the features
improve; when it falls, it is time to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from sgmim_fast import data
from sgmim_fast.data import StructureKind, structure_of
from sgmim_fast.engine import loader
from sgmim_fast.errors import UserError
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build
from sgmim_fast.pretrain.config import Config

RIDGE = 1e-3  # ridge penalty, relative to the features' mean variance


def kind_of(config: Config) -> StructureKind:
    """Returns the kind of the probe's labels."""
    settings = config.data
    classes = {"classes": settings.probe_classes} if settings.probe_kind == "semantic" else {}
    return data.structure_kind(settings.probe_kind, **{"channels": None, "classes": None, "ignore": 255, **classes})


def create(config: Config) -> Dataset:
    """Creates the data set of the labelled pairs in `data.probe`, with deterministic crops.

    Raises:
        UserError, DataError: a folder is missing, or there are fewer than 2 usable pairs.
    """
    settings = config.data
    folders = [Path(settings.probe, name) for name in ("images", "labels")]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"data.probe is {settings.probe} without {folder.name}/; expected images/ and labels/ in it"
            )
    transform = data.PairTransform.evaluation(settings.size, **build.normalisation(config))
    options = {"missing": settings.missing, "kind": kind_of(config), "channels": settings.image_channels}
    found = data.FolderPairs(*folders, transform, **options)
    if len(found) < 2:
        raise UserError(f"data.probe has {len(found)} labelled pairs; expected 2 at least, to fit and to test on")
    return found


@torch.no_grad()
def measure(model: SGMIM, dataset: Dataset, config: Config, accelerator: Accelerator) -> dict[str, float]:
    """Fits the probe on the images of even index, and evaluates it on those of odd index.

    Returns:
        For depth "probe_r2", the explained share of the variance of the standardised depth; for classes
        "probe_accuracy", the share of cells whose most frequent class is predicted.
    """
    training = model.training
    model.eval()
    device, moments = accelerator.device, None
    for x, y in _cells(model, dataset, range(0, len(dataset), 2), config, accelerator):
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)  # the column of ones is for the bias
        new = x.T @ x, x.T @ y
        moments = new if moments is None else tuple(old + more for old, more in zip(moments, new, strict=True))
    if not moments[0][-1, -1]:
        raise UserError("data.probe has no cell in which every pixel has a label")
    gram, products = moments
    mean = gram[-1:, :-1] / gram[-1, -1]
    ridge = RIDGE * (gram.diagonal()[:-1] / gram[-1, -1] - mean.square()[0]).mean() * gram[-1, -1]
    penalty = torch.diag(torch.cat((ridge.expand(len(gram) - 1), ridge.new_zeros(1))))
    weights = torch.linalg.lstsq(gram + penalty, products).solution
    count = right = total = squares = error = torch.zeros((), dtype=torch.float64, device=device)
    for x, y in _cells(model, dataset, range(1, len(dataset), 2), config, accelerator):
        guess = x @ weights[:-1] + weights[-1]
        count, right = count + len(y), right + (guess.argmax(1) == y.argmax(1)).sum()
        total, squares, error = total + y.sum(0), squares + y.square().sum(0), error + (guess - y).square().sum(0)
    model.train(training)
    if config.data.probe_kind == "semantic":
        return {"probe_accuracy": float(right / count)}
    return {"probe_r2": float(1 - error.sum() / (squares - total.square() / count).sum())}


def _cells(
    model: SGMIM, dataset: Dataset, indices: range, config: Config, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each batch the tokens (n, C) and labels (n, channels), float64, of its fully labelled cells."""
    batch, stride, kind = config.optim.batch, config.model.stride, kind_of(config)
    sampler = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    options: dict[str, Any] = {"batch_sampler": sampler, "generator": torch.Generator().manual_seed(0)}
    for items in loader.read(dataset, min(loader.workers(config.data), len(sampler)), **options):
        images = items["image"].to(accelerator.device)
        labels, valid = structure_of(items, accelerator.device, kind)
        with accelerator.autocast():
            features = model.encoder(images, None)
        features = features.flatten(2).mT if features.ndim == 4 else features
        known = F.avg_pool2d(valid.double(), stride).flatten(2).amin(1).flatten() == 1
        y = F.avg_pool2d(labels.double().where(valid, 0), stride).flatten(2).mT.flatten(0, 1)
        yield features.flatten(0, 1).double()[known], y[known]
