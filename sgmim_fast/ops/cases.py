"""Arguments of every op at any size: the table from which tests, benchmarks and `kernels.compile` take their calls.

There is one function per op, with the op's name. Its parameters are sizes, which optional arguments are present, and
how tensors are made; it returns the op's `Arguments`, with groups of tensors as the flat lists that the op takes.
Weights are scaled to keep the magnitude of their inputs, so that no result is ill-conditioned.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops._op import Op
from sgmim_fast.ops.gather_patches import Arguments as GatherPatches
from sgmim_fast.ops.linear_l1 import Arguments as LinearL1
from sgmim_fast.ops.masked_patch_embed import Arguments as MaskedPatchEmbed
from sgmim_fast.ops.norm_attention import Arguments as NormAttention
from sgmim_fast.ops.norm_linear import Arguments as NormLinear
from sgmim_fast.ops.norm_mlp import Arguments as NormMlp
from sgmim_fast.ops.position_bias import Arguments as PositionBias
from sgmim_fast.ops.relational_guidance import Arguments as RelationalGuidance
from sgmim_fast.ops.relational_guidance import GuidanceParameters, RowLists
from sgmim_fast.ops.selective_mask import Arguments as SelectiveMask
from sgmim_fast.ops.standardize_structure import Arguments as StandardizeStructure
from sgmim_fast.ops.structure_embed import Arguments as StructureEmbed
from sgmim_fast.ops.structure_embed import StructureParameters
from sgmim_fast.ops.token_salience import Arguments as TokenSalience
from sgmim_fast.ops.window_attention import Arguments as WindowAttention
from sgmim_fast.rows import Rows


class Make(NamedTuple):
    """How tensors are made. `numbers`: torch.randn, or torch.zeros if values do not matter."""

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    numbers: Callable[..., Tensor] = torch.randn

    def __call__(self, *shape: int) -> Tensor:
        return self.numbers(shape, dtype=self.dtype, device=self.device)

    def weight(self, *shape: int) -> Tensor:
        """Returns a weight (out, ...), scaled so that a gemm keeps the magnitude of its input."""
        return self(*shape) / math.sqrt(math.prod(shape[1:]))

    def bias(self, width: int) -> Tensor:
        return 0.1 * self(width)

    def norm_weight(self, width: int) -> Tensor:
        return 1 + 0.1 * self(width)

    def norm(self, width: int, there: bool = True) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Returns weight and bias of a LayerNorm, or two None unless `there`."""
        return (self.norm_weight(width), self.bias(width)) if there else (None, None)

    def rows(self, wanted: Tensor) -> Rows:
        """Returns the row list of the True entries of (images, cells)."""
        offsets = torch.zeros(wanted.shape[0] + 1, dtype=torch.int64)
        offsets[1:] = wanted.sum(1).cumsum(0)
        return Rows(wanted.flatten().nonzero().squeeze(1).to(self.device), offsets.to(self.device))


FLOAT32, FLOAT64 = Make(), Make(torch.float64)


def chosen(counts: Sequence[int], cells: int) -> Tensor:
    """Returns (images, cells) bool, in each image with exactly `counts` random entries True."""
    order = torch.rand(len(counts), cells).argsort(1)
    return order < torch.tensor(counts).view(-1, 1)


def registered(op: str) -> Op:
    return importlib.import_module(f"sgmim_fast.ops.{op}")._op


def call(op: str, arguments: Sequence[Any]) -> Any:
    """Calls an op and returns its result, a tuple if it has several."""
    results = registered(op)(*arguments)
    return results[0] if isinstance(results, tuple) and isinstance(results[1], list) else results


def leaves(op: str, arguments: Any, *without: str) -> list[Tensor]:
    """Returns the floating-point tensors except those named in `without`, after requires_grad_()."""
    found = registered(op).declared.tensors(arguments)
    return [t.requires_grad_() for name, t in found if t.is_floating_point() and name not in without]


def gather_patches(
    counts: Sequence[int] = (2, 1), grid: tuple[int, int] = (2, 3), channels: int = 3, cell: int = 4, patch: int = 2,
    *, zorder: bool = True, rows: Tensor | None = None, make: Make = FLOAT32,
) -> GatherPatches:  # fmt: skip
    """counts: selected cells of each image, at random unless `rows` are given."""
    pixels = make(len(counts), channels, grid[0] * cell, grid[1] * cell)
    rows = make.rows(chosen(counts, math.prod(grid))).index if rows is None else rows
    return GatherPatches(pixels, rows, cell, patch, zorder)


