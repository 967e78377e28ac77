"""Relative log amplitudes of feature maps, which measure the strength of their high frequencies.

The method is that of Park and Kim, "How Do Vision Transformers Work?" (ICLR 2022, arXiv 2202.06709), Figures 2a and 8.
The maps are Fourier-transformed in two dimensions, and log amplitudes are averaged over channels and images. The
half-diagonal of the spectrum, from frequency 0 (constant) to frequency π (alternating from cell to cell in both
directions), is returned relative to its value at frequency 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-6  # added to amplitudes, as in the published code, so that their logarithm is finite


class Spectrum(NamedTuple):
    """Points along the half-diagonal, float64 on the CPU."""

    frequency: Tensor  # (F,), in units of π, ascending from 0; the last one is 1 if the maps' sides are even
    value: Tensor  # (F,), natural log amplitude minus that at frequency 0


def relative_log_amplitude(maps: Tensor) -> Spectrum:
    """Computes log amplitudes along the half-diagonal, averaged over images and channels, minus that at frequency 0.

    For even h, the published notebook omits the last point, and labels the one before it, at (1 - 2 / h) π, as π. Here
    every point has its own frequency. The first coefficient and, for even h, the last one are real, and the others are
    complex. White noise therefore has the value 0 at both ends and log(2) / 2 between them.

    Args:
        maps: (B, C, h, h), floating point.

    Raises:
        TypeError, ValueError: maps has another dtype or shape.
    """
    return relative(log_amplitude(maps).mean(0), maps.shape[3])


def log_amplitude(maps: Tensor) -> Tensor:
    """Computes the log amplitudes of maps (B, C, h, h) along the half-diagonal, averaged over channels: (B, F) float64
    on the CPU. They are not relative to frequency 0, so that batches can be summed."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"maps is a {getattr(maps, 'dtype', type(maps).__name__)}; expected a floating-point tensor")
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or 0 in maps.shape:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; expected square maps (B, C, h, h)")
    points = torch.arange(maps.shape[3] // 2 + 1, device=maps.device)
    maps = maps if maps.dtype == torch.float64 else maps.float()  # the CPU has no half-precision FFT
    amplitude = torch.fft.rfft2(maps)[..., points, points].abs()
    return (amplitude.double() + SMALLEST).log().mean(1).cpu()


def relative(values: Tensor, length: int) -> Spectrum:
    """Returns mean log amplitudes (F,) of maps whose sides are `length` as differences to that at frequency 0."""
    return Spectrum(torch.arange(len(values), dtype=torch.float64) * 2 / length, values - values[0])
