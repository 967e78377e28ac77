"""The forward of `linear_l1` as the CUDA kernel does it, compiled for the host, against NumPy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from host_build import load_bodies
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def bodies():
    return load_bodies()


def cells_of(pixels: np.ndarray, cell: int) -> np.ndarray:
    """(cells, S * cell^2), pixel-shuffle order."""
    batch, channels, height, width = pixels.shape
    blocks = pixels.reshape(batch, channels, height // cell, cell, width // cell, cell)
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * cell * cell)


def check(bodies, shape, cell: int, width: int, count: int, packed: bool, masked: bool, last: bool, threads: int):
    random = np.random.default_rng(count * 7 + width)
    batch, channels, down, across = shape
    cells = batch * down * across
    rows = random.permutation(cells)[:count].astype(np.int64)
    # whole numbers, whose sums have no rounding: signs and distances are exact, zeros among them
    target, x, weight, bias = (
        random.integers(-3, 4, size).astype(np.float32)
        for size in (
            (batch, channels, down * cell, across * cell),
            (len(rows) if packed else cells, width),
            (channels * cell**2, width),
            (channels * cell**2,),
        )
    )
    valid = random.random(target.shape) < 0.7 if masked else np.zeros((0, 0, 0, 0), bool)
    prediction = (x if packed else x[rows]) @ weight.T + bias
    difference = prediction - cells_of(target, cell)[rows]
    if masked:
        difference *= cells_of(valid, cell)[rows]
    if last:
        target = np.ascontiguousarray(target.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    signs = np.full(difference.shape, 9, np.int8)
    total = bodies.linear_l1(x, weight, bias, target, valid, rows, signs, cell, packed, threads)
    np.testing.assert_array_equal(signs, np.sign(difference))
    assert total == np.abs(difference.astype(np.float64)).sum()


@pytest.mark.parametrize("width", [1, 8, 127, 128, 136, 257])
def test_widths(bodies, width):
    for count, packed in itertools.product((0, 1, 5, 6), (True, False)):
        check(bodies, (1, 1, 2, 3), 4, width, count, packed, False, False, 1)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    cell=st.integers(1, 9), width=st.integers(1, 140), packed=st.booleans(), masked=st.booleans(), last=st.booleans(),
    threads=st.sampled_from([1, 3]), data=st.data(),
)  # fmt: skip
def test_any_shape(bodies, shape, cell, width, packed, masked, last, threads, data):
    count = data.draw(st.integers(0, shape[0] * shape[2] * shape[3]))
    check(bodies, shape, cell, width, count, packed, masked, last, threads)


def test_several_tiles_of_rows(bodies):
    check(bodies, (3, 1, 8, 8), 8, 40, 150, True, True, False, 3)
