"""Modules under the names that they had before: importing one warns, and gives the new one. For one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old name, without "sgmim_fast.", -> new one, the longest that fits a name counts
MOVED = {
    "accelerate": "fused.accelerate",
    "blocks": "fused.blocks",
    "bypass": "fused.unmodified",
    "data.seeding": "data.seeds",
    "data.sheet": "data.pictures",
    "downstream": "finetune",
    "downstream.finetune": "finetune.cli",
    "downstream.finetuning": "finetune.task",
    "structure": "data.depth_maps",
    "train": "pretrain",
    "train.pretrain": "pretrain.cli",
    "train.pretraining": "pretrain.task",
    "train.engine": "engine.trainer",
    **{f"train.{name}": f"engine.{name}" for name in ("checkpoint", "command", "launch", "loader", "lock", "log")},
    **{f"train.{name}": f"engine.{name}" for name in ("order", "settings", "state", "step", "stop", "task", "window")},
}


class Moved(ModuleType):
    """Has what the new module has."""

    def __init__(self, old: str, new: ModuleType):
        super().__init__(old, new.__doc__)
        self.__path__: list[str] = []  # modules below it have moved, too
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._new, name)

    def __dir__(self) -> list[str]:
        return dir(self._new)


class Finder(MetaPathFinder, Loader):
    """The last place where modules are looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = moved_to(fullname)
        if new is None or importlib.util.find_spec(new) is None:
            return None
        warnings.warn(f"{fullname} is now {new}; the old name goes with the next release", DeprecationWarning, 2)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Moved(spec.name, importlib.import_module(str(moved_to(spec.name))))

    def exec_module(self, module: ModuleType) -> None:
        """The new one has been executed."""


def moved_to(fullname: str) -> str | None:
    """The new name of a module; None: it has not moved."""
    package, _, name = fullname.partition(".")
    if package != "sgmim_fast" or (fullname in sys.modules and not isinstance(sys.modules[fullname], Moved)):
        return None
    known, rest = name, ""
    while known and known not in MOVED:
        known, _, last = known.rpartition(".")
        rest = f".{last}{rest}"
    return f"sgmim_fast.{MOVED[known]}{rest}" if known else None


sys.meta_path.append(Finder())
