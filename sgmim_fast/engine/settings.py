"""Typed settings: merges a preset, a YAML file and `--set` options into the dataclass of a run's configuration.

A configuration is a frozen dataclass with the field `preset` (str) and with sections, which are frozen dataclasses.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sgmim_fast.errors import UserError, nearest

C = TypeVar("C")


class _Loader(yaml.SafeLoader):
    """Loads YAML 1.1 as yaml.SafeLoader, and 1e-4, which is a number in YAML 1.2, as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

# Sections whose settings do not change what is computed, except for the settings `_OF_RUN`
_ASIDE = ("run", "evaluation")
_OF_RUN = ("seed", "precision", "fsdp")
# Other settings that may change when a run is resumed. The number of images per step is compared separately.
_FREE = ("data.workers", "data.val_images", "data.val_structure", "optim.batch", "optim.accumulate")
_EPOCHS = ("optim.epochs", "optim.warmup_epochs", "optim.milestones")
# Settings of every configuration whose minimum is 1, and those whose minimum is 0
OF_EVERY_RUN_1 = (
    *("optim.batch", "optim.accumulate", "run.log_every", "run.checkpoint_every"),
    *("run.keep", "run.pictures", "run.nonfinite"),
)
OF_EVERY_RUN_0 = (
    *("data.workers", "optim.epochs", "optim.lr", "optim.weight_decay", "optim.eps"),
    *("optim.clip", "run.seed", "run.pictures_every"),
)


@dataclass(frozen=True)
class Run:
    """Settings of how to run and what to write. Only seed, precision and fsdp change what is computed."""

    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    fsdp: bool = False  # shard parameters, gradients and optimizer state over the processes
    capture: bool = True  # run forward and backward as a CUDA graph if possible, with the same results
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    keep: int = 2  # number of newest checkpoints kept, besides the best one (by held-out loss if there is one)
    pictures_every: int = 5000  # steps; 0: only at the end
    pictures: int = 4  # rows of the grid
    tensorboard: bool = False
    wandb: str | None = None  # project of Weights & Biases
    nonfinite: int = 10  # number of consecutive steps without a finite loss that ends the run


