"""Fixtures for all tests (backends, poisoned buffers, seeds, threads), hypothesis settings, summary of skips."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch reads it: a thread that spins takes another worker's core
    os.environ["OMP_WAIT_POLICY"] = "passive"

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # code that was generated for other sources would be found by its key
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest
import torch
import torch.utils._device
from hypothesis import HealthCheck, register_random, settings

from sgmim_fast import backends, tuned
from sgmim_fast.ops import gemm

os.environ["SGMIM_FAST_TUNED"] = "0"  # tests ignore what the user has tuned
EXAMPLES = os.environ.get("SGMIM_FAST_EXAMPLES")  # number of hypothesis examples, which then differ in every run
SEED = os.environ.get("SGMIM_FAST_SEED")  # seed of random tensors; hypothesis examples then differ in every run

settings.register_profile(
    "sgmim_fast",
    deadline=None,  # the first call compiles or loads something
    max_examples=int(EXAMPLES or 15),
    derandomize=EXAMPLES is SEED is None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # all examples of a test share its `place`
)
settings.load_profile("sgmim_fast")

# `with torch.device(...)` caches the factory functions that it intercepts at its first use. If that were after
# `poisoned_buffers` has replaced some of them, tensors on the meta device would really be allocated.
torch.utils._device._device_constructors()

if not torch.cuda.is_available():
    # torch.manual_seed formats a stack trace for each device type that is not in use: a third of the time of many tests
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        devices.manual_seed_all = lambda seed: None

if backends.triton_interpreted() and importlib.util.find_spec("triton"):
    from triton.runtime import interpreter

    # Half of the interpreter's time goes to work without effect. It computes integer sums and products again in int64
    # for an assertion that it drops unless it debugs. And at each call of a device function it searches all of
    # triton.language for builtins to replace, although the call of the kernel has replaced them.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)

    @functools.cache
    def builtins_of(language) -> list[str]:
        return [name for name in dir(language) if interpreter.tl.core.is_builtin(getattr(language, name))]

    def patch_builtins(language, *args) -> None:
        for name in builtins_of(language):
            if interpreter.tl.core.is_builtin(member := getattr(language, name)):
                interpreter._patch_attr(language, name, member, *args)

    if {"_patch_builtin", "_patch_attr"} <= vars(interpreter).keys():  # private: another Triton may lack them
        interpreter._patch_builtin = patch_builtins

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # workers and their subprocesses share the cores
    threads_each = max(1, torch.get_num_threads() // int(workers))
    torch.set_num_threads(threads_each)
    os.environ["OMP_NUM_THREADS"] = str(threads_each)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Disables the garbage collector during collection, and freezes what was collected. These objects live until the
    end, so later collections need not traverse them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_configure(config):
    """Schedules slow tests one at a time; with the longest first, no worker is left with a long test at the end."""
    if config.option.markexpr == "slow" and hasattr(config.option, "maxschedchunk"):
        config.option.maxschedchunk = 1


def pytest_ignore_collect(collection_path, config):
    """Where the slow tests alone are wanted, a file that has none is not imported: all take each worker ten seconds."""
    if config.option.markexpr == "slow" and collection_path.match("test_*.py"):
        return "mark.slow" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: -max((mark.kwargs.get("minutes", 0) for mark in item.iter_markers("slow")), default=0))


def pytest_runtest_logreport(report):
    """With SGMIM_FAST_FAILURES=FILE, appends each failure to the file at once, in case a time limit ends the run."""
    if report.failed and (path := os.environ.get("SGMIM_FAST_FAILURES")):
        with open(path, "a") as file:
            print(f"#### {report.nodeid}\n{report.longreprtext[-3000:]}", file=file)


def pytest_terminal_summary(terminalreporter):
    """Prints how many tests were skipped for each reason; -rs lists every test."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons and "s" not in terminalreporter.reportchars:
        terminalreporter.section("skipped", sep="-")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:6} {reason}")


class TorchRandom:
    """Lets hypothesis seed torch's generator before each example, so that failures are reproducible."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()
register_random(torch_random)  # keeps only a weak reference


class Place(NamedTuple):
    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter. It is a thousand times slower, so tests use smaller sizes."""
        return self == ("triton", "cpu")


def _marks(backend: str, device: str) -> list[pytest.MarkDecorator]:
    """Returns the marks of a place. A place that cannot run on this machine is skipped before any fixture is set up."""
    if device == "cuda":
        return [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
    if backend == "triton":
        reason = "runs in Triton's interpreter, with TRITON_INTERPRET=1"
        return [pytest.mark.skipif(not backends.triton_interpreted(), reason=reason)]
    return []


PLACES = [
    pytest.param(Place(backend, device), id=f"{backend}-{device}", marks=_marks(backend, device))
    for backend, device in (
        *(("torch", "cpu"), ("cpu", "cpu"), ("triton", "cpu")),
        *(("torch", "cuda"), ("triton", "cuda"), ("cuda", "cuda")),
    )
]


@pytest.fixture(params=PLACES)
def place(request):
    """Runs the test once per backend and device type, with that backend forced.

    In test_NAME.py of an op NAME, and in tests with a parameter `op`, backends that do not implement the op are
    skipped, with the reason of `backends.can_run`. Backends that cannot run on this machine are skipped, too.
    """
    backend, params = request.param.backend, request.node.callspec.params
    op = params.get("op", request.module.__name__.rpartition(".")[2].removeprefix("test_"))
    usable, reason = backends.can_run(op, backend) if op in backends.MODULES else backends.available()[backend]
    if not usable:
        pytest.skip(reason)
    if backend == "cuda" and op in ("norm_attention", "window_attention"):
        pytest.skip("float32 and narrow heads are not its, test_cuda_window_attention.py has what is")
    dtype = getattr(params.get("precision"), "dtype", params.get("dtype"))
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels take float32 and bfloat16")
    with contextlib.ExitStack() as stack:
        stack.enter_context(backends.use(backend))
        if request.param.interpreted:  # gemms in bfloat16 as on a GPU, whatever is fastest on this CPU
            stack.enter_context(gemm.compute_bfloat16_in(torch.bfloat16))
        yield request.param


@pytest.fixture
def backend(place):
    """Name of the forced backend (see `place`)."""
    return place.backend


@pytest.fixture
def device(place):
    """Device for the tensors of the forced backend (see `place`)."""
    return torch.device(place.device)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(int(SEED or 0))


@pytest.fixture(autouse=True)
def new_choices():
    """Every test chooses the implementations of its calls anew, since it may replace some."""
    tuned.generation += 1


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Fills uninitialised buffers of the library with NaN, True, or the largest integer, to reveal elements that a
    kernel does not write."""

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            buffer = allocate(*args, **kwargs)
            # Under torch.compile the allocation itself is traced.
            if torch.compiler.is_compiling() or not _caller(1).startswith("sgmim_fast"):
                return buffer
            if buffer.is_floating_point() or buffer.is_complex():
                return buffer.fill_(torch.nan)
            return buffer.fill_(True if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).max)

        return allocate_and_fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def _caller(depth: int) -> str:
    """Returns the name of the module `depth` frames above the caller of this function."""
    return sys._getframe(depth + 1).f_globals.get("__name__", "")


@pytest.fixture
def threads():
    """`with threads(n):` runs torch, and thereby the C++ kernels, on n threads."""

    @contextlib.contextmanager
    def use(number):
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use
