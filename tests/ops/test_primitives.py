"""Every backend implements the primitives as `ops.primitives` declares them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re

import pytest

from sgmim_fast import backends
from sgmim_fast.ops.primitives import Gradients, Primitives

DECLARED = {name: f for name, f in vars(Primitives).items() if inspect.isfunction(f) and not name.startswith("_")}
MODULES = {"torch": "sgmim_fast.ops._plain"} | backends.MODULES["norm_linear"]
# Composite ops for which a backend has a module of its own, with only the primitives that they call.
OWN = [
    (op, module)
    for op, modules in backends.MODULES.items()
    if backends.composed(op)
    for module in modules.values()
    if module not in MODULES.values()
]
SOME = {module: module for _, module in OWN} | {"library": "sgmim_fast.ops.library"}


@pytest.mark.parametrize("name", [*MODULES, *SOME])
@pytest.mark.parametrize("primitive", DECLARED)
def test_signatures(name, primitive):
    """Parameters have the same names, order and defaults. A backend may have further ones with defaults."""
    if name not in ("torch", "cpu", "library") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    function = getattr(importlib.import_module((MODULES | SOME)[name]), primitive, None)
    if function is None and name in SOME:
        pytest.skip("none of the ops of this module calls it")
    _, *declared = inspect.signature(DECLARED[primitive]).parameters.values()  # without self
    actual = inspect.signature(function).parameters
    for parameter in declared:
        assert parameter.name in actual, f"{primitive} of {name} has no {parameter.name}"
        assert actual[parameter.name].kind == parameter.kind and actual[parameter.name].default == parameter.default
    own = [p for p in actual.values() if p.name not in {d.name for d in declared}]
    assert all(p.default is not inspect.Parameter.empty for p in own)
    assert [p for p in actual if p in {d.name for d in declared}] == [d.name for d in declared]


@pytest.mark.parametrize("name", MODULES)
def test_constants(name):
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert isinstance(importlib.import_module(MODULES[name]).CHECKS_INDICES, bool)


@pytest.mark.parametrize(("op", "module"), [own for own in OWN if own[0] != "window_attention"])  # it has no weights
def test_own_module_has_what_its_op_asks_for(op, module):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    sources = inspect.getsource(importlib.import_module(f"sgmim_fast.ops.{op}")), inspect.getsource(Gradients)
    asked = {name for source in sources for name in re.findall(r"\b_?p\.(\w+)\(", source)}
    assert {"weights_in", "wgrads", "finish"} <= asked <= set(DECLARED)
    actual = importlib.import_module(module)
    assert not [name for name in sorted(asked) if not hasattr(actual, name)]
