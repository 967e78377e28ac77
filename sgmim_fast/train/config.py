"""The typed configuration of a run: defaults, presets, a YAML file and `--set`, in this order."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sgmim_fast.errors import UserError, nearest


@dataclass(frozen=True)
class Model:
    """`create_encoder` and `SGMIM`."""

    encoder: str = "swin_base_patch4_window7_224"  # a timm name
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of timm.create_model; img_size is data.size
    stride: int = 32  # pixels along an output token of the encoder
    guidance: bool = True  # False: SimMIM
    hidden_context: Literal["keep", "drop"] = "keep"
    position_embedding: bool = False
    accelerate: bool = True  # timm's blocks through fused ops


@dataclass(frozen=True)
class Data:
    """Where images and maps come from: two mirrored folders, shards, or procedural scenes."""

    images: str | None = None  # a folder
    structure: str | None = None  # the mirrored folder of maps
    shards: str | None = None  # WebDataset shards, as "train-{000..099}.tar"
    epoch_images: int | None = None  # of shards, whose number is not known: images that count as an epoch
    scenes: int = 0  # that many procedural scenes
    missing: float | None = 0.0  # integer that means "no value" in maps; None: none does
    size: int = 192  # pixels along an image
    scale: tuple[float, float] = (0.67, 1.0)  # area of a crop, share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width by height of a crop
    flip: bool = True
    workers: int | None = None  # loading processes of each training process; None: what the cores allow, at most 8


@dataclass(frozen=True)
class Mask:
    """`selective_mask`."""

    unit: int = 32  # pixels along a mask unit
    ratio: float = 0.6  # share of masked units
    shown: str = "masked"  # where the structure is shown: "masked", "visible", "all" or the share hidden at random


@dataclass(frozen=True)
class Optim:
    """docs/SPEC.md "Published recipes". Learning rates are for a total batch of 512 and scaled to the run's."""

    epochs: float = 800
    batch: int = 128  # images per process and backward
    accumulate: int = 1  # backwards per step
    lr: float = 1e-4
    warmup_lr: float = 5e-7
    min_lr: float = 0.0  # cosine's end
    schedule: Literal["cosine", "multistep"] = "multistep"
    warmup_epochs: float = 10
    milestones: tuple[float, ...] = (700,)  # epochs after which multistep multiplies by gamma
    gamma: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0  # largest gradient norm; 0: none


@dataclass(frozen=True)
class Run:
    """How it runs and what it leaves behind. None of it but seed, precision and fsdp changes what is computed."""

    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    fsdp: bool = False  # parameters, gradients and optimizer state in shards over the processes
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    keep: int = 2  # newest checkpoints kept, besides the one with the lowest loss
    pictures_every: int = 5000  # steps; 0: only at the end
    pictures: int = 4  # rows of the grid
    tensorboard: bool = False
    nonfinite: int = 10  # so many steps in a row without a finite loss end the run


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


# Changing these on resuming leaves every step what it would have been; images a step are compared by themselves.
FREE = {"data.workers", "optim.batch", "optim.accumulate"}
FREE |= {f"run.{f.name}" for f in dataclasses.fields(Run)} - {"run.seed", "run.precision", "run.fsdp"}


def with_changes(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """The configuration with some fields replaced.

    Args:
        changes: "section.field" -> value of the field's type, or text to be read as one. Keys below
            "model.arguments." are arguments of timm.
        where: what the changes come from, for the message.

    Raises:
        UserError: a key that does not exist (the nearest ones are named), or a value of another type.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        if key == "preset":
            continue
        section, _, name = key.partition(".")
        kinds = typing.get_type_hints(type(getattr(config, section, None)))
        argument = section == "model" and name.startswith("arguments.")
        if not argument and name not in kinds:
            raise UserError(f"{where}: there is no setting {key!r}{nearest(key, flat(config))}")
        new = sections.setdefault(section, {})
        if argument:
            arguments = new.get("arguments", config.model.arguments)
            new["arguments"] = {**arguments, name.partition(".")[2]: _read(value)}
        else:
            new[name] = _as(kinds[name], value, f"{where}: {key}")
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    )


def flat(config: Config) -> dict[str, Any]:
    """ "section.field" -> value, in order."""
    return {
        f"{section.name}.{f.name}": getattr(getattr(config, section.name), f.name)
        for section in dataclasses.fields(config)
        if section.name != "preset"
        for f in dataclasses.fields(getattr(config, section.name))
    }


def differences(old: Config, new: Config) -> list[str]:
    """ "key: old -> new" for every field that changes what a run computes."""
    before, after = flat(old), flat(new)
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key] and key not in FREE]


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def from_mapping(tree: Any, where: str) -> dict[str, Any]:
    """Nested sections, as in a YAML file, to the flat keys of `with_changes` ("preset" stays).

    Raises:
        UserError: it is no mapping of sections.
    """
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} is no configuration: expected sections like 'optim:' with settings below them")
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
    """The flat keys of a YAML file.

    Raises:
        UserError: the file cannot be read, or is no YAML, or no configuration.
    """
    try:
        return from_mapping(yaml.safe_load(Path(path).read_text()), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error


def read_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """`--set` "a.b=value" texts to flat keys.

    Raises:
        UserError: one has no "=".
    """
    changes = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: expected SECTION.SETTING=VALUE, like optim.lr=1e-4")
        changes[key.strip()] = value.strip()
    return changes


def _read(value: Any) -> Any:
    """Text as YAML reads it, but 1e-4 is a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() else yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value


def _as(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind` of a field above."""
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
