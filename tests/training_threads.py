"""A script for test_sanitizers.py: three Python threads train at once, each on its own backend.

    python tests/training_threads.py [race]

The exit code is 1 if the losses of a thread differ from those of a single thread. With `race`, two threads write to the
same buffer instead.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from functools import partial

import torch
from tiny import batch, family

from sgmim_fast import SGMIM, backends, selective_mask

STEPS = 3


def run(targets: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def train(model: SGMIM, size: tuple[int, int], backend: str, losses: list[float]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    grid = size[0] // model.encoder_stride, size[1] // model.encoder_stride
    with backends.use(backend):
        for step in range(STEPS):
            images, structure = (t.float() for t in batch(model, size, 2, seed=step))
            mask = selective_mask(2, grid, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(images, structure, mask)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())


def race() -> None:
    x, y = torch.randn(1 << 18), torch.empty(1 << 18)
    run([lambda: [torch.ops.sgmim_fast_cpu.gelu(x, y) for _ in range(20)]] * 2)


def main() -> int:
    torch.set_num_threads(1)  # several would wait in one pool, whose atomics are not instrumented
    model, size = family("swin")
    model = model.float()
    if sys.argv[1:] == ["race"]:
        assert backends.available()["cpu"][0]
        race()
        return 0
    names = ["cpu", "torch", "cpu"]
    losses: list[list[float]] = [[] for _ in names]
    models = [copy.deepcopy(model) for _ in names]
    run([partial(train, *each) for each in zip(models, [size] * len(names), names, losses, strict=True)])
    for name, found in zip(names, losses, strict=True):
        alone: list[float] = []
        train(copy.deepcopy(model), size, name, alone)
        if found != alone or len(found) != STEPS:
            print(f"{name}: {found} beside others, {alone} alone")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
