"""Blocks of the published code, recognised by their layout: forward and all gradients, with and without changes."""

from __future__ import annotations

import copy
import logging
import pickle

import published
import pytest
import test_unmodified
import torch
from published import Block, PatchMerging, SwinTransformerBlock, SwinTransformerV2Block
from test_unmodified import Example
from torch import Tensor, nn

import sgmim_fast
from sgmim_fast import accelerate, backends
from sgmim_fast.fused import published_blocks
from sgmim_fast.fused.unmodified import _said

SWIN, VIT = (2, 24, 8), (2, 7, 8)
SHARED = torch.linspace(-2, 2, 2 * 7 * 7, dtype=torch.float64).view(2, 7, 7)


def with_bias(block: nn.Module, x: Tensor) -> Tensor:
    return block(x, SHARED)


def with_bias_by_name(block: nn.Module, x: Tensor) -> Tensor:
    return block(x, rel_pos_bias=SHARED)


EXAMPLES = {
    "swin": Example(lambda: SwinTransformerBlock(8, (4, 6), 2, 2, 0), SWIN),
    "swin, shifted": Example(lambda: SwinTransformerBlock(8, (4, 6), 2, 2, 1, 0.3), SWIN),
    "swin, no bias": Example(lambda: SwinTransformerBlock(8, (4, 6), 2, 2, 1, bias=False), SWIN),
    "swinv2": Example(lambda: SwinTransformerV2Block(8, (4, 6), 2, 2, 0), SWIN),
    "swinv2, shifted": Example(lambda: SwinTransformerV2Block(8, (4, 6), 2, 2, 1, 0.3), SWIN),
    "swinv2, no bias": Example(lambda: SwinTransformerV2Block(8, (4, 6), 2, 2, 1, bias=False), SWIN),
    "beit": Example(lambda: Block(8, 2, (2, 3), 0.1, 0.3), VIT),
    "beit, both biases": Example(lambda: Block(8, 2, (2, 3), 0.1), VIT, plain=with_bias, fast=with_bias),
    "simmim": Example(lambda: Block(8, 2, None, 0.1), VIT, plain=with_bias_by_name, fast=with_bias_by_name),
    "no layer scale": Example(lambda: Block(8, 2, None), VIT),
    "mae": Example(lambda: Block(8, 2, plain=True), VIT),
    "merging": Example(lambda: PatchMerging((4, 6), 8), SWIN),
    "merging, norm behind": Example(lambda: PatchMerging((4, 6), 8, after=True), SWIN),
}


@pytest.fixture(autouse=True)
def quick(threads):
    with threads(1):
        yield


def fast_copy(block: nn.Module) -> nn.Module:
    fast = accelerate(copy.deepcopy(block))
    assert isinstance(fast, tuple(published_blocks.FAMILIES.values())) and isinstance(fast, type(block))
    assert not any(fast.reasons().values())
    return fast


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_its_own_forward_and_gradients(name, backend, train):
    """In float64, with the same random numbers for drop path."""
    if backend == "cpu" and not backends.available()["cpu"][0]:
        pytest.skip(backends.available()["cpu"][1])
    example = EXAMPLES[name]
    plain = test_unmodified.make(example).train(train)
    dtype = torch.float64 if backend == "torch" else torch.float32
    fast, plain, x = fast_copy(plain).to(dtype), plain.to(dtype), torch.randn(example.shape, dtype=dtype)
    outcomes = []
    for block, call in ((plain, example.plain), (fast, example.fast)):
        inputs = x.clone().requires_grad_()
        torch.manual_seed(3)
        bias = SHARED.to(dtype) if "bias" in call.__name__ else None
        with backends.use(backend):
            result = block(inputs) if bias is None else block(inputs, rel_pos_bias=bias)
            (result * torch.linspace(-1, 1, result.numel(), dtype=dtype).view(result.shape)).sum().backward()
        outcomes.append({"result": result, "input": inputs.grad, **{k: p.grad for k, p in block.named_parameters()}})
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for key, expected in outcomes[0].items():
        assert (outcomes[1][key] - expected).norm() <= tolerance * (1e-3 + expected.norm()), key


