"""Window attention of the CUDA backend: its device function on the host, with tensor cores emulated by fragment
layouts, compared with plain PyTorch in float64; its Python side; and the op on a GPU."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from host_build import load_bodies
from hypothesis import given, settings
from hypothesis import strategies as st
from test_window_attention import check
from torch import Tensor

from sgmim_fast import _native, backends
from sgmim_fast.ops import _plain, cases
from sgmim_fast.ops.cuda import relational_guidance
from sgmim_fast.ops.cuda import window_attention as ours
from sgmim_fast.ops.primitives import Request, Windows

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
EVERYTHING = ("qkv", "bias", "logit_scale", "pad", "qkv_bias")
# Grid, window and shift: full and partial tiles of 48, 64 and 144 tokens, windows beyond the grid or larger than it.
SHAPES = {
    "36": ((12, 12), (6, 6), (0, 0)),
    "36 shifted": ((13, 11), (6, 6), (3, 2)),
    "49": ((7, 9), (7, 7), (3, 3)),
    "64": ((9, 8), (8, 8), (4, 0)),
    "144": ((12, 12), (12, 12), (0, 0)),
    "144 shifted": ((12, 13), (12, 12), (6, 6)),
    "101": ((1, 101), (1, 101), (0, 0)),
    "3 x 2": ((5, 3), (3, 2), (1, 1)),
    "larger than the grid": ((2, 3), (5, 4), (4, 1)),
}


@functools.cache
def bodies():
    return load_bodies()


def raw(t: Tensor | None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    t = torch.zeros(0, dtype=dtype) if t is None else t.detach()
    return (t.view(torch.uint16) if t.dtype in NAMES else t).numpy()


def call_of(tensors: list[Tensor | None], spread: Tensor, heads: int, *sizes: int):
    """Returns the device function on the host and its arguments."""
    qkv, bias, index, logit_scale, pad = tensors
    if not hasattr(bodies(), f"window_attention_{NAMES[qkv.dtype]}"):
        pytest.skip("the compiler has no _Float16")
    options = bodies().WindowSizes(sizes[:2], sizes[2:4], heads, sizes[4])
    vectors = raw(bias), raw(index, torch.int64), raw(logit_scale), raw(pad, torch.bfloat16)
    return getattr(bodies(), f"window_attention_{NAMES[qkv.dtype]}"), (raw(qkv), *vectors, options, raw(spread))


def forward(qkv, bias, index, logit_scale, pad, heads, *rest, backwards=False) -> None:
    *sizes, spread, out = rest
    body, arguments = call_of([qkv, bias, index, logit_scale, pad], spread, heads, *sizes)
    nothing = raw(None, torch.bfloat16)
    body(*arguments, raw(out), nothing, nothing, raw(None), raw(None), raw(None), backwards)


def backward(dout, qkv, bias, index, logit_scale, pad, heads, *rest, backwards=False) -> None:
    *sizes, spread, dqkv, dbias, dscale, dpad = rest
    body, arguments = call_of([qkv, bias, index, logit_scale, pad], spread, heads, *sizes)
    sums = raw(dbias), raw(dscale), raw(dpad)
    body(*arguments, raw(None, torch.bfloat16), raw(dout), raw(dqkv), *sums, backwards)


@pytest.fixture
def operators(monkeypatch):
    """CPU implementations of the operators by the device function on the host, and of the sums that Triton computes."""
    usable, reason = _native.load_cuda()
    if not usable:
        pytest.skip(reason)
    pytest.importorskip("triton", reason="its sums run in Triton")
    from sgmim_fast.kernels import window_attention

    def table_sum(dense: Tensor, index: Tensor, table: Tensor) -> Tensor:
        rows = dense.view(table.shape[1], -1).T
        return torch.zeros(table.shape).index_add_(0, index.flatten(), rows).view(1, -1)

    monkeypatch.setattr(window_attention, "finished", lambda sums, dtypes: [s.sum(0) for s in sums])
    monkeypatch.setattr(window_attention, "column_sums", lambda xs: [x.float().sum(0, keepdim=True) for x in xs])
    monkeypatch.setattr(window_attention, "table_sum", table_sum)
    with torch.library._scoped_library("sgmim_fast_cuda", "IMPL") as library:
        library.impl("window_attention", forward, "CPU")
        library.impl("window_attention_backward", backward, "CPU")
        yield


def inputs(grid, heads, width, window, *, bias="table", cosine=False, pad=True):
    """Returns (qkv, bias, logit_scale, pad) in float64, and the index."""
    options = {"bias": bias, "hottest": 5.0 if cosine else None, "pad": pad, "make": cases.FLOAT64}
    a = cases.window_attention((2, *grid), heads, width, window, **options)
    return (a.qkv, a.bias, a.logit_scale, a.pad), a.index


def relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def compare(shape, heads, depth, dtype, *, bias="table", cosine=False, pad=True, wanted=EVERYTHING) -> None:
    """Compares forward and backward through the Python side with plain PyTorch in float64."""
    grid, window, shift = shape
    tensors, index = inputs(grid, heads, depth, window, bias=bias, cosine=cosine, pad=pad)
    kinds = dtype, torch.float32, torch.float32, dtype
    qkv, bias, scale, pad = (None if t is None else t.to(d) for t, d in zip(tensors, kinds, strict=True))
    grad = torch.randn(*qkv.shape[:3], heads * depth).to(dtype)

    def windows(kind: torch.dtype | None) -> Windows:
        vectors = (None if t is None else t.to(kind or t.dtype) for t in (bias, scale, pad))
        b, s, p = vectors
        return Windows(b, index, s, p, heads, list(window), list(shift))

    missing = {name for name, t in {"bias": bias, "logit_scale": scale, "pad": pad}.items() if t is None}
    wanted = set(wanted) - missing
    out = ours.window_attention(qkv, windows(None))
    dqkv, sums = ours.window_attention_backward(grad, qkv, windows(None), wanted)
    exact = _plain.window_attention(qkv.double(), windows(torch.float64))
    truth, true_sums = _plain.window_attention_backward(grad.double(), qkv.double(), windows(torch.float64), wanted)

    eps = torch.finfo(dtype).eps  # operands of the second gemms are rounded once; largest error seen: 0.4 eps
    assert out.dtype == dqkv.dtype == dtype and sums.keys() == wanted - {"qkv"}
    assert relative(out, exact) < eps
    for name, a, t in zip("qkv", dqkv.chunk(3, -1), truth.chunk(3, -1), strict=True):
        assert relative(a, t) < eps, name
    for name, parts in sums.items():
        total, true = parts.sum(0).flatten(), true_sums[name].flatten()
        if name == "pad":  # queries of the padding do not affect the result
            total, true = total[heads * depth :], true[heads * depth :]
        # The gradient of the bias adds numbers that are never rounded to dtype, that of qkv's bias numbers that are.
        # That of the scale is nearly 0 where the softmax is 1, and that of the padding where all of it is masked:
        # e^-100 is 0 in float16.
        tolerance = 1e-4 if name == "bias" else eps
        least = eps * torch.finfo(dtype).smallest_normal
        floor = least * grad.double().norm() + 1e-30
        if name in ("logit_scale", "qkv_bias"):
            floor += eps * dqkv.double().norm()
        assert (total.double() - true).norm() <= tolerance * true.norm() + floor, name


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(operators, shape, dtype, cosine):
    compare(SHAPES[shape], 2, 32, dtype, cosine=cosine)


@pytest.mark.parametrize("shape", ["36 shifted", "49", "64"])
@pytest.mark.parametrize("cosine", [False, True])
def test_heads_of_64_channels(operators, shape, cosine):
    compare(SHAPES[shape], 1, 64, torch.bfloat16, cosine=cosine)


@pytest.mark.parametrize("bias", ["dense", None])
@pytest.mark.parametrize("pad", [False, True])
def test_without_a_table_or_padding(operators, bias, pad):
    compare(SHAPES["36 shifted"], 3, 32, torch.bfloat16, bias=bias, pad=pad)


@pytest.mark.parametrize("wanted", [(), ("qkv",), ("bias",), ("logit_scale",), ("pad",), ("bias", "qkv_bias")])
def test_partial_gradients(operators, wanted):
    compare(SHAPES["36 shifted"], 2, 32, torch.bfloat16, cosine=True, wanted=wanted)


@settings(max_examples=6)
@given(
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    window=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    moved=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    groups=st.integers(1, 5),
    cosine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_order_of_warps_and_groups_of_windows(grid, window, moved, groups, cosine, seed):
    """The order of warps and the number of groups do not change a bit, except for the sums of groups."""
    torch.manual_seed(seed)
    shift = [int(m * w) for m, w in zip(moved, window, strict=True)]
    tensors, index = inputs(grid, 2, 32, window, cosine=cosine)
    kinds = torch.bfloat16, torch.float32, torch.float32, torch.bfloat16
    qkv, bias, scale, pad = (None if t is None else t.to(d) for t, d in zip(tensors, kinds, strict=True))
    grad, n, windows = torch.randn(*qkv.shape[:3], 64).bfloat16(), window[0] * window[1], 2
    for side, along in zip(grid, window, strict=True):
        windows *= -(-side // along)
    tiles = 3 if n <= 48 else 4 if n <= 64 else 9
    found = []
    for number, backwards in ((1, False), (1, True), (groups, False)):
        number = -(-windows // -(-windows // min(number, windows)))
        rest = qkv, bias, index, scale, pad, 2, *window, *shift, number, torch.full((2 * tiles**2 * 256,), torch.nan)
        out, dqkv = (torch.full(s, torch.nan).bfloat16() for s in (grad.shape, qkv.shape))
        sums = [torch.full((number, *s), torch.nan) for s in ((2, n, n), (2,), (192,))]
        forward(*rest, out, backwards=backwards)
        backward(grad, *rest, dqkv, sums[0], sums[1] if cosine else None, sums[2], backwards=backwards)
        found.append((out, dqkv, [t.sum(0) for t in sums if cosine or t is not sums[1]]))
    for out, dqkv, sums in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(dqkv, found[0][1])
        for actual, expected in zip(sums, found[0][2], strict=True):
            assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-30


def test_zero_vectors_have_no_direction(operators):
    """Keys of SwinV2's padding are zero vectors. In float16, the inverse of their norm is infinite."""
    for dtype in NAMES:
        qkv, grad = torch.randn(1, 5, 5, 96).to(dtype), torch.randn(1, 5, 5, 32).to(dtype)
        qkv[0, :2, :2, :64] = 0
        windows = Windows(None, None, torch.zeros(1), None, 1, [5, 5], [0, 0])
        found, _ = ours.window_attention_backward(grad, qkv, windows, {"qkv"})
        truth, _ = _plain.window_attention_backward(grad.double(), qkv.double(), windows, {"qkv"})
        kept = torch.ones(5, 5, dtype=torch.bool)
        kept[:2, :2] = False  # the gradient is 1e12 times larger there
        assert relative(found[0][kept], truth[0][kept]) < torch.finfo(dtype).eps
        assert relative(found[0, :2, :2, 64:], truth[0, :2, :2, 64:]) < torch.finfo(dtype).eps


