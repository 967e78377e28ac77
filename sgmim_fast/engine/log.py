"""Logs a run: JSON lines, a progress bar or plain lines, TensorBoard, Weights & Biases, and plots of the losses."""

from __future__ import annotations

import json
import resource
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from sgmim_fast.data.pictures import save
from sgmim_fast.errors import UserError

STEPS, METRICS, SKIPPED = "log.jsonl", "metrics.jsonl", "skipped-files.txt"


class Log:
    """Writes `log.jsonl` and `metrics.jsonl` in a run's folder. For the first process only.

    Args:
        run: the run's folder.
        steps: total number of steps of the run.
        done: number of completed steps; later lines, of an interrupted run, are removed.
        tensorboard: also write `tensorboard/`.
        losses: names of the losses, the total first.
        wandb: project of Weights & Biases to log to, or None. A resumed run continues its run there.

    Raises:
        UserError: TensorBoard or wandb is requested and not installed.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        done: int = 0,
        tensorboard: bool = False,
        losses: Sequence[str] = ("loss",),
        wandb: str | None = None,
    ):
        self.run, self.steps, self.losses = run, steps, losses
        for name in (STEPS, METRICS):
            if (run / name).is_file():
                lines = [line for line in read(run, name) if line["step"] <= done]
                aside = (run / name).with_suffix(".writing")
                aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
                aside.rename(run / name)
        board = str(run / "tensorboard")
        self.board = board_writer()(board, purge_step=done + 1) if tensorboard else None
        self.wandb = None if wandb is None else _wandb_run(wandb, run)
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def steps_done(self, step: int) -> None:
        """Updates the progress bar."""
        self.bar.update(step - self.bar.n)

    def window(self, line: dict[str, Any]) -> None:
        """Logs one line about the last steps; "step" is the number of completed steps."""
        self._write(STEPS, line)
        text = describe(line, self.losses)
        if self.bar.disable:
            width = len(str(self.steps))
            self.say(f"step {line['step']:{width}}/{self.steps}  epoch {line['epoch']:.2f}  {text}")
        else:
            self.bar.set_postfix_str(text)

    def metrics(self, step: int, found: dict[str, float]) -> None:
        """Logs the metrics of an evaluation after `step` steps."""
        self._write(METRICS, {"step": step, **found})
        self.say(f"evaluation after step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with (self.run / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    self.board.add_scalar(key, value, line["step"])
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in line.items() if value is not None}, step=line["step"])

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read(run: Path, name: str = STEPS) -> list[dict[str, Any]]:
    """Reads the lines of a run's log, of steps by default, up to the first incomplete one."""
    path, lines = run / name, []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def read_skipped(run: Path) -> dict[str, str]:
    """Reads the files that a run skipped, with reasons."""
    path = run / SKIPPED
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else ()
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines)}


def write_skipped(run: Path, broken: dict[str, str]) -> None:
    text = "".join(f"{name}\t{reason}\n" for name, reason in broken.items())
    (run / SKIPPED).write_text(text, encoding="utf-8", errors="surrogateescape")


def describe(line: dict[str, Any], losses: Sequence[str]) -> str:
    """Formats a log line as text."""
    total, *parts_of_it = losses

    def number(name: str, form: str) -> str:
        return "none" if line[name] is None else format(line[name], form)

    inside = ", ".join(f"{name.removesuffix('_loss')} {number(name, '.4f')}" for name in parts_of_it)
    parts = [
        f"{total} {number(total, '.4f')}" + (f" ({inside})" if inside else ""),
        f"lr {line['lr']:.2e}",
        f"norm {number('grad_norm', '.2f')}",
        f"{line['images_per_second']:.3g} images/s",
        f"{line['waiting']:.0%} waiting for data",
        f"{line['memory_gib']:.1f} GiB",
        f"{duration(line['seconds_left'])} left",
    ]
    if line["skipped_steps"]:
        parts.append(f"{line['skipped_steps']} steps skipped, not finite")
    if line["skipped_files"]:
        parts.append(f"{line['skipped_files']} files skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Formats seconds as 3 d 4 h, 2 h 5 min or 7 min 12 s."""
    seconds = round(seconds)
    for size, name, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // smaller} {below}"
    return f"{seconds} s"


def memory(device: torch.device) -> float:
    """Returns the peak memory in GiB, allocated on the GPU or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def board_writer() -> Any:
    """Imports TensorBoard's SummaryWriter. Raises UserError if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("run.tensorboard needs TensorBoard: pip install 'sgmim_fast[tensorboard]'") from error
    return SummaryWriter


def wandb_module() -> Any:
    """Imports Weights & Biases. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.wandb needs Weights & Biases: pip install 'sgmim_fast[wandb]'") from error
    return wandb


def _wandb_run(project: str, run: Path) -> Any:
    wandb, known = wandb_module(), run / "wandb-id.txt"
    if not known.is_file():
        known.write_text(secrets.token_hex(8) + "\n")
    number = known.read_text().strip()
    return wandb.init(project=project, name=run.name, id=number, resume="allow", dir=str(run))


def curves(lines: list[dict[str, Any]], path: Path, names: Sequence[str], tests: Sequence[dict[str, Any]] = ()) -> None:
    """Plots the named losses, raw and smoothed, and the learning rate over the steps of a log.

    Args:
        lines: log lines, see `read`.
        path: file of the picture.
        names: names of the losses.
        tests: lines of metrics with the same losses on held-out data, named "val_" + name.
    """
    names = (*names, "lr")
    figure = Figure((3.4 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
        known = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        steps, values = zip(*known, strict=True) if known else ((), ())
        if name == "lr":
            axis.plot(steps, values, linewidth=1)
        else:
            axis.plot(steps, values, linewidth=0.7, alpha=0.35, color="tab:blue")
            axis.plot(steps, smooth(values), linewidth=1.2, color="tab:blue", label="training, smoothed")
        held_out = [(line["step"], line[f"val_{name}"]) for line in tests if f"val_{name}" in line]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), ".-", linewidth=1.2, color="tab:orange", label="held out")
            axis.legend(fontsize=7, frameon=False)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("learning rate" if name == "lr" else name.replace("_", " "), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Computes a centred moving average over an eighth of the values; the window shrinks towards both ends."""
    reach = len(values) // 16
    near = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - n : i + n + 1]) / (2 * n + 1) for i, n in enumerate(near)]
