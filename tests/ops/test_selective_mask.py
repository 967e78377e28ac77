from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgmim_fast import backends
from sgmim_fast.ops.selective_mask import philox, selective_mask


def seed_of(number: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor([number, -number], dtype=torch.int64, device=device)


def flat(drawn) -> list[torch.Tensor]:
    mask, visible, masked = drawn
    return [mask.cpu(), *(t.cpu() for t in (*visible, *masked))]


@st.composite
def draws(draw):
    """Draws seed, masked, grid and scale."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    masked = draw(st.lists(st.integers(0, math.prod(grid)), min_size=1, max_size=5))
    key = st.integers(-(2**63), 2**63 - 1)
    return torch.tensor([draw(key), draw(key)]), masked, grid, draw(st.integers(1, 3))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123 for philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in words) == expected


@given(arguments=draws())
def test_counts_complement_and_rows(place, arguments):
    seed, counts, grid, scale = arguments
    mask, visible, masked = selective_mask(seed.to(place.device), counts, grid, scale)
    batch, cells = len(counts), math.prod(grid) * scale**2
    assert mask.shape == (batch, grid[0] * scale, grid[1] * scale) and mask.dtype == torch.bool
    for rows, chosen in ((masked, mask), (visible, ~mask)):
        numbers = chosen.flatten().nonzero().flatten()
        assert torch.equal(rows.index, numbers)  # ascending and complete
        assert rows.offsets.dtype == torch.int64
        assert rows.offsets.tolist() == [0, *chosen.flatten(1).sum(1).cumsum(0).tolist()]
    assert mask.flatten(1).sum(1).tolist() == [count * scale**2 for count in counts]
    units = mask.view(batch, grid[0], scale, grid[1], scale)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))  # only whole units
    assert visible.index.numel() + masked.index.numel() == batch * cells


@given(arguments=draws())
def test_same_bits_as_the_plain_implementation(place, arguments):
    seed, *rest = arguments
    with backends.use("torch"):
        expected = flat(selective_mask(seed, *rest))
    actual = flat(selective_mask(seed.to(place.device), *rest))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_keys_decide(device):
    """The units with the smallest Philox keys are masked."""
    mask, _, _ = selective_mask(seed_of(7, device), [5, 11], (3, 7))
    key = (seed_of(7) & 0xFFFFFFFF).unbind()
    for image, count in enumerate((5, 11)):
        words = [philox([torch.tensor(c) for c in (four, image, 0, 0)], key) for four in range(6)]
        keys = torch.tensor([int(word) for four in words for word in four])[:21]
        assert mask[image].flatten().nonzero().flatten().tolist() == sorted(keys.argsort()[:count].tolist())


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (128, 128)])
def test_nothing_and_everything_masked(device, grid):
    units = math.prod(grid)
    mask, visible, masked = selective_mask(seed_of(1, device), [0, units], grid)
    assert not mask[0].any() and mask[1].all()
    assert visible.offsets.tolist() == [0, units, units] and masked.offsets.tolist() == [0, 0, units]
    mask, visible, masked = selective_mask(seed_of(1, device), [0], grid, 2)
    assert not mask.any() and visible.index.numel() == 4 * units and masked.index.numel() == 0


def test_every_unit_is_as_likely(place):
    """Tests Pearson's statistic over the images of how often each unit, and each pair of neighbours, is masked."""
    device, count, (rows, columns) = place.device, 22, (6, 6)
    images = 128 if place.interpreted else 4096
    mask, _, _ = selective_mask(seed_of(3, device), [count] * images, (rows, columns))
    share = count / (rows * columns)
    z = (mask.double().mean(0) - share) / math.sqrt(share * (1 - share) / images)
    # For a fixed total, the sum of z^2 over 36 units is 36/35 chi-square with 35 degrees: mean 36, deviation 8.6.
    assert 10 < z.square().sum() < 70
    both = share * (count - 1) / (rows * columns - 1)
    z = ((mask[:, :, 1:] & mask[:, :, :-1]).double().mean(0) - both) / math.sqrt(both * (1 - both) / images)
    assert z.abs().max() < 4


def test_images_and_seeds_differ(device):
    first, _, _ = selective_mask(seed_of(1, device), [32] * 8, (8, 8))
    second, _, _ = selective_mask(seed_of(2, device), [32] * 8, (8, 8))
    drawn = torch.cat([first, second]).flatten(1)
    assert len({tuple(row.tolist()) for row in drawn}) == 16
    prefix, _, _ = selective_mask(seed_of(1, device), [32] * 3, (8, 8))
    assert torch.equal(prefix, first[:3])  # an image's draw does not depend on the rest of the batch


def test_number_of_threads_does_not_matter(device, threads):
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(flat(selective_mask(seed_of(5, device), [40, 0, 64, 13] * 8, (8, 8), 4)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_nothing_waits_for_the_gpu():
    seed = seed_of(1, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        selective_mask(seed, [3, 4], (3, 3), 2)
        selective_mask(seed, [3, 3], (3, 3), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile(device):
    def draw(seed):
        mask, visible, masked = selective_mask(seed, [3, 5], (3, 4), 2)
        return mask, visible.index * 1, masked.offsets

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(seed_of(9, device)), draw(seed_of(9, device)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed has shape \(3,\)"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed has dtype torch.int32"),
        ({"masked": []}, ValueError, "masked is empty"),
        ({"masked": [3, 13]}, ValueError, "masked is 13 for image 1; expected 0 to 12"),
        ({"masked": [-1]}, ValueError, "masked is -1 for image 0"),
        ({"grid": (0, 4)}, ValueError, r"grid is \(0, 4\)"),
        ({"grid": (65536, 65536)}, ValueError, "grid is"),
        ({"scale": 0}, ValueError, "scale is 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"seed": seed_of(1), "masked": [1, 2], "grid": (3, 4), "scale": 1, **change}
    with pytest.raises(error, match=message):
        selective_mask(**arguments)
