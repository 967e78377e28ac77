"""Measured dispatch: what `sgmim_fast.tune` selects, stores and does not change, and how invalid files are handled."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from calls import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from test_cli import output
from tiny import batch, drawn, family

import sgmim_fast
from sgmim_fast import backends, ops, tuned
from sgmim_fast.tune import Winner, table

tune_module = importlib.import_module("sgmim_fast.tune")  # the package's attribute of this name is the function

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(not backends.available()["cpu"][0], reason=backends.available()["cpu"][1]),
    pytest.mark.skipif(backends.triton_interpreted(), reason="tunes for minutes in Triton's interpreter"),
]
COMPOSED = sorted(op for op in backends.MODULES if backends.composed(op))


class Mlp(torch.nn.Module):
    """One op, forward and backward."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, 3 * width), torch.nn.Linear(3 * width, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
        norm = {"norm_weight": self.norm.weight, "norm_bias": self.norm.bias}
        return ops.norm_mlp(x, *self.fc1.parameters(), *self.fc2.parameters(), **norm)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A temporary cache folder, in use."""
    monkeypatch.setenv("SGMIM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SGMIM_FAST_TUNED", raising=False)
    tuned.forget()
    yield tmp_path / "cache" / "tuned"
    tuned.forget()


@pytest.fixture
def slow(monkeypatch):
    """`slow(way, ...)` makes every call of these implementations 10 ms slower."""
    implementation = backends.implementation

    def choose(*ways):
        def slowed(op, part, way):
            function = implementation(op, part, way)

            def run(*args):
                if way in ways:
                    time.sleep(0.01)
                return function(*args)

            run.__module__, run.way = function.__module__, way
            return run

        monkeypatch.setattr(backends, "implementation", slowed)

    return choose


def tune_mlp(x=None, dtype=torch.float32, **options) -> Winner:
    (found,) = sgmim_fast.tune(Mlp(), [torch.randn(20, 8) if x is None else x], dtype, report=None, **options)
    return found


def chosen(rows: int = 20, part: str = "forward") -> str:
    """Returns the implementation selected for `Mlp` with this number of rows."""
    found = []
    choose, model = backends.choose, Mlp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "state", lambda: None)  # no choice of an earlier call is used again
        patch.setattr(backends, "choose", lambda *call: found.append((call[1], choose(*call))) or found[-1][1])
        model(torch.randn(rows, 8)).sum().backward()
    return dict(found)[part].way


@pytest.mark.parametrize(("ways", "wins"), [(("cpu",), "torch"), (("torch", "torch:library"), "cpu")])
def test_the_fastest_way_is_used_from_then_on(slow, ways, wins, cache):
    """This process uses it, and later ones through the file. At other shapes the choice is as without a table."""
    slow(*ways)
    assert chosen() == "cpu"
    found = tune_mlp()
    assert found.name == wins and found.default == "cpu" and not found.refused
    for _ in range(2):
        assert {chosen(part=part).partition(":")[0] for part in ("forward", "backward")} == {wins}
        assert chosen(21) == "cpu"
        tuned.forget()
    assert len(list(cache.rglob("*.json"))) == 1
    with backends.use("cpu"):
        assert chosen() == "cpu"


def test_parts_have_variants_of_one_backend(slow):
    """A backward reads what the forward of the same backend has saved."""
    slow("cpu")
    found = tune_mlp()
    assert found.backend.keys() == {"forward", "backward"}
    assert {name.partition(":")[0] for name in found.backend.values()} == {"torch"}
    assert found.seconds.keys() == {"cpu", "torch"} and found.seconds["cpu"] > 0.02


def test_a_wrong_or_raising_way_is_left_out(monkeypatch, slow):
    implementation = backends.implementation

    def wrong(op, part, way):
        function = implementation(op, part, way)
        if way == "torch:library":

            def run(*args):
                raise RuntimeError("out of resource")
        elif way == "cpu" and part == "backward":

            def run(*args):
                return [None if g is None else g * 1.01 for g in function(*args)]
        else:
            return function
        return run

    monkeypatch.setattr(backends, "implementation", wrong)
    found = tune_mlp()
    assert found.name == "torch" and set(found.backend.values()) == {"torch"}
    assert found.refused["torch:library"] == "RuntimeError: out of resource"
    assert "result 0 of its backward is off by" in found.refused["cpu"]
    assert any("cpu is left out: ArithmeticError" in line for line in table([found]))


def test_a_small_error_of_plain_pytorch_by_chance(monkeypatch):
    """It does not count alone: with other draws of the arguments, the error is larger."""
    tolerances, calls = tune_module._tolerances, []

    def exact_at_first(plain, truth):
        calls.append(1)
        return [0.0, 0.0] if len(calls) == 1 else tolerances(plain, truth)

    monkeypatch.setattr(tune_module, "_tolerances", exact_at_first)
    assert not tune_mlp(torch.randn(300, 8)).refused and len(calls) > 3


def test_one_wrong_row_of_many_is_seen(monkeypatch):
    implementation = backends.implementation

    def wrong(op, part, way):
        function = implementation(op, part, way)

        def run(*args):
            out, saved = function(*args)
            out[-1] = 0
            return out, saved

        return run if way == "cpu" and part == "forward" else function

    monkeypatch.setattr(backends, "implementation", wrong)
    assert "result 0 of its forward" in tune_mlp(torch.randn(3000, 8), torch.bfloat16).refused["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_no_op_of_a_model_is_slower_than_plain_pytorch(name, dtype):
    """Holds whatever the times of the backends are here. No result is wrong, and every op of a step is in the table."""
    model, size = family(name)
    inputs = [*(t.float() for t in batch(model, size)), drawn(model, size)]
    found = sgmim_fast.tune(model, inputs, dtype, report=None, seconds=3)
    called = set()
    backends.WATCHED.append(lambda op, part, device, args: called.add((op, part, tuned.key(op, part, args))))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(*inputs).backward()
    backends.WATCHED.pop()
    # Except the patches that PyTorch's implementation of an op gathers and ours does not.
    known, called = ({k for k in keys if backends.composed(k[0])} for keys in (tuned.read("cpu"), called))
    assert called == known
    assert {op for op, *_ in called} >= {"norm_attention", "norm_mlp", "structure_embed", "linear_l1"}
    for winner in found:
        assert winner.refused == {} and winner.seconds[winner.name] <= winner.seconds["torch"]


def test_results_are_the_same_up_to_rounding(slow):
    model, size = family("vit")
    inputs = [*(t.float() for t in batch(model, size)), drawn(model, size)]
    before = model(*inputs).item()
    slow("cpu")
    sgmim_fast.tune(model, inputs, torch.float32, report=None, seconds=1)
    assert abs(model(*inputs).item() - before) <= 1e-5 * abs(before)


def test_a_model_is_left_as_it_was():
    model, _ = family("swin")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = sgmim_fast.tune(model, 2, torch.float32, report=None, seconds=1)
    assert {w.op for w in found} >= {"selective_mask", "standardize_structure"} and not any(w.refused for w in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g and bool((g == 1).all()) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not backends.WATCHED


def test_evaluation_has_no_backward():
    model, x = Mlp().eval(), torch.randn(20, 8)
    (found,) = sgmim_fast.tune(model, [x], torch.float32, report=None)
    assert found.backend.keys() == {"forward"}


@pytest.mark.parametrize("op", backends.MODULES)
def test_every_op_has_a_key(op):
    """A key contains names of the op's schema. Forward and backward of a composite op have the same key."""
    calls = []
    backends.WATCHED.append(lambda op, part, device, args: calls.append((op, part, tuned.key(op, part, args))))
    args = EXAMPLES[op]()
    tensors = [t.requires_grad_() for t in _tensors(args) if t.is_floating_point()]
    result = getattr(torch.ops.sgmim_fast, op)(*args)
    result = result[0] if isinstance(result, tuple | list) else result
    if result.requires_grad:
        torch.autograd.grad(result.sum(), tensors, allow_unused=True)
    backends.WATCHED.pop()
    mine = [call for call in calls if call[0] == op]
    assert [part for _, part, _ in mine] == ["forward", "backward"][: len(mine)] and mine
    if op in COMPOSED:
        assert mine[0][2] == mine[1][2]
    assert all(tuned._from_json(json.loads(json.dumps(tuned._to_json(key)))) == key for *_, key in calls)


