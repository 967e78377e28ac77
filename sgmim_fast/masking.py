"""Draws selective masks (`selective_mask`) and resamples them to the grids of the model.

1 or True means masked, that is, not visible to the encoder. See docs/SPEC.md, "Selective masking".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops.selective_mask import selective_mask as draw
from sgmim_fast.rows import Rows
from sgmim_fast.salience import RATIO, SPREAD, THRESHOLD
from sgmim_fast.salience import draw as draw_salient

SHOWN = ("masked", "visible", "all")
MASKING = ("random", "salience")


class SelectiveMask(NamedTuple):
    """A mask with its row lists, which the model accepts in place of a mask tensor.

    Given a mask tensor, the model has to search it for the row lists, which on a GPU synchronises with the device.
    """

    mask: Tensor  # (B, h, w) bool, True = masked
    structure: Tensor  # (B, h, w) bool, True = shown: the structure branch may read the map; equal to `mask` by default
    visible: Rows  # rows of the visible cells
    masked: Rows  # rows of the masked cells
    shown: Rows  # rows of the cells where the structure is shown
    counts: tuple[int, ...] | None = None  # number of visible cells of each image, if it is known on the host

    def visible_counts(self) -> list[int]:
        """Returns the number of visible cells of each image. Synchronises on a GPU if `counts` is None."""
        return self.visible.offsets.diff().tolist() if self.counts is None else list(self.counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SelectiveMask:
        """Returns the mask with all its tensors on `device`, like `torch.Tensor.to`; itself if they are there."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        moved = self._map(move, lambda rows: Rows(*map(move, rows)), self.counts)
        return self if moved.mask is self.mask else moved

    def _map(
        self, of_mask: Callable[[Tensor], Tensor], of_rows: Callable[[Rows], Rows], counts: tuple[int, ...] | None
    ) -> SelectiveMask:
        """Returns the mask with functions applied to its tensors and row lists, to those that are shared only once."""
        mask, masked, visible = of_mask(self.mask), of_rows(self.masked), of_rows(self.visible)
        if self.shown.index is self.masked.index:
            return SelectiveMask(mask, mask, visible, masked, masked, counts)
        shown = visible if self.shown.index is self.visible.index else of_rows(self.shown)
        return SelectiveMask(mask, of_mask(self.structure), visible, masked, shown, counts)

    def on(self, grid: tuple[int, int]) -> SelectiveMask:
        """Returns the same mask on a grid (rows, columns) of cells.

        Row lists are computed from those of this mask, without a search and without synchronising.

        Raises:
            ValueError: `grid` is not a multiple of the mask's own grid.
        """
        own = tuple(self.mask.shape[1:])
        if own == tuple(grid):
            return self
        if not aligned(own, grid):
            raise ValueError(f"grid is {tuple(grid)}; expected multiples of the mask's own {own}")
        each = grid[0] // own[0] * (grid[1] // own[1])
        counts = None if self.counts is None else tuple(each * count for count in self.counts)
        return self._map(lambda mask: resize(mask, *grid), lambda rows: rows.on(own, grid), counts)

    def part(self, first: int, count: int) -> SelectiveMask:
        """Returns the masks of images `first` to `first + count - 1`, views of this one where possible.

        Does not synchronise. All images must have equal numbers of masked cells and of shown cells, so that their
        offsets are known on the host.

        Raises:
            ValueError: the range exceeds the batch.
            RuntimeError: images have different numbers of rows; on a GPU, a device-side assertion.
        """
        images, cells = self.mask.shape[0], self.mask.shape[1] * self.mask.shape[2]
        if first < 0 or count < 0 or first + count > images:
            raise ValueError(f"images {first} to {first + count} are out of range; expected some of {images}")
        if count == images:
            return self

        def rows(whole: Rows) -> Rows:
            each = whole.index.shape[0] // images
            same = (whole.offsets.diff() == each).all()
            torch._assert_async(same, "images have different numbers of rows; expected the same, to part them")
            index = whole.index[first * each : (first + count) * each] - first * cells
            return Rows(index, whole.offsets[: count + 1])

        own = slice(first, first + count)
        counts = None if self.counts is None else self.counts[own]
        return self._map(lambda mask: mask[own], rows, counts)


class DenseMask(NamedTuple):
    """A mask without row lists, because some cells are partly masked or because its values must not be read."""

    mask: Tensor  # (B, h, w) bool
    structure: Tensor  # (B, h, w) bool


