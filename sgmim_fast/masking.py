"""Masks: drawing them (`selective_mask`), and what the model makes of one. SPEC "Selective masking".

Everywhere 1 / True means masked: hidden from the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops.selective_mask import selective_mask as draw
from sgmim_fast.rows import Rows

SHOWN = ("masked", "visible", "all")


class SelectiveMask(NamedTuple):
    """A drawn mask with its row lists. Pass it to the model in place of a mask tensor.

    The row lists save the model the search for them, which on a GPU would have to wait for the device.
    """

    mask: Tensor  # (B, h, w) bool, True = masked (hidden from the encoder)
    structure: Tensor  # (B, h, w) bool, True = the structure branch may read the map here; as `mask` by default
    visible: Rows  # cells that are not masked
    masked: Rows  # cells that are masked
    shown: Rows  # cells where the structure is shown


def selective_mask(
    batch: int,
    grid: int | tuple[int, int],
    ratio: float | Sequence[float] = 0.6,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    *,
    shown: str | float = "masked",
    seed: Tensor | None = None,
) -> SelectiveMask:
    """Draws the masks of a batch: in each image ceil(ratio * units) units, a uniformly random subset.

    Exact counts, reproducible from `generator`, and nothing waits for the device. Plain PyTorch, per image:
    `mask.view(-1)[torch.randperm(units)[:count]] = True`. SPEC "Selective masking", paper section 3.

    Args:
        batch: number of images, at least 1.
        grid: mask units (rows, columns), or one number for a square; an image of 192 pixels and units of 32 has 6.
        ratio: share of masked units between 0 and 1; one for all or one per image.
        generator: of `device`; None: torch's default generator.
        device: where the results live; None: the generator's device, else the CPU.
        shown: where the structure branch may read its map. "masked": where the image is masked (the paper's selective
            masking). Ablations: "visible": the same places as the image; "all": everywhere; a number between 0 and 1:
            an independent random subset with this share *hidden*.
        seed: (2,) int64 on the device where the results live, in place of a generator: the low 32 bits of both numbers
            say which masks are drawn, the same on every device. A captured step counts it up there.

    Returns:
        SelectiveMask on the unit grid; the model brings it to its own resolutions.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid is {grid!r}; expected at least one unit along each side")
    ratios = [float(ratio)] * batch if isinstance(ratio, (int, float)) else [float(r) for r in ratio]
    if len(ratios) != batch:
        raise ValueError(f"ratio has {len(ratios)} entries; expected one number, or one per image of {batch}")
    if seed is not None and (generator is not None or device is not None):
        raise ValueError("seed comes with a generator or a device; expected it alone: the masks live where it does")
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")

    def new_seed() -> Tensor:
        if seed is not None:
            return seed
        return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=device, dtype=torch.int64)

    def other_seed() -> Tensor:
        return new_seed() if seed is None else seed ^ 0x80000000

    mask, visible, masked = _draw(ratios, (rows, columns), new_seed, "ratio")
    if shown == "masked":
        return SelectiveMask(mask, mask, visible, masked, masked)
    if shown == "visible":
        return SelectiveMask(mask, ~mask, visible, masked, visible)
    if shown == "all":
        every, _, rows_shown = _draw([1.0] * batch, (rows, columns), new_seed, "shown")
        return SelectiveMask(mask, every, visible, masked, rows_shown)
    if isinstance(shown, str):
        raise ValueError(f"shown is {shown!r}; expected 'masked', 'visible', 'all' or a number between 0 and 1")
    hidden, rows_shown, _ = _draw([float(shown)] * batch, (rows, columns), other_seed, "shown")
    return SelectiveMask(mask, ~hidden, visible, masked, rows_shown)


def _draw(
    ratios: list[float], grid: tuple[int, int], seed: Callable[[], Tensor], name: str
) -> tuple[Tensor, Rows, Rows]:
    units = grid[0] * grid[1]
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{name} is {ratios}; expected numbers between 0 and 1")
    counts = [math.ceil(ratio * units) for ratio in ratios]
    return draw(seed(), counts, grid)


def resize(mask: Tensor, height: int, width: int) -> Tensor:
    """A (B, h, w) mask on a finer grid of height x width, each entry repeated; both sides must be multiples."""
    mask = mask.repeat_interleave(height // mask.shape[1], 1) if height != mask.shape[1] else mask
    return mask.repeat_interleave(width // mask.shape[2], 2) if width != mask.shape[2] else mask


class Cells(NamedTuple):
    """Row lists on the grid of encoder cells."""

    visible: Rows
    masked: Rows
    shown: Rows


def cells_of(mask: SelectiveMask, down: int, across: int) -> Cells:
    """The row lists of a drawn mask on the encoder's grid of down x across cells, a multiple of the mask's own.

    The counts are known from the mask's own lists, so nothing waits for the device.
    """
    if mask.mask.shape[1:] == (down, across):
        return Cells(mask.visible, mask.masked, mask.shown)
    fine = down * across // (mask.mask.shape[1] * mask.mask.shape[2])

    def rows(coarse: Tensor, old: Rows) -> Rows:
        flat = resize(coarse, down, across).flatten()
        index = torch.nonzero_static(flat, size=old.index.shape[0] * fine).squeeze(1)
        return Rows(index, old.offsets * fine)

    masked = rows(mask.mask, mask.masked)
    shown = masked if mask.shown is mask.masked else rows(mask.structure, mask.shown)
    return Cells(rows(~mask.mask, mask.visible), masked, shown)


@torch.compiler.disable
def search_cells(mask: Tensor, down: int, across: int) -> Cells | None:
    """The row lists of a mask tensor on down x across cells, or None where a cell is masked only in part.

    Args:
        mask: (B, h, w), bool or numbers, at least as fine as the cells.

    Raises:
        ValueError: values other than 0 and 1.

    The counts depend on the values, so on a GPU this waits for the device once, and torch.compile breaks the graph.
    """
    batch = mask.shape[0]
    masked = mask.to(torch.bool)
    blocks = masked.view(batch, down, mask.shape[1] // down, across, mask.shape[2] // across)
    cells, whole = blocks.any(4).any(2), blocks.all(4).all(2)
    counts = cells.flatten(1).sum(1)
    binary = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        binary = (mask == masked).all()
    *per_image, is_binary, aligned = torch.cat([counts, binary[None], (cells == whole).all()[None]]).tolist()
    if not is_binary:
        raise ValueError("mask has values other than 0 and 1; expected 1 where the image is masked and 0 elsewhere")
    if not aligned:
        return None
    offsets = torch.zeros(2, batch + 1, dtype=torch.int64, device=mask.device)
    offsets[0, 1:] = counts.cumsum(0)
    offsets[1, 1:] = (down * across - counts).cumsum(0)
    total = int(sum(per_image))
    flat = cells.flatten()
    rows_masked = Rows(torch.nonzero_static(flat, size=total).squeeze(1), offsets[0])
    rows_visible = Rows(torch.nonzero_static(~flat, size=flat.numel() - total).squeeze(1), offsets[1])
    return Cells(rows_visible, rows_masked, rows_masked)
