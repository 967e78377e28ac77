"""Relative log amplitudes of feature maps: how much of them varies quickly from place to place.

Park and Kim, "How Do Vision Transformers Work?" (ICLR 2022, arXiv 2202.06709), Figures 2a and 8: maps go through a
two-dimensional Fourier transform, the logarithms of the amplitudes are averaged over channels and images, and of them
the half-diagonal is looked at, from no variation at all (frequency 0) to a change of sign from each cell to the next
in both directions (frequency π), each less the value at frequency 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-6  # added to amplitudes, as there, so that the logarithm of none is finite


class Spectrum(NamedTuple):
    """Points along the half-diagonal, float64 on the CPU."""

    frequency: Tensor  # (F,), in units of π, ascending from 0; the last is 1 on a grid of even length
    value: Tensor  # (F,), log amplitude less the one at frequency 0, natural logarithm


def relative_log_amplitude(maps: Tensor) -> Spectrum:
    """The mean over images and channels of the log amplitudes along the half-diagonal, less that at frequency 0.

    The published notebook leaves the last point of a grid of even length out and writes π at the one before it, which
    lies at (1 - 2 / h) π. Here every point is there, at its own frequency. The first and the last have real amplitudes,
    the others complex ones: white noise has 0 at both ends and log(2) / 2 between them.

    Args:
        maps: (B, C, h, h), floating point.

    Raises:
        TypeError, ValueError: naming what came and what is expected.
    """
    return relative(log_amplitude(maps).mean(0), maps.shape[3])


def log_amplitude(maps: Tensor) -> Tensor:
    """(B, C, h, h) -> (B, F), float64 on the CPU, means over channels; absolute, so that batches can be added up."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"maps is a {getattr(maps, 'dtype', type(maps).__name__)}; expected a floating-point tensor")
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or 0 in maps.shape:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; expected square maps (B, C, h, h)")
    points = torch.arange(maps.shape[3] // 2 + 1, device=maps.device)
    wide = maps if maps.dtype == torch.float64 else maps.float()  # there is no transform of half precision on a CPU
    amplitude = torch.fft.rfft2(wide)[..., points, points].abs()
    return (amplitude.double() + SMALLEST).log().mean(1).cpu()


def relative(values: Tensor, length: int) -> Spectrum:
    """Mean log amplitudes (F,) of maps of that length as the difference to frequency 0."""
    return Spectrum(torch.arange(len(values), dtype=torch.float64) * 2 / length, values - values[0])
