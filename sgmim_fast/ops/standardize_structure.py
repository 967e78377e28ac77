"""`standardize_structure`: standardisation with trimmed statistics. SPEC "Standardising the structure map"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.primitives import sum_dtype


class Arguments(NamedTuple):
    """The operator's arguments, see `standardize_structure`."""

    structure: Tensor
    ignore: bool


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint16)


def standardize_structure(structure: Tensor, *, nonfinite: str = "raise") -> Tensor:
    """Standardises each structure map to mean 0 and variance 1, measured on its values between the outer deciles.

    For every image and channel: y = (x - mean) / sqrt(var + 1e-6), with mean and unbiased variance of the sorted values
    from index int(0.1 n) up to, not including, int(0.9 n), as in MultiMAE. The CPU backend finds both ends by
    selection, without sorting. A constant map yields zeros, and so does one with fewer than two values in that range.

    Plain PyTorch, per map: `t = x.flatten().sort().values[int(0.1 * n) : int(0.9 * n)]`, then
    `(x - t.mean()) / (t.var() + 1e-6).sqrt()`.

    Args:
        structure: (B, S, H, W), not empty, any strides; float32, float64, bfloat16, float16, or uint16 as in 16-bit
            depth files, which is divided by 2^16.
        nonfinite: treatment of infinities and NaN. "raise": raises (on a GPU this synchronises once). "ignore": the
            statistics are those of the finite values, n being their number, and the others become 0; pass
            `structure_valid=structure.isfinite()` to the model to exclude them from the loss.

    Returns:
        (B, S, H, W), contiguous, float32 (float64 for float64). Statistics are computed in float64. Not differentiable.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    _check.data("structure", structure, "standardising")
    if nonfinite not in ("raise", "ignore"):
        raise ValueError(f"nonfinite is {nonfinite!r}; expected 'raise' or 'ignore'")
    return _op(structure, nonfinite == "ignore")


def _check_arguments(a: Arguments) -> None:
    structure = a.structure
    if structure.ndim != 4:
        raise ValueError(f"structure has shape {tuple(structure.shape)}; expected (B, S, H, W)")
    if structure.numel() == 0:
        raise ValueError(
            f"structure has shape {tuple(structure.shape)}; expected at least one image, channel and pixel"
        )
    if structure.dtype not in DTYPES:
        raise TypeError(f"structure has dtype {structure.dtype}; expected one of {', '.join(map(str, DTYPES))}")


def planes(structure: Tensor) -> Tensor:
    """Returns one row per image and channel, contiguous, float64 for float64, else float32."""
    rows = structure.reshape(structure.shape[0] * structure.shape[1], -1)
    if structure.dtype == torch.uint16:
        return rows.to(torch.float32) / 2**16
    return rows.to(sum_dtype(structure.dtype)).contiguous()


def raise_if_any(nonfinite: Tensor, channels: int) -> None:
    """Raises ValueError unless all counts of infinities and NaN, one per image and channel, are zero."""
    if nonfinite.any():
        counts = nonfinite.view(-1, channels).sum(1).tolist()
        found = ", ".join(f"{count} in image {image}" for image, count in enumerate(counts) if count)
        raise ValueError(f"structure has infinities or NaN: {found}; expected finite values, or nonfinite='ignore'")


def _forward(structure: Tensor, ignore: bool) -> Tensor:
    x = planes(structure)
    finite = x.isfinite()
    count = finite.sum(1, keepdim=True)
    if not ignore:
        raise_if_any(x.shape[1] - count, structure.shape[1])
    first, last = (0.1 * count.double()).long(), (0.9 * count.double()).long()
    kept = last - first
    ordered = x.where(finite, torch.inf).sort(1).values.double()
    position = torch.arange(x.shape[1], device=x.device)
    inside = (position >= first) & (position < last)
    # Relative to the first of the values in range, so that a constant map yields exact zeros.
    origin = ordered.gather(1, first.clamp(max=x.shape[1] - 1))
    origin = origin.where(kept > 0, 0)
    mean = (ordered - origin).where(inside, 0).sum(1, keepdim=True) / kept
    variance = (ordered - origin - mean).where(inside, 0).square().sum(1, keepdim=True) / (kept - 1)
    y = (x.double() - origin - mean) / (variance + 1e-6).sqrt()
    return y.where(finite & (kept > 1), 0).to(x.dtype).view(structure.shape)


_op = Op(
    "standardize_structure",
    Arguments,
    _forward,
    fake=lambda a: a.structure.new_empty(a.structure.shape, dtype=sum_dtype(a.structure.dtype)),
    check=_check_arguments,
)
_op.not_differentiable()
