"""What a model makes of some pairs, and how its losses went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from sgmim_fast.data import StructureKind, structure_of
from sgmim_fast.data.structure_kind import DEPTH
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build, masks
from sgmim_fast.pretrain.config import Config
from sgmim_fast.reference import pixel_mask

# by which the images were normalised
MEAN, STD = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[:, :, None, None]


class Panels(NamedTuple):
    """What is drawn, on the CPU: (B, 3, H, W) normalised, (B, C, H, W) standardised, bool."""

    images: Tensor
    hidden: Tensor  # (B, 1, H, W), True where the image was masked
    image: Tensor  # predicted
    structure: Tensor | None  # of images alone
    valid: Tensor | None
    shown: Tensor  # True where the structure branch could read the map
    guess: Tensor | None  # of the structure; None without guidance


@torch.no_grad()
def panels(model: SGMIM, batch: dict[str, Any], config: Config, device: torch.device) -> Panels:
    """Predictions for a batch of `sgmim_fast.data`, with masks that depend on the seed alone."""
    training = model.training
    model.eval()
    images = batch["image"].to(device)
    structure, valid = structure_of(batch, device, build.structure_kind(config))
    mask = masks.draw(config.mask, config.data.size, len(images), config.run.seed, 0, device)
    image, guess = model.predict(images, structure, mask, structure_valid=valid)
    model.train(training)
    hidden, shown = (pixel_mask(m, images).bool() for m in (mask.mask, mask.structure))
    found = Panels(images, hidden, image.float(), structure, valid, shown, None if guess is None else guess.float())
    return Panels(*(None if t is None else t.cpu() for t in found))


def grid(found: Panels, path: Path, title: str = "", kind: StructureKind = DEPTH) -> None:
    """One row per pair. Grey is hidden, white is not known; predictions stand only where they were asked for."""

    def colours(image: Tensor) -> Tensor:
        return (image * STD + MEAN).clamp(0, 1)

    grey, white = torch.full((3, 1, 1), 0.6), torch.ones(3, 1, 1)
    columns = {
        "image": colours(found.images),
        "masked image": colours(found.images).where(~found.hidden, grey),
        "reconstruction": colours(found.image).where(found.hidden, colours(found.images)),
    }
    if found.guess is not None:
        truth = kind.colours(found.structure).where(found.valid.all(1, keepdim=True), white)
        columns |= {
            "structure shown": truth.where(found.shown, grey),
            "structure predicted": kind.colours(found.guess).where(~found.hidden, truth),
            "structure truth": truth,
        }
    rows = len(found.images)
    figure = Figure((1.6 * len(columns), 1.65 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(label, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def curves(lines: list[dict[str, Any]], path: Path, names: Sequence[str], tests: Sequence[dict[str, Any]] = ()) -> None:
    """What has these names, and the learning rate, over the steps of a log: smoothed, and faintly as it is.

    Args:
        tests: lines with the same on held-out data, as "val_" and the name.
    """
    names = (*names, "lr")
    figure = Figure((3.4 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        steps, values = zip(*known, strict=True) if known else ((), ())
        if name == "lr":
            axis.plot(steps, values, linewidth=1)
        else:
            axis.plot(steps, values, linewidth=0.7, alpha=0.35, color="tab:blue")
            axis.plot(steps, smooth(values), linewidth=1.2, color="tab:blue", label="training, smoothed")
        held_out = [(line["step"], line[f"val_{name}"]) for line in tests if f"val_{name}" in line]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), ".-", linewidth=1.2, color="tab:orange", label="held out")
            axis.legend(fontsize=7, frameon=False)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("learning rate" if name == "lr" else name.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Means over an eighth of the values around each, fewer towards the ends, where they stay in the middle."""
    reach = len(values) // 16
    near = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - n : i + n + 1]) / (2 * n + 1) for i, n in enumerate(near)]


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
