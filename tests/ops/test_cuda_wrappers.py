"""The Python side of the `cuda` backend without a GPU. Its operators have CPU implementations that call the device
functions on the host, and its functions are compared with plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import assert_all_close_to_truth
from host_build import load_bodies
from torch import Tensor

from sgmim_fast import _native, backends
from sgmim_fast.ops import gemm
from sgmim_fast.ops.cases import FLOAT32, chosen
from sgmim_fast.ops.cuda import (
    gather_patches,
    relational_guidance,
    selective_mask,
    standardize_structure,
)
from sgmim_fast.ops.primitives import Packed

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.uint16: "uint16"}


def raw(tensor: Tensor) -> np.ndarray:
    """Returns the tensor's memory; 16-bit floats as integers."""
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


@pytest.fixture(scope="module")
def operators():
    """CPU implementations of `torch.ops.sgmim_fast_cuda` for this file."""
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

    def place(embedded, visible, inverse, token, weight, bias, eps, out, statistics):
        body = bodies.place_tokens if out.dtype == torch.float32 else bodies.place_tokens_bfloat16
        weight, bias, statistics = (torch.zeros(0) if t is None else t for t in (weight, bias, statistics))
        tensors = [raw(t.detach()) for t in (embedded, visible, inverse, token, weight, bias, out, statistics)]
        body(*tensors[:6], eps, *tensors[6:], (1, 2, 1))

    def take(dout, embedded, visible, inverse, weight, statistics, dembedded, partials, sums):
        body = bodies.place_tokens_backward if dout.dtype == torch.float32 else bodies.place_tokens_backward_bfloat16
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


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 21])
def test_masked_patch_embed(operators, norm, bias, dtype, width):
    x, weight = torch.randn(2, 3, 8, 12), torch.randn(width, 3, 4, 4) / 7
    vectors = [torch.randn(width) if wanted else None for wanted in (bias, True, norm, norm)]
    visible, grad = torch.tensor([11, 2, 3, 6]), torch.randn(2, 6, width)
    low = [None if t is None else t.to(dtype) for t in (x, weight, *vectors, grad)]

    def run(backend, tensors):
        *first, norm_weight, norm_bias, grad = tensors
        args = *first, visible, norm_weight, norm_bias, 1e-5, None
        forward, backward = (
            backends.implementation("masked_patch_embed", part, backend) for part in ("forward", "backward")
        )
        with backends.use("torch"), gemm.compute_bfloat16_in(torch.bfloat16):  # for the gathers inside
            out, saved = forward(*args)
            grads = backward(grad, *args, saved, [True, True, bias, True, False, norm, norm])
        return [out, *(g for g in grads if g.numel())]

    actual, same = run("cuda", low), run("torch", low)
    truth = run("torch", [None if t is None else t.double() for t in low])
    assert [t.dtype for t in actual] == [dtype] * len(truth)
    assert_all_close_to_truth(actual, same, truth, [str(i) for i in range(len(truth))])


def attention(q, k, v, dout, offsets, cells: int, heads: int, keep: bool) -> list[Tensor]:
    """Returns result and gradients of attention over the shown keys and copies of the last one, per image and head."""
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
@pytest.mark.parametrize("width", [16, 32, 192])  # head widths of 8, and two that are read 16 bytes at a time
def test_attention(operators, keep, dtype, width):
    masked = chosen((5, 12, 0), 12)
    offsets = FLOAT32.rows(~masked).offsets, FLOAT32.rows(masked).offsets
    q, k, v, dout = (torch.randn(n, width).to(dtype) for n in (19, 18, 18, 19))
    packed = Packed(FLOAT32.rows(~masked).index, offsets[0], FLOAT32.rows(masked).index, offsets[1], 12, 2, keep)
    out, lse = relational_guidance.guidance_attention(q, k, v, packed)
    grads = relational_guidance.guidance_attention_backward(dout, q, k, v, out, lse, packed)
    same = attention(q, k, v, dout, offsets, 12, 2, keep)
    truth = attention(*(t.double() for t in (q, k, v, dout)), offsets, 12, 2, keep)
    assert_all_close_to_truth([out, *grads], same, truth, ["out", "dq", "dk", "dv"])


def test_no_wrapper_is_left_out(operators):
    """Every op of the backend is called in this file or in test_cuda_window_attention.py."""
    tests = {"norm_attention", "window_attention"} | {
        name.removeprefix("test_").replace("attention", "relational_guidance") for name in globals()
    }
    assert {name for name, modules in backends.MODULES.items() if "cuda" in modules} <= tests
