from __future__ import annotations

import pytest
import torch
from checks import layouts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast import backends
from sgmim_fast.ops.gather_patches import gather_patches

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def order_of(side: int, order: str) -> list[tuple[int, int]]:
    """Returns (row, column) of a cell's patches; Z-order as SPEC defines it, quarter by quarter."""
    if order == "raster" or side == 1:
        return [(row, column) for row in range(side) for column in range(side)]
    half, inside = side // 2, order_of(side // 2, "z")
    return [(r * half + y, c * half + x) for r, c in ((0, 0), (1, 0), (0, 1), (1, 1)) for y, x in inside]


def by_slices(pixels: Tensor, rows: Tensor, cell: int, patch: int, order: str) -> Tensor:
    """Returns the packed patches, gathered slice by slice."""
    down, across = pixels.shape[2] // cell, pixels.shape[3] // cell
    packed = [pixels.new_zeros(0, pixels.shape[1] * patch * patch)]
    for number in rows.tolist():
        image, y, x = number // (down * across), number // across % down, number % across
        for row, column in order_of(cell // patch, order):
            top, left = y * cell + row * patch, x * cell + column * patch
            packed.append(pixels[image, :, top : top + patch, left : left + patch].reshape(1, -1))
    return torch.cat(packed)


@st.composite
def gathers(draw):
    """Draws pixels, rows, cell, patch and order."""
    order = draw(st.sampled_from(["raster", "z"]))
    side = draw(st.sampled_from([1, 2, 4] if order == "z" else [1, 2, 3, 5]))
    patch = draw(st.integers(1, 5))
    cell = side * patch
    batch, channels, down, across = (draw(st.integers(1, 3)) for _ in range(4))
    pixels = torch.arange(batch * channels * down * cell * across * cell).view(batch, channels, down * cell, -1)
    cells = batch * down * across
    rows = draw(st.lists(st.integers(0, cells - 1), unique=True, max_size=cells))
    return pixels, torch.tensor(rows, dtype=torch.int64), cell, patch, order


@given(arguments=gathers(), dtype=st.sampled_from(DTYPES))
def test_values(place, arguments, dtype):
    pixels, rows, cell, patch, order = arguments
    pixels, rows = pixels.to(place.device, dtype), rows.to(place.device)
    for name, source in layouts(pixels).items():
        packed = gather_patches(source, rows, cell=cell, patch=patch, order=order)
        assert torch.equal(packed, by_slices(source, rows, cell, patch, order)), name
        assert packed.is_contiguous() and packed.dtype == dtype


@given(arguments=gathers(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_gradient(place, arguments, dtype):
    pixels, rows, cell, patch, order = arguments
    pixels, rows = pixels.to(place.device, dtype).requires_grad_(), rows.to(place.device)
    packed = gather_patches(pixels, rows, cell=cell, patch=patch, order=order)
    expected = by_slices(pixels, rows, cell, patch, order)
    for grad in (torch.randn_like(packed), torch.randn_like(packed.mT).mT, packed.new_ones(()).expand_as(packed)):
        (actual,) = torch.autograd.grad(packed, pixels, grad, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, pixels, grad, retain_graph=True) if len(rows) else (0 * actual,)
        assert torch.equal(actual, wanted) and actual.is_contiguous()


def test_all_cells_in_raster_order_are_an_unfold(device):
    pixels = torch.randn(2, 3, 12, 20, device=device)
    packed = gather_patches(pixels, torch.arange(30, device=device), cell=4, patch=4)
    assert torch.equal(packed, torch.nn.functional.unfold(pixels, 4, stride=4).mT.reshape(30, 48))


def test_four_patches_in_z_order_are_one_merged_patch(device):
    """This view makes patch merging free (SPEC, "The exact shortcut")."""
    pixels = torch.randn(1, 2, 16, 16, device=device)
    packed = gather_patches(pixels, torch.tensor([0], device=device), cell=16, patch=4, order="z").view(4, 4, 2, 4, 4)
    quarters = gather_patches(pixels, torch.tensor([0], device=device), cell=16, patch=8, order="z").view(4, 2, 8, 8)
    for quarter, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        whole = pixels[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert torch.equal(quarters[quarter], whole)
        for part, (y, x) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            assert torch.equal(packed[quarter, part], whole[:, y * 4 : y * 4 + 4, x * 4 : x * 4 + 4])


def test_autocast_changes_nothing(device):
    pixels, rows = torch.randn(1, 2, 4, 8, device=device), torch.tensor([1, 0], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        packed = gather_patches(pixels, rows, cell=4, patch=2)
    assert torch.equal(packed, by_slices(pixels, rows, 4, 2, "raster"))


def test_number_of_threads_does_not_matter(device, threads):
    pixels = torch.randn(3, 2, 32, 32, device=device, requires_grad=True)
    rows = torch.randperm(48, device=device)[:31]
    results = []
    for number in (1, 2):
        with threads(number):
            packed = gather_patches(pixels, rows, cell=8, patch=2, order="z")
            results.append([packed, *torch.autograd.grad(packed, pixels, packed.detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile(device):
    rows = torch.tensor([2, 1], device=device)

    def function(pixels):
        return gather_patches(pixels * 2, rows, cell=4, patch=2, order="z").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pixels = torch.randn(2, 3, 4, 8, device=device, requires_grad=True)
    results = [(out := f(pixels), *torch.autograd.grad(out, pixels)) for f in (function, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("row", [-9, 8])
def test_rows_out_of_range_raise(place, device, row):
    """CPU backends check indices. A GPU kernel could not without synchronising."""
    if place.backend in ("cuda", "triton"):
        pytest.skip("indices on a GPU are not read back")
    with pytest.raises((ValueError, RuntimeError), match=f"rows has {row}; expected indices from 0 to below 8"):
        gather_patches(torch.zeros(2, 1, 8, 8), torch.tensor([0, row]), cell=4, patch=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixels": torch.zeros(3, 8, 8)}, ValueError, r"pixels has shape \(3, 8, 8\)"),
        ({"pixels": torch.zeros(1, 1, 8, 6)}, ValueError, "pixels has 8x6 pixels; expected multiples"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, TypeError, "rows has dtype torch.int32"),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"rows has shape \(2, 1\)"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "rows is on meta; expected cpu"),
        ({"patch": 3}, ValueError, "patch is 3 and cell 4; expected"),
        ({"patch": 0}, ValueError, "patch is 0 and cell 4; expected"),
        ({"order": "hilbert"}, ValueError, "order is 'hilbert'"),
        ({"cell": 6, "patch": 2, "order": "z", "pixels": torch.zeros(1, 1, 6, 6)}, ValueError, "power of two"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "pixels": torch.zeros(1, 1, 8, 8),
        "rows": torch.zeros(1, dtype=torch.int64),
        "cell": 4,
        "patch": 2,
        "order": "raster",
        **change,
    }
    with pytest.raises(error, match=message):
        gather_patches(arguments.pop("pixels"), arguments.pop("rows"), **arguments)


def test_sixteen_bytes_run_on_the_plain_implementation():
    pixels = torch.randn(1, 2, 4, 8, dtype=torch.complex128)
    assert not backends.can_run("gather_patches", "cpu", pixels)[0]
    rows = torch.tensor([1])
    assert torch.equal(gather_patches(pixels, rows, cell=4, patch=2), by_slices(pixels, rows, 4, 2, "raster"))
