"""The stereo photograph of `evidence.py --real`: crops of its parts, and the probe of its measured disparity.

The motorcycle of the Middlebury 2014 benchmark, which ships inside scikit-image: nothing is downloaded. One photograph
says nothing about others; what can be seen is whether anything of the scenes' result is there at all.
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

COLUMNS = {"pretrain": (0, 420), "train": (0, 420), "validation": (420, 520), "test": (520, 741)}  # of 741
CROPS = {"pretrain": 2048, "train": 768, "validation": 256, "test": 512}
SIDES = (72, 220)  # pixels along a crop, at most what the part is wide


def crops(size: int) -> dict[str, Split]:
    """Random square crops of each part of the photograph, resized; the disparity in pixels, NaN where not known."""
    left, _, disparity = skimage.data.stereo_motorcycle()
    image = tv_tensors.Image(torch.from_numpy(left).permute(2, 0, 1))
    maps = tv_tensors.Mask(torch.from_numpy(disparity)[None])  # a mask's values are never mixed
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
    """(N, 1, S, S) -> (N, T), means over the known pixels of each token; NaN where less than half of them are known."""
    patches = to_patches(depth[:, 0])
    return patches.nanmean(-1).where(patches.isfinite().sum(-1) * 2 >= PATCH**2, torch.nan)


def probe_crops(encoder: nn.Module, sets: dict[str, Split]) -> dict[str, float]:
    """RMSE, in pixels, of the disparity of the held-out part's tokens, predicted linearly from frozen features."""
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
