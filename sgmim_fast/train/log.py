"""What a run says: a JSON line for every window of steps, a progress bar or plain lines, TensorBoard on request."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sgmim_fast.errors import UserError


class Log:
    """The log of a run, `log.jsonl` in its folder. Used by the first process only.

    Args:
        run: the run's folder.
        steps: of the whole run.
        done: steps that are done; later lines, of a run that was cut off, are taken out.
        tensorboard: write `tensorboard/` as well.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, run: Path, steps: int, done: int = 0, tensorboard: bool = False):
        self.path, self.steps = run / "log.jsonl", steps
        lines = [line for line in read(run) if line["step"] <= done]
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        aside.rename(self.path)
        self.board = _board(run / "tensorboard", done) if tensorboard else None
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def steps_done(self, step: int) -> None:
        """Moves the bar."""
        self.bar.update(step - self.bar.n)

    def window(self, line: dict[str, Any]) -> None:
        """One line about the last steps; "step" is the number of steps done."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, line["step"])
        text = describe(line)
        if self.bar.disable:
            width = len(str(self.steps))
            self.say(f"step {line['step']:{width}}/{self.steps}  epoch {line['epoch']:.2f}  {text}")
        else:
            self.bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """A line of text, above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. One that was cut off in the middle ends it."""
    path, lines = run / "log.jsonl", []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def describe(line: dict[str, Any]) -> str:
    """The numbers of a window in words."""

    def number(name: str, form: str) -> str:
        return "none" if line[name] is None else format(line[name], form)

    parts = [
        f"loss {number('loss', '.4f')} (image {number('image_loss', '.4f')}, "
        f"structure {number('structure_loss', '.4f')})",
        f"lr {line['lr']:.2e}",
        f"norm {number('grad_norm', '.2f')}",
        f"{line['images_per_second']:.0f} images/s",
        f"{line['memory_gib']:.1f} GiB",
        f"{duration(line['seconds_left'])} left",
    ]
    if line["skipped_steps"]:
        parts.append(f"{line['skipped_steps']} steps skipped, not finite")
    if line["skipped_files"]:
        parts.append(f"{line['skipped_files']} files skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """As in 3 d 4 h, 2 h 5 min, 7 min 12 s."""
    seconds = round(seconds)
    for size, name, smaller, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // smaller} {below}"
    return f"{seconds} s"


def memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _board(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("run.tensorboard needs TensorBoard: pip install 'sgmim_fast[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=done + 1)