def linear_l1(
    counts: Sequence[int] = (2, 4), grid: tuple[int, int] = (2, 3), channels: int = 1, cell: int = 4, width: int = 16,
    *, packed: bool = True, valid: bool = False, scale: float = 1.0, squared: bool = False, normalized: bool = False,
    decided: bool = False, rows: Tensor | None = None, make: Make = FLOAT32,
) -> LinearL1:  # fmt: skip
    """counts: selected cells of each image, at random unless `rows` are given; decided: whether to keep the differences
    away from 0, so that no sign depends on rounding."""
    rows = make.rows(chosen(counts, math.prod(grid))).index if rows is None else rows
    x = make(sum(counts) if packed else len(counts) * math.prod(grid), width)
    weight, bias = make.weight(channels * cell**2, width) / 2, make.bias(channels * cell**2)
    target = make(len(counts), channels, grid[0] * cell, grid[1] * cell)
    if decided:
        target = away_from_zero(target)
    if decided and normalized:  # the target's deviation is 1: make predictions larger instead
        weight, bias = weight / 100, away_from_zero(bias)
    known = torch.rand(target.shape).lt(0.7).to(target.device) if valid else None
    return LinearL1(x, weight, bias, target, known, rows, cell, packed, scale, squared, normalized, None)


def away_from_zero(x: Tensor) -> Tensor:
    """Moves values away from 0 by 4, more than an untrained head predicts, so that no L1 sign depends on rounding."""
    return x + torch.where(x < 0, -4, 4)


def masked_patch_embed(
    batch: int = 3, grid: tuple[int, int] = (5, 3), channels: int = 3, patch: int = 4, width: int = 21,
    *, share: float = 0.4, bias: bool = True, norm: bool = True, visible: Tensor | None = None, make: Make = FLOAT32,
) -> MaskedPatchEmbed:  # fmt: skip
    """share: fraction of patches that are visible, at random unless `visible` is given."""
    patches = batch * math.prod(grid)
    if visible is None:
        visible = torch.randperm(patches)[: round(share * patches)].sort().values.to(make.device)
    x, weight = make(batch, channels, grid[0] * patch, grid[1] * patch), make.weight(width, channels, patch, patch)
    vectors = make(width) if bias else None, make(width), visible, *make.norm(width, norm)
    return MaskedPatchEmbed(x, weight, *vectors, 1e-5, None)


def norm_attention(
    shape: Sequence[int] = (2, 4, 6), width: int = 16, heads: int = 2,
    window: tuple[int, int] = (2, 3), shift: tuple[int, int] = (1, 1),
    *, biases: bool = True, norm: bool = True, layer_scale: bool = False, bias: str | None = "table",
    hottest: float | None = None, residual: bool = False, post_norm: bool = False, make: Make = FLOAT32,
) -> NormAttention:  # fmt: skip
    """bias, hottest: see `window_attention`, or bias = "position"; biases: whether both layers have one."""
    x = make(*shape, width) + 0.5
    layers = [t for out in (3 * width, width) for t in (make.weight(out, width), make.bias(out) if biases else None)]
    scale = make.norm_weight(width) if layer_scale else None
    table, index = _biases("table" if bias == "position" else bias, window, heads, make)
    position, logit_scale = (None,) * 4, _logit_scale(hottest, heads, make)
    if bias == "position":
        table, position = None, position_bias(window, heads, make=make)[:4]
    windows = table, index, logit_scale, *position, heads, list(window), list(shift)
    return NormAttention(x, *layers, *make.norm(width, norm), scale, *windows, residual, post_norm, 1e-6, None)


def norm_linear(
    rows: Sequence[int] = (2, 5), width: int = 24, out: int = 40,
    *, bias: bool = True, norm: bool = True, layer_scale: bool = False, residual: bool = False, make: Make = FLOAT32,
) -> NormLinear:  # fmt: skip
    x, weight = make(*rows, width) + 0.5, make.weight(out, width)
    vectors = make.bias(out) if bias else None, *make.norm(width, norm), make.norm_weight(out) if layer_scale else None
    return NormLinear(x, weight, *vectors, make(*rows, out) if residual else None, 1e-6, None)


def norm_mlp(
    rows: Sequence[int] = (2, 5), width: int = 24, hidden: int = 40, out: int | None = None,
    *, norm: bool = True, layer_scale: bool = False, residual: bool = False, post_norm: bool = False,
    make: Make = FLOAT32,
) -> NormMlp:  # fmt: skip
    """out: None for the width of x."""
    out = width if out is None else out
    layers = make.weight(hidden, width), make.bias(hidden), make.weight(out, hidden), make.bias(out)
    vectors = *make.norm(width, norm), make.norm_weight(width) if layer_scale else None
    return NormMlp(make(*rows, width) + 0.5, *layers, *vectors, residual, post_norm, 1e-6, None)


