"""Procedural scenes with exact depth or the class of each pixel's object, to try fine-tuning without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

from sgmim_fast.data import PairTransform, Scenes
from sgmim_fast.data.seeds import mix


class SceneMaps(Dataset):
    """`sgmim_fast.data.Scenes` with depth, in the unit of the scenes, or with labels.

    Args:
        task: "depth" or "segmentation".
        count: number of scenes.
        size: pixels along each side.
        seed: the run's seed. With one seed, the scenes for training, for testing and of `sgmim-fast pretrain` differ.
        train: whether these are the scenes for training, which are flipped at random.
        mean, std: mean and standard deviation with which images are normalised, ImageNet's by default.
    """

    min_depth, max_depth, crop = 0.1, 16.0, None  # the corners of large rooms are beyond max_depth
    class_names = ("room", "sphere", "box", "plane")
    classes = len(class_names)

    def __init__(
        self,
        task: str,
        count: int,
        size: int,
        seed: int,
        train: bool,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.task = task
        transform = PairTransform(size, scale=(1, 1), ratio=(1, 1), flip=0.5 if train else 0, mean=mean, std=std)
        labels = task == "segmentation"
        self._scenes = Scenes(count, size, seed=mix(seed, "fine-tuning", train), transform=transform, labels=labels)

    def set_epoch(self, epoch: int) -> None:
        self._scenes.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._scenes[index]
        structure = item.pop("structure")
        return {**item, "depth": structure} if self.task == "depth" else dict(item)
