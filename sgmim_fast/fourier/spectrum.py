"""Relative log amplitudes of feature maps: how strong their high frequencies are.

Park and Kim, "How Do Vision Transformers Work?" (ICLR 2022, arXiv 2202.06709), Figures 2a and 8: maps go through a
two-dimensional Fourier transform, log amplitudes are averaged over channels and images, and the half-diagonal of the
spectrum is taken, from frequency 0 (constant) to frequency π (alternating from cell to cell in both directions),
relative to its value at frequency 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-6  # added to amplitudes, as published, so that their logarithm is finite


class Spectrum(NamedTuple):
    """Points along the half-diagonal, float64 on the CPU."""

    frequency: Tensor  # (F,), in units of π, ascending from 0; the last is 1 on a grid of even length
    value: Tensor  # (F,), log amplitude less the one at frequency 0, natural logarithm


def relative_log_amplitude(maps: Tensor) -> Spectrum:
    """The mean over images and channels of the log amplitudes along the half-diagonal, less that at frequency 0.

    The published notebook omits the last point of a grid of even length, and labels the one before it, at
    (1 - 2 / h) π, as π. Here every point has its own frequency. The first and the last coefficients are real, the
    others complex: white noise has 0 at both ends and log(2) / 2 between them.

    Args:
        maps: (B, C, h, h), floating point.

    Raises:
        TypeError, ValueError: naming what came and what is expected.
    """
    return relative(log_amplitude(maps).mean(0), maps.shape[3])


def log_amplitude(maps: Tensor) -> Tensor:
    """(B, C, h, h) -> (B, F), float64 on the CPU, averaged over channels; absolute, so that batches can be summed."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise TypeError(f"maps is a {getattr(maps, 'dtype', type(maps).__name__)}; expected a floating-point tensor")
    if maps.ndim != 4 or maps.shape[2] != maps.shape[3] or 0 in maps.shape:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; expected square maps (B, C, h, h)")
    points = torch.arange(maps.shape[3] // 2 + 1, device=maps.device)
    maps = maps if maps.dtype == torch.float64 else maps.float()  # the CPU has no half-precision FFT
    amplitude = torch.fft.rfft2(maps)[..., points, points].abs()
    return (amplitude.double() + SMALLEST).log().mean(1).cpu()


def relative(values: Tensor, length: int) -> Spectrum:
    """Mean log amplitudes (F,) of maps of that length as the difference to frequency 0."""
    return Spectrum(torch.arange(len(values), dtype=torch.float64) * 2 / length, values - values[0])
