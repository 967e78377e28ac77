"""Two processes, each with half of a batch, compute what one does with all of it: under DistributedDataParallel, and
with captured steps whose gradients are averaged."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fake_graph import FakeGraph, values_unread
from tiny import batch, drawn, family, stem_mask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sgmim_fast import SGMIM, backends, capture, gradients

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
DTYPES = (torch.float64, torch.float32)
CALLS, ACCUMULATE = 10, 2


def inputs(model: SGMIM, size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Returns images, structure and mask of four images with equally many masked cells, for equal halves."""
    mask = stem_mask(model, size, drawn(model, size, count=4))
    return [*(t.to(dtype) for t in batch(model, size, count=4)), mask]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def batches(model: SGMIM, size: tuple[int, int]) -> list[list[Tensor]]:
    """Returns two batches for every call, one for each process."""
    return [[x.double() for x in batch(model, size, 2, seed=seed)] for seed in range(2 * CALLS)]


@contextlib.contextmanager
def graphs() -> Iterator[str]:
    """Gives the device of captured steps: a GPU, which both processes share, or the CPU with simulated graphs."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    simulated = mock.patch.object(sys.modules["sgmim_fast.capture"], "Graph", FakeGraph)
    with simulated, backends.use("torch"), values_unread():
        yield "cpu"


def captured(rank: int) -> tuple[dict[str, Tensor], int, list[str]]:
    """Trains with captured steps. The second process starts with other parameters."""
    model, size = family("vit")
    if rank:
        nn.init.normal_(next(model.parameters()))
    with graphs() as device:
        model = model.to(device, torch.float64)
        step = capture(model, sgd(model), clip=0.5, accumulate=ACCUMULATE, process_group=dist.group.WORLD)
        for call, (images, structure) in enumerate(batches(model, size)[rank::2]):
            step(images, structure, drawn(model, size, 2, seed=2 * call + rank))
    return {name: p.detach().cpu() for name, p in model.named_parameters()}, step.captures, step.reasons


def few_gradients(rank: int) -> tuple[list[Tensor | None], str]:
    """Averages gradients of which each process lacks some, in buckets of one each, and then one that came later."""
    parameters = [nn.Parameter(torch.zeros(2, 3)), *(nn.Parameter(torch.zeros(4)) for _ in range(3))]
    average = gradients.Averaging(parameters, dist.group.WORLD)
    with mock.patch.object(gradients, "BUCKET", 16):
        for _ in range(2):
            for p in parameters:
                p.grad = None
            parameters[0].grad = torch.arange(6.0).view(3, 2).t() * (1 + rank)  # not contiguous
            parameters[1 + rank].grad = torch.ones(4)
            average()
    found = [p.grad for p in parameters]
    parameters[3].grad = torch.ones(4)
    try:
        average()
    except RuntimeError as error:
        return found, str(error)
    return found, ""


def process(rank: int, folder: str) -> None:
    """Runs one of two processes, and saves what both, or the first one, have in the end."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    for dtype in DTYPES:
        model, size = family("vit")
        model = DistributedDataParallel(model.to(dtype))
        half = [t[2 * rank : 2 * rank + 2] for t in inputs(model.module, size, dtype)]
        loss = model(*half)
        loss.backward()
        dist.all_reduce(loss := loss.detach())
        if rank == 0:
            found = {name: p.grad for name, p in model.module.named_parameters()}
            torch.save((loss / 2, found), Path(folder, f"{dtype}.pt"))
    torch.save(captured(rank), Path(folder, f"captured-{rank}.pt"))
    torch.save(few_gradients(rank), Path(folder, f"few-{rank}.pt"))
    # The model holds the process group. With torch 2.11, a group that is freed with the model waits for its threads,
    # and these for the interpreter's lock, to free their last tensors.
    del model
    dist.barrier()
    dist.destroy_process_group()


def other(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    process(1, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs both processes. The first one is this one, because starting a process takes most of the time."""
    path, threads = tmp_path_factory.mktemp("processes"), torch.get_num_threads()
    started = torch.multiprocessing.spawn(other, args=(str(path),), join=False)
    torch.set_num_threads(1)
    try:
        process(0, str(path))
    finally:
        torch.set_num_threads(threads)
    assert started.join()
    return path


def test_data_parallel_equals_one_process(folder):
    for dtype in DTYPES:
        model, size = family("vit")
        model = model.to(dtype)
        expected = model(*inputs(model, size, dtype))
        expected.backward()
        loss, found = torch.load(folder / f"{dtype}.pt")
        # The 1e-5 that both losses add to the number of pixels makes a difference of 1e-9.
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-8, atol=0)
        for name, parameter in model.named_parameters():
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= (1e-5 if dtype == torch.float32 else 1e-8), name


def test_captured_steps_equal_one_process(folder):
    """Five optimizer steps of two calls each, of which all but the first two calls are replays."""
    model, size = family("vit")
    model = model.double()
    optimizer, data = sgd(model), batches(model, size)
    for step in range(CALLS // ACCUMULATE):
        optimizer.zero_grad()
        share = range(2 * ACCUMULATE * step, 2 * ACCUMULATE * (step + 1))
        for i in share:
            (model(*data[i], drawn(model, size, 2, seed=i)) / len(share)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for rank in range(2):
        found, captures, reasons = torch.load(folder / f"captured-{rank}.pt")
        assert captures >= 1 and reasons == []
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-9, atol=1e-12, msg=name)


def test_a_process_without_a_gradient_contributes_zeros(folder):
    for rank in range(2):
        (first, second, third, fourth), error = torch.load(folder / f"few-{rank}.pt")
        assert torch.equal(first, torch.arange(6.0).view(3, 2).t() * 1.5)
        assert torch.equal(second, torch.full((4,), 0.5)) and torch.equal(third, second)
        assert fourth is None and "parameter 3, of shape (4,), has a gradient that no process had" in error


def test_a_wrapper_and_a_process_group_are_refused(monkeypatch):
    model, _ = family("vit")
    monkeypatch.setattr(sys.modules["sgmim_fast.capture"], "DistributedDataParallel", SGMIM)
    with pytest.raises(ValueError, match="process_group with a model that communicates itself"):
        capture(model, process_group="any")