def _tensors(args):
    for arg in args:
        yield from _tensors(arg) if isinstance(arg, list) else [arg] if isinstance(arg, torch.Tensor) else []


def test_a_lookup_takes_a_fraction_of_choosing():
    """A table adds 0.8 us to 6.8 us. The test takes the minimum of many alternating rounds, in thread time."""
    args = EXAMPLES["norm_mlp"]()
    tables = {}, {("norm_mlp", "forward", tuned.key("norm_mlp", "forward", args)): "cpu"}
    least = [float("inf")] * 2
    for i in [0, 1] * 100:
        tuned._tables["cpu"] = tables[i]
        start = time.thread_time()
        for _ in range(300):
            backends.choose("norm_mlp", "forward", "cpu", args)
        least[i] = min(least[i], (time.thread_time() - start) / 300)
    assert least[1] < 1.3 * least[0]


# Files


def kept(cache) -> Path:
    tune_mlp()
    (path,) = cache.rglob("*.json")
    return path


@pytest.mark.parametrize("name", ["torch", "sgmim_fast", "triton", "built", "device", "threads"])
def test_another_version_or_machine_measures_again(cache, monkeypatch, name):
    path, machine = kept(cache), tuned.machine
    monkeypatch.setattr(tuned, "machine", lambda device: machine(device) | {name: "another"})
    assert tuned.read("cpu") == {}
    other = tuned.table_folder("cpu") / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())  # the first version's file at the new version's path
    assert tuned.read("cpu") == {}
    tune_mlp()
    assert len(tuned.read("cpu")) == 2 and path.exists()


