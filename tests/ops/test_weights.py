"""Copies of weights in the dtype of the gemms: the backward reads the copies of the forward, and none is outdated."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from sgmim_fast import SGMIM, backends, create_encoder, ops, selective_mask
from sgmim_fast.ops import gemm, target, weights
from sgmim_fast.ops.cpu import gemm as cpu_gemm
from sgmim_fast.ops.weights import cast_together, weights_in

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Simulates a GPU, since copies are kept only there."""
    monkeypatch.setattr(target, "on_gpu", lambda weight: True)
    monkeypatch.setattr(cpu_gemm, "reads_float32_weights", lambda: False)  # otherwise a CPU casts nothing


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
    """Releases the memory and fills it again without changing the version, as FSDP does."""
    storage, values = weight.untyped_storage(), weight.detach() + 1
    storage.resize_(0)
    storage.resize_(values.numel() * values.itemsize)
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.copy_(values)


CHANGES = [data, other_data, in_place, step, fused_step, load, load_assigned, gathered]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backward", [False, True])
def test_a_forward_reads_what_the_weight_is(change, backward):
    """Holds whether the preceding forward had a backward or not."""
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
    assert torch.equal(weights_in(LOW, weight, last=True)[0], weight.detach().to(LOW))  # of a retained graph


@pytest.mark.parametrize("scaled", [False, True])
def test_the_backward_of_an_op_lets_all_copies_go(scaled):
    x, scale = torch.randn(3, 8), torch.randn(8) if scaled else None
    layers = [nn.Parameter(torch.randn(size)) for size in ((16, 8), (16,), (8, 16), (8,))]
    with gemm.compute_bfloat16_in(LOW), backends.use("torch"):
        with torch.autocast("cpu", LOW):
            y = ops.norm_mlp(x, *layers, layer_scale=scale)
        assert {id(layers[0]), id(layers[2])} <= weights._kept.keys()
        y.sum().backward()
    assert not {id(layer) for layer in layers} & weights._kept.keys()


@pytest.mark.parametrize("change", [in_place, step, load])
def test_the_backward_sees_what_autograd_sees(change):
    """Autograd raises in the end, since the weight was saved. Until then, the new weight is used."""
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


@pytest.fixture
def copied(monkeypatch):
    """Records how many weights each call copies."""
    calls, copies = [], weights._copies

    def noted(given, dtype):
        if given:
            calls.append(len(given))
        return copies(given, dtype)

    monkeypatch.setattr(weights, "_copies", noted)
    return calls


def test_together(copied):
    """All weights of a model are copied in one call, and the backward reads them, too. Without a gemm in another dtype
    nothing is copied."""
    first, second, bias, foreign = (nn.Parameter(torch.randn(*size)) for size in [(6, 5), (4, 6), (4,), (2, 2)])
    with cast_together(lambda: [first, second, bias]):
        assert weights_in(torch.float32, first)[0].data_ptr() == first.data_ptr() and copied == []
        (found,) = weights_in(LOW, first)
        assert torch.equal(found, first.to(LOW)) and not found.requires_grad
        assert [torch.equal(t, w.to(LOW)) for t, w in zip(weights_in(LOW, second, bias), (second, bias), strict=True)]
        assert copied == [3]
        weights_in(LOW, foreign)
    assert copied == [3, 1]
    assert weights_in(LOW, first, last=True)[0] is found
    weights_in(LOW, first)
    assert copied == [3, 1, 1]  # the next forward reads the current weight


@pytest.mark.parametrize("change", [in_place, other_data, step, load, load_assigned])
def test_a_change_within_a_forward_is_seen(change):
    """Except for changes that are not recorded within a forward: in place through `.data`, and by a fused optimizer."""
    weight, other = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 5))
    with cast_together(lambda: [weight, other]):
        weights_in(LOW, other)
        change(weight)
        assert torch.equal(weights_in(LOW, weight)[0], weight.detach().to(LOW))


def test_threads_have_forwards_of_their_own():
    weight, found = nn.Parameter(torch.randn(6, 5)), []
    with cast_together(lambda: [weight]):
        (here,) = weights_in(LOW, weight)
        thread = threading.Thread(target=lambda: found.extend(weights_in(LOW, weight)))
        thread.start()
        thread.join()
        assert found[0] is not here and torch.equal(found[0], here)


def tiny() -> SGMIM:
    arguments = {"img_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)}
    return SGMIM(create_encoder("swin_base_patch4_window7_224", **arguments), encoder_stride=32)


def trained(model: SGMIM) -> float:
    torch.manual_seed(1)
    batch = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64), selective_mask(2, 2)
    with torch.autocast("cpu", LOW), gemm.compute_bfloat16_in(LOW):
        loss = model(*batch)
    loss.backward()
    return loss.item()


def test_a_model_casts_its_weights_once(copied):
    """The values are those of casts one after the other, which happen if hooks are called in between."""
    model = tiny()
    linears = [layer for layer in model.modules() if type(layer) is nn.Linear]
    expected = sum(len(list(layer.parameters())) for layer in linears)
    loss = trained(model)
    assert max(copied) == expected and sum(copied) <= expected + 6  # patch embeddings are convolutions
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    handle = model.encoder.model.layers[0].register_forward_hook(lambda *_: None)
    copied.clear()
    assert trained(model) == loss and max(copied) < 16 and sum(copied) >= expected
    handle.remove()
    assert all(torch.equal(grad, model.get_parameter(name).grad) for name, grad in grads.items())
