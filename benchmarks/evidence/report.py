"""Table and plot of the results of `evidence.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NAMES = {"rmse": "RMSE ↓", "abs_rel": "abs rel ↓", "miou": "mIoU ↑"}
Row = Mapping[str, Any]  # method, seed, how ("frozen" or "fine-tuned"), labelled, and the metrics


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation (0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def grouped(rows: Iterable[Row], metric: str) -> dict[tuple[str, str, int], list[float]]:
    """Returns (how, method, labelled) -> values of all seeds, in the order of the rows."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        if metric in row:
            found.setdefault((row["how"], row["method"], row["labelled"]), []).append(row[metric])
    return found


def table(rows: Sequence[Row]) -> str:
    """Formats Markdown tables for frozen and for fine-tuned encoders, with one line per method: mean ± standard
    deviation over seeds."""
    metrics = [metric for metric in NAMES if any(metric in row for row in rows)]
    sizes = sorted({row["labelled"] for row in rows})
    found = {metric: grouped(rows, metric) for metric in metrics}
    parts = []
    for how in dict.fromkeys(row["how"] for row in rows):
        columns = [(metric, size) for metric in metrics for size in sizes]
        head = [how, "seeds", *(f"{NAMES[metric]} n={size}" for metric, size in columns)]
        lines = [head, ["---"] * len(head)]
        for method in dict.fromkeys(row["method"] for row in rows if row["how"] == how):
            values = [found[metric].get((how, method, size), []) for metric, size in columns]
            cells = ["{:.3f} ± {:.3f}".format(*summary(v)) if v else "" for v in values]
            lines.append([method, str(max(map(len, values))), *cells])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def differences(rows: Sequence[Row], against: str, metric: str = "rmse") -> str:
    """Formats a Markdown table of each method minus `against` at the same seed: mean ± standard deviation over the
    seeds that both have."""
    values = {(row["how"], row["labelled"], row["method"], row["seed"]): row[metric] for row in rows}
    lines = []
    for how, size, method in dict.fromkeys(key[:3] for key in values):
        pairs = [
            value - values[how, size, against, seed]
            for (*key, seed), value in values.items()
            if tuple(key) == (how, size, method) and (how, size, against, seed) in values
        ]
        if method != against and pairs:
            mean, deviation = summary(pairs)
            lines.append(f"| {how} | {size} | {method} | {mean:+.3f} ± {deviation:.3f} | {len(pairs)} |")
    return "\n".join([f"| | n | method | {NAMES[metric]} less {against} | seeds |", "|---|---|---|---|---|", *lines])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws one panel per metric for frozen and for fine-tuned encoders: mean and standard deviation of every method
    over the number of labelled scenes."""
    metrics = [metric for metric in NAMES if any(metric in row for row in rows)]
    ways = list(dict.fromkeys(row["how"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure((4 * len(metrics), 3 * len(ways) + 0.4), layout="constrained")
    axes = figure.subplots(len(ways), len(metrics), squeeze=False)
    for line, how in zip(axes, ways, strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            found = grouped([row for row in rows if row["how"] == how], metric)
            for number, method in enumerate(methods):
                points = sorted((size, *summary(v)) for (_, name, size), v in found.items() if name == method)
                if points:
                    sizes, means, deviations = zip(*points, strict=True)
                    style = {"linestyle": "-" if number < 3 else "--", "linewidth": 1.6 if number < 3 else 0.9}
                    axis.errorbar(sizes, means, deviations, label=method, color=f"C{number}", capsize=2, **style)
            sizes = sorted({row["labelled"] for row in rows if row["how"] == how})
            axis.set_xscale("log")
            axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            axis.minorticks_off()
            axis.set_title(f"{how}: {NAMES[metric]}", fontsize=9)
            axis.set_xlabel("labelled images", fontsize=8)
            axis.tick_params(labelsize=7)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
