"""Device functions for selection, masks and trimmed standardisation, compiled for the host: with one thread for all
small cases, with several parallel threads, and under the thread sanitizer."""

from __future__ import annotations

import itertools
import math
import subprocess

import numpy as np
import pytest
import torch
from host_build import build, load_bodies
from hypothesis import given
from hypothesis import strategies as st

from sgmim_fast import backends
from sgmim_fast.ops.selective_mask import selective_mask

THREADS = st.sampled_from([1, 2, 3])


@pytest.fixture(scope="module")
def bodies():
    return load_bodies()


def check_selection(bodies, keys: np.ndarray, threads: int) -> None:
    """Checks the key of every rank, and the number of equal keys before it, against sorting."""
    ordered = np.sort(keys)
    found, before = bodies.select_key(keys, np.arange(len(keys), dtype=np.uint32), threads)
    np.testing.assert_array_equal(found, ordered)
    np.testing.assert_array_equal(before, np.arange(len(keys)) - np.searchsorted(ordered, ordered))


def check_counts(bodies, keys: np.ndarray, masked: int, threads: int) -> None:
    """The first of equal keys are masked, as by a stable sort."""
    chosen = np.zeros(len(keys), np.uint32)
    chosen[np.argsort(keys, kind="stable")[:masked]] = 1
    expected = np.concatenate([[0], np.cumsum(chosen)])
    np.testing.assert_array_equal(bodies.count_masked(keys, masked, threads), expected)


def test_selection_of_every_small_array(bodies):
    pool = np.array([0, 1, 0x100, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    for n in range(1, 6):
        for keys in itertools.product(pool, repeat=n):
            check_selection(bodies, np.array(keys, np.uint32), 1)
            for masked in range(n + 1):
                check_counts(bodies, np.array(keys, np.uint32), masked, 1)


@given(
    pool=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200), n=st.integers(1, 2000), threads=THREADS,
    number=st.integers(0, 2**31), data=st.data(),
)  # fmt: skip
def test_selection_of_large_arrays(bodies, pool, n, threads, number, data):
    keys = np.random.default_rng(number).choice(np.array(pool, np.uint32), n)
    ranks = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)), np.uint32)
    found, _ = bodies.select_key(keys, ranks, threads)
    np.testing.assert_array_equal(found, np.sort(keys)[ranks])
    check_counts(bodies, keys, data.draw(st.integers(0, n)), threads)


def drawn(bodies, seed: list[int], masked: list[int], grid: tuple[int, int], scale: int, threads: int) -> list:
    cells = math.prod(grid) * scale**2
    mask = np.full((len(masked), grid[0] * scale, grid[1] * scale), True)
    hidden = np.full(sum(masked) * scale**2, -1)
    visible = np.full(len(masked) * cells - len(hidden), -1)
    keys = (number & 0xFFFFFFFFFFFFFFFF for number in seed)
    bodies.draw_masks(*keys, np.array(masked), *grid, scale, mask, hidden, visible, threads)
    return [mask, hidden, visible]


def check_masks(bodies, seed: list[int], masked: list[int], grid: tuple[int, int], scale: int, threads: int) -> None:
    with backends.use("torch"):
        mask, visible, hidden = selective_mask(torch.tensor(seed), masked, grid, scale)
    expected = [mask, hidden.index, visible.index]
    for actual, wanted in zip(drawn(bodies, seed, masked, grid, scale, threads), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.numpy())


def test_masks_of_every_small_grid(bodies):
    """Tests every number of masked units, with one image for each."""
    for rows, columns, scale in itertools.product(range(1, 5), range(1, 5), (1, 2, 3)):
        check_masks(bodies, [rows, -columns], list(range(rows * columns + 1)), (rows, columns), scale, 1)


@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)), scale=st.integers(1, 4), threads=THREADS,
    seed=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2), data=st.data(),
)  # fmt: skip
def test_masks_of_any_grid(bodies, grid, scale, threads, seed, data):
    masked = data.draw(st.lists(st.integers(0, math.prod(grid)), min_size=1, max_size=3))
    check_masks(bodies, seed, masked, grid, scale, threads)


@pytest.mark.parametrize("grid", [(128, 128), (1, 16384), (16384, 1)])
def test_masks_of_the_largest_grids(bodies, grid):
    """16,384 units; every image masks another number of them."""
    check_masks(bodies, [5, 6], [9831, 0, 1, 16383, 16384], grid, 1, 2)


FORMATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint16": torch.uint16,
}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "uint16"])
def test_every_stored_value(bodies, name):
    raw = np.arange(2**16, dtype=np.uint16)
    stored = torch.from_numpy(raw.copy()).view(FORMATS[name])
    expected = (stored.float() / 2**16 if name == "uint16" else stored.float()).numpy()
    actual = getattr(bodies, f"values_{name}")(raw)
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), raw[~same]


def standardized(bodies, name: str, x: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    y, nonfinite = np.full(x.shape, np.nan, np.float32), np.full(len(x), -1)
    getattr(bodies, f"standardize_{name}")(x, y, nonfinite, threads)
    return y, nonfinite


def check_standardized(bodies, x: np.ndarray, threads: int, name: str = "float32") -> None:
    """Checks x, (planes, n) as stored. The truth keeps the values that sorting keeps, and sums them exactly."""
    y, nonfinite = standardized(bodies, name, x, threads)
    wide = x if name == "float32" else np.stack([getattr(bodies, f"values_{name}")(plane) for plane in x])
    for plane, result, bad in zip(wide.astype(np.float64), y, nonfinite, strict=True):
        good = np.isfinite(plane)
        assert bad == (~good).sum()
        n = int(good.sum())
        kept = np.sort(plane[good])[int(0.1 * n) : int(0.9 * n)]
        if len(kept) < 2:
            np.testing.assert_array_equal(result, 0)
            continue
        mean = math.fsum(kept) / len(kept)
        deviation = math.sqrt(math.fsum((kept - mean) ** 2) / (len(kept) - 1) + 1e-6)
        np.testing.assert_array_equal(result[~good], 0)
        truth = (plane[good] - mean) / deviation
        # rounding to float32 (half an ulp), and rounding of the value and the statistics in double
        tolerance = (
            np.abs(truth) * (2**-24 + 1e-12) + 1e-15 * (np.abs(plane[good]) + np.abs(kept).max()) / deviation + 1e-45
        )
        assert (np.abs(result[good] - truth) <= tolerance).all()


def test_standardize_every_small_plane(bodies):
    """Every combination of ties, both zeros, denormals, neighbours and magnitudes far apart."""
    pool = np.array([-1e30, -1.0, -1e-40, -0.0, 0.0, 3.3e-39, 1.0, np.nextafter(np.float32(1), 2), np.inf], np.float32)
    for n in range(1, 5):
        check_standardized(bodies, np.array(list(itertools.product(pool, repeat=n)), np.float32), 1)
    check_standardized(bodies, np.array(list(itertools.product(pool[1::3], repeat=6)), np.float32), 1)


@given(
    n=st.integers(1, 4000), pool=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), threads=THREADS,
    bad=st.sampled_from([0, 0.02, 0.9, 1]), number=st.integers(0, 2**31),
)  # fmt: skip
def test_standardize_with_ties_and_nonfinite_values(bodies, n, pool, threads, bad, number):
    random = np.random.default_rng(number)
    x = random.choice(np.array(pool, np.float32), (2, n))
    x[random.random(x.shape) < bad] = np.nan
    x[random.random(x.shape) < bad / 2] = -np.inf
    check_standardized(bodies, x, threads)


@pytest.mark.parametrize("name", FORMATS)
def test_standardize_stored_formats(bodies, name):
    random = np.random.default_rng(2)
    if name == "float32":
        x = random.gamma(2.0, 3.0, (3, 36864)).astype(np.float32)
    elif name == "uint16":
        x = random.integers(0, 2**16, (3, 5000)).astype(np.uint16)
    else:
        x = torch.from_numpy(random.gamma(2.0, 3.0, (3, 5000))).to(FORMATS[name]).view(torch.uint16).numpy()
    check_standardized(bodies, x, 1, name)
    check_standardized(bodies, x, 4, name)


@pytest.mark.parametrize("value", [0.0, -2.5, 0.1, 1e30, 1e-45])
def test_standardize_a_constant_gives_zeros(bodies, value):
    y, nonfinite = standardized(bodies, "float32", np.full((1, 97), value, np.float32), 1)
    assert not y.any() and nonfinite == [0]


def test_no_races():
    """Groups of host threads run under the thread sanitizer, and are compared with a group of one."""
    done = subprocess.run([build("cuda_races")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
