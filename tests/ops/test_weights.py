"""Copies of weights in the dtype of the gemms: the backward reads the forward's, and none is ever stale."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from sgmim_fast.ops import target
from sgmim_fast.ops.weights import weights_in

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Where alone copies are kept."""
    monkeypatch.setattr(target, "on_gpu", lambda weight: True)


def data(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def other_data(weight: nn.Parameter) -> None:
    weight.data = 2 * weight.data


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1)


def step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.5).step()


def fused_step(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], 0.5, fused=True).step()


def load(weight: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": weight.detach() + 1})


def load_assigned(weight: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": nn.Parameter(weight.detach() + 1)}, assign=True)


def gathered(weight: nn.Parameter) -> None:
    """As FSDP does: the memory is given up and filled anew, without a trace in the version."""
    storage, values = weight.untyped_storage(), weight.detach() + 1
    storage.resize_(0)
    storage.resize_(values.numel() * values.itemsize)
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.copy_(values)


CHANGES = [data, other_data, in_place, step, fused_step, load, load_assigned, gathered]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backward", [False, True])
def test_a_forward_reads_what_the_weight_is(change, backward):
    """Whether the forward before it had a backward or not."""
    weight = nn.Parameter(torch.randn(6, 5))
    weights_in(LOW, weight)
    if backward:
        weights_in(LOW, weight, last=True)
    change(weight)
    assert torch.equal(weights_in(LOW, weight)[0], weight.detach().to(LOW))


def test_the_backward_reads_the_forwards_copy_and_lets_it_go():
    weight, bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
    forward, _, nothing = weights_in(LOW, weight, bias, None)
    assert nothing is None
    (backward,) = weights_in(LOW, weight, last=True)
    assert backward is forward
    gone = weakref.ref(forward)
    del forward, backward
    gc.collect()
    assert gone() is None
    assert torch.equal(weights_in(LOW, weight, last=True)[0], weight.detach().to(LOW))  # of a graph that was retained


@pytest.mark.parametrize("change", [in_place, step, load])
def test_the_backward_sees_what_autograd_sees(change):
    """Which raises, in the end, since the weight was saved: until then nothing is computed with the old one."""
    weight = nn.Parameter(torch.randn(6, 5))
    weights_in(LOW, weight)
    change(weight)
    assert torch.equal(weights_in(LOW, weight, last=True)[0], weight.detach().to(LOW))


def test_what_needs_no_copy():
    weight, frozen = nn.Parameter(torch.randn(6, 5).mT), torch.randn(6, 5)
    (found,) = weights_in(torch.float32, weight)
    assert torch.equal(found, weight) and found.is_contiguous() and not found.requires_grad
    first, second = weights_in(LOW, frozen)[0], weights_in(LOW, frozen, last=True)[0]
    assert first is not second  # no backward is expected to read it


def test_other_dtype_and_another_weight():
    weight = nn.Parameter(torch.randn(6, 5))
    weights_in(LOW, weight)
    assert weights_in(torch.float16, weight, last=True)[0].dtype == torch.float16
    weights_in(LOW, weight)
    twin = copy.deepcopy(weight)
    in_place(twin)
    assert torch.equal(weights_in(LOW, twin, last=True)[0], twin.detach().to(LOW))
