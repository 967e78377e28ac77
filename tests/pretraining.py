"""A very small configuration for the tests of pre-training, and functions to run it in this process or in others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from sgmim_fast.engine.settings import from_mapping, with_changes
from sgmim_fast.pretrain.config import Config

TINY = {
    "model": {
        "encoder": "vit_tiny_patch16_224",
        "arguments": {"depth": 3, "embed_dim": 48, "num_heads": 3},
        "stride": 16,
    },
    "data": {"scenes": 32, "size": 64, "workers": 0},
    "mask": {"unit": 16},
    "optim": {"epochs": 2, "batch": 4, "warmup_epochs": 0.5, "lr": 0.1, "milestones": [1.5]},
    "run": {"log_every": 3, "checkpoint_every": 8, "pictures_every": 0, "pictures": 2},
}


def tiny(**changes: Any) -> Config:
    """Returns the small configuration, with changes such as `optim__lr=1`."""
    config = with_changes(Config(), from_mapping(TINY, "TINY"), "TINY")
    return with_changes(config, {key.replace("__", "."): value for key, value in changes.items()}, "test")


class Pairs(Dataset):
    """Pairs of noise in the format of `sgmim_fast.data`. The first `unknown` rows of a map are missing (NaN); `broken`
    maps the index of an image to a value that fills it."""

    def __init__(self, count: int = 32, size: int = 64, broken: dict[int, float] | None = None, unknown: int = 8):
        self.count, self.size, self.broken, self.unknown = count, size, broken or {}, unknown

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, self.size, self.size, generator=generator)
        structure = torch.randn(1, self.size, self.size, generator=generator)
        structure[:, : self.unknown] = torch.nan
        if index in self.broken:
            image[:] = self.broken[index]
        return {"image": image, "structure": structure, "name": f"pair {index}", "skipped": ""}


def arguments(**changes: Any) -> list[str]:
    """Returns the small configuration, with changes, as options of `sgmim-fast pretrain`."""
    given = {f"{section}.{name}": value for section, part in TINY.items() for name, value in part.items()}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--set={key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in given.items()]


def start(*command: Any, cpu: str | None = "true") -> subprocess.Popen:
    """Starts Python with one thread. `cpu` is the value of ACCELERATE_USE_CPU; None leaves it unset."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if cpu is not None:
        environment["ACCELERATE_USE_CPU"] = cpu
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Waits for the process, asserts its exit code, and returns its stdout and stderr."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Resets the global state of accelerate before and after the block, and selects the CPU whatever devices exist."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)


def weights(run: Path, step: int) -> dict[str, Tensor]:
    """Returns the weights that a run saved at a step."""
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Returns whether both have the same tensors, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