def test_nan_is_not_hidden(operators):
    qkv = torch.randn(1, 6, 12, 96).bfloat16()
    qkv[0, 0, 0, 0] = torch.nan
    out = ours.window_attention(qkv, Windows(None, None, None, None, 1, [6, 6], [0, 0]))
    assert out[0, 0, 0].isnan().all() and out[0, :, 6:].isfinite().all()


def test_what_it_refuses(monkeypatch):
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])
    monkeypatch.setattr(backends, "available", lambda: {"triton": (True, "")})
    large = type("Properties", (), {"shared_memory_per_block_optin": 232448})()
    small = type("Properties", (), {"shared_memory_per_block_optin": 166912})()

    def reason(tokens: int, width: int, dtype=torch.bfloat16, gpu=large) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
        usable, why = ours.takes(Request((dtype,), window=(tokens, width)))
        return "" if usable else why

    assert reason(144, 32) == reason(64, 64) == reason(1, 32, torch.float16) == reason(64, 32, gpu=small) == ""
    assert "dtype torch.float32; the CUDA kernel takes bfloat16 and float16" in reason(36, 32, torch.float32)
    assert "heads of 24 channels; the CUDA kernel takes 32 and 64" in reason(36, 24)
    assert "windows of 145 tokens; the CUDA kernel holds 144 with 32 channels" in reason(145, 32)
    assert "windows of 65 tokens; the CUDA kernel holds 64 with 64 channels" in reason(65, 64)
    assert re.fullmatch(
        r"windows of 144 tokens need 22\d{4} bytes of shared memory; this GPU has 166912", reason(144, 32, gpu=small)
    )
    assert "its sums, gemms and norms run in Triton: dtype torch.float64" in reason(36, 32, torch.float64)
    monkeypatch.setattr(backends, "available", lambda: {"triton": (False, "made up")})
    assert reason(36, 32) == "its sums, gemms and norms run in Triton: made up"


