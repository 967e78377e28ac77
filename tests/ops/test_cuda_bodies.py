"""The device function of `gather_patches`, compiled for the host and compared with NumPy, bit for bit."""

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


def z_order(side: int) -> list[tuple[int, int]]:
    """Returns (row, column) of the patches of a cell as defined in SPEC.md: the four quarters (row 0, column 0), (1,
    0), (0, 1), (1, 1), each in the same order inside."""
    if side == 1:
        return [(0, 0)]
    half, inside = side // 2, z_order(side // 2)
    return [(r * half + y, c * half + x) for r, c in ((0, 0), (1, 0), (0, 1), (1, 1)) for y, x in inside]


def gathered(tensor: np.ndarray, cells: np.ndarray, cell: int, patch: int, zorder: bool) -> np.ndarray:
    """Returns the packed rows, gathered slice by slice."""
    _, channels, height, width = tensor.shape
    side, down, across = cell // patch, height // cell, width // cell
    places = z_order(side) if zorder else list(itertools.product(range(side), range(side)))
    rows = []
    for number in cells:
        image, y, x = number // (down * across), number // across % down, number % across
        for row, column in places:
            top, left = y * cell + row * patch, x * cell + column * patch
            rows.append(tensor[image, :, top : top + patch, left : left + patch].reshape(-1))
    return np.array(rows, tensor.dtype).reshape(len(cells) * side * side, channels * patch * patch)


