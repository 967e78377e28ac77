"""Fast SG-MIM: Structured Knowledge Guided Masked Image Modeling on visible tokens, with fused kernels.

Importing this package registers the operators (`torch.ops.sgmim_fast`) and takes little longer than importing torch.
Names that need timm (and with it torchvision) or `torch.compile` are imported when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from sgmim_fast import _moved, backends, ops  # noqa: F401 - old names of modules
from sgmim_fast.memory import keep_freed_memory
from sgmim_fast.ops import standardize_structure
from sgmim_fast.rows import Rows

if TYPE_CHECKING:
    from sgmim_fast import checkpoints, reference
    from sgmim_fast import encoders as encoders
    from sgmim_fast import guidance as guidance
    from sgmim_fast import masking as masking
    from sgmim_fast import model as model
    from sgmim_fast.capture import capture
    from sgmim_fast.checkpoints import export_timm, load_published, published_state_dict
    from sgmim_fast.decoder import Decoder
    from sgmim_fast.encoders import create_encoder
    from sgmim_fast.fused.accelerate import accelerate
    from sgmim_fast.masking import SelectiveMask, selective_mask
    from sgmim_fast.model import SGMIM
    from sgmim_fast.reference import Losses
    from sgmim_fast.tune import tune

__version__ = "0.1.0"  # defined only here; pyproject.toml reads it

# torch.compile keeps generated code on disk, under a key that knows the names of the ops in it, but not their version.
# An op of another version may save other tensors for its backward.
torch.compiler.config.cache_key_tag += f" sgmim_fast {__version__}"

__all__ = [
    "SGMIM",
    "Decoder",
    "Losses",
    "Rows",
    "SelectiveMask",
    "accelerate",
    "backends",
    "capture",
    "checkpoints",
    "create_encoder",
    "export_timm",
    "keep_freed_memory",
    "load_published",
    "ops",
    "published_state_dict",
    "reference",
    "selective_mask",
    "standardize_structure",
    "tune",
]

# The lazy imports, listed above for type checkers: modules, and the module of each other name.
_MODULES = ("checkpoints", "encoders", "guidance", "masking", "model", "reference")
_NAMES = {
    "SGMIM": "model",
    "Decoder": "decoder",
    "Losses": "reference",
    "SelectiveMask": "masking",
    "accelerate": "fused.accelerate",
    "capture": "capture",
    "create_encoder": "encoders",
    "export_timm": "checkpoints",
    "load_published": "checkpoints",
    "published_state_dict": "checkpoints",
    "selective_mask": "masking",
    "tune": "tune",
}


class _Package(ModuleType):
    """Module class of the package. Importing a submodule such as `capture` sets an attribute of the package, which
    would hide the function of the same name; this class keeps the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # with a module `__getattr__`, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _NAMES:
            value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
            setattr(sys.modules[__name__], name, value)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES})