@given(data=st.data())
def test_broken_files_are_as_if_not_there(cache, data, caplog):
    """Truncated files, flipped bits and other contents are not read and do not raise; a warning is logged."""
    path = next(iter(cache.rglob("*.json")), None) or kept(cache)
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "bit", "text", "nested"]))
    if kind == "cut":
        broken = whole[: data.draw(st.integers(0, len(whole) - 3))]
    elif kind == "bit":
        at = data.draw(st.integers(0, len(whole) - 1))
        broken = whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :]
    else:
        broken = data.draw(st.binary()) if kind == "text" else b"[" * 100_000
    try:
        same = json.loads(broken) == json.loads(whole)  # only white space differs
    except (ValueError, RecursionError):
        same = False
    path.write_bytes(broken)
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING, "sgmim_fast"):
            assert bool(tuned.read("cpu")) == same
        assert same or str(path) in caplog.text
    finally:
        path.write_bytes(whole)


def test_a_broken_file_is_made_anew(cache):
    path = kept(cache)
    path.write_text("{")
    tuned.forget()
    assert tuned.read("cpu") == {}
    assert kept(cache) == path and len(tuned.read("cpu")) == 2


def test_measurements_of_several_models_are_kept_beside_each_other(cache, slow):
    tune_mlp()
    tune_mlp(torch.randn(30, 8))
    before = tuned.read("cpu")
    assert len(before) == 4 and len(list(cache.rglob("*.json"))) == 2
    slow("cpu")
    tune_mlp()
    after = tuned.read("cpu")
    others = [found for found in before if 30 in found[2][0]]
    assert after.keys() == before.keys() and len(others) == 2
    assert all(after[found] == before[found] for found in others)
    tuned.forget()
    assert chosen().startswith("torch")


