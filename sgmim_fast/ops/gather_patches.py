"""`gather_patches`: gathers the patches of selected cells of an NCHW map into rows. SPEC "The exact shortcut"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op


class Arguments(NamedTuple):
    """The operator's arguments, see `gather_patches`."""

    pixels: Tensor
    rows: Tensor
    cell: int
    patch: int
    zorder: bool


class BackwardArguments(NamedTuple):
    """The arguments of the backward operator."""

    grad: Tensor
    rows: Tensor
    shape: list[int]  # shape of pixels
    cell: int
    patch: int
    zorder: bool


def gather_patches(pixels: Tensor, rows: Tensor, *, cell: int, patch: int, order: str = "raster") -> Tensor:
    """Gathers the patches of selected cells of a map, without unfolding the rest of it.

    The map is a grid of cells of `cell` x `cell` pixels. Each selected cell yields its (cell / patch)^2 patches, each
    flattened channel first, as the weight of a convolution.

    Plain PyTorch, raster order: `F.unfold` of the map in patches, then `index_select` of the cells' patches.

    Args:
        pixels: (B, C, H, W), any dtype and strides; H and W are multiples of `cell`.
        rows: (n,) int64, distinct indices into the B * (H / cell) * (W / cell) cells, row-major.
        cell: side of a cell in pixels.
        patch: side of a patch in pixels, a divisor of `cell`.
        order: order of the patches within a cell: "raster", or "z" (Z-order: column bit above row bit at each level,
            so that a patch merging concatenates four consecutive patches; cell / patch must be a power of two).

    Returns:
        (n * (cell / patch)^2, C * patch^2), dtype of `pixels`, contiguous. Differentiable in `pixels`.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    if order not in ("raster", "z"):
        raise ValueError(f"order is {order!r}; expected 'raster' or 'z'")
    return _op(pixels, rows, cell, patch, order == "z")


def _check_arguments(a: Arguments) -> None:
    pixels, rows, cell, patch, zorder = a
    if cell < 1 or patch < 1 or cell % patch:
        raise ValueError(f"patch is {patch} and cell {cell}; expected positive numbers, patch a divisor of cell")
    _check.cells("pixels", pixels, cell)
    _check.index("rows", rows)
    side = cell // patch
    if zorder and side & (side - 1):
        raise ValueError(f"order is 'z' with {side} patches along a cell; expected a power of two")


def patch_order(side: int, zorder: bool, device: torch.device | None = None) -> Tensor:
    """Returns the raster index of each patch of a cell of side x side patches, in order; (side^2,) int64."""
    if not zorder:
        return torch.arange(side * side, device=device)
    grid = torch.zeros(1, 1, dtype=torch.int64, device=device)
    length = 1
    while length < side:  # each level arranges four copies of the grid: (0,0), (1,0), (0,1), (1,1)
        n = length * length
        grid = torch.cat([torch.cat([grid, grid + 2 * n], 1), torch.cat([grid + n, grid + 3 * n], 1)], 0)
        length *= 2
    return grid.flatten().argsort()


def _packed_shape(pixels: Tensor, rows: Tensor, cell: int, patch: int) -> tuple[int, int]:
    return rows.shape[0] * (cell // patch) ** 2, pixels.shape[1] * patch * patch


def _forward(pixels: Tensor, rows: Tensor, cell: int, patch: int, zorder: bool) -> Tensor:
    batch, channels, height, width = pixels.shape
    side = cell // patch
    _check.rows("rows", rows, batch * (height // cell) * (width // cell), distinct=False)
    cells = pixels.reshape(batch, channels, height // cell, side, patch, width // cell, side, patch)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 2).flatten(1, 2).flatten(2)
    return cells[rows][:, patch_order(side, zorder, rows.device)].reshape(_packed_shape(pixels, rows, cell, patch))


def _backward(grad: Tensor, rows: Tensor, shape: list[int], cell: int, patch: int, zorder: bool) -> Tensor:
    batch, channels, height, width = shape
    side = cell // patch
    cells = grad.new_zeros(batch * (height // cell) * (width // cell), side * side, channels * patch * patch)
    _check.rows("rows", rows, cells.shape[0])
    raster = grad.reshape(rows.shape[0], side * side, channels * patch * patch)
    raster = raster[:, patch_order(side, zorder, rows.device).argsort()]
    cells[rows] = raster
    cells = cells.reshape(batch, height // cell, width // cell, side, side, channels, patch, patch)
    return cells.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(shape).contiguous()


_op = Op(
    "gather_patches",
    Arguments,
    _forward,
    fake=lambda a: a.pixels.new_empty(_packed_shape(a.pixels, a.rows, a.cell, a.patch)),
    check=_check_arguments,
)


def _save(ctx: Any, inputs: tuple, _: list[Tensor]) -> None:
    pixels, rows, *ctx.sizes = inputs
    ctx.shape = pixels.shape
    ctx.save_for_backward(rows)


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    (rows,) = ctx.saved_tensors
    return (_op.backward(grad, rows, ctx.shape, *ctx.sizes),)


_op.differentiable(
    BackwardArguments, _backward, fake=lambda a: a.grad.new_empty(a.shape), save=_save, gradients=_gradients
)

# For the backward of ops that gather: (grad, rows, shape, cell, patch, zorder) -> gradient of the map.
gather_patches_backward = _op.backward
