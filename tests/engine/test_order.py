"""Images and masks of a step do not depend on the number of processes, or on where a run was resumed."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset, get_worker_info

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from pretraining import tiny

from sgmim_fast.data.seeds import mix
from sgmim_fast.engine.loader import Layout, Order, batches
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain.build import draw_masks

SPLITS = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]  # batch, accumulate, processes: 8 images a step


def steps(length: int, split: tuple[int, int, int], step: int = 0) -> list[list[int]]:
    """Returns the images of each step of an epoch, combined from all processes."""
    batch, accumulate, processes = split
    found: dict[int, list[int]] = {}
    for rank in range(processes):
        layout = Layout(batch, accumulate, processes, rank)
        order = Order(length, layout, seed=3, epoch=5, step=step)
        batches = list(order)
        assert len(batches) == len(order) and all(len(b) == batch for b in batches)
        for i, b in enumerate(batches):
            first = layout.first(i % accumulate)
            found.setdefault(i // accumulate, [-1] * layout.total)[first : first + batch] = b
    return [found[i] for i in sorted(found)]


@given(st.integers(8, 70), st.sampled_from(SPLITS))
def test_steps_do_not_depend_on_the_split(length, split):
    whole = steps(length, SPLITS[0])
    assert steps(length, split) == whole
    images = [image for step in whole for image in step]
    assert len(set(images)) == len(images) == length // 8 * 8 and max(images) < length


@given(st.sampled_from(SPLITS), st.integers(0, 5))
def test_an_epoch_goes_on_where_it_stopped(split, step):
    assert steps(41, split, step) == steps(41, split)[step:]


def test_epochs_and_seeds_differ():
    layout = Layout(32)
    orders = [next(iter(Order(32, layout, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert len({mix(*numbers) for numbers in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1))}) == 5


class Stream(IterableDataset):
    """Yields items whose names are numbers. Each worker has its share, as of shards. There is one pass only."""

    def __init__(self, length: int):
        self.length = length

    def set_epoch(self, epoch: int) -> None:
        if epoch > 0:
            raise RuntimeError("a second pass")

    def __iter__(self):
        worker = get_worker_info()
        for number in range(self.length) if worker is None else range(worker.id, self.length, worker.num_workers):
            yield {"image": torch.full((3, 2, 2), float(number)), "name": str(number), "skipped": ""}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("batch", [5, 8, 16, 24])
def test_a_pass_fills_as_many_batches_with_any_number_of_workers(batch, workers):
    found = list(islice(batches(Stream(24), Layout(batch), 0, 0, 24 // batch, workers, pin=False), 24 // batch))
    names = [name for each in found for name in each["name"]]
    assert len(set(names)) == len(names) == 24 // batch * batch
    for each in found:
        assert each["image"].shape == (batch, 3, 2, 2) and each["skipped"] == [""] * batch
        assert each["image"][:, 0, 0, 0].tolist() == list(map(float, each["name"]))


def test_a_pass_without_a_batch_is_an_error():
    with pytest.raises(UserError, match="a pass over the data has fewer images than the 9 of a batch; expected"):
        next(batches(Stream(8), Layout(9), 0, 0, 1, workers=0, pin=False))


@pytest.mark.parametrize("shown", ["masked", "visible", "all", "0.5"])
@pytest.mark.parametrize(("stride", "side"), [(None, 4), (16, 4), (8, 8), (4, 16), (32, 4), (12, 4)])
def test_masks_are_drawn_on_the_cells_that_make_up_a_unit(shown, stride, side):
    def draw(stride: int | None):
        settings = tiny(mask__shown=shown).mask
        return draw_masks(settings, 64, 6, seed=0, step=1, device=torch.device("cpu"), stride=stride)

    units, found = draw(None), draw(stride)
    assert all(units.mask.flatten(1).sum(1) == 10)  # ceil(0.6 * 16)
    assert found.mask.shape == (6, side, side)
    for actual, expected in zip(pytree.tree_leaves(found), pytree.tree_leaves(units.on((side, side))), strict=True):
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))  # tensors, and numbers known to the host


def test_masks_come_from_seed_and_step():
    draw = [
        draw_masks(tiny().mask, 64, 4, seed, step, torch.device("cpu")).mask for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    torch.manual_seed(9)  # the default generator is not used
    assert torch.equal(draw_masks(tiny().mask, 64, 4, 0, 0, torch.device("cpu")).mask, draw[0])
    assert not torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
