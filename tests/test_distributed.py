"""Two processes under DistributedDataParallel, each with half of a batch, compute what one does with all of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import batch, drawn, family, stem_mask
from torch.nn.parallel import DistributedDataParallel

from sgmim_fast import SGMIM

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
DTYPES = (torch.float64, torch.float32)


def inputs(model: SGMIM, size: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns images, structure and mask of four images with equally many masked cells, for equal halves."""
    mask = stem_mask(model, size, drawn(model, size, count=4))
    return [*(t.to(dtype) for t in batch(model, size, count=4)), mask]


def process(rank: int, folder: str) -> None:
    """Runs one of two processes. The first one saves the mean loss and the averaged gradients of every dtype."""
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
            gradients = {name: p.grad for name, p in model.module.named_parameters()}
            torch.save((loss / 2, gradients), Path(folder, f"{dtype}.pt"))
    dist.destroy_process_group()


def other(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    process(1, folder)


def test_two_processes_equal_one(tmp_path, threads):
    """The first of the two processes is this one, because starting a process takes most of the time."""
    started = torch.multiprocessing.spawn(other, args=(str(tmp_path),), join=False)
    with threads(1):
        process(0, str(tmp_path))
    assert started.join()
    for dtype in DTYPES:
        model, size = family("vit")
        model = model.to(dtype)
        expected = model(*inputs(model, size, dtype))
        expected.backward()
        loss, gradients = torch.load(tmp_path / f"{dtype}.pt")
        # The 1e-5 that both losses add to the number of pixels makes a difference of 1e-9.
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-8, atol=0)
        for name, parameter in model.named_parameters():
            error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= (1e-5 if dtype == torch.float32 else 1e-8), name
