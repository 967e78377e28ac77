"""The folder of a run, read again: its configuration, and the model of one of its checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgmim_fast.engine import checkpoint
from sgmim_fast.engine.settings import from_mapping, with_changes
from sgmim_fast.errors import UserError
from sgmim_fast.exported import without_sources
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain.build import create_model
from sgmim_fast.pretrain.config import Config


class Saved(NamedTuple):
    """A sound checkpoint of a run."""

    path: Path
    facts: dict[str, Any]
    config: Any


def find(run: Path, name: str | None = None, kind: type = Config, command: str = "pretrain") -> Saved:
    """The checkpoint of that name, "best" or the newest, and the configuration it was trained with.

    Args:
        kind: of the configuration.
        command: that made the run.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: another command made the run.
    """
    path = checkpoint.choose(run, name)
    facts = checkpoint.facts(path)
    made_by = facts.get("command", "pretrain")
    if made_by != command:
        raise UserError(f"{run} is a run of sgmim-fast {made_by}; expected one of sgmim-fast {command}")
    where = str(path / checkpoint.FACTS)
    config = kind(preset=facts["config"].get("preset", ""))
    return Saved(path, facts, with_changes(config, from_mapping(facts["config"], where), where))


def trained(config: Config) -> Config:
    """The same without weights to start from, which a checkpoint replaces: nothing is downloaded or read for them."""
    arguments = without_sources(config.model.arguments)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arguments=arguments))


def load(saved: Saved) -> SGMIM:
    """The model of a checkpoint, on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        model = create_model(trained(saved.config))
    model.load_state_dict(checkpoint.read(saved.path, "model"))
    return model.eval()
