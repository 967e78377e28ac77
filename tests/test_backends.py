"""Selection of backends: forcing, the environment variable, reasons, and the order of the automatic choice."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgmim_fast import backends, ops
from sgmim_fast.ops import gemm

ROOT = Path(__file__).parents[1]
needs_cpu_library = pytest.mark.skipif(not backends.available()["cpu"][0], reason=backends.available()["cpu"][1])
OPS = sorted(backends.MODULES)


def python(program: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that can import sgmim_fast, with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "SGMIM_FAST_BACKEND"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)


def pixels(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, 8, 8).to(dtype), torch.arange(3)


def chosen(op: str, *args: object) -> str:
    """Returns the name of the module whose forward the automatic choice selects for the op."""
    return backends.choose(op, "forward", "cpu", args).__module__


def test_names():
    assert set(backends.available()) == set(backends.NAMES)
    assert backends.available()["torch"] == (True, "")
    assert all(usable or reason for usable, reason in backends.available().values())


@pytest.mark.parametrize("op", OPS)
def test_torch_runs_everything(op):
    assert backends.can_run(op, "torch") == (True, "")
    assert callable(backends.implementation(op, "forward", "torch"))


@pytest.mark.parametrize("op", OPS)
def test_a_backend_that_misses_an_op_says_so(op):
    for name in set(backends.NAMES) - {"torch"} - set(backends.MODULES[op]):
        assert backends.can_run(op, name) == (False, f"{op} has no {name} implementation")


@pytest.mark.parametrize("op", OPS)
def test_a_missing_backend_gives_its_reason(op):
    for name in backends.MODULES[op]:
        assert backends.can_run(op, name) == backends.available()[name]


@needs_cpu_library
def test_automatic_choice():
    assert chosen("gather_patches", *pixels(), 4, 4, False) == "sgmim_fast.ops.cpu.gather_patches"
    x, weight, bias, target, rows = torch.randn(3, 8), torch.randn(16, 8), torch.zeros(16), *pixels()
    args = x, weight, bias, target, None, rows, 4, True, 1.0, False, False
    assert chosen("linear_l1", *args, None) == "sgmim_fast.ops.cpu.primitives"
    assert chosen("linear_l1", *args, torch.bfloat16) == "sgmim_fast.ops.cpu.primitives"
    assert chosen("linear_l1", *args, torch.float16) == "sgmim_fast.ops._plain"
    assert chosen("linear_l1", x.double(), *args[1:], None) == "sgmim_fast.ops._plain"


@needs_cpu_library
def test_reasons():
    args = *pixels(torch.float64), None
    usable, reason = backends.can_run("linear_l1", "cpu", torch.zeros(3, 8, dtype=torch.float64), None)
    assert not usable and "float64" in reason and "float32 and bfloat16" in reason
    usable, reason = backends.can_run("gather_patches", "cpu", args[0].to(torch.complex128))
    assert not usable and "16 bytes" in reason
    usable, reason = backends.can_run("gather_patches", "cpu", args[0].to("meta"))
    assert not usable and reason == "the cpu backend needs cpu tensors, got one on meta"
    four = [torch.zeros(1)] * 4
    usable, reason = backends.can_run("structure_embed", "cpu", args[0].float(), args[1], four, 4, 1e-5, None)
    assert not usable and "without patch mergings" in reason


@needs_cpu_library
def test_use_forces_and_nests():
    assert backends.forced() is None
    with backends.use("torch"):
        assert backends.forced() == "torch"
        assert chosen("gather_patches", *pixels(), 4, 4, False) == "sgmim_fast.ops.gather_patches"
        with backends.use("cpu"):
            assert backends.forced() == "cpu"
            assert chosen("gather_patches", *pixels(), 4, 4, False) == "sgmim_fast.ops.cpu.gather_patches"
        assert backends.forced() == "torch"
    assert backends.forced() is None


def test_use_ends_with_the_block_when_it_raises():
    with pytest.raises(KeyError), backends.use("torch"):
        raise KeyError
    assert backends.forced() is None


def test_a_forced_backend_that_cannot_run_raises_with_the_reason():
    reason = backends.available()["triton"][1]
    with (
        backends.use("triton"),
        pytest.raises(RuntimeError, match=r"backend 'triton' was forced but cannot run ") as error,
    ):
        ops.gather_patches(*pixels(), cell=4, patch=4)
    assert reason in str(error.value) or "gather_patches has no triton implementation" in str(error.value)


@needs_cpu_library
def test_a_forced_backend_raises_on_a_dtype_it_lacks():
    x, weight, bias = (t.double() for t in (torch.randn(3, 8), torch.randn(16, 8), torch.zeros(16)))
    target, rows = pixels(torch.float64)
    with (
        backends.use("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' was forced but cannot run linear_l1: dtype torch\.float64"),
    ):
        ops.linear_l1(x, weight, bias, target, rows, cell=4)


@pytest.mark.parametrize("name", ["", "CPU", "numpy"])
def test_unknown_names(name):
    with (
        pytest.raises(ValueError, match=f"name is {name!r}; expected one of cuda, triton, cpu, torch"),
        backends.use(name),
    ):
        pass
    with pytest.raises(ValueError, match=f"backend is {name!r}; expected one of"):
        backends.can_run("linear_l1", name)
    with pytest.raises(ValueError, match=f"op is {name!r}; expected one of .*linear_l1"):
        backends.can_run(name, "torch")


def test_environment_variable():
    program = """
