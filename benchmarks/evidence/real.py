"""The stereo photograph of `evidence.py --real`: crops of its parts, and the probe of its measured disparity.

It is the motorcycle of the Middlebury 2014 benchmark, which scikit-image contains, so that nothing is downloaded. One
photograph does not represent others. It can only show whether the scenes' result appears on a photograph at all.
"""

from __future__ import annotations

import skimage.data
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from evidence.pretrain import PATCH
from evidence.probe import LAMBDAS, choose, features, ridge, to_patches
from evidence.scenes import Split
from sgmim_fast.data import Normalize

COLUMNS = {"pretrain": (0, 420), "train": (0, 420), "validation": (420, 520), "test": (520, 741)}  # of 741 columns
CROPS = {"pretrain": 2048, "train": 768, "validation": 256, "test": 512}  # number of crops
SIDES = (72, 220)  # range of pixels along each side of a crop, at most the width of the part


def crops(size: int) -> dict[str, Split]:
    """Returns resized random square crops of each part of the photograph, with disparity in pixels as depth."""
    left, _, disparity = skimage.data.stereo_motorcycle()
    image = tv_tensors.Image(torch.from_numpy(left).permute(2, 0, 1))
    maps = tv_tensors.Mask(torch.from_numpy(disparity)[None])  # resizing does not interpolate the values of a Mask
    generator = torch.Generator().manual_seed(0)
    normalize = Normalize()
    found = {}
    for name, (first, last) in COLUMNS.items():
        pairs = []
        for _ in range(CROPS[name]):
            side, top, left_edge = torch.rand(3, generator=generator).tolist()
            side = int(SIDES[0] + side * (min(SIDES[1], last - first) - SIDES[0]))
            top, left_edge = int(top * (image.shape[1] - side)), first + int(left_edge * (last - first - side))
            cut = (v2.functional.resized_crop(part, top, left_edge, side, side, [size, size]) for part in (image, maps))
            pairs.append(normalize(*cut))
        images, depth = (
            torch.stack([part.as_subclass(Tensor) for part in parts]) for parts in zip(*pairs, strict=True)
        )
        depth = depth.where(depth.isfinite(), torch.nan)
        found[name] = Split(images, depth, torch.empty(len(images), 0, 0, dtype=torch.uint8))
    return found


def token_disparity(depth: Tensor) -> Tensor:
    """Returns the mean over the valid pixels of each token, (N, T), from (N, 1, S, S); NaN for tokens with less than
    half of their pixels valid."""
    patches = to_patches(depth[:, 0])
    return patches.nanmean(-1).where(patches.isfinite().sum(-1) * 2 >= PATCH**2, torch.nan)


def probe_crops(encoder: nn.Module, sets: dict[str, Split]) -> dict[str, float]:
    """Predicts the disparity of tokens linearly from frozen features. Returns the RMSE on the test part, in pixels, and
    that of predicting the mean."""
    found = {}
    for name in ("train", "validation", "test"):
        disparity = token_disparity(sets[name].depth)
        known = disparity.isfinite()
        found[name] = features(encoder, sets[name].images)[known][:, None], disparity[known][:, None, None]
    (tokens, targets), (others, truth), (unseen, wanted) = found.values()

    def rmse(predicted: Tensor, disparity: Tensor) -> float:
        return (predicted - disparity).square().mean().sqrt().item()

    predict = choose(ridge(tokens, targets, LAMBDAS), others, lambda guess: rmse(guess, truth))
    return {"rmse": rmse(predict(unseen), wanted), "rmse_of_mean": rmse(targets.mean(), wanted)}