def check(
    bodies, tensor: np.ndarray, cells: np.ndarray, cell: int, patch: int, zorder: bool, threads: int, lanes: int = 1
) -> None:
    expected = gathered(tensor, cells, cell, patch, zorder)
    packed = np.full_like(expected, 9)
    bodies.pack_patches(tensor, cells, packed, cell, patch, zorder, threads)
    np.testing.assert_array_equal(packed, expected)

    # Backward: gathered pixels return to their places, and all others are zero, whatever `inverse` contains.
    number = tensor.size // tensor.shape[1] // cell**2
    for before in (0, 2, -1, 2**62):
        filled = np.full_like(tensor, 9)  # keeps the order of the strides
        bodies.unpack_patches(packed, cells, np.full(number, before), filled, cell, patch, zorder, threads, lanes)
        everywhere = gathered(filled, np.arange(number), cell, patch, zorder)
        wanted = np.zeros_like(everywhere).reshape(number, (cell // patch) ** 2, expected.shape[1])
        wanted[cells] = expected.reshape(-1, *wanted.shape[1:])
        np.testing.assert_array_equal(everywhere, wanted.reshape(everywhere.shape))


def layouts(shape: tuple[int, int, int, int], dtype: type) -> list[np.ndarray]:
    """Returns the same values contiguous, channels last, and as a part of a larger array."""
    values = np.random.default_rng(0).permutation(np.prod(shape)).astype(dtype).reshape(shape)
    last = np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    larger = np.zeros([size * 2 + 1 for size in shape], dtype)
    larger[1::2, 1::2, 1::2, 1::2] = values
    return [values, last, larger[1::2, 1::2, 1::2, 1::2]]


SHAPES = [
    (batch, channels, down, across, cell, patch, zorder)
    for batch, channels, down, across in itertools.product((1, 2), (1, 2, 3), (1, 2), (1, 3))
    for cell, patch in ((1, 1), (2, 1), (4, 4), (4, 2), (6, 2), (8, 2), (8, 1), (14, 7))
    for zorder in (False, True)
    if not (zorder and (cell // patch) & (cell // patch - 1))
]


@pytest.mark.parametrize("dtype", [np.float64, np.uint32, np.uint16])
def test_copy_patches_of_every_small_shape(bodies, dtype):
    for batch, channels, down, across, cell, patch, zorder in SHAPES:
        cells = np.random.default_rng(1).permutation(batch * down * across)
        for tensor in layouts((batch, channels, down * cell, across * cell), dtype):
            check(bodies, tensor, cells, cell, patch, zorder, 1)


@given(
    threads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    dtype=st.sampled_from([np.float64, np.uint32, np.uint16]),
    side=st.sampled_from([1, 2, 4, 8]),
    patch=st.sampled_from([1, 2, 3, 4, 5, 8]),
    grid=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)
def test_copy_patches_with_any_group(bodies, threads, dtype, side, patch, grid, data):
    batch, channels, down, across = grid
    number = batch * down * across
    cells = data.draw(st.lists(st.integers(0, number - 1), unique=True, max_size=number))
    shape = (batch, channels, down * side * patch, across * side * patch)
    for tensor in layouts(shape, dtype):
        check(bodies, tensor, np.array(cells, np.int64), side * patch, patch, data.draw(st.booleans()), *threads)


def test_accesses_are_as_wide_as_alignment_allows(bodies):
    """Accesses have 16 bytes if rows of patches, strides and both addresses are aligned, and never span two rows."""

    def pixels(shape, dtype, cell, patch, start=0, step=1):
        memory = np.zeros(2 * np.prod(shape) + 64, dtype)
        first = -memory.ctypes.data // memory.itemsize % (64 // memory.itemsize)  # 64-byte boundary
        tensor = memory[first + start :][: step * np.prod(shape)].reshape(*shape[:3], -1)[..., ::step]
        cells = np.arange(shape[0] * (shape[2] // cell) * (shape[3] // cell))
        packed = np.zeros(tensor.size + 64, dtype)
        packed = packed[-packed.ctypes.data // packed.itemsize % (64 // packed.itemsize) :][: tensor.size]
        there = bodies.pack_patches(tensor, cells, packed, cell, patch, False, 1)
        assert bodies.unpack_patches(packed, cells, np.zeros_like(cells), tensor, cell, patch, False, 1, 1) == there
        assert there[1] == 1
        return there[0]

    assert pixels((2, 1, 8, 8), np.uint16, 8, 4) == 4
    assert pixels((2, 1, 32, 32), np.uint16, 16, 16) == 8
    assert pixels((2, 3, 8, 8), np.float64, 8, 4) == 2
    assert pixels((2, 3, 6, 6), np.uint16, 6, 2) == 2
    assert pixels((2, 3, 28, 28), np.uint16, 14, 7) == 1
    assert pixels((2, 1, 32, 32), np.uint16, 16, 16, start=1) == 1
    assert pixels((2, 1, 32, 32), np.uint16, 16, 16, start=4) == 4
    assert pixels((2, 1, 32, 32), np.uint16, 16, 16, step=2) == 1


def test_channels_last_accesses_are_sixteen_bytes_too(bodies):
    """Accesses have three channels, or 16 bytes of channels, if a patch is at least 16 bytes wide."""

    def access(channels, dtype, patch, start=0):
        memory = np.zeros(2 * 8 * patch**2 * channels + 64, dtype)
        first = -memory.ctypes.data // memory.itemsize % (64 // memory.itemsize) + start
        tensor = memory[first:][: 8 * patch**2 * channels].reshape(2, 2 * patch, 2 * patch, channels)
        packed = np.zeros(tensor.size + 64, dtype)
        packed = packed[-packed.ctypes.data // packed.itemsize % (64 // packed.itemsize) :][: tensor.size]
        return bodies.pack_patches(tensor.transpose(0, 3, 1, 2), np.arange(8), packed, patch, patch, False, 1)

    assert access(3, np.uint32, 4) == access(3, np.uint32, 16) == (4, 3)
    assert access(3, np.uint16, 16) == access(3, np.uint16, 8) == (8, 3)
    assert access(8, np.uint32, 4) == (4, 4) and access(16, np.uint16, 8) == (8, 8)
    assert access(1, np.uint32, 4) == (4, 1)  # one channel is the same as contiguous
    assert access(3, np.uint16, 4) == access(3, np.uint32, 14) == access(5, np.uint32, 4) == (1, 1)
    assert access(3, np.uint32, 4, start=1) == access(4, np.uint32, 4, start=2) == (1, 1)


def test_z_order_is_the_merging_order():
    """At every level, four consecutive patches are a 2 × 2 group in the order of SPEC.md."""
    assert z_order(2) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert z_order(4)[:5] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]


def test_offsets_beyond_32_bits(bodies):
    """A batch of 2**22 images of 1 x 224 x 224 has offsets near 2**38."""
    across, image = 7, 2**22 - 1
    corner = bodies.patch_corner(image * 49 + 3 * across + 5, 13, 7, across, 224 * 224, 224, 32, 4, True)
    row, column = z_order(8)[13]
    assert corner == image * 224 * 224 + (3 * 32 + row * 4) * 224 + 5 * 32 + column * 4
    assert corner > 2**37
