"""The Python side of the `cuda` backend on a machine without a GPU: its operators get CPU implementations that call the
host's instances of the kernels' bodies, and the backend's functions are held against the plain ones."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from checks import assert_all_close_to_truth
from host_build import load_bodies
from packed import chosen, rows_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sgmim_fast import _native, backends
from sgmim_fast.ops import products
from sgmim_fast.ops.cuda import (
    gather_patches,
    linear_l1,
    masked_patch_embed,
    relational_guidance,
    selective_mask,
    standardize_structure,
)
from sgmim_fast.ops.linear_l1 import unpack_signs

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.uint16: "uint16"}


def raw(tensor: Tensor) -> np.ndarray:
    """The tensor's memory; 16-bit floats as integers."""
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


@pytest.fixture(scope="module")
def operators():
    """CPU implementations of `torch.ops.sgmim_fast_cuda`, for this file."""
    usable, reason = _native.load_cuda()
    if not usable:
        pytest.skip(reason)
    bodies = load_bodies()

    def draw(seed, masked, gh, gw, scale, mask, visible, visible_offsets, masked_rows, masked_offsets):
        images = masked_offsets.shape[0] - 1
        counts = torch.full((images,), masked) if masked >= 0 else masked_offsets.diff() // scale**2
        if masked >= 0:
            masked_offsets[0] = 0
            masked_offsets[1:] = (counts * scale**2).cumsum(0)
        visible_offsets.copy_(torch.arange(images + 1) * gh * gw * scale**2 - masked_offsets)
        keys = (int(key) & 0xFFFFFFFFFFFFFFFF for key in seed)
        lists = raw(mask), raw(masked_rows), raw(visible)
        bodies.draw_masks(*keys, counts.numpy(), gh, gw, scale, *lists, 1)

    def standardize(x, y, nonfinite):
        getattr(bodies, f"standardize_{NAMES[x.dtype]}")(raw(x), raw(y), raw(nonfinite), 1)

    def pack(pixels, rows, out, cell, patch, zorder):
        bodies.pack_patches(raw(pixels), raw(rows), raw(out), cell, patch, zorder, 1)

    def unpack(grad, rows, inverse, out, cell, patch, zorder):
        bodies.unpack_patches(raw(grad), raw(rows), raw(inverse), raw(out), cell, patch, zorder, 1, 1)

    def distances(x, weight, bias, target, valid, rows, cell, packed, scale, signs, partials, total):
        valid = torch.zeros(0, 0, 0, 0, dtype=torch.bool) if valid is None else valid
        assert partials.shape == (-(-signs.shape[0] // 64) * -(-weight.shape[0] // 64),)
        arrays = (raw(t.detach()) for t in (x, weight, bias, target, valid, rows, signs))
        body = bodies.linear_l1 if x.dtype == torch.float32 else bodies.linear_l1_bfloat16
        total.fill_(scale * body(*arrays, cell, packed, 1))

    def head_gradients(grad, x, weight, signs, rows, packed, scale, dx, dweight, dbias):
        body = bodies.linear_l1_backward if x.dtype == torch.float32 else bodies.linear_l1_backward_bfloat16
        operands = (raw(t.detach()) for t in (grad, x, weight, signs, rows))
        body(*operands, packed, scale, *(raw(t) for t in (dx, dweight, dbias)), 1)

    def place(embedded, visible, inverse, token, weight, bias, eps, out, statistics):
        body = bodies.place_tokens if out.dtype == torch.float32 else bodies.place_tokens_bfloat16
        weight, bias, statistics = (torch.zeros(0) if t is None else t for t in (weight, bias, statistics))
        tensors = [raw(t.detach()) for t in (embedded, visible, inverse, token, weight, bias, out, statistics)]
        body(*tensors[:6], eps, *tensors[6:], (1, 2, 1))

    def take(dout, embedded, visible, inverse, weight, statistics, dembedded, partials, sums):
        body = bodies.take_tokens if dout.dtype == torch.float32 else bodies.take_tokens_bfloat16
        embedded = dout[:0] if embedded is None else embedded
        weight, statistics = (torch.zeros(0) if t is None else t for t in (weight, statistics))
        tensors = dout, embedded, visible, inverse, weight, statistics, dembedded, partials, sums
        body(*(raw(t.detach()) for t in tensors), (1, 2, 1))

    def attend(*args):
        body = bodies.attend if args[0].dtype == torch.float32 else bodies.attend_bfloat16
        body(*(raw(t) for t in args[:7]), *args[7:], 1)

    def attend_backward(*args):
        body = bodies.attend_backward if args[0].dtype == torch.float32 else bodies.attend_backward_bfloat16
        body(*(raw(t) for t in args[:12]), *args[12:], 1, 2)

    functions = {
        "selective_mask": draw,
        "standardize_structure": standardize,
        "gather_patches": pack,
        "gather_patches_backward": unpack,
        "linear_l1": distances,
        "linear_l1_backward": head_gradients,
        "place_tokens": place,
        "place_tokens_backward": take,
        "attention": attend,
        "attention_backward": attend_backward,
    }
    with torch.library._scoped_library("sgmim_fast_cuda", "IMPL") as library:
        for name, function in functions.items():
            library.impl(name, function, "CPU")
        yield


def plain(op: str, part: str = "forward"):
    return backends.implementation(op, part, "torch")


@pytest.mark.parametrize("masked", [[3], [5, 5], [0, 12, 7]])
def test_selective_mask(operators, masked):
    for scale in (1, 2):
        args = torch.tensor([3, -4]), masked, 3, 4, scale
        for actual, expected in zip(selective_mask.forward(*args), plain("selective_mask")(*args), strict=True):
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", NAMES)
def test_standardize_structure(operators, dtype):
    structure = (torch.rand(2, 2, 13, 15) * 1000).to(dtype)
    for layout in (structure, structure.transpose(2, 3)):
        actual, expected = standardize_structure.forward(layout, False), plain("standardize_structure")(layout, False)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    if dtype.is_floating_point:
        structure[1, 0, 3, 3] = torch.inf
        with pytest.raises(ValueError, match="1 in image 1"):
            standardize_structure.forward(structure, False)
        assert standardize_structure.forward(structure, True)[1, 0, 3, 3] == 0


@pytest.mark.parametrize(("cell", "patch", "zorder"), [(8, 2, True), (8, 4, False), (6, 3, False), (4, 4, True)])
def test_gather_patches(operators, cell, patch, zorder):
    pixels, rows = torch.randn(2, 3, 2 * cell, 3 * cell, dtype=torch.float64), torch.tensor([4, 0, 11])
    for source in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        packed = gather_patches.forward(source, rows, cell, patch, zorder)
        assert torch.equal(packed, plain("gather_patches")(source, rows, cell, patch, zorder))
    args = packed, rows, list(pixels.shape), cell, patch, zorder
    assert torch.equal(gather_patches.backward(*args), plain("gather_patches", "backward")(*args))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 21, 200])