@pytest.mark.filterwarnings("ignore")  # deprecated hooks and weight norm are tested on purpose
@pytest.mark.parametrize("kind", ["modules", "tensors", "methods", "settings"])
@pytest.mark.parametrize("name", ["swin, shifted", "swinv2, shifted", "beit", "mae", "merging"])
def test_changes(name, kind):
    """After every kind of change of test_unmodified, results are those of the block that is not accelerated."""
    example, different = EXAMPLES[name], []
    model = test_unmodified.make(example)
    with backends.use("torch"):
        for place in test_unmodified.places(example):
            for change_name, change in test_unmodified.changes(model.get_submodule(place), kind):
                different += test_unmodified.compare(example, model, place, change, change_name)[:1]
    assert not different, "\n".join(different[:30])


def test_a_function_of_its_file_that_is_replaced(monkeypatch):
    plain = test_unmodified.make(EXAMPLES["swin"])
    fast, x = fast_copy(plain), torch.randn(SWIN, dtype=torch.float64)
    expected = fast(x)
    reverse = published.window_reverse
    monkeypatch.setattr(published, "window_reverse", lambda *args: 2 * reverse(*args))
    assert not torch.allclose(fast(x), expected)
    torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.parametrize("name", ["swin, shifted", "swinv2", "beit", "merging"])
def test_copies_pickles_and_state(name):
    plain = test_unmodified.make(EXAMPLES[name]).eval()
    fast, x = fast_copy(plain), torch.randn(EXAMPLES[name].shape, dtype=torch.float64)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert accelerate(fast) is fast
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast) and not any(other.reasons().values())
        assert torch.equal(other(x), fast(x))


class Scaled(SwinTransformerBlock):
    """Has the same layout, but computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * x


class Wrapped(SwinTransformerBlock):
    """Computes the same in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone())


class Gated(Block):
    """Has an additional child."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x).sigmoid()


def test_unknown_variants_are_left_alone_with_one_line(caplog):
    _said.clear()
    tanh = Block(8, 2)
    tanh.mlp.act = nn.GELU(approximate="tanh")
    model = nn.Sequential(
        Scaled(8, (4, 6), 2, 2, 1), Scaled(8, (4, 6), 2, 2, 1), Gated(), tanh, Wrapped(8, (4, 6), 2, 2, 0)
    )
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        accelerate(model)
    assert torch.equal(state, torch.get_rng_state())
    assert [type(m) for m in model[:3]] == [Scaled, Scaled, Gated]
    assert all(isinstance(m, tuple(published_blocks.FAMILIES.values())) for m in model[3:])
    assert (
        "Sequential's Scaled unchanged: its forward computes a different result (relative error" in caplog.messages[0]
    )
    assert caplog.messages[1].endswith(
        "Gated unchanged: its children, parameters or buffers differ from those of the published code"
    )
    assert caplog.messages[2].endswith("FastBlock unchanged: mlp.act: approximate is 'tanh'; expected 'none'")
    assert len(caplog.messages) == 3


def test_hooks_are_not_called_by_trying():
    block, calls = SwinTransformerBlock(8, (4, 6), 2, 2, 0), []
    block.attn.softmax.register_forward_hook(lambda *_: calls.append(1))
    accelerate(block)
    assert not calls and block.reasons()["attention"] == "attn.softmax has hooks"
    block(torch.randn(2, 24, 8))
    assert calls == [1]


class Encoder(nn.Module):
    """SimMIM's Swin with such blocks."""

    num_features, in_chans, patch_size = 32, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.mask_token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(16))
        self.first = nn.Sequential(*(SwinTransformerBlock(16, (8, 8), 2, 4, shift) for shift in (0, 2)))
        self.merge, self.second = PatchMerging((8, 8), 16), SwinTransformerBlock(32, (4, 4), 4, 4, 0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT
        x = torch.where(mask.flatten(1)[:, :, None].bool(), self.mask_token.to(x.dtype), x)
        return self.second(self.merge(self.first(x)))


def test_around_ones_own_published_encoder():
    torch.manual_seed(0)
    encoder = Encoder()
    model, plain = (sgmim_fast.SGMIM(copy.deepcopy(encoder), 8, accelerate=fast).double() for fast in (True, False))
    plain.load_state_dict(model.state_dict())
    assert sum(isinstance(m, tuple(published_blocks.FAMILIES.values())) for m in model.modules()) == 4
    images, structure = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 1, 32, 32).double()
    mask = sgmim_fast.selective_mask(2, 4)
    losses = [m(images, structure, mask) for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(loss, m.encoder.parameters()) for loss, m in zip(losses, (model, plain), strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
