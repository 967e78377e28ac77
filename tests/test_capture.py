"""`capture`: what it does around a graph, with one that runs on the CPU, and on a GPU."""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_graph import FakeGraph
from tiny import FAMILIES, batch, drawn, family, stem_mask
from torch import Tensor, nn

import sgmim_fast
from sgmim_fast import SGMIM, SelectiveMask, backends, capture, selective_mask

CAPTURE = sys.modules["sgmim_fast.capture"]


@pytest.fixture
def graphs(monkeypatch):
    """Steps on the CPU are captured, with the backend that does on one what it does on a GPU."""
    monkeypatch.setattr(CAPTURE, "Graph", FakeGraph)
    with backends.use("torch"):
        yield FakeGraph


def data(model: SGMIM, size: tuple[int, int], step: int, count: int = 2) -> tuple[Tensor, Tensor, SelectiveMask]:
    """Another batch, with other masks, at each step."""
    images, structure = (x.float() for x in batch(model, size, count, seed=10 + step))
    return images, structure, drawn(model, size, count, seed=20 + step)


def eager_step(model: nn.Module, *inputs: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """What everybody writes."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*inputs, **options)
    loss.backward()
    return loss.detach()


def state(model: nn.Module, grads: bool = True) -> dict[str, Tensor]:
    """Parameters and their gradients, copied."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    if grads:
        found |= {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit"])
def test_replays_are_the_eager_step(graphs, name):
    """Loss and every gradient to the bit, while images, structure, masks and weights change."""
    model, size = family(name)
    plain = copy.deepcopy(model)
    step = capture(model, autocast=torch.bfloat16)
    for i in range(5):
        inputs = data(model, size, i)
        model.zero_grad()
        plain.zero_grad()
        assert torch.equal(step(*inputs), eager_step(plain, *inputs, dtype=torch.bfloat16))
        assert_same(state(model), state(plain))
        with torch.no_grad():
            for those in (model.parameters(), plain.parameters()):
                for p in those:
                    p -= 0.01 * p.grad
    assert step.captures == 1 and step.reasons == []
