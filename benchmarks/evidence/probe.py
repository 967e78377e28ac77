"""Measures how well a small encoder, frozen or fine-tuned, predicts depth and classes, for `evidence.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evidence.pretrain import PATCH, Settings, learning_rate
from evidence.scenes import CLASSES, FARTHEST, NEAREST, Split

LAMBDAS = [10.0**power for power in range(-5, 2)]  # ridge penalties, relative to the number of rows


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Encodes images (N, 3, S, S) without masks. Returns tokens (N, T, C)."""
    encoder.eval()
    return torch.cat([encoder(part) for part in images.split(256)])


def to_patches(maps: Tensor) -> Tensor:
    """Splits maps (N, S, S) into the pixels of each token, (N, T, PATCH²)."""
    return F.pixel_unshuffle(maps[:, None], PATCH).flatten(2).transpose(1, 2)


def one_hot(labels: Tensor) -> Tensor:
    """Encodes labels (N, S, S) one-hot, (N, T, PATCH² · CLASSES)."""
    return F.one_hot(to_patches(labels).long(), CLASSES).flatten(2).float()


def to_labels(scores: Tensor) -> Tensor:
    """Returns the class with the highest score, (N, T, PATCH²), from scores (N, T, PATCH² · CLASSES)."""
    return scores.unflatten(2, (-1, CLASSES)).argmax(-1)


def depth_metrics(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Computes RMSE and absolute relative error of each image, (N, ...), averaged over images.

    Predictions are clamped to the range of depth. The truth is NaN at missing values.
    """
    known = truth.isfinite().flatten(1)
    error = (predicted.clamp(NEAREST, FARTHEST) - truth).flatten(1)
    count = known.sum(1)
    square = error.square().where(known, 0).sum(1) / count
    relative = (error.abs() / truth.flatten(1)).where(known, 0).sum(1) / count
    return {"rmse": square.sqrt().mean().item(), "abs_rel": relative.mean().item()}


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Computes the mean IoU over all pixels of all images. Classes that occur in neither argument are left out."""
    pairs = torch.bincount((truth.long() * CLASSES + predicted.long()).flatten(), minlength=CLASSES**2)
    pairs = pairs.view(CLASSES, CLASSES).double()
    union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (pairs.diag() / union)[union > 0].mean().item()


Predictor = Callable[[Tensor], Tensor]


def ridge(tokens: Tensor, targets: Tensor, lambdas: Sequence[float]) -> list[Predictor]:
    """Fits linear maps from tokens (N, T, C) to targets (N, T, O), one per penalty, with the same weights at every
    position.

    Each position has its own bias without penalty, so that every encoder knows the mean target at each position.
    Features are first scaled to a standard deviation of 1.
    """
    scale = tokens.flatten(0, 1).std(0) + 1e-6
    mean, bias = (tokens / scale).mean(0), targets.mean(0)  # (T, C), (T, O)
    x, y = ((part - centre).flatten(0, 1).double() for part, centre in ((tokens / scale, mean), (targets, bias)))
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ y) / len(x)

    def predictor(penalty: float) -> Predictor:
        weight = (vectors @ (projected / (values.clamp_min(0)[:, None] + penalty))).to(tokens.dtype)
        return lambda tokens: (tokens / scale - mean) @ weight + bias

    return [predictor(penalty) for penalty in lambdas]


def choose(predictors: Sequence[Predictor], tokens: Tensor, score: Callable[[Tensor], float]) -> Predictor:
    """Returns the predictor whose predictions on validation tokens have the lowest score."""
    return min(predictors, key=lambda predictor: score(predictor(tokens)))


def probe(encoder: nn.Module, sets: dict[str, Split], sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Probes frozen features. Returns number of labelled scenes -> metrics on the test scenes. Penalties are chosen on
    the validation scenes."""
    tokens = {name: features(encoder, sets[name].images) for name in ("labelled", "validation", "test")}
    depth = {name: to_patches(sets[name].depth[:, 0]) for name in tokens}
    labels = {name: to_patches(sets[name].labels) for name in tokens}
    results = {}
    for size in sizes:
        known = tokens["labelled"][:size]
        predict = choose(
            ridge(known, depth["labelled"][:size], LAMBDAS),
            tokens["validation"],
            lambda found: depth_metrics(found, depth["validation"])["rmse"],
        )
        results[size] = depth_metrics(predict(tokens["test"]), depth["test"])
        predict = choose(
            ridge(known, one_hot(sets["labelled"].labels[:size]), LAMBDAS),
            tokens["validation"],
            lambda found: -mean_iou(to_labels(found), labels["validation"]),
        )
        results[size]["miou"] = mean_iou(to_labels(predict(tokens["test"])), labels["test"])
    return results


def finetune(
    encoder: nn.Module, sets: dict[str, Split], size: int, seed: int, settings: Settings, steps: int, batch: int = 32
) -> dict[str, float]:
    """Trains the encoder and a linear head for depth and classes jointly on `size` scenes. Returns metrics on the test
    scenes."""
    encoder = copy.deepcopy(encoder).train()
    torch.manual_seed(seed)
    few, pixels = sets["labelled"][:size], PATCH**2
    head = nn.Linear(settings.width, pixels * (1 + CLASSES))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    centre, spread = few.depth.mean(), few.depth.std()

    def predict(images: Tensor) -> tuple[Tensor, Tensor]:
        found = head(encoder(images))
        return found[..., :pixels] * spread + centre, found[..., pixels:].unflatten(2, (pixels, CLASSES))

    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, number, steps) / 2
        index = torch.randint(0, size, (batch,), generator=generator)
        part = few[index]
        if torch.rand(1, generator=generator) < 0.5:
            part = Split(*(tensor.flip(-1) for tensor in part))
        depth, scores = predict(part.images)
        labels = to_patches(part.labels).long()
        # Squared errors, as in RMSE. With absolute errors, most scenes are best predicted to be all room.
        loss = ((depth - to_patches(part.depth[:, 0])) / spread).square().mean()
        loss = loss + F.cross_entropy(scores.flatten(0, 2), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()
    with torch.no_grad():
        parts = [predict(images) for images in sets["test"].images.split(256)]
    depth, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    test = sets["test"]
    found = depth_metrics(depth, to_patches(test.depth[:, 0]))
    return {**found, "miou": mean_iou(scores.argmax(-1), to_patches(test.labels))}
