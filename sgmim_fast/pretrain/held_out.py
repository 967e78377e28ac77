"""Pairs that a run does not train on, and its losses there: the same pairs and masks at every call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sgmim_fast.data import PairTransform, Scenes, StructureKind, structure_of
from sgmim_fast.data.pairs import Pairs
from sgmim_fast.engine import loader
from sgmim_fast.engine.order import mix
from sgmim_fast.errors import UserError
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import build, masks
from sgmim_fast.pretrain.config import Config


def check(config: Config) -> None:
    """That the settings say at most one kind of held-out data.

    Raises:
        UserError: naming the setting, what came and what is expected.
    """
    data = config.data
    if not 0 <= data.val < 1:
        raise UserError(f"data.val is {data.val}; expected a share of the data, 0 or more and less than 1")
    if data.val_structure is not None and data.val_images is None:
        raise UserError("data.val_images is missing; expected --val-images DIR with --val-structure DIR")
    if data.val and data.val_images is not None:
        raise UserError(f"data.val is {data.val} with data.val_images; expected one of them")
    if data.val and data.shards is not None:
        raise UserError("data.val does not split shards; expected --val-images DIR and --val-structure DIR")


def create(config: Config, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """What is trained on of a data set, and what is held out, cut and resized without chance; None: nothing is.

    Raises:
        UserError: nothing would be left to train on.
        DataError: there is something wrong with the folders of held-out data.
    """
    settings = config.data
    if settings.val_images is not None:
        source = {"images": settings.val_images, "structure": settings.val_structure, "shards": None, "scenes": 0}
        other = build.create_dataset(dataclasses.replace(config, data=dataclasses.replace(settings, **source)))
        return dataset, _without_chance(other, settings.size)
    if not settings.val:
        return dataset, None
    count = max(1, round(settings.val * len(dataset)))
    if isinstance(dataset, Scenes):
        more = Scenes(len(dataset) + count, settings.size, seed=dataset.seed)
        return dataset, Subset(more, range(len(dataset), len(more)))
    if count == len(dataset):
        raise UserError(f"data.val is {settings.val} of {len(dataset)} images, which leaves none to train on")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(mix(config.run.seed, 5)))
    held_out, rest = (sorted(part.tolist()) for part in order.split([count, len(dataset) - count]))
    return dataset.part(rest), _without_chance(dataset.part(held_out), settings.size)


def _without_chance(dataset: Dataset, size: int) -> Dataset:
    if isinstance(dataset, Pairs):
        dataset.transform = PairTransform.evaluation(size)
    return dataset


@torch.no_grad()
def losses(model: SGMIM, dataset: Dataset, config: Config, accelerator: Accelerator) -> Sequence[float]:
    """Total, image and structure loss, means over the images. Every process takes its share, and has to call it.

    Each image has one mask, which depends on the seed alone, and the model is not in training mode meanwhile.
    """
    batch, device, count = config.optim.batch, accelerator.device, len(dataset)
    rank, processes = accelerator.process_index, accelerator.num_processes
    seed = mix(config.run.seed, 6)
    drawn = masks.draw(config.mask, config.data.size, count, seed, 0, device, stride=config.model.stride)
    # sharded models are computed by all processes together: one without images left repeats the last ones for nothing
    starts = range(rank * batch, math.ceil(count / batch / processes) * processes * batch, processes * batch)
    firsts = [min(start, (count - 1) // batch * batch) for start in starts]
    batches = loader.read(
        dataset,
        min(loader.workers(config.data), len(firsts)),
        batch_sampler=[range(first, min(first + batch, count)) for first in firsts],
        generator=torch.Generator().manual_seed(0),  # the default generator is left alone
    )
    total = torch.zeros(4, device=device)
    training = model.training
    model.eval()
    for start, first, items in zip(starts, firsts, batches, strict=True):
        mask = drawn.part(first, len(items["image"]))
        found = _losses(model, items, mask, build.structure_kind(config), accelerator)
        if start == first:
            total += len(items["image"]) * torch.stack([*found, torch.ones_like(found[0])])
    model.train(training)
    *sums, images = accelerator.reduce(total, "sum").tolist()
    return [value / images for value in sums]


def _losses(
    model: SGMIM,
    items: dict[str, Tensor],
    mask: masks.SelectiveMask,
    kind: StructureKind,
    accelerator: Accelerator,
) -> tuple[Tensor, ...]:
    images = items["image"].to(accelerator.device)
    structure, valid = structure_of(items, accelerator.device, kind)
    with accelerator.autocast():
        return model(images, structure, mask, return_losses=True, structure_valid=valid)
