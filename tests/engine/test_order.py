"""Images and masks of a step do not depend on the number of processes, or on where a run was resumed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from pretraining import tiny

from sgmim_fast.data.seeds import mix
from sgmim_fast.engine.loader import Layout, Order
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
