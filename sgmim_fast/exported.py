"""Reads the description of model and images in an exported file. Files are untrusted: only numbers and flags are
used."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._builder import build_model_with_cfg

from .encoders import _FAMILIES
from .errors import UserError, nearest

_logger = logging.getLogger("sgmim_fast")

# Arguments of the models' classes, without those of timm.create_model and its helpers, which may name files and URLs.
SHAPING = frozenset(name for family, _ in _FAMILIES for name in inspect.signature(family.__init__).parameters) - {
    "self",
    "device",
    "dtype",
}
_OF_TIMM = frozenset(
    name for function in (timm.create_model, build_model_with_cfg) for name in inspect.signature(function).parameters
) | {"use_naflex"}
# What timm raises for arguments that do not fit together, besides OSError if it downloads
ERRORS_OF_TIMM = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Mean and standard deviation with which images are normalised unless a file or a setting has others
IMAGENET: dict[str, tuple[float, ...]] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_LARGEST = 2**16  # largest number: side, width, classes
_TIMES = 4  # largest ratio of the model's parameters to those of the file


def describe(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Reads timm's name and arguments from a file of `export_timm`; None and {} for other safetensors files.

    Raises:
        UserError: the file cannot be read, or its description does not match its content.
    """
    metadata, held = _read(path)
    if "timm_name" not in metadata:
        return None, {}
    name = metadata["timm_name"]
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"{path} names the model {name!r}, which timm does not have{nearest(name, timm.list_models())}")
    arguments = _shaping(path, metadata.get("timm_arguments", "{}"))
    _check_size(path, name, arguments, held)
    return name, arguments


def normalisation(path: Path) -> dict[str, tuple[float, ...]]:
    """Reads `mean` and `std`, with which an encoder's images are normalised, from a file of `export_timm`; ImageNet's
    if the file has none.

    Raises:
        UserError: the file cannot be read, or does not have one valid number for each channel.
    """
    metadata, _ = _read(path)
    found = {}
    for name, usual in IMAGENET.items():
        values = _json(path, name, metadata[name]) if name in metadata else list(usual)
        if not (isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)):
            raise UserError(f"{path}: {name} is {metadata[name][:40]}; expected a list of numbers")
        found[name] = tuple(map(float, values))
    if len(found["mean"]) != len(found["std"]) or min(found["std"], default=0) <= 0:
        raise UserError(
            f"{path}: mean is {found['mean']} and std {found['std']}; expected as many numbers, those of std above 0"
        )
    return found


def require_rgb(what: str, channels: int) -> None:
    """Raises UserError unless an encoder takes images of three channels."""
    if channels != 3:
        raise UserError(f"{what} takes images of {channels} channels; expected an encoder of 3, for RGB images")


def without_sources(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the model class, without those of timm.create_model, which may name initial weights."""
    return {name: value for name, value in arguments.items() if name not in _OF_TIMM}


def tuples(value: Any) -> Any:
    """Converts lists to tuples, recursively, as timm expects for sizes."""
    if isinstance(value, dict):
        return {name: tuples(item) for name, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def _read(path: Path) -> tuple[dict[str, str], int]:
    """Returns the metadata of a safetensors file, and how many numbers its tensors have together."""
    try:
        with safe_open(path, "pt") as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
            return file.metadata() or {}, held
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _json(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {name} is not valid JSON: {error}") from error


def _shaping(path: Path, text: str) -> dict[str, Any]:
    given = _json(path, "timm_arguments", text)
    if not isinstance(given, dict):
        raise UserError(f"{path}: timm_arguments is {text[:40]}; expected names and values")
    kept = {name: tuples(value) for name, value in given.items() if name in SHAPING and _is_plain(value)}
    if left_out := [name for name in given if name not in kept]:
        _logger.warning("%s: ignored arguments that do not affect the architecture: %s", path, ", ".join(left_out[:8]))
    return kept


def _is_plain(value: Any) -> bool:
    """Whether it is a number within limits, a bool, a short text, or a list of these."""
    if isinstance(value, list):
        return len(value) <= 64 and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= 64
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= _LARGEST)


def _check_size(path: Path, name: str, arguments: dict[str, Any], held: int) -> None:
    """Raises UserError if the model is much larger than the file, since creating it could exhaust memory."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except ERRORS_OF_TIMM as error:
        raise UserError(f"{path}: timm cannot create its {name} with {arguments}: {error}") from error
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > _TIMES * max(held, 2**20):
        raise UserError(f"{path} holds {held} numbers and describes a {name} of {described}; expected equal numbers")
