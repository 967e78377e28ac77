"""Masks as users draw them, and the row lists that the model derives from a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import nothing_searched
from torch import Tensor

import sgmim_fast
from sgmim_fast.masking import DenseMask, SelectiveMask, cells_of, resize, search, selective_mask
from sgmim_fast.rows import Rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_rows(rows: Rows, wanted: Tensor) -> None:
    """Asserts that `rows` lists in ascending order where `wanted` (B, h, w) is True, with the offsets of each image."""
    assert torch.equal(rows.index, wanted.flatten().nonzero().squeeze(1))
    assert rows.offsets.tolist() == [0, *wanted.flatten(1).sum(1).cumsum(0).tolist()]
    assert rows.index.dtype == rows.offsets.dtype == torch.int64


def assert_cells(found: SelectiveMask, mask: Tensor, shown: Tensor) -> None:
    assert torch.equal(found.mask, mask) and torch.equal(found.structure, shown)
    assert_rows(found.visible, ~mask)
    assert_rows(found.masked, mask)
    assert_rows(found.shown, shown)


@pytest.mark.parametrize("shown", ["masked", "visible", "all", 0.3, 0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.6, 0.0, 1.0, [0.0, 0.25, 1.0]], ids=str)
def test_counts_and_row_lists(ratio, shown):
    drawn = selective_mask(3, (4, 5), ratio, generator(), shown=shown)
    ratios = ratio if isinstance(ratio, list) else [ratio] * 3
    assert drawn.mask.shape == drawn.structure.shape == (3, 4, 5)
    assert drawn.mask.dtype == drawn.structure.dtype == torch.bool
    assert drawn.mask.flatten(1).sum(1).tolist() == [math.ceil(r * 20) for r in ratios]
    assert_cells(drawn, drawn.mask, drawn.structure)
    if shown == "masked":
        assert torch.equal(drawn.structure, drawn.mask)
    elif shown == "visible":
        assert torch.equal(drawn.structure, ~drawn.mask)
    elif shown == "all":
        assert drawn.structure.all()
    else:
        assert (~drawn.structure).flatten(1).sum(1).tolist() == [math.ceil(shown * 20)] * 3


def test_independent_structure_mask_is_not_the_image_mask():
    drawn = selective_mask(8, 6, 0.5, generator(), shown=0.5)
    agreement = (drawn.mask == drawn.structure).float().mean()
    assert 0.3 < agreement < 0.7


def test_generator_reproduces_the_draw():
    first, second = (selective_mask(4, 6, generator=generator(7)) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask, selective_mask(4, 6, generator=generator(8)).mask)
    one = generator(7)
    assert torch.equal(selective_mask(4, 6, generator=one).mask, first.mask)
    assert not torch.equal(selective_mask(4, 6, generator=one).mask, first.mask)


def test_default_generator():
    torch.manual_seed(3)
    first = selective_mask(4, 6)
    torch.manual_seed(3)
    assert torch.equal(selective_mask(4, 6).mask, first.mask)


def test_every_unit_is_as_likely():
    """2000 draws of 3 out of 6 units: 6 counts with mean 1000 and deviation 22; the tolerance is five of them."""
    counts = selective_mask(2000, (2, 3), 0.5, generator()).mask.sum(0)
    assert (counts - 1000).abs().max() < 112


def test_lives_where_asked():
    for drawn in (selective_mask(2, 3, device="meta"), selective_mask(2, 3, device=torch.device("meta"))):
        assert {t.device.type for t in (*drawn[:2], *drawn.visible, *drawn.masked, *drawn.shown)} == {"meta"}
    assert selective_mask(2, 3).mask.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 6), ValueError, "batch is 0; expected at least 1"),
        ((2, 0), ValueError, "grid is 0; expected at least one unit"),
        ((2, (3, -1)), ValueError, r"grid is \(3, -1\); expected at least one unit"),
        ((2, 6, 1.5), ValueError, r"ratio is \[1.5, 1.5\]; expected numbers between 0 and 1"),
        ((2, 6, -0.1), ValueError, "ratio is .*; expected numbers between 0 and 1"),
        ((2, 6, float("nan")), ValueError, "ratio is .*; expected numbers between 0 and 1"),
        ((2, 6, [0.5]), ValueError, "ratio has 1 entries; expected one number, or one per image of 2"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        selective_mask(*arguments)


@pytest.mark.parametrize(("shown", "message"), [("hidden", "shown is 'hidden'; expected"), (1.5, "shown is ")])
def test_bad_shown(shown, message):
    with pytest.raises(ValueError, match=message):
        selective_mask(2, 6, shown=shown)


@given(
    st.integers(1, 3), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3))
)
def test_resize_repeats_each_entry(batch, grid, scale):
    coarse = torch.randint(0, 2, (batch, *grid), generator=generator()).bool()
    down, across = grid[0] * scale[0], grid[1] * scale[1]
    fine = resize(coarse, down, across)
    assert fine.shape == (batch, down, across)
    for y in range(down):
        for x in range(across):
            assert torch.equal(fine[:, y, x], coarse[:, y // scale[0], x // scale[1]])


@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["masked", "visible", "all", 0.5]),
    st.sampled_from([0.0, 0.4, 1.0, [0.0, 0.3, 1.0]]),
    st.integers(0, 9),
)
def test_a_drawn_mask_on_a_finer_grid(batch, grid, scale, shown, ratio, seed):
    ratio = ratio[:batch] if isinstance(ratio, list) else ratio
    drawn = selective_mask(batch, grid, ratio, generator(seed), shown=shown)
    down, across = grid[0] * scale[0], grid[1] * scale[1]
    with nothing_searched():
        fine = drawn.on((down, across))
    assert_cells(fine, resize(drawn.mask, down, across), resize(drawn.structure, down, across))
    assert (fine.shown is fine.masked) == (shown == "masked") and (fine.shown is fine.visible) == (shown == "visible")
    assert drawn.on(grid) is drawn
    if scale[0] == scale[1]:  # drawn there directly
        again = selective_mask(batch, grid, ratio, generator(seed), shown=shown, scale=scale[0])
        assert_cells(again, fine.mask, fine.structure)


@pytest.mark.parametrize("grid", [(2, 6), (0, 6), (-4, 6), (12,)])
def test_other_grids_are_refused(grid):
    with pytest.raises(ValueError, match=r"grid is \(.*\); expected multiples of the mask's own \(4, 6\)"):
        selective_mask(2, (4, 6)).on(grid)


@pytest.mark.parametrize("masking", ["random", "salience"])
def test_scale_is_positive(masking):
    salience = torch.rand(2, 6, 6) if masking == "salience" else None
    with pytest.raises(ValueError, match="scale is 0; expected at least 1"):
        selective_mask(2, 6, scale=0, masking=masking, salience=salience)


def test_cells_of_is_deprecated():
    drawn = selective_mask(2, 3)
    with pytest.warns(DeprecationWarning, match=r"mask\.on\(\(down, across\)\)"):
        cells = cells_of(drawn, 6, 6)
    assert_cells(cells, resize(drawn.mask, 6, 6), resize(drawn.mask, 6, 6))


@pytest.mark.parametrize("shown", ["masked", "visible", "all", 0.5])
def test_parts_are_the_masks_of_their_images(shown):
    whole = selective_mask(6, (4, 5), generator=generator(), shown=shown)
    for first, count in ((0, 6), (0, 2), (4, 2), (3, 1), (2, 0)):
        with nothing_searched():
            part = whole.part(first, count)
        own = slice(first, first + count)
        assert_cells(part, whole.mask[own], whole.structure[own])
        assert (part.shown is part.masked) == (shown == "masked") and (part.shown is part.visible) == (
            shown == "visible"
        )
    assert whole.part(0, 6) is whole


@pytest.mark.parametrize("images", [(-1, 2), (0, 7), (5, 2), (2, -1)])
def test_parts_that_are_not_there(images):
    with pytest.raises(ValueError, match=r"images -?\d to \d are out of range; expected some of 6"):
        selective_mask(6, 2).part(*images)


def test_parts_of_images_with_other_counts():
    """Parts are refused even if the counts of their images add up to the same number."""
    with pytest.raises(RuntimeError, match="images have different numbers of rows; expected the same"):
        selective_mask(4, (2, 2), [0.25, 0.75, 0.5, 0.5]).part(0, 2)


@pytest.mark.parametrize("shown", ["masked", "visible", "all"])
def test_a_mask_moves_with_all_it_has(shown):
    drawn = selective_mask(2, 3, shown=shown)
    assert drawn.to("cpu") is drawn and drawn.to(torch.device("cpu")).mask is drawn.mask
    moved = drawn.to("meta")
    tensors = [moved.mask, moved.structure, *moved.visible, *moved.masked, *moved.shown]
    assert {t.device.type for t in tensors} == {"meta"} and moved.counts == drawn.counts
    for name in ("masked", "visible"):  # lists that are one stay one
        shared = getattr(drawn, name).index is drawn.shown.index
        assert (getattr(moved, name).index is moved.shown.index) == shared == (shown == name)


@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 9),
)
def test_search_of_an_aligned_mask(batch, grid, scale, dtype, seed):
    mask = torch.randint(0, 2, (batch, *grid), generator=generator(seed)).bool()
    fine = resize(mask, grid[0] * scale, grid[1] * scale)
    assert_cells(search(fine.to(dtype), *grid), mask, mask)


@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(2, 3), st.data())
def test_search_refuses_a_partly_masked_cell(grid, scale, data):
    mask = torch.zeros(2, grid[0] * scale, grid[1] * scale, dtype=torch.bool)
    mask.view(-1)[data.draw(st.integers(0, mask.numel() - 1))] = True
    for dense in (mask, ~mask):
        found = search(dense, *grid)
        assert isinstance(found, DenseMask) and all(torch.equal(part, dense) for part in found)


def test_search_of_a_mask_that_is_not_contiguous():
    mask = torch.randint(0, 2, (3, 2, 4), generator=generator()).bool()
    fine = resize(mask, 4, 8).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not fine.is_contiguous()
    assert_cells(search(fine, 2, 4), mask, mask)


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("aligned", [True, False])
def test_search_raises_on_other_values(value, aligned):
    mask = torch.zeros(2, 4, 4)
    mask[0, 0:2, 0:2] = value
    if not aligned:
        mask[1, 3, 3] = 1
    with pytest.raises(ValueError, match="mask has values other than 0 and 1; expected 1 where the image is masked"):
        search(mask, 2, 2)


def test_a_drawn_mask_is_a_tuple_of_tensors():
    """Data loaders, pinning and `torch.compile` can therefore traverse it."""
    drawn = sgmim_fast.selective_mask(2, 3)
    assert isinstance(drawn, tuple) and isinstance(drawn, SelectiveMask)
    leaves = torch.utils._pytree.tree_leaves(drawn)
    assert [type(leaf) for leaf in leaves] == [torch.Tensor] * 8 + [int] * 2  # and the counts, known to the host
