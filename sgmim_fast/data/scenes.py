"""Data set of procedural scenes with exact depth, which needs no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sgmim_fast.data.pair import Item, Structure, make_item
from sgmim_fast.data.scene import Scene, draw_scene, render
from sgmim_fast.data.seeds import Seeded, seeded
from sgmim_fast.data.transform import Normalize


class Scenes(Seeded, Dataset):
    """Scenes of textured spheres, boxes and cards that occlude one another in a room under random light, with exact
    depth.

    Scene i does not depend on the length of the data set. Objects measure about 1 in the unit of depth. Colours do not
    depend on depth.

    Args:
        count: number of scenes.
        size: pixels along each side.
        seed: seed of the scenes and of the transform.
        transform: callable that takes and returns the image, the structure map, and the labels if there are any, and
            normalises the image. torch's CPU generator is seeded for each item from (seed, epoch, index). None:
            `Normalize`.
        labels: whether items also have "labels", (size, size) int64: 0 room, 1 sphere, 2 box, 3 plane (card).
    """

    def __init__(
        self,
        count: int,
        size: int,
        *,
        seed: int = 0,
        transform: Callable[..., Sequence[Tensor]] | None = None,
        labels: bool = False,
    ) -> None:
        super().__init__(seed)
        if count < 1 or size < 1:
            raise ValueError(f"count is {count} and size is {size}; expected positive numbers")
        self.count, self.size = count, size
        self.transform = Normalize() if transform is None else transform
        self.labels = labels

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Returns scene `index`."""
        return draw_scene(np.random.default_rng((self.seed, index)))

    def __getitem__(self, index: int) -> Item:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} is out of range for {self.count} scenes")
        index %= self.count
        rng = np.random.default_rng((self.seed, index))
        colour, depth, labels = render(draw_scene(rng), self.size, rng)
        image, structure = tv_tensors.Image(torch.from_numpy(colour)), Structure(torch.from_numpy(depth)[None])
        maps = [structure, tv_tensors.Mask(torch.from_numpy(labels))] if self.labels else [structure]
        with seeded(self.seed, self._epoch.get(), index):
            return make_item(self.transform(image, *maps), f"scene-{self.seed}-{index}")
