"""Reads and writes checkpoints, which are folders `step-00001000` of safetensors files and metadata.

Writing is atomic: a checkpoint is written to a temporary folder, flushed to the disk, and renamed. `checkpoint.json`
contains the SHA-256 digest of every other file, so that damage is detected before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole

from sgmim_fast.engine.settings import differences, from_mapping, with_changes
from sgmim_fast.errors import UserError

FACTS, AVERAGE = "checkpoint.json", "average"
_OPTIONS = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is missing or damaged."""


def write(folder: Path, step: int, parts: Mapping[str, dict[str, Tensor]], facts: dict[str, Any]) -> Path:
    """Writes the checkpoint of a step. Replaces an earlier one of the same step.

    Args:
        folder: the folder of all checkpoints of the run.
        parts: maps file names without suffix to state dicts; each becomes one safetensors file.
        facts: metadata, which must be serialisable as JSON.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the disk is full, or writing fails for another reason. Earlier checkpoints are unchanged.
    """
    final, aside, old = folder / f"step-{step:08d}", folder / f".writing-{step:08d}", folder / f".old-{step:08d}"
    try:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
        files = {}
        for name, tensors in parts.items():
            path = aside / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            files[path.name] = _digest(path)
        (aside / FACTS).write_text(json.dumps({**facts, "step": step, "files": files}, indent=1) + "\n")
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if final.exists():
            final.rename(old)
        aside.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        before = steps(folder)
        kept = f"{before[-1]} is intact" if before else "there was none before it"
        free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0
        raise CheckpointError(
            f"cannot write the checkpoint {final} ({_why(error)}; {free:.0f} MiB free on the disk); {kept}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return final


def steps(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))


def tidy(folder: Path, keep: int, newest: Path) -> None:
    """Removes all checkpoints but the last `keep` up to `newest` and the one with the best score.

    Checkpoints later than `newest` are leftovers of a run that was resumed from an earlier one.
    """
    found = steps(folder)
    done = found[: found.index(newest) + 1]
    best = min(done, key=score)
    for path in found:
        if path not in done[-keep:] and path != best:
            shutil.rmtree(path, ignore_errors=True)


def score(path: Path) -> float:
    """Returns the score that a checkpoint was saved with, lower is better; infinite if it is unknown."""
    try:
        known = facts(path)
    except CheckpointError:
        return math.inf
    value = known.get("score", known.get("loss"))
    return math.inf if value is None else value


def facts(path: Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint: the `facts` given to `write`, with "step" and "files" added.

    Raises:
        CheckpointError: the metadata cannot be read.
    """
    try:
        return json.loads((path / FACTS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged ({FACTS}: {_why(error)})") from error


def damage(path: Path) -> str:
    """Returns a description of the first damaged file of a checkpoint; "" if there is none."""
    try:
        files = facts(path)["files"]
    except CheckpointError as error:
        return f"{FACTS}: {_why(error.__cause__ or error)}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not what was written"
    return ""


def choose(run: Path, name: str | None = None) -> Path:
    """Chooses a checkpoint of a run and verifies its files.

    Args:
        run: the run's folder.
        name: "best", "step-00000100", or "100"; None: the newest.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: there is none, or it is damaged; the message names the newest undamaged one.
    """
    found = steps(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} has no checkpoint; expected the folder of a run that has saved one")
    if name is None:
        path = found[-1]
    elif name == "best":
        path = min(found, key=score)
    else:
        number = name.removeprefix("step-").lstrip("0")
        path = next((path for path in found if path.name.removeprefix("step-").lstrip("0") == number), None)
        if path is None:
            raise CheckpointError(f"{run} has no checkpoint {name!r}, only best, {', '.join(p.name for p in found)}")
    wrong = damage(path)
    if wrong:
        sound = next((other for other in reversed(found) if other != path and not damage(other)), None)
        offer = f"--checkpoint {sound.name} takes the sound one of that name" if sound else "no other one is sound"
        raise CheckpointError(f"the checkpoint {path} is damaged ({wrong}); {offer}")
    return path


def read(path: Path, part: str) -> dict[str, Tensor]:
    """Returns the state dict of one part, on the CPU."""
    return load_file(path / f"{part}.safetensors")


def averages(path: Path) -> dict[str, Tensor]:
    """Returns the moving averages of the parameters (`engine.average`); {} if the checkpoint has none."""
    return read(path, AVERAGE) if (path / f"{AVERAGE}.safetensors").is_file() else {}


class Saved(NamedTuple):
    """A verified checkpoint of a run: its folder, metadata and configuration."""

    path: Path
    facts: dict[str, Any]
    config: Any


def find(run: Path, name: str | None, kind: type, command: str) -> Saved:
    """Finds a checkpoint (see `choose`) and reads the configuration of its training.

    Args:
        run, name: see `choose`.
        kind: class of the configuration.
        command: name of the command that the run must belong to.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: the run belongs to another command.
    """
    path = choose(run, name)
    known = facts(path)
    made_by = known.get("command", "pretrain")
    if made_by != command:
        raise UserError(f"{run} is a run of sgmim-fast {made_by}; expected one of sgmim-fast {command}")
    where = str(path / FACTS)
    config = kind(preset=known["config"].get("preset", ""))
    return Saved(path, known, with_changes(config, from_mapping(known["config"], where), where))


def weights_for(model: nn.Module, config: Any, saved: Saved) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint for a model that was created from a configuration, which may have changed.

    Raises:
        CheckpointError: names or shapes differ from the model's. The message has the changed settings.
    """
    found, own = read(saved.path, "model"), model.state_dict()
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
        changed = "; ".join(differences(saved.config, config)) or "nothing in the settings changed"
        raise CheckpointError(
            f"the weights of {saved.path} do not fit the model: {changed}; expected the run's settings"
        )
    return found


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Returns the state dicts {"model", "optimizer"} on the CPU, complete on the first process only.

    Every process must call it. The optimizer's entries are named STATE/PARAMETER, e.g. exp_avg/encoder.mask_token.
    """
    weights = whole.get_model_state_dict(model, options=_OPTIONS)
    states = whole.get_optimizer_state_dict(model, optimizer, options=_OPTIONS).get("state", {})
    named = {f"{kind}/{name}": tensor for name, state in states.items() for kind, tensor in state.items()}
    return {"model": weights, "optimizer": named}


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], named: dict[str, Tensor]
) -> None:
    """Loads the state dicts that `gather` returned. Every process must call it, with all tensors."""
    options = whole.StateDictOptions(full_state_dict=True)
    groups: Any = whole.get_optimizer_state_dict(model, optimizer)["param_groups"]
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in named.items():
        kind, _, name = key.partition("/")
        states.setdefault(name, {})[kind] = tensor
    content = {"state": states, "param_groups": groups}
    whole.set_optimizer_state_dict(model, optimizer, content, options=options)
    whole.set_model_state_dict(model, weights, options=options)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
