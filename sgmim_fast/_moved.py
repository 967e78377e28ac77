"""Keeps the old names of moved modules for one release: importing one warns and returns the new module's content."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

# old name, without "sgmim_fast.", -> new name; the longest matching old name counts
MODULES = {
    "accelerate": "fused.accelerate",
    "blocks": "fused.swin_blocks",
    "bypass": "fused.unmodified",
    "data.png": "data.map_file",
    "data.seeding": "data.seeds",
    "data.sheet": "data.pictures",
    "data.standardize": "data.structure_kind",
    "downstream": "finetune",
    "downstream.finetune": "finetune.task",
    "downstream.finetuning": "finetune.task",
    "downstream.groups": "finetune.build",
    "downstream.presets": "finetune.config",
    "downstream.schedule": "finetune.build",
    "downstream.sizes": "finetune.encoder",
    "downstream.weights": "weights",
    "finetune.weights": "weights",
    "fused.blocks": "fused.swin_blocks",
    "kernels.products": "kernels.gemm",
    "ops.products": "ops.gemm",
    "structure": "data.depth_maps",
    "train": "pretrain",
    **{f"train.{name}": f"engine.{name}" for name in ("checkpoint", "command", "launch", "loader", "log")},
    **{f"train.{name}": f"engine.{name}" for name in ("settings", "task")},
    "train.engine": "engine.trainer",
    "train.held_out": "pretrain.task",
    "train.masks": "pretrain.build",
    "train.optimizer": "pretrain.build",
    "train.lock": "engine.launch",
    "train.order": "engine.loader",
    "train.presets": "pretrain.config",
    "train.pretrain": "pretrain.task",
    "train.pretraining": "pretrain.task",
    "train.reconstruct": "pretrain.pictures",
    "train.runs": "pretrain.build",
    "train.state": "engine.checkpoint",
    "train.step": "engine.trainer",
    "train.stop": "engine.launch",
    "train.window": "engine.trainer",
}
# old -> new place of functions and classes that were renamed, or moved elsewhere than their module
NAMES = {
    **{
        f"{old}.{name}": f"fused.vit_blocks:{name}"
        for old in ("blocks", "fused.blocks")
        for name in ("BeitBlock", "ViTBlock")
    },
    "train.held_out.check": "pretrain.build:check",
    "train.held_out.create": "pretrain.build:hold_out",
    "train.held_out.losses": "pretrain.task:held_out_losses",
    "train.masks.draw": "pretrain.build:draw_masks",
    "train.masks.part": "masking:SelectiveMask.part",
    "train.pictures.curves": "engine.log:curves",
    "train.pictures.smooth": "engine.log:smooth",
    "train.order.mix": "data.seeds:mix",
    "train.pictures.save": "data.pictures:save",
}


class Moved(ModuleType):
    """An old module, which forwards attributes to the new one."""

    def __init__(self, old: str, new: ModuleType):
        super().__init__(old, new.__doc__)
        self.__path__: list[str] = []  # makes it a package, whose submodules have moved, too
        self._new = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old = f"{self.__name__.partition('.')[2]}.{name}"
        if old in NAMES:
            module, _, name = NAMES[old].partition(":")
            return attrgetter(name)(importlib.import_module(f"sgmim_fast.{module}"))
        return getattr(self._new, name)

    def __dir__(self) -> list[str]:
        return dir(self._new)


class Finder(MetaPathFinder, Loader):
    """Finder and loader of old names. It is the last one in `sys.meta_path`."""

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
        """Does nothing, since the new module was executed when it was imported."""


def moved_to(fullname: str) -> str | None:
    """Returns the new name of a module; None if it has not moved."""
    package, _, name = fullname.partition(".")
    if package != "sgmim_fast" or (fullname in sys.modules and not isinstance(sys.modules[fullname], Moved)):
        return None
    known, rest = name, ""
    while known and known not in MODULES:
        known, _, last = known.rpartition(".")
        rest = f".{last}{rest}"
    return f"sgmim_fast.{MODULES[known]}{rest}" if known else None


sys.meta_path.append(Finder())
