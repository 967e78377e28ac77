"""The Python side of the `cuda` backend on a machine without a GPU: its operators get CPU implementations that call the
host's instances of the kernels' bodies, and the backend's functions are held against the plain ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from host_build import load_bodies
from packed import chosen, rows_of
from torch import Tensor

from sgmim_fast import _native, backends
from sgmim_fast.ops.cuda import gather_patches, linear_l1, relational_guidance, selective_mask, standardize_structure

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

    def gather(pixels, rows, out, cell, patch, zorder):
        bodies.copy_patches(raw(pixels), raw(rows), raw(out), cell, patch, zorder, False, 1)

    def scatter(grad, rows, out, cell, patch, zorder):
        bodies.copy_patches(raw(out), raw(rows), raw(grad), cell, patch, zorder, True, 1)

    def distances(x, weight, bias, target, valid, rows, cell, packed, signs, partials, total):
        valid = torch.zeros(0, 0, 0, 0, dtype=torch.bool) if valid is None else valid
        assert partials.shape == (-(-signs.shape[0] // 64) * -(-signs.shape[1] // 64),)
        arrays = (raw(t.detach()) for t in (x, weight, bias, target, valid, rows, signs))
        total.fill_(bodies.linear_l1(*arrays, cell, packed, 1))

    def attend(*args):
        bodies.attend(*(raw(t) for t in args[:7]), *args[7:], 1)

    def attend_backward(*args):
        bodies.attend_backward(*(raw(t) for t in args[:12]), *args[12:], 1)

    functions = {
        "selective_mask": draw,
        "standardize_structure": standardize,
        "gather_patches": gather,
        "gather_patches_backward": scatter,
        "linear_l1": distances,
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
def test_linear_l1(operators, packed, masked):
    rows = torch.tensor([5, 0, 3, 7])
    x, weight, bias = torch.randn(4 if packed else 8, 24), torch.randn(32, 24), torch.randn(32)
    target = torch.randn(2, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    valid = torch.rand(2, 2, 8, 8) < 0.7 if masked else None
    args = x, weight, bias, target, valid, rows, 4, packed, None
    with backends.use("torch"):  # of the gather inside the plain one
        expected, signs = plain("linear_l1")(*args)
    actual, found = linear_l1.forward(*args)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(found, signs)


@pytest.mark.parametrize("keep", [True, False])
def test_attention(operators, monkeypatch, keep):
    """Against softmax over the shown keys and copies of the last one, in float64, and autograd's gradients."""
    sums = pytest.importorskip("sgmim_fast.kernels.sums")
    monkeypatch.setattr(sums, "finish", lambda parts: [part.out.copy_(part.partials.sum(0)) for part in parts])
    images, cells, heads, width = 3, 12, 2, 16
    masked = chosen((5, 12, 0), cells)
    visible, shown = rows_of(~masked), rows_of(masked)
    q, k, v = (torch.randn(n, width) for n in (visible.index.shape[0], 18, 18))
    assert shown.index.shape[0] + 1 == k.shape[0]
    offsets = visible.offsets, shown.offsets
    out, lse = relational_guidance.attention(q, k, v, *offsets, cells, heads, keep)

    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    expected = []
    for image, head in itertools.product(range(images), range(heads)):
        i, j = (slice(*o[image : image + 2].tolist()) for o in offsets)
        d = slice(head * width // heads, (head + 1) * width // heads)
        hidden = cells - (j.stop - j.start) if keep else 0
        key, value = (torch.cat([t[j, d], t[-1:, d].expand(hidden, -1)]) for t in leaves[1:])
        weights = (leaves[0][i, d] @ key.T * (width // heads) ** -0.5).softmax(1)
        expected.append((i, d, weights @ value))
    for i, d, values in expected:
        torch.testing.assert_close(out[i, d].double(), values.detach(), rtol=1e-5, atol=1e-6)

    dout = torch.randn_like(q)
    sum((values * dout[i, d]).sum() for i, d, values in expected).backward()
    found = relational_guidance.attention_backward(dout, q, k, v, out, lse, *offsets, cells, heads, keep)
    for actual, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(actual.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_no_wrapper_is_left_out(operators):
    """Every op of the backend is called above."""
    assert {name for name, modules in backends.MODULES.items() if "cuda" in modules} == {
        name.removeprefix("test_").replace("attention", "relational_guidance")
        for name in globals()
        if name.startswith("test_") and name != "test_no_wrapper_is_left_out"
    }