def selective_mask(
    batch: int,
    grid: int | tuple[int, int],
    ratio: float | Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    *,
    shown: str | float = "masked",
    seed: Tensor | None = None,
    scale: int = 1,
    masking: str = "random",
    salience: Tensor | None = None,
    noise: Tensor | None = None,
    spread: float = SPREAD,
    threshold: float = THRESHOLD,
    adaptive: str = "image",
) -> SelectiveMask:
    """Draws masks: a uniformly random subset of ceil(ratio * units) units in each image.

    Does not synchronise with the device. Equivalent per image, up to the random numbers, to
    `mask.view(-1)[torch.randperm(units)[:count]] = True`. SPEC "Selective masking", paper section 3.

    masking="salience" masks the units with the highest scores, salience + U(0, 1) / 2, and adapts their number to each
    image: SBAM and AMR (arXiv 2404.08327), SPEC "Salience-based masking". Since these numbers depend on values, this
    synchronises once on a GPU, unless adaptive="none"::

        selective_mask(len(images), 6, masking="salience", salience=encoder.salience(images))

    `SGMIM.draw_mask` computes both.

    Args:
        batch: number of images, at least 1.
        grid: number of mask units (rows, columns), or one number for a square grid; 192 pixels in units of 32 have 6.
        ratio: share of masked units between 0 and 1, one for all images or one per image. None: 0.6 for "random", 0.75
            for "salience".
        generator: random generator on `device`; None: torch's default generator.
        device: device of the results; None: the device of `generator` or of `salience`, else the CPU.
        shown: where the structure branch may read its map. "masked": where the image is masked (the paper's selective
            masking). Ablations: "visible": where the image is visible; "all": everywhere; a number between 0 and 1: on
            an independent random subset, with this share of units *hidden*.
        seed: (2,) int64, instead of a generator, on the device where the masks are to be. The low 32 bits of both
            numbers determine the masks, identically on every device. A captured step can increment it on the device.
        scale: cells along a unit. The masks are drawn directly on the finer grid of cells. If units are larger than the
            encoder's stride, passing their ratio saves the model this conversion.
        masking: "random" or "salience".
        salience: (B, h, w) from 0 to 1 per patch, as `MaskedEncoder.salience` returns it, only for masking="salience";
            h and w are multiples of the grid. The salience of a unit is the mean over its patches.
        noise: for "salience", (B, rows * columns) from 0 to 1, replaces the random numbers of the scores.
        spread, threshold: for "salience". A patch whose salience exceeds `threshold` counts as salient; an image with a
            share y of salient patches has the ratio ratio + spread * (2 y - 1). The defaults 0.10 and 0.5, like the
            ratio 0.75, are those of a third-party port.
        adaptive: for "salience", "image": each image has its own ratio; "batch": all images have the mean of these
            ratios, as in the released code; "none": all images have `ratio`.

    Returns:
        SelectiveMask on the grid of cells.

    Raises:
        ValueError, TypeError: an argument is invalid; the message names it, its value and what is expected. NaN in
            `salience` raises too, on a GPU with adaptive="none" by a device-side assertion.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid is {grid!r}; expected at least one unit along each side")
    if scale < 1:
        raise ValueError(f"scale is {scale}; expected at least 1")
    if masking not in MASKING:
        raise ValueError(f"masking is {masking!r}; expected one of {', '.join(MASKING)}")
    if seed is not None and (generator is not None or device is not None):
        raise ValueError(
            "seed is given with a generator or a device; expected seed alone, whose device is that of the masks"
        )
    if masking == "salience":
        if salience is None:
            raise TypeError("salience is missing; expected (B, h, w) of patches, as encoder.salience(images) gives it")
        if seed is not None:
            raise ValueError("seed is given with masking='salience'; expected a generator, or noise")
        if device is not None and torch.device(device).type != salience.device.type:
            raise ValueError(f"salience is on {salience.device}; expected {device}, the device given")
        if len(salience) != batch:
            raise ValueError(f"salience has {len(salience)} images; expected {batch}, as batch says")
        device, units = salience.device, (rows, columns)
        options = {"spread": spread, "threshold": threshold, "adaptive": adaptive, "noise": noise}
        ratio = RATIO if ratio is None else ratio
        drawn = draw_salient(salience, units, scale, ratio=ratio, generator=generator, **options)
        return _with_shown(drawn, batch, units, scale, shown, generator, device, None)
    if salience is not None or noise is not None:
        raise ValueError(
            f"{'noise' if salience is None else 'salience'} is given with masking='random'; expected 'salience'"
        )
    ratio = 0.6 if ratio is None else ratio
    ratios = [float(ratio)] * batch if isinstance(ratio, Real) else [float(r) for r in ratio]
    if len(ratios) != batch:
        raise ValueError(f"ratio has {len(ratios)} entries; expected one number, or one per image of {batch}")
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")
    counts = _counts(ratios, rows * columns, "ratio")
    drawn = draw(_seed(seed, generator, device), counts, (rows, columns), scale)
    visible_counts = tuple(scale**2 * (rows * columns - count) for count in counts)
    return _with_shown(drawn, batch, (rows, columns), scale, shown, generator, device, seed, visible_counts)


def _seed(seed: Tensor | None, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    if seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=device, dtype=torch.int64)


def _with_shown(
    drawn: tuple[Tensor, Rows, Rows],
    batch: int,
    grid: tuple[int, int],
    scale: int,
    shown: str | float,
    generator: torch.Generator | None,
    device: torch.device | str,
    seed: Tensor | None,
    visible_counts: tuple[int, ...] | None = None,
) -> SelectiveMask:
    """Completes a drawn mask by the cells where the structure is shown. `visible_counts` are the mask's `counts`."""
    (mask, visible, masked), units = drawn, grid[0] * grid[1]
    if shown == "masked":
        return SelectiveMask(mask, mask, visible, masked, masked, visible_counts)
    if shown == "visible":
        return SelectiveMask(mask, ~mask, visible, masked, visible, visible_counts)
    if shown == "all":
        every, _, rows_shown = draw(_seed(seed, generator, device), [units] * batch, grid, scale)
        return SelectiveMask(mask, every, visible, masked, rows_shown, visible_counts)
    if isinstance(shown, str):
        raise ValueError(f"shown is {shown!r}; expected 'masked', 'visible', 'all' or a number between 0 and 1")
    counts = _counts([float(shown)] * batch, units, "shown")
    other = _seed(None, generator, device) if seed is None else seed ^ 0x80000000
    hidden, rows_shown, _ = draw(other, counts, grid, scale)
    return SelectiveMask(mask, ~hidden, visible, masked, rows_shown, visible_counts)