@pytest.mark.parametrize("place", ["file", "missing"])
def test_where_nothing_can_be_written_this_process_knows(tmp_path, monkeypatch, slow, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGMIM_FAST_CACHE", str(tmp_path / "file") if place == "file" else "/proc/none")
    slow("cpu")
    lines = []
    sgmim_fast.tune(Mlp(), [torch.randn(20, 8)], torch.float32, report=lines.append)
    assert lines[-1].startswith("kept for this process alone: ")
    assert chosen().startswith("torch")
    tuned.forget()
    assert chosen() == "cpu"


def test_switched_off(monkeypatch, slow, cache):
    slow("cpu")
    tune_mlp()
    tuned.forget()
    monkeypatch.setenv("SGMIM_FAST_TUNED", "0")
    assert chosen() == "cpu"
    with pytest.raises(RuntimeError, match="SGMIM_FAST_TUNED is 0"):
        tune_mlp()
    tuned.forget()
    monkeypatch.setenv("SGMIM_FAST_TUNED", "maybe")
    with pytest.raises(ValueError, match="SGMIM_FAST_TUNED is 'maybe'; expected 0 or 1"):
        chosen()


PROGRAM = """
import logging, os, sys, torch, sgmim_fast
from test_tune import Mlp
from sgmim_fast import tuned
logging.basicConfig(level=logging.WARNING)
torch.set_num_threads(1)

def work(who, rounds):
    for _ in range(rounds):
        if who == "reads":
            sizes = {len(tuned.read("cpu"))}
            assert sizes <= {0, 2, 4}, sizes
        else:
            sgmim_fast.tune(Mlp(), [torch.randn(int(who), 8)], torch.float32, seconds=0.01, report=None)

children = []
for call in (("20", 6), ("20", 6), ("30", 6), ("reads", 100)):
    if not (child := os.fork()):
        work(*call)
        os._exit(0)
    children.append(child)
assert all([os.waitpid(child, 0)[1] == 0 for child in children])
"""


def test_processes_tune_and_read_at_once(cache):
    """Two processes tune the same model and a third another one; a fourth keeps reading, and sees no partial file."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM]  # Python warns at every fork
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.stderr, done.returncode) == ("", 0)
    files = [path.name for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(name.endswith(".json") for name in files)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_tiles_of_triton_are_measured_too(cache):
    """Runs in Triton's interpreter, in which tiles give right results but are never the fastest."""
    program = """
import sys, torch, sgmim_fast
from test_tune import Mlp
sgmim_fast.tune
found, tune = {}, sys.modules["sgmim_fast.tune"]
meter = tune._Meter._time
tune._Meter._time = lambda self, calls: found.setdefault("ways", []).append(list(calls)) or meter(self, calls)
(winner,) = sgmim_fast.tune(Mlp(16), [torch.randn(8, 16)], torch.float32, seconds=0.01, report=None)
assert not winner.refused, winner.refused
assert {name.partition(":")[0] for name in winner.seconds} == {"triton", "cpu", "torch"} and winner.name != "triton"
for ways in found["ways"]:
    assert sum(way.startswith("triton:") for way in ways) >= 4, ways
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


# Errors and the command


def test_errors_name_the_argument():
    for call, message in (
        (lambda: sgmim_fast.tune(Mlp(), 2), "model a Mlp; expected an SGMIM"),
        (lambda: sgmim_fast.tune(family("vit")[0], 0), "batch is 0; expected at least 1"),
        (lambda: sgmim_fast.tune(Mlp(), "four"), "batch is a str"),
        (lambda: tune_mlp(dtype=torch.float64), "dtype is torch.float64; expected torch.float32"),
        (lambda: tune_mlp(seconds=0), "seconds is 0; expected more than 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with backends.use("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced"):
        tune_mlp()


TINY = ("--preset", "tiny_demo", "--batch", 2, "--precision", "float32", "--seconds", 1, "--device", "cpu")


def test_command(capsys, cache):
    out, _ = output(capsys, 0, "tune", *TINY)
    assert "swinv2_tiny_window8_256, 2 images of 96 pixels, float32, cpu" in out
    assert "norm_attention" in out and f"kept in {cache}" in out
    assert f"choices in {cache}" in output(capsys, 0, "env")[0]


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ((), {}, "give --preset"),
        ((*TINY, "--seconds", 0), {}, "--seconds is 0.0"),
        ((*TINY, "--precision", "half"), {}, "run.precision"),
        (TINY, {"SGMIM_FAST_TUNED": "0"}, "SGMIM_FAST_TUNED is 0"),
        (TINY, {"SGMIM_FAST_CACHE": "/proc/none"}, "SGMIM_FAST_CACHE names another folder"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(capsys, monkeypatch, words, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in output(capsys, 2, "tune", *words)[1]
