"""The decoder's gradients, computed by the forward pass in chunks, are those that the backward pass would compute."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from test_model import assert_same, evaluate
from test_visible_only import make
from tiny import batch, drawn
from torch import Tensor

from sgmim_fast import SGMIM, visible


@pytest.fixture
def pieces(monkeypatch):
    """Makes every image a chunk of its own, and lists how many images were decoded at once."""
    monkeypatch.setitem(visible.MIN_TOKENS, "cpu", 1)
    seen, own = [], visible._distance

    def distance(model: SGMIM, tokens: Tensor, images: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(images))
        return own(model, tokens, images, *args, **options)

    monkeypatch.setattr(visible, "_distance", distance)
    return seen


def late(monkeypatch) -> None:
    monkeypatch.setattr(visible, "fits", lambda *_: False)


@pytest.mark.parametrize("ratio", [0.5, [0.3, 1.0, 0.0, 0.6, 0.6]], ids=str)
@pytest.mark.parametrize("options", [{}, {"target": "normalized_patch", "loss": "l2", "positions": "learned"}], ids=str)
@pytest.mark.parametrize("name", ["vit", "vit-no-class-token", "registers"])
def test_pieces_of_a_batch(pieces, monkeypatch, name, options, ratio):
    model, size = make(name, **options)
    model.double()
    inputs, mask = batch(model, size, 5), drawn(model, size, 5, ratio=ratio)
    early = evaluate(model, *inputs, mask)
    assert pieces == [1] * 5
    late(monkeypatch)
    assert_same(early, evaluate(model, *inputs, mask), 1e-12)
    assert pieces == [1] * 5 + [5]
    assert_same(early, evaluate(model, *inputs, mask, dense=True), 1e-10)


def test_the_least_tokens_of_a_piece(monkeypatch):
    model, size = make()
    mask = drawn(model, size, 7)
    for least, expected in ((1, 7), (16, 7), (17, 6), (57, 1), (1000, 1)):
        monkeypatch.setitem(visible.MIN_TOKENS, "cpu", least)
        found = list(visible._pieces(model, mask))
        assert len(found) == expected
        lengths = 7, len(mask.visible.index), len(mask.masked.index)
        for length, parts in zip(lengths, zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat([torch.arange(length)[part] for part in parts]), torch.arange(length))


@pytest.mark.parametrize("ratio, expected", [(0.5, 4), (0.99, 1)])
def test_few_visible_cells_are_decoded_at_once(monkeypatch, ratio, expected):
    monkeypatch.setitem(visible.MIN_TOKENS, "cpu", 1)
    model, size = make(depth=1)
    assert len(list(visible._pieces(model, drawn(model, size, 4, ratio=ratio)))) == expected


class Mark:
    """An object that lives as long as the autograd node to which it is attached."""


def test_nothing_of_the_decoder_is_kept_for_the_backward(monkeypatch):
    model, size = make()
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    decoded, own = [], visible._distance

    def distance(model: SGMIM, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        tokens.grad_fn.metadata["mark"] = mark = Mark()
        decoded.append(weakref.ref(mark))
        return own(model, tokens, *args, **options)

    monkeypatch.setattr(visible, "_distance", distance)
    loss = model(*inputs, mask)
    assert loss.requires_grad and decoded[0]() is None
    late(monkeypatch)
    loss = model(*inputs, mask)
    assert decoded[1]() is not None
    del loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scaled_twice_and_in_parts(dtype):
    """The loss is scaled, the graph is retained, and gradients of some tensors only are requested."""
    model, size = make()
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(*inputs, mask, return_losses=True)
    once = torch.autograd.grad(losses.image, parameters, retain_graph=True, allow_unused=True)
    some = torch.autograd.grad(4 * losses.image, parameters[::7], retain_graph=True, allow_unused=True)
    for a, e in zip(some, once[::7], strict=True):
        assert a is e is None or torch.equal(a, 4 * e)
    (2 * losses.image).backward()
    for p, e in zip(parameters, once, strict=True):
        assert p.grad is e is None or torch.equal(p.grad, 2 * e)
    with pytest.raises(RuntimeError, match="second time"):
        losses.image.backward()


def test_there_is_no_second_derivative():
    model, size = make(guidance=False)
    images, mask = batch(model, size)[0].float(), drawn(model, size)
    weight = model.decoder.embed.weight
    (grad,) = torch.autograd.grad(model(images, mask=mask), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_parameters_changed_before_the_backward():
    model, size = make(guidance=False)
    loss = model(batch(model, size)[0].float(), mask=drawn(model, size))
    with torch.no_grad():
        model.decoder.blocks[0].mlp.fc1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_parts(pieces):
    for frozen in ("encoder", "decoder", "image_head", ""):
        model, size = make(guidance=False)
        model.get_submodule(frozen).requires_grad_(False)
        images, mask = batch(model, size)[0].float(), drawn(model, size)
        loss = model(images, mask=mask)
        if not frozen:
            assert not loss.requires_grad
            continue
        loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is None) == name.startswith(frozen), name


@pytest.mark.parametrize("who", ["hook on a module", "hook on a parameter", "float16", "checkpointing", "no gradient"])
def test_who_listens_hears_one_backward(pieces, who):
    """With hooks, float16, checkpointing or no gradients, there is one ordinary backward pass of the whole batch. With
    a hook on a module, the modules are called for all tokens."""
    model, size = make(guidance=False)
    inputs, mask, calls = batch(model, size)[0].float(), drawn(model, size), []
    block = model.decoder.blocks[0]
    if who == "hook on a module":
        block.mlp.fc1.register_full_backward_hook(lambda *_: calls.append(len(pieces)))
    elif who == "hook on a parameter":
        block.mlp.fc1.weight.register_hook(lambda _: calls.append(len(pieces)))
    elif who == "checkpointing":
        model.decoder.set_grad_checkpointing()
    with torch.autocast("cpu", torch.float16, enabled=who == "float16"), torch.set_grad_enabled(who != "no gradient"):
        loss = model(inputs, mask=mask)
    assert pieces == ([] if who == "hook on a module" else [2]) and not calls
    if who != "no gradient":
        loss.backward()
    assert len(calls) == who.startswith("hook")


def test_shared_memory_of_gradients():
    """A bias is shared by two layers, and gradients of a copied model accumulate."""
    model, size = make(guidance=False)
    first, second = model.decoder.blocks
    second.mlp.fc1.bias = first.mlp.fc1.bias
    images, mask = batch(model, size)[0].float(), drawn(model, size)
    early = evaluate(model, images, None, mask)
    assert_same(early, evaluate(copy.deepcopy(model), images, None, mask, dense=True), 1e-5)
