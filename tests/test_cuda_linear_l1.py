"""`linear_l1` as the CUDA kernels do it, compiled for the host, against NumPy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from host_build import load_bodies
from hypothesis import given
from hypothesis import strategies as st

from sgmim_fast.ops.linear_l1 import packed_shape, unpack_signs


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
    signs = np.full(packed_shape(*difference.shape), -1, np.int32)
    total = bodies.linear_l1(x, weight, bias, target, valid, rows, signs, cell, packed, threads)
    expected = np.sign(difference)
    np.testing.assert_array_equal(unpack_signs(torch.from_numpy(signs), len(weight)), expected)
    assert total == np.abs(difference.astype(np.float64)).sum()

    grad, scale = np.full((), 3, np.float32), 0.25
    dx, dweight, dbias = np.zeros_like(x), np.full_like(weight, np.nan), np.full_like(bias, np.nan)
    bodies.linear_l1_backward(grad, x, weight, signs, rows, packed, scale, dx, dweight, dbias, threads)
    wanted = np.zeros_like(x)
    wanted[slice(None) if packed else rows] = 0.75 * expected @ weight
    np.testing.assert_array_equal(dx, wanted)
    np.testing.assert_array_equal(dweight, 0.75 * expected.T @ (x if packed else x[rows]))
    np.testing.assert_array_equal(dbias, 0.75 * expected.sum(0))


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


def test_every_sign_at_every_bit(bodies):
    """A head of no weight whose bias is the prediction: above, below, met, not counted, in every place of a word."""
    outs = 100
    kinds = np.stack([np.roll(np.arange(outs) % 4, shift) for shift in range(4)])
    target = np.zeros((4, outs, 1, 1), np.float32)
    target[..., 0, 0] = np.choose(kinds, [1, -1, 0, 5])
    valid = (kinds != 3).reshape(target.shape)
    x, weight, bias = np.ones((4, 1), np.float32), np.zeros((outs, 1), np.float32), np.zeros(outs, np.float32)
    signs = np.full(packed_shape(4, outs), -1, np.int32)
    bodies.linear_l1(x, weight, bias, target, valid, np.arange(4), signs, 1, True, 1)
    np.testing.assert_array_equal(unpack_signs(torch.from_numpy(signs), outs), np.choose(kinds, [-1, 1, 0, 0]))
    assert signs.nbytes == 4 * 2 * 4 * 4  # 100 signs a row take two planes of four words


@pytest.mark.parametrize("half", [False, True])
def test_bfloat16_gradients_in_either_dtype(bodies, half):
    """Under autocast the parameters' gradients are float32, those of the tokens bfloat16."""
    x, weight = (torch.randint(-3, 4, shape).bfloat16() for shape in ((70, 136), (96, 136)))
    signs = torch.randint(-1, 2, (70, 96))
    bits = torch.stack([signs > 0, signs < 0], 1).view(70, 2, 3, 32).long()
    packed = (bits << torch.arange(32)).sum(-1).int()  # wraps
    assert torch.equal(unpack_signs(packed, 96), signs.to(torch.int8))
    create = {"dtype": torch.bfloat16 if half else torch.float32}
    dx, dweight, dbias = torch.empty(x.shape, **create), torch.empty(weight.shape, **create), torch.empty(96)
    raw = (t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in (x, weight, dx, dweight))
    x_raw, weight_raw, dx_raw, dweight_raw = raw
    arrays = np.ones((), np.float32), x_raw, weight_raw, packed.numpy(), np.arange(70)
    bodies.linear_l1_backward_bfloat16(*arrays, True, 1.0, dx_raw, dweight_raw, dbias.numpy(), 1)
    assert torch.equal(dx, (signs.float() @ weight.float()).to(dx.dtype))
    assert torch.equal(dweight, (signs.T.float() @ x.float()).to(dweight.dtype))
    assert torch.equal(dbias, signs.sum(0).float())


def test_a_gradient_nobody_wants_is_not_made(bodies):
    x, weight, nothing = np.ones((3, 8), np.float32), np.ones((4, 8), np.float32), np.zeros(0, np.float32)
    signs, rows, one = np.ones((3, 2, 1), np.int32), np.arange(3), np.ones((), np.float32)
    dx, dweight, dbias = np.full_like(x, 9), np.full_like(weight, 9), np.full(4, 9, np.float32)
    bodies.linear_l1_backward(one, x, weight, signs, rows, True, 1.0, dx, nothing, dbias, 1)
    assert (dbias == 9).all() and not (dx == 9).any()
    bodies.linear_l1_backward(one, x, weight, signs, rows, True, 1.0, nothing, dweight, dbias, 1)
    assert not (dweight == 9).any() and not (dbias == 9).any()
