"""Draws the spectra of several encoders, and writes them to CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sgmim_fast.data.pictures import save
from sgmim_fast.fourier.spectrum import Spectrum

Spectra = Mapping[str, list[Spectrum]]  # label of an encoder -> spectrum of each block


def high_frequency(spectra: list[Spectrum]) -> list[float]:
    """Returns the value of each block at its highest frequency, NaN for maps of one cell."""
    return [float(s.value[-1]) if len(s.value) > 1 else math.nan for s in spectra]


def draw(spectra: Spectra, path: Path) -> None:
    """Draws one panel per encoder, with one curve per block, and a last panel with the values at the highest frequency.

    Raises:
        OSError: the file cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    colours = matplotlib.colormaps["plasma_r"]
    figure = Figure((2.6 * len(spectra) + 4.2, 3.2), layout="constrained")
    *panels, last = figure.subplots(1, len(spectra) + 1, width_ratios=[1] * len(spectra) + [1.3], sharey=True)
    for panel, (label, blocks) in zip(panels, spectra.items(), strict=True):
        for depth, block in zip(_depths(blocks), blocks, strict=True):
            panel.plot(block.frequency, block.value, color=colours(depth), linewidth=1.2)
        panel.set_title(label, fontsize=8)
        panel.set_xlabel("frequency / π", fontsize=8)
        panel.set_xlim(0, 1)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), ax=panels, pad=0.01)
    bar.set_label("normalised depth", fontsize=8)
    for label, blocks in spectra.items():
        last.plot(_depths(blocks), high_frequency(blocks), marker="o", markersize=3, linewidth=1.2, label=label)
    last.set_title("at the highest frequency", fontsize=8)
    last.set_xlabel("normalised depth", fontsize=8)
    last.legend(fontsize=7)
    panels[0].set_ylabel("Δ log amplitude", fontsize=8)
    for axis in (*panels, last, bar.ax):
        axis.tick_params(labelsize=7)
    save(figure, path, dpi=120)


def write_csv(spectra: Spectra, path: Path) -> None:
    """Writes one line per encoder, block (counted from 1) and frequency (in units of π)."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["encoder", "block", "frequency", "value"])
        for label, blocks in spectra.items():
            for number, block in enumerate(blocks, 1):
                for frequency, value in zip(block.frequency.tolist(), block.value.tolist(), strict=True):
                    lines.writerow([label, number, f"{frequency:.6f}", f"{value:.6f}"])


def _depths(blocks: list[Spectrum]) -> list[float]:
    return [number / len(blocks) for number in range(1, len(blocks) + 1)]
