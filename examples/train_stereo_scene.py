"""Trains a small SG-MIM on one real stereo photograph and its measured disparity, on a CPU, and draws what it learnt.

    pip install -e ".[train]"
    python examples/train_stereo_scene.py

The photograph is the motorcycle of the Middlebury 2014 benchmark, which ships inside scikit-image: nothing is
downloaded. A strip at its right edge is held out of training. In the end the model is given crops of that strip with
60 % of the image hidden: there it has to fill in the image, and elsewhere it has to predict the disparity.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import skimage.data
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import sgmim_fast

HELD_OUT = 220  # columns at the right edge of the photograph
STRIDE = 16  # pixels along an output token of both encoders, and along a mask unit
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]  # of ImageNet


def load_scene() -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """The photograph (3, 500, 741), normalised, and its disparity in pixels (1, 500, 741), infinite where unknown.

    A `Mask` is cropped and mirrored with its image but not interpolated, so unknown values spoil no neighbours.
    """
    left, _, disparity = skimage.data.stereo_motorcycle()
    photograph = (torch.from_numpy(left).permute(2, 0, 1) / 255 - MEAN) / STD
    return tv_tensors.Image(photograph), tv_tensors.Mask(disparity[None])


class RandomCrops(Dataset):
    """Random crops, scaled and mirrored at random, from the part of the scene that is trained on."""

    def __init__(self, size: int, length: int):
        self.scene = [tv_tensors.wrap(tensor[..., :-HELD_OUT], like=tensor) for tensor in load_scene()]
        self.transform = v2.Compose([v2.RandomResizedCrop(size, scale=(0.1, 0.5)), v2.RandomHorizontalFlip()])
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.scene)


def held_out_crops(size: int) -> tuple[Tensor, Tensor]:
    """Three crops of the held-out strip, from top to bottom: images (3, 3, size, size) and their disparity."""
    scene = load_scene()
    height, width = scene[0].shape[1:]
    boxes = [(round(i * (height - HELD_OUT) / 2), width - HELD_OUT, HELD_OUT, HELD_OUT) for i in range(3)]
    crop = v2.functional.resized_crop
    return tuple(torch.stack([crop(tensor, *box, [size, size]) for box in boxes]) for tensor in scene)


def create_model(encoder: str, size: int) -> sgmim_fast.SGMIM:
    """SG-MIM around a small version of a timm model, made with timm's own arguments."""
    if encoder == "vit":
        small = sgmim_fast.create_encoder("vit_tiny_patch16_224", img_size=size, depth=6)
    else:
        arguments = {"embed_dim": 48, "depths": (2, 2, 2), "num_heads": (3, 6, 12), "window_size": size // STRIDE}
        small = sgmim_fast.create_encoder("swinv2_tiny_window8_256", img_size=size, **arguments)
    return sgmim_fast.SGMIM(small, encoder_stride=STRIDE)


def train(model: sgmim_fast.SGMIM, loader: DataLoader, learning_rate: float) -> list[tuple[float, float]]:
    """An ordinary training loop. Returns the image loss and the structure loss of every step."""
    steps, warm_up = len(loader), min(30, len(loader))
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    history = []
    progress = tqdm(loader, unit="step", disable=not sys.stderr.isatty())
    for images, disparity in progress:
        mask = sgmim_fast.selective_mask(len(images), images.shape[-1] // STRIDE, ratio=0.6)  # 1 = hidden
        structure = sgmim_fast.standardize_structure(disparity, nonfinite="ignore")
        losses = model(images, structure, mask, return_losses=True, structure_valid=disparity.isfinite())

        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()

        history.append((losses.image.item(), losses.structure.item()))
        report = f"image {history[-1][0]:.3f}  structure {history[-1][1]:.3f}"
        progress.set_postfix_str(report)
        if progress.disable and (len(history) % 20 == 0 or len(history) in (1, steps)):
            print(f"step {len(history):4d}/{steps}  {report}", flush=True)
    return history


@torch.no_grad()
def evaluate(model: sgmim_fast.SGMIM, images: Tensor, disparity: Tensor, masks: int = 8) -> dict[str, float]:
    """Losses over several masks per crop, beside those of the simplest guesses: visible mean colour, mean disparity."""
    images, disparity = images.repeat(masks, 1, 1, 1), disparity.repeat(masks, 1, 1, 1)
    structure = sgmim_fast.standardize_structure(disparity, nonfinite="ignore")
    generator = torch.Generator().manual_seed(0)
    mask = sgmim_fast.selective_mask(len(images), images.shape[-1] // STRIDE, ratio=0.6, generator=generator)
    valid = disparity.isfinite()
    losses = model(images, structure, mask, return_losses=True, structure_valid=valid)
    hidden = sgmim_fast.reference.pixel_mask(mask.mask, images)
    colour = (images * (1 - hidden)).sum((2, 3), keepdim=True) / (1 - hidden).sum((2, 3), keepdim=True)
    l1 = sgmim_fast.reference.masked_l1
    return {
        "image": losses.image.item(),
        "image, mean": l1(colour, images, hidden).item(),
        "structure": losses.structure.item(),
        "structure, mean": l1(torch.zeros_like(structure), structure, (1 - hidden) * valid).item(),
    }


def draw(model: sgmim_fast.SGMIM, images: Tensor, disparity: Tensor, history: list[tuple[float, float]], out: Path):
    """One row per crop, and the losses of the training below them. Grey is hidden, white is unknown."""
    valid = disparity.isfinite()
    structure = sgmim_fast.standardize_structure(disparity, nonfinite="ignore")
    generator = torch.Generator().manual_seed(1)
    mask = sgmim_fast.selective_mask(len(images), images.shape[-1] // STRIDE, ratio=0.6, generator=generator)
    image, guess = model.predict(images, structure, mask, structure_valid=valid)
    hidden = sgmim_fast.reference.pixel_mask(mask.mask, images).bool()

    def colours(image: Tensor) -> Tensor:  # (B, 3, H, W), 0 to 1
        return (image * STD + MEAN).clamp(0, 1)

    def heat(structure: Tensor) -> Tensor:  # bright is near; the same scale in all panels
        rgba = plt.get_cmap("inferno")(plt.Normalize(-2, 2.5)(structure[:, 0].numpy()))
        return torch.from_numpy(rgba[..., :3]).permute(0, 3, 1, 2)

    white, grey = torch.ones(3, 1, 1), torch.full((3, 1, 1), 0.6)
    measured = heat(structure).where(valid, white.double())
    columns = {
        "image": colours(images),
        "masked image": colours(images).where(~hidden, grey),
        "reconstruction": colours(image).where(hidden, colours(images)),
        "structure shown": measured.where(hidden, grey.double()),
        "structure predicted": heat(guess).where(~hidden, measured),
        "structure measured": measured,
    }
    figure = plt.figure(figsize=(9, 1.5 * len(images) + 1.9), layout="constrained")
    panels, curves = figure.subfigures(2, 1, height_ratios=[1.5 * len(images) + 0.2, 1.7])
    axes = panels.subplots(len(images), len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(label, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture.permute(1, 2, 0))
            axes[row, column].set_axis_off()
    for index, axis in enumerate(curves.subplots(1, 2)):
        axis.plot(range(1, len(history) + 1), [losses[index] for losses in history], linewidth=0.8)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(("image loss", "structure loss")[index], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="crops per step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help=f"size of the crops in pixels, a multiple of {STRIDE}")
    parser.add_argument("--encoder", choices=("swin", "vit"), default="swin")
    parser.add_argument("--lr", type=float, default=2e-3, help="maximum learning rate (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("stereo_scene.png"), help="figure to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="number of threads (default: torch's)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    model = create_model(args.encoder, args.size)
    loader = DataLoader(RandomCrops(args.size, args.steps * args.batch), args.batch)
    history = train(model, loader, args.lr)

    crops = held_out_crops(args.size)
    print("held out:", ", ".join(f"{name} {value:.3f}" for name, value in evaluate(model.eval(), *crops).items()))
    draw(model, *crops, history, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
