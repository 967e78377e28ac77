"""The cost of `import sgmim_fast`, and access to names that are loaded at their first use."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sgmim_fast

TIMED = """
import json, sys, time
marks = [time.process_time()]
import torch
marks.append(time.process_time())
import sgmim_fast
marks.append(time.process_time())
loaded = sorted({"timm", "torchvision", "torch._dynamo"} & set(sys.modules))
registered = hasattr(torch.ops.sgmim_fast, "gather_patches")
import timm.models.beit, timm.models.swin_transformer_v2, timm.models.vision_transformer
marks.append(time.process_time())
from sgmim_fast import *
marks.append(time.process_time())
print(json.dumps([[b - a for a, b in zip(marks, marks[1:])], loaded, registered]))
"""

FORKED = """
import os, timm, torch
for program in {programs!r}:
    if os.fork() == 0:
        exec(program)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_costs_little_more_than_torch_and_timm():
    """Limits the process time, in a second try if the first exceeds it. Measured: 0.05 s over torch, and 0.06 s over
    timm for all names."""
    for _ in range(2):
        (_, ours, _, names), loaded, registered = json.loads(run(TIMED))
        assert loaded == [] and registered
        if ours < 0.3 and names < 0.3:
            return
    pytest.fail(f"{ours:.2f} s over torch, {names:.2f} s over timm")


def test_type_checkers_see_what_is_loaded_when_used():
    tree = ast.parse(Path(sgmim_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    names = {name: f"sgmim_fast.{module}" for name, module in sgmim_fast._NAMES.items()}
    assert seen == names | dict.fromkeys(sgmim_fast._MODULES, "sgmim_fast")
    assert set(sgmim_fast.__all__) <= set(dir(sgmim_fast)) and set(seen) <= set(dir(sgmim_fast))


@pytest.mark.parametrize("name", sorted({*sgmim_fast._NAMES, *sgmim_fast._MODULES}))
def test_every_name_is_there_from_the_beginning(name):
    kind = ModuleType if name in sgmim_fast._MODULES else object
    assert isinstance(getattr(sgmim_fast, name), kind)
    if kind is object:
        assert getattr(sgmim_fast, name).__module__ == f"sgmim_fast.{sgmim_fast._NAMES[name]}"


def test_a_function_is_not_hidden_by_its_module():
    """Holds for both orders of the imports, in processes that have already imported torch and timm."""
    names = [name for name, module in sgmim_fast._NAMES.items() if name == module]
    functions = [f"from sgmim_fast import {name} as f_{name}" for name in names]
    modules = [f"from sgmim_fast.{name} import {name} as m_{name}" for name in names]
    same = [f"assert sgmim_fast.{name} is f_{name} is m_{name} and callable(f_{name})" for name in names]
    orders = ["\n".join(["import sgmim_fast", *order]) for order in ([*functions, *modules], [*modules, *functions])]
    run(FORKED.format(programs=["\n".join([order, *same]) for order in orders]))


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'sgmim_fast' has no attribute 'SGMIN'"):
        _ = sgmim_fast.SGMIN