def with_changes(config: C, changes: Mapping[str, Any], where: str) -> C:
    """Returns the configuration with some fields replaced.

    Args:
        changes: maps "section.field" to a value of the field's type, or to text that is parsed as one. Keys below
            "model.arguments." are arguments of timm.
        where: source of the changes, for messages.

    Raises:
        UserError: unknown key (the message names similar ones), a value of the wrong type, or another preset than the
            configuration's.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        if key == "preset":
            if value and value != config.preset:
                raise UserError(f"{where}: preset is {value!r}; expected the option --preset instead")
            continue
        section, _, name = key.partition(".")
        kinds = typing.get_type_hints(type(getattr(config, section, None)))
        argument = section == "model" and name.startswith("arguments.")
        if not argument and name not in kinds:
            raise UserError(f"{where}: unknown setting {key!r}{nearest(key, flat(config))}")
        new = sections.setdefault(section, {})
        if argument:
            arguments = new.get("arguments", config.model.arguments)
            new["arguments"] = {**arguments, name.partition(".")[2]: _read(value)}
        else:
            new[name] = _as(kinds[name], value, f"{where}: {key}")
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    )


def flat(config: Any) -> dict[str, Any]:
    """Returns all settings as a flat dict with keys "section.field", in order."""
    return {
        f"{section.name}.{f.name}": getattr(getattr(config, section.name), f.name)
        for section in dataclasses.fields(config)
        if section.name != "preset"
        for f in dataclasses.fields(getattr(config, section.name))
    }


def differences(old: C, new: C) -> list[str]:
    """Lists, as "key: old -> new", the changed settings that affect what a run computes."""
    before, after = flat(old), flat(new)
    changed = [key for key in before if before[key] != after[key] and not _is_free(key)]
    return [f"{key}: {before[key]} -> {after[key]}" for key in changed]


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return key in _FREE or (section in _ASIDE and name not in _OF_RUN)


def at_least(config: Any, least: int, names: Iterable[str]) -> None:
    """Raises UserError if one of these settings is a number below `least` (0 or 1)."""
    values = flat(config)
    for name in names:
        if values[name] is not None and not values[name] >= least:  # also NaN
            raise UserError(f"{name} is {values[name]}; expected {'at least 1' if least else '0 or more'}")


def check_numbers(config: Any) -> None:
    """Raises UserError for epochs that are not finite, and for AdamW's betas and rates of dropout and drop path that
    are not from 0 to 1."""
    rates = {f"model.arguments.{name}": v for name, v in config.model.arguments.items() if name.endswith("_rate")}
    for name, value in {**flat(config), **rates}.items():
        for number in value if isinstance(value, tuple) else (value,):
            if name in _EPOCHS and not math.isfinite(number):
                raise UserError(f"{name} is {value}; expected a finite number")
            if name in ("optim.betas", *rates) and not (isinstance(number, int | float) and 0 <= number < 1):
                raise UserError(f"{name} is {value}; expected 0 or more, less than 1")


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def from_mapping(tree: Any, where: str) -> dict[str, Any]:
    """Flattens nested sections, as in a YAML file, to the keys of `with_changes` ("preset" stays).

    Raises:
        UserError: `tree` is not a mapping of sections.
    """
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} is not a configuration; expected sections like 'optim:' with settings below them")
    changes: dict[str, Any] = {}
    for section, settings in tree.items():
        if section == "preset":
            changes["preset"] = settings
        elif isinstance(settings, Mapping):
            changes |= {f"{section}.{name}": value for name, value in settings.items()}
        else:
            raise UserError(f"{where}: {section} is {settings!r}; expected a section with settings below it")
    return changes


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file into the flat keys of `with_changes`.

    Raises:
        UserError: the file cannot be read, or is not YAML, or not a configuration.
    """
    try:
        return from_mapping(yaml.load(Path(path).read_text(), _Loader), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error


def read_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Parses `--set` options "section.setting=value" into flat keys.

    Raises:
        UserError: an option without "=".
    """
    changes = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: expected SECTION.SETTING=VALUE, like optim.lr=1e-4")
        changes[key.strip()] = value.strip()
    return changes


def add_arguments(parser: argparse.ArgumentParser, preset: str, example: str) -> None:
    """Adds --preset, whose help is `preset`, --config and --set: the arguments of `resolve`."""
    parser.add_argument("--preset", help=preset)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with settings that override those of the preset"
    )
    add_set(parser, example)


def add_set(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds --set, which `read_assignments` reads, with an example in its help."""
    what = f"change one setting, for example {example}; may be repeated"
    parser.add_argument("--set", "-s", action="append", default=[], metavar="KEY=VALUE", help=what)


def resolve(
    default: C,
    presets: Mapping[str, Any],
    name: str | None,
    file: str | Path | None,
    changes: dict[str, Any],
    instead: Mapping[str, Mapping[str, Any]] | None = None,
) -> C:
    """Merges a preset, a YAML file and single changes; later ones override earlier ones.

    Args:
        default: the configuration before any change.
        presets: maps names to nested sections.
        name: name of the preset; None: `preset:` of the file, if any.
        file: path of a YAML file, or None.
        changes: maps "section.field" to values.
        instead: maps a setting, or "setting=value", to new values of other settings. If the file or `changes` give that
            setting (or that value), the new values replace the preset's, except for settings that are given as well.

    Raises:
        UserError: invalid settings.
    """
    from_file = read_yaml(file) if file is not None else {}
    of_file = from_file.pop("preset", None)
    name = name or of_file
    if name is None and file is None and "model.encoder" not in changes:
        raise UserError(f"give --preset, one of {', '.join(presets)}, or --config FILE")
    config = preset(default, presets, str(name)) if name else default
    given = {key for key, value in {**from_file, **changes}.items() if value is not None}
    texts = {f"{key}={value}" for key, value in {**from_file, **changes}.items()}
    replaced = {k: v for setting in given | texts for k, v in (instead or {}).get(setting, {}).items()}
    config = with_changes(config, {key: replaced[key] for key in replaced.keys() - given}, "preset")
    config = with_changes(config, from_file, str(file))
    return with_changes(config, changes, "--set")


def preset(default: C, presets: Mapping[str, Any], name: str) -> C:
    """Returns the configuration of a preset.

    Raises:
        UserError: unknown name; the message names similar ones.
    """
    if name not in presets:
        raise UserError(f"unknown preset {name!r}; expected one of {', '.join(presets)}{nearest(name, presets)}")
    return with_changes(dataclasses.replace(default, preset=name), from_mapping(presets[name], name), name)


def _read(value: Any) -> Any:
    """Parses text as YAML. Returns other values and invalid YAML unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, _Loader)
    except (ValueError, yaml.YAMLError):  # ValueError: an invalid date
        return value


def _as(kind: Any, value: Any, where: str) -> Any:
    """Converts `value` to the type `kind` of a field."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        given = _read(value)
        if given is None:
            return None
        return _as(next(option for option in options if option is not type(None)), value, where)
    if origin is Literal:
        if value not in options:
            raise UserError(
                f"{where} is {value!r}; expected one of {', '.join(options)}{nearest(str(value), options, 1)}"
            )
        return value
    if kind is str:
        return str(value)
    given = _read(value)
    if kind is float and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if kind is int and isinstance(given, float) and given.is_integer():
        return int(given)
    if origin is None and isinstance(given, kind) and (kind is bool) == isinstance(given, bool):
        return given
    if origin is dict and isinstance(given, Mapping):
        return dict(given)
    if origin is tuple:
        items = given if isinstance(given, list | tuple) else [given]
        if options[-1] is Ellipsis or len(items) == len(options):
            return tuple(_as(options[0], item, where) for item in items)
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "")
    if origin is tuple:
        expected = "numbers like [1, 2]" if options[-1] is Ellipsis else f"{len(options)} numbers like [1, 2]"
    raise UserError(f"{where} is {value!r}; expected {expected or 'settings like {a: 1}'}")


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, tuple) else tree
