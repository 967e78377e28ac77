"""A very small run of `sgmim-fast finetune` for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgmim_fast import cli

TINY = {
    "model": {
        "encoder": "vit_tiny_patch16_224",
        "arguments": {"depth": 4, "embed_dim": 48, "num_heads": 3},
        "drop_path": 0.1,
        "head": "upernet",
        "head_channels": 16,
    },
    "data": {"source": "scenes", "scenes": 16, "test_scenes": 3, "size": [64, 64], "workers": 0},
    "optim": {"epochs": 2, "batch": 4, "lr": 1e-3, "layer_decay": 0.7},
    "run": {"log_every": 3, "checkpoint_every": 4, "pictures_every": 0, "pictures": 2},
}


def arguments(**changes: Any) -> list[str]:
    """Returns the small configuration as options, with changes such as `optim__lr=1`."""
    given = {f"{section}.{name}": value for section, part in TINY.items() for name, value in part.items()}
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--set={key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in given.items()]


def finetune(run: Path, task: str = "depth", *words: str, **changes: Any) -> int:
    """Runs `sgmim-fast finetune` and returns its exit code."""
    return cli.main(["finetune", task, f"--out={run}", *words, *arguments(**changes)])