def test_blocks_of_a_multiprocessor():
    """Registers and shared memory limit the number of blocks: an H100 has 228 KB of shared memory, an A100 164 KB."""
    if not _native.load_cuda()[0]:
        pytest.skip(_native.load_cuda()[1])
    blocks = torch.ops.sgmim_fast_cuda.window_attention_blocks
    sizes = [(36, 32), (64, 32), (144, 32), (36, 64), (64, 64)]
    assert [blocks(*size, False, 228 << 10) for size in sizes] == [6, 5, 2, 5, 3]
    assert [blocks(*size, True, 228 << 10) for size in sizes] == [4, 3, 1, 3, 2]
    assert [blocks(*size, True, 164 << 10) for size in sizes] == [3, 2, 0, 2, 1]
    with pytest.raises(RuntimeError, match="windows of 144 tokens and heads of 64 channels; at most 144 with 32"):
        blocks(144, 64, True, 1 << 20)


def test_it_comes_first_where_it_was_the_fastest():
    for op, first in (("window_attention", "cuda"), ("norm_attention", "cuda"), ("relational_guidance", "triton")):
        assert backends.order(op, "cuda")[0] == first and "cuda" in backends.MODULES[op]
    assert backends.order("gather_patches", "cuda") == ["cuda", "triton", "torch"]


