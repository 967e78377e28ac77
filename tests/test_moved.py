"""Old names of modules lead to the new ones, with a warning. Old imports and pickles continue to work."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest

import sgmim_fast
from sgmim_fast import _moved

pytest.importorskip("accelerate", reason="training needs the extra [downstream]")
pytest.importorskip("segmentation_models_pytorch", reason="fine-tuning needs the extra [downstream]")


@pytest.fixture
def forgotten():
    """Removes old names from `sys.modules`, as if none had been imported."""
    for name in [name for name, module in sys.modules.items() if isinstance(module, _moved.Moved)]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:sgmim_fast.(train|downstream) is now:DeprecationWarning")
@pytest.mark.parametrize("name", _moved.MODULES)
def test_modules(forgotten, name):
    if name == "structure":
        pytest.importorskip("transformers", reason="needs the extra [structure]")
    new = f"sgmim_fast.{_moved.MODULES[name]}"
    with pytest.warns(DeprecationWarning, match=rf"^sgmim_fast\.{name} is now {new};"):
        module = importlib.import_module(f"sgmim_fast.{name}")
    assert module.__name__ == f"sgmim_fast.{name}"
    real = importlib.import_module(new)
    names = [each for each in vars(real) if not each.startswith("_") and f"{name}.{each}" not in _moved.NAMES]
    assert all(getattr(module, each) is getattr(real, each) for each in names) and set(names) <= set(dir(module))


@pytest.mark.parametrize("name", _moved.NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(f"sgmim_fast.{module}"), attribute)
    new, _, path = _moved.NAMES[name].partition(":")
    assert found.__module__ == f"sgmim_fast.{new}" and found.__qualname__ == path


def test_below_a_package(forgotten):
    with pytest.warns(DeprecationWarning) as caught:
        from sgmim_fast.downstream.data.colors import DepthColors
    assert DepthColors.__module__ == "sgmim_fast.finetune.data.colors"
    assert {warning.filename for warning in caught} == {__file__}  # the warning points to the line to change


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_never_was_is_not_found():
    for name in ("train.nothing", "downstream.data.nothing", "nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named 'sgmim_fast.{name}'"):
            importlib.import_module(f"sgmim_fast.{name}")
    from sgmim_fast.train import engine

    with pytest.raises(AttributeError, match="nothing"):
        _ = engine.nothing


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pickles_of_before():
    """Old pickles refer to the classes of accelerated blocks by their old modules."""
    for old in (b"blocks", b"fused.blocks"):
        assert pickle.loads(b"csgmim_fast.%b\nViTBlock\n." % old).__module__ == "sgmim_fast.fused.vit_blocks"
        assert pickle.loads(b"csgmim_fast.%b\nPatchMerging\n." % old).__module__ == "sgmim_fast.fused.swin_blocks"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functions_stay_functions(forgotten):
    """Importing the old module `accelerate` does not hide the function of the same name."""
    importlib.import_module("sgmim_fast.accelerate")
    assert sgmim_fast.accelerate.__module__ == "sgmim_fast.fused.accelerate"


def test_nothing_here_uses_an_old_name():
    commands = "import sgmim_fast.pretrain.task, sgmim_fast.finetune.evaluate, sgmim_fast.fourier.command"
    done = subprocess.run([sys.executable, "-W", "error:sgmim_fast", "-c", commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