def test_linear_l1(operators, packed, masked, dtype, width):
    rows = torch.tensor([5, 0, 3, 7])
    # whole numbers, whose sums have no rounding in any dtype
    shapes = (4 if packed else 8, width), (32, width), (32,)
    x, weight, bias = (torch.randint(-2, 3, shape).to(dtype) for shape in shapes)
    target = torch.randint(-9, 10, (2, 2, 8, 8)).float().contiguous(memory_format=torch.channels_last)
    valid = torch.rand(2, 2, 8, 8) < 0.7 if masked else None
    args = x, weight, bias, target, valid, rows, 4, packed, 0.25, None
    wide = (x.double(), weight.double(), bias.double(), *args[3:])
    with backends.use("torch"):  # of the gather inside the plain one
        expected, (signs, *_) = plain("linear_l1")(*wide)
    with products.compute_bfloat16_in(torch.bfloat16):
        actual, (found, *copies) = linear_l1.forward(*args)
    assert actual == expected and not copies
    assert found.dtype == torch.int32 and torch.equal(unpack_signs(found, 32), signs)

    grad = torch.tensor(0.5)
    options = rows, 4, packed, 0.25
    with backends.use("torch"), products.compute_bfloat16_in(torch.bfloat16):
        truth = plain("linear_l1", "backward")(grad.double(), *wide[:4], [signs], *options, [True] * 4, None)
        for needs in ([True] * 4, [True, False, False, False], [False, False, True, False], [False] * 4):
            grads = linear_l1.backward(grad, *args[:4], [found], *options, needs, None)
            # what another backend makes of packed signs
            other = plain("linear_l1", "backward")(grad, *args[:4], [found], *options, needs, None)
            for need, t, *those in zip(needs, args[:4], grads, other, truth, strict=True):
                actual, same, exact = those
                if not need:
                    assert actual.numel() == same.numel() == 0
                    continue
                assert actual.dtype == t.dtype and actual.shape == t.shape
                assert torch.equal(actual, exact.to(t.dtype)) and torch.equal(actual, same)