def test_ways_that_tune_compares(monkeypatch):
    """`tune` also tries this attention, combined with every tile of Triton's gemms, and then runs it."""
    pytest.importorskip("triton", reason="its gemms run in Triton")
    from sgmim_fast.kernels import primitives

    monkeypatch.setattr(backends, "can_run", lambda op, name, *args, part: (name in ("cuda", "torch"), "made up"))
    asked = Request((torch.bfloat16,), (64,), window=(36, 32))
    monkeypatch.setitem(backends._requests, "norm_attention", lambda part, args: (args, asked))
    monkeypatch.setattr(primitives, "variants", lambda request: ["64x64x32x4x3"])
    ways = backends.candidates("norm_attention", "forward", [])
    assert ways[:2] == ["cuda", "cuda:64x64x32x4x3"]
    for module in (ours, relational_guidance):
        assert module.varied(module, lambda p: lambda: p, "64x64x32x4x3")() is module


@pytest.mark.gpu
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.bfloat16) for shape in SHAPES), ("144 shifted", torch.float16)]
)
@pytest.mark.parametrize("where", ["cuda-cuda"])  # in the id, to be selected like other tests of these kernels
def test_on_a_gpu(where, shape, dtype, cosine):
    from conftest import Place

    usable, reason = backends.can_run("window_attention", "cuda")
    if not usable:
        pytest.skip(reason)
    (grid, window, shift), heads = SHAPES[shape], 3
    with backends.use("cuda"):
        sizes = {"shape": (2, *grid), "heads": heads, "width": 32, "window": window, "shift": shift}
        check(Place("cuda", "cuda"), dtype, **sizes, hottest=5.0 if cosine else None)