def position_bias(
    window: tuple[int, int] = (2, 3), heads: int = 2, hidden: int = 24, *, scale: float = 16.0, make: Make = FLOAT32
) -> PositionBias:
    coordinates = make(1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
    return PositionBias(coordinates, make.weight(hidden, 2), make.bias(hidden), make.weight(heads, hidden), scale)


def relational_guidance(
    visible: Sequence[int] = (2, 5), shown: Sequence[int] | None = None, cells: int = 6, width: int = 16,
    heads: int = 8, hidden: int = 24,
    *, keep: bool = True, packed: bool = False, rows: tuple[Rows, Rows] | None = None, make: Make = FLOAT32,
) -> RelationalGuidance:  # fmt: skip
    """visible, shown: cells of each image, at random unless `rows` are given; shown=None: all that are not visible."""
    if rows is None:
        seen = chosen(visible, cells)
        rows = make.rows(seen), make.rows(~seen if shown is None else chosen(shown, cells))
    features = make(rows[0].index.shape[0] if packed else len(visible) * cells, width)
    structure, norm = make(rows[1].index.shape[0] + 1, width), make.norm(width)
    parameters = GuidanceParameters(
        *norm, *(t + 0.1 for t in norm), *(make.weight(width, width) for _ in range(4)), make.bias(width),
        *(t - 0.1 for t in norm), make.weight(hidden, width), make.bias(hidden), make.weight(width, hidden),
        make.bias(width),
    )  # fmt: skip
    lists = RowLists(*rows[0], *rows[1])
    return RelationalGuidance(features, structure, parameters, lists, cells, heads, keep, packed, 1e-5, None)


def selective_mask(
    masked: Sequence[int] = (2, 3), grid: tuple[int, int] = (2, 3), scale: int = 2, *, make: Make = FLOAT32
) -> SelectiveMask:
    return SelectiveMask(torch.tensor([3, 4], device=make.device), list(masked), *grid, scale)


def standardize_structure(
    shape: Sequence[int] = (2, 1, 4, 5), *, ignore: bool = False, make: Make = FLOAT32
) -> StandardizeStructure:
    return StandardizeStructure(make(*shape), ignore)


def structure_embed(
    shown: Sequence[int] = (3, 1, 6), grid: tuple[int, int] = (2, 3), channels: int = 1, patch: int = 4,
    mergings: int = 2, width: int = 6, *, rows: Tensor | None = None, make: Make = FLOAT32,
) -> StructureEmbed:  # fmt: skip
    """shown: cells of each image, at random unless `rows` are given; width: of an embedded patch, doubled by a merging.
    The cell is `patch << mergings` pixels wide."""
    cell, widths = patch << mergings, [width << i for i in range(mergings)]
    parameters = StructureParameters(
        *(make.weight(width, channels, patch, patch), make.bias(width), *make.norm(width)),
        *([make.norm_weight(4 * d) for d in widths], [make.bias(4 * d) for d in widths]),
        [make.weight(2 * d, 4 * d) for d in widths],
    )
    rows = make.rows(chosen(shown, math.prod(grid))).index if rows is None else rows
    structure = make(len(shown), channels, grid[0] * cell, grid[1] * cell)
    return StructureEmbed(structure, rows, parameters.flat(), cell, 1e-5, None)


def token_salience(shape: Sequence[int] = (2, 5, 3), *, length: float = 1.0, make: Make = FLOAT32) -> TokenSalience:
    """length: approximate norm of a token; the longer, the more of its attention it pays to itself."""
    return TokenSalience(make(*shape) * (length / math.sqrt(shape[-1])))


def window_attention(
    shape: Sequence[int] = (2, 6, 6), heads: int = 2, width: int = 8,
    window: tuple[int, int] = (3, 3), shift: tuple[int, int] = (1, 1),
    *, bias: str | None = "table", hottest: float | None = None, pad: bool = True, make: Make = FLOAT32,
) -> WindowAttention:  # fmt: skip
    """width: of a head; bias: "table", "dense" or None; hottest: the largest logit scale, None: no cosine attention."""
    windows = _biases(bias, window, heads, make)
    options = _logit_scale(hottest, heads, make), make(3 * heads * width) if pad else None
    qkv = make(*shape, 3 * heads * width)
    return WindowAttention(qkv, *windows, *options, heads, list(window), list(shift))


def _biases(kind: str | None, window: tuple[int, int], heads: int, make: Make) -> tuple[Tensor | None, Tensor | None]:
    """Returns a relative position bias and its index."""
    n, entries = math.prod(window), (2 * window[0] - 1) * (2 * window[1] - 1)
    if kind == "table":
        return make(entries, heads), torch.randint(entries, (n, n)).to(make.device)
    return make(heads, n, n) if kind == "dense" else None, None


def _logit_scale(hottest: float | None, heads: int, make: Make) -> Tensor | None:
    """Returns logit scales from 1 to `hottest`; those above 4.6 are clamped by the op."""
    return None if hottest is None else torch.linspace(hottest, 1.0, heads).to(make.device, make.dtype)
