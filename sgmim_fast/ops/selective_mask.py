"""`selective_mask`: draws the masks of a batch and their row lists. SPEC "Selective masking"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.rows import Rows

_WORD = 0xFFFFFFFF


class Arguments(NamedTuple):
    """The operator's arguments, see `selective_mask`."""

    seed: Tensor
    masked: list[int]
    gh: int
    gw: int
    scale: int


def selective_mask(
    seed: Tensor, masked: Sequence[int], grid: tuple[int, int], scale: int = 1
) -> tuple[Tensor, Rows, Rows]:
    """Masks a uniformly random subset of exactly `masked[b]` units in image b; lists the visible and the masked rows.

    Each unit gets a 32-bit key from the counter-based generator Philox 4x32-10 (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011), and the units with the smallest keys are masked. A key depends on (seed, image,
    unit) only, so the result is the same on every device and backend. The call does not synchronise.

    Plain PyTorch, per image: `mask.view(-1)[torch.randperm(units)[:count]] = True`.

    Args:
        seed: (2,) int64, on the device of the results. The low 32 bits of both numbers are the generator's key.
        masked: number of masked units of each image, each between 0 and the number of units; its length is the batch.
        grid: number of mask units (rows, columns).
        scale: cells along a unit; the mask and the row lists are on the grid of cells.

    Returns:
        mask (B, rows * scale, columns * scale) bool, True = masked (hidden from the encoder), then the visible and the
        masked `Rows`: ascending indices image * cells + cell, cells counted row-major.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    rows, columns = grid
    mask, visible, visible_offsets, masked_rows, masked_offsets = _op(seed, list(masked), rows, columns, scale)
    return mask, Rows(visible, visible_offsets), Rows(masked_rows, masked_offsets)


def _check_arguments(a: Arguments) -> None:
    seed, masked, gh, gw, scale = a
    _check.shape("seed", seed, (2,), "two numbers")
    _check.index("seed", seed)
    if gh < 1 or gw < 1:
        raise ValueError(f"grid is {(gh, gw)}; expected at least one unit along each side")
    if gh * gw >= 2**31:
        raise ValueError(f"grid is {(gh, gw)}; expected less than 2^31 units")
    if scale < 1:
        raise ValueError(f"scale is {scale}; expected at least 1")
    if len(masked) == 0:
        raise ValueError("masked is empty; expected one number of masked units per image")
    for image, count in enumerate(masked):
        if not 0 <= count <= gh * gw:
            raise ValueError(f"masked is {count} for image {image}; expected 0 to {gh * gw} units")


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four 32-bit counter words and two key words to four random words; int64 tensors, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, which keeps the 64 bits of the unsigned product
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD, (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def sizes(masked: Sequence[int], gh: int, gw: int, scale: int) -> tuple[tuple[int, int, int], int, int]:
    """Returns the shape of the mask, the number of visible rows, and that of masked rows."""
    masked_rows, cells = sum(masked) * scale * scale, gh * scale * gw * scale
    return (len(masked), gh * scale, gw * scale), len(masked) * cells - masked_rows, masked_rows


def counts(values: Sequence[int], device: torch.device) -> Tensor:
    """Returns the numbers as a tensor, without synchronising."""
    if len(set(values)) == 1:
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def offsets(count: Tensor, scale: int) -> Tensor:
    """Returns the first row of each image, and the end. count: units per image."""
    starts = torch.zeros(count.shape[0] + 1, dtype=torch.int64, device=count.device)
    starts[1:] = (count * scale * scale).cumsum(0)
    return starts


def first_of(
    order: Tensor, masked: Sequence[int], gh: int, gw: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the op's results with the first `masked[b]` units of image b masked, in the order (B, units)."""
    batch, units, device = len(masked), gh * gw, order.device
    (_, height, width), visible, masked_rows = sizes(masked, gh, gw, scale)
    count = counts(masked, device)
    drawn = torch.zeros(batch, units, dtype=torch.bool, device=device)
    drawn.scatter_(1, order, torch.arange(units, device=device) < count[:, None])
    mask = drawn.view(batch, gh, 1, gw, 1).expand(batch, gh, scale, gw, scale).reshape(batch, height, width)

    def rows(chosen: Tensor, total: int, count: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nonzero_static(chosen.flatten(), size=total).view(-1), offsets(count, scale)

    return mask, *rows(~mask, visible, units - count), *rows(mask, masked_rows, count)


def _forward(
    seed: Tensor, masked: Sequence[int], gh: int, gw: int, scale: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, units, device = len(masked), gh * gw, seed.device
    fours = torch.arange((units + 3) // 4, device=device)
    images = torch.arange(batch, device=device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.stack(torch.broadcast_tensors(*philox((fours, images, zero, zero), (seed & _WORD).unbind())), -1)
    keys = keys.view(batch, -1)[:, :units] << 31 | torch.arange(units, device=device)  # distinct: the unit breaks ties
    return first_of(keys.argsort(1), masked, gh, gw, scale)


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    (shape, visible, masked_rows), starts, seed = sizes(*a[1:]), len(a.masked) + 1, a.seed
    return (
        seed.new_empty(shape, dtype=torch.bool),
        seed.new_empty(visible),
        seed.new_empty(starts),
        seed.new_empty(masked_rows),
        seed.new_empty(starts),
    )


_op = Op(
    "selective_mask",
    Arguments,
    _forward,
    fake=_fake,
    check=_check_arguments,
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_op.not_differentiable()