@pytest.mark.parametrize("forced", ["cuda", "triton", "torch", None])
def test_the_format_of_linear_l1s_signs_is_known_beforehand(monkeypatch, forced):
    """Tracing sees the tensors that the backend chosen at that moment saves; the backward goes by what was saved."""
    everything = dict.fromkeys(backends.NAMES, (True, ""))
    monkeypatch.setattr(backends, "available", lambda: everything)
    with FakeTensorMode(), backends.use(forced) if forced else contextlib.nullcontext():
        shapes = (4, 16), (32, 16), (32,), (2, 2, 8, 8)
        x, weight, bias, target = (torch.empty(shape, device="cuda") for shape in shapes)
        rows = torch.empty(4, dtype=torch.int64, device="cuda")
        _, (signs,) = torch.ops.sgmim_fast.linear_l1(x, weight, bias, target, None, rows, 4, True, 1.0, None)
        assert (signs.dtype, signs.shape) == ((torch.int32, (4, 2, 1)) if forced == "cuda" else (torch.int8, (4, 32)))
    args = x, x, weight, bias, target, [signs], rows, 4, True, 1.0, [True] * 4, None
    able = {
        name for name in ("cuda", "triton", "torch") if backends.can_run("linear_l1", name, *args, part="backward")[0]
    }
    assert able == {"torch", "cuda" if forced == "cuda" else "triton"}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 21])
def test_masked_patch_embed(operators, norm, bias, dtype, width):
    x, weight = torch.randn(2, 3, 8, 12), torch.randn(width, 3, 4, 4) / 7
    vectors = [torch.randn(width) if wanted else None for wanted in (bias, True, norm, norm)]
    visible, grad = torch.tensor([11, 2, 3, 6]), torch.randn(2, 6, width)
    low = [None if t is None else t.to(dtype) for t in (x, weight, *vectors, grad)]

    def run(forward, backward, tensors):
        *first, norm_weight, norm_bias, grad = tensors
        args = *first, visible, norm_weight, norm_bias
        with backends.use("torch"), products.compute_bfloat16_in(torch.bfloat16):  # of the gathers inside
            out, saved = forward(*args, 1e-5, None)
            grads = backward(grad, *args, saved, [True, True, bias, True, norm, norm], None)
        return [out, *(g for g in grads if g.numel())]

    twin = plain("masked_patch_embed"), plain("masked_patch_embed", "backward")
    actual = run(masked_patch_embed.forward, masked_patch_embed.backward, low)
    truth = run(*twin, [None if t is None else t.double() for t in low])
    assert [t.dtype for t in actual] == [dtype] * len(truth)
    assert_all_close_to_truth(actual, run(*twin, low), truth, [str(i) for i in range(len(truth))])


def attention(q, k, v, dout, offsets, cells: int, heads: int, keep: bool) -> list[Tensor]:
    """Softmax over the shown keys and copies of the last one, image by image and head by head; result and gradients."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, depth = [], q.shape[1] // heads
    for image in range(offsets[0].shape[0] - 1):
        i, j = (slice(*o[image : image + 2].tolist()) for o in offsets)
        hidden = cells - (j.stop - j.start) if keep else 0
        key, value = (torch.cat([t[j], t[-1:].expand(hidden, -1)]) for t in leaves[1:])
        split = (t.unflatten(1, (heads, depth)).transpose(0, 1) for t in (leaves[0][i], key, value))
        query, key, value = split
        out.append(((query @ key.mT * depth**-0.5).softmax(-1) @ value).transpose(0, 1).flatten(1))
    return [torch.cat(out).detach(), *torch.autograd.grad(torch.cat(out), leaves, dout)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 32, 192])  # a depth of 8, and two that are read 16 bytes at a time
def test_attention(operators, keep, dtype, width):
    masked = chosen((5, 12, 0), 12)
    offsets = rows_of(~masked).offsets, rows_of(masked).offsets
    q, k, v, dout = (torch.randn(n, width).to(dtype) for n in (19, 18, 18, 19))
    out, lse = relational_guidance.attention(q, k, v, *offsets, 12, 2, keep)
    grads = relational_guidance.attention_backward(dout, q, k, v, out, lse, *offsets, 12, 2, keep)
    same = attention(q, k, v, dout, offsets, 12, 2, keep)
    truth = attention(*(t.double() for t in (q, k, v, dout)), offsets, 12, 2, keep)
    assert_all_close_to_truth([out, *grads], same, truth, ["out", "dq", "dk", "dv"])


def test_no_wrapper_is_left_out(operators):
    """Every op of the backend is called above."""
    tests = {name.removeprefix("test_").replace("attention", "relational_guidance") for name in globals()}
    assert {name for name, modules in backends.MODULES.items() if "cuda" in modules} <= tests