import torch
from sgmim_fast import backends, ops
print(backends.forced())
with backends.use("torch"):
    print(backends.forced())
print(backends.choose("gather_patches", "forward", "cpu", (torch.zeros(1, 1, 8, 8), torch.arange(1))).__module__)
"""
    done = python(program, SGMIM_FAST_BACKEND=" Torch ")
    assert done.stdout.split() == ["torch", "torch", "sgmim_fast.ops.gather_patches"], done.stderr


def test_without_a_library_the_torch_backend_takes_over(tmp_path):
    program = """
import torch
from sgmim_fast import backends, ops
print(backends.available()["cpu"][1])
print(ops.gather_patches(torch.arange(64.0).view(1, 1, 8, 8), torch.tensor([3]), cell=4, patch=4).sum().item())
with backends.use("cpu"):
    ops.gather_patches(torch.zeros(1, 1, 8, 8), torch.tensor([3]), cell=4, patch=4)
"""
    missing = str(tmp_path / "missing.so")
    done = python(program, SGMIM_FAST_LIBRARY=missing)
    reason, total = done.stdout.splitlines()
    assert missing in reason and float(total) == sum(8 * y + x for y in range(4, 8) for x in range(4, 8))
    assert f"RuntimeError: backend 'cpu' was forced but cannot run gather_patches: {missing}" in done.stderr


def test_choice_of_the_dtype_of_bfloat16_products():
    x = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        with gemm.compute_bfloat16_in(dtype):
            assert gemm.compute_dtype(torch.bfloat16, x) == dtype
            assert gemm.compute_dtype(torch.float32, x) == torch.float32
    with pytest.raises(ValueError, match=r"dtype is torch.float16; expected torch.float32 or torch.bfloat16"):
        gemm.compute_bfloat16_in(torch.float16).__enter__()


@pytest.fixture
def environment(monkeypatch):
    """Sets an environment variable and clears the caches of its value, now and after the test."""
    caches = [backends._environment, gemm._bfloat16_on_cpu]

    def change(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        for cache in caches:
            cache.cache_clear()

    yield change
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_gemm_variable(environment, value):
    environment("SGMIM_FAST_PRODUCTS", value)
    assert gemm.compute_dtype(torch.bfloat16, torch.device("cpu")) == getattr(torch, value)


def test_environment_variables_with_unknown_values(environment):
    environment("SGMIM_FAST_PRODUCTS", "half")
    with pytest.raises(ValueError, match="SGMIM_FAST_PRODUCTS is 'half'; expected auto, float32 or bfloat16"):
        gemm.compute_dtype(torch.bfloat16, torch.device("cpu"))
    environment("SGMIM_FAST_BACKEND", "numpy")
    with pytest.raises(ValueError, match="SGMIM_FAST_BACKEND is 'numpy'; expected one of cuda, triton, cpu, torch"):
        backends.forced()


ONE_STEP = """
import os, sys, timm, torch
folder, *wanted = sys.argv[1:]
for isa in wanted:  # in a process each, which has torch already
    if os.fork() == 0:
        os.environ["SGMIM_FAST_CPU_ISA"] = isa
        from tiny import batch, drawn, foreign, gradients
        from sgmim_fast import backends
        backends.available()
        model = foreign(width=40, stride=32)
        inputs = [t.float() for t in batch(model, (64, 96))]
        loss = model(*inputs, drawn(model, (64, 96), ratio=[0.3, 0.8]))
        found = {"loss": loss.detach()} | gradients(model, loss)
        torch.save((torch.ops.sgmim_fast_cpu.isa(), found), f"{folder}/{isa}.pt")
        os._exit(0)
    assert os.wait()[1] == 0, isa
"""


@needs_cpu_library
def test_every_instruction_set_gives_the_same(tmp_path):
    """The variable can lower the instruction set of the machine, but not raise it."""
    wanted = "avx512bf16", "avx512", "avx2", "baseline"
    done = python(ONE_STEP, tmp_path, *wanted)
    assert done.returncode == 0, done.stderr
    sets, results = zip(*(torch.load(tmp_path / f"{isa}.pt") for isa in wanted), strict=True)
    assert sets[-1] == "baseline" and sets[-2] in ("avx2", "baseline")
    for other in results[1:]:
        for name, expected in results[0].items():
            assert (other[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.4.0", (8, 0), ""),
        ("3.10.1+git0", (9, 0), ""),
        ("3.3.1", (9, 0), "triton is 3.3.1; expected 3.4 or newer"),
        (None, (9, 0), "triton is not installed"),
        ("3.9.0", (7, 5), "the GPU is older than compute capability 8.0"),
    ],
    ids=str,
)
def test_triton_missing_or_too_old(monkeypatch, caplog, version, capability, reason):
    """On a GPU without a usable Triton, one line is logged and the next backend is selected."""

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with caplog.at_level("WARNING", logger="sgmim_fast"):
        assert backends._triton() == (not reason, reason)
    assert [record.getMessage() for record in caplog.records] == (
        [f"the Triton backend is not available: {reason}"] if reason else []
    )


def test_order_on_a_gpu(monkeypatch):
    """CUDA C++ is preferred, then Triton, then plain PyTorch."""
    able = {"cuda", "triton", "torch"}
    monkeypatch.setattr(backends, "can_run", lambda op, name, *args, part: (name in able, "made up"))
    monkeypatch.setattr(backends, "implementation", lambda op, part, name: name)
    for name in ("cuda", "triton", "torch"):
        assert backends.choose("linear_l1", "forward", "cuda", []) == name
        able.discard(name)
