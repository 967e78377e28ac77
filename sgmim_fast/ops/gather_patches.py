"""`gather_patches`: the wanted cells of an NCHW map as packed patch rows. SPEC "The exact shortcut"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op


class Arguments(NamedTuple):
    """Of the op, as of `gather_patches`."""

    pixels: Tensor
    rows: Tensor
    cell: int
    patch: int
    zorder: bool


class BackwardArguments(NamedTuple):
    """Of its backward."""

    grad: Tensor
    rows: Tensor
    shape: list[int]  # of the pixels
    cell: int
    patch: int
    zorder: bool


def gather_patches(pixels: Tensor, rows: Tensor, *, cell: int, patch: int, order: str = "raster") -> Tensor:
    """Reads the patches of the wanted cells straight out of a map, without unfolding the rest of it.

    The map is a grid of cells of `cell` x `cell` pixels; each wanted cell gives its (cell / patch)^2 patches, each
    patch flattened channel first, as a convolution's weight is.

    Plain PyTorch, raster order: `F.unfold` of the map in patches, then `index_select` of the wanted cells' patches.

    Args:
        pixels: (B, C, H, W), any dtype and any strides; H and W multiples of `cell`.
        rows: (n,) int64, distinct indices into the B * (H / cell) * (W / cell) cells, row-major.
        cell: side of a cell in pixels.
        patch: side of a patch in pixels; divides `cell`.
        order: of the patches inside a cell. "raster", or "z" (Z-order: column bit above row bit at each level, so that
            four consecutive patches are what a patch merging concatenates; needs cell / patch a power of two).

    Returns:
        (n * (cell / patch)^2, C * patch^2), dtype of `pixels`, contiguous. Differentiable in `pixels`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
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
    """Raster index of the t-th patch of a cell of side x side patches; (side^2,) int64."""
    if not zorder:
        return torch.arange(side * side, device=device)
    grid = torch.zeros(1, 1, dtype=torch.int64, device=device)
    length = 1
    while length < side:  # each level puts four copies of the grid side by side: (0,0), (1,0), (0,1), (1,1)
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

# For the backward of ops that gather: (grad, rows, shape, cell, patch, zorder) -> the map's gradient.
gather_patches_backward = _op.backward