def _counts(ratios: list[float], units: int, name: str) -> list[int]:
    """Returns the number of masked units of each image."""
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"{name} is {ratios}; expected numbers between 0 and 1")
    return [math.ceil(ratio * units) for ratio in ratios]


def resize(mask: Tensor, height: int, width: int) -> Tensor:
    """Repeats the entries of a (B, h, w) mask to height x width, which must be multiples of h and w."""
    mask = mask.repeat_interleave(height // mask.shape[1], 1) if height != mask.shape[1] else mask
    return mask.repeat_interleave(width // mask.shape[2], 2) if width != mask.shape[2] else mask


def aligned(grid: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether each unit of `grid` consists of whole cells, at least one."""
    return len(cells) == 2 and all(c > 0 and c % units == 0 for units, c in zip(grid, cells, strict=True))


def without_lists(mask: Tensor | SelectiveMask) -> DenseMask:
    """Returns the mask without row lists. Does not read its values."""
    return DenseMask(mask.bool(), mask.bool()) if isinstance(mask, Tensor) else DenseMask(mask.mask, mask.structure)


@torch.compiler.disable
def search(mask: Tensor, down: int, across: int) -> SelectiveMask | DenseMask:
    """Computes the row lists of a mask tensor on down x across cells.

    The lengths of the lists depend on values, so this synchronises once on a GPU, and torch.compile breaks the graph.

    Args:
        mask: (B, h, w), bool or numbers; h and w are multiples of `down` and `across`.

    Returns:
        A `SelectiveMask`, or a `DenseMask` if a cell is partly masked.

    Raises:
        ValueError: the mask has values other than 0 and 1.
    """
    batch = mask.shape[0]
    masked = mask.to(torch.bool)
    blocks = masked.view(batch, down, mask.shape[1] // down, across, mask.shape[2] // across)
    cells, whole = blocks.any(4).any(2), blocks.all(4).all(2)
    counts = cells.flatten(1).sum(1)
    binary = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        binary = (mask == masked).all()
    *per_image, is_binary, is_aligned = torch.cat([counts, binary[None], (cells == whole).all()[None]]).tolist()
    if not is_binary:
        raise ValueError("mask has values other than 0 and 1; expected 1 where the image is masked and 0 elsewhere")
    if not is_aligned:
        return DenseMask(masked, masked)
    offsets = torch.zeros(2, batch + 1, dtype=torch.int64, device=mask.device)
    offsets[0, 1:] = counts.cumsum(0)
    offsets[1, 1:] = (down * across - counts).cumsum(0)
    total = int(sum(per_image))
    flat = cells.flatten()
    rows_masked = Rows(torch.nonzero_static(flat, size=total).squeeze(1), offsets[0])
    rows_visible = Rows(torch.nonzero_static(~flat, size=flat.numel() - total).squeeze(1), offsets[1])
    visible_counts = tuple(down * across - int(count) for count in per_image)
    return SelectiveMask(cells, cells, rows_visible, rows_masked, rows_masked, visible_counts)


def cells_of(mask: SelectiveMask, down: int, across: int) -> SelectiveMask:
    warnings.warn("cells_of(mask, down, across) is now mask.on((down, across))", DeprecationWarning, stacklevel=2)
    return mask.on((down, across))
