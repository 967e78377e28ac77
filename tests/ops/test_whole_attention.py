"""Attention of all tokens with PyTorch's own kernels: compared with plain PyTorch on a CPU, faked for a GPU."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close_to_truth
from torch._subclasses.fake_tensor import FakeTensorMode

from sgmim_fast.ops import _plain, library, whole_attention
from sgmim_fast.ops.primitives import Windows


def windows(heads: int, window: tuple[int, int], shift: tuple[int, int] = (0, 0), **given: torch.Tensor) -> Windows:
    tensors = {"bias": None, "index": None, "logit_scale": None, "pad": None} | given
    return Windows(**tensors, heads=heads, window=list(window), shift=list(shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "heads", "width"), [((1, 17), 3, 16), ((4, 5), 2, 8), ((1, 1), 1, 24)])
def test_as_plain_pytorch(window, heads, width, dtype):
    w = windows(heads, window)
    qkv, grad = (torch.randn(2, *window, c * heads * width).to(dtype) for c in (3, 1))
    assert whole_attention.takes(qkv, w)
    with torch._C._AutoDispatchBelowAutograd():  # as inside an op
        found = library.window_attention(qkv, w), library.window_attention_backward(grad, qkv, w, ("qkv",))[0]
    for i, actual in enumerate(found):
        plain, truth = (
            (_plain.window_attention(x, w), _plain.window_attention_backward(g, x, w, ("qkv",))[0])[i]
            for x, g in ((qkv, grad), (qkv.double(), grad.double()))
        )
        assert actual.is_contiguous() and actual.dtype == dtype
        assert_close_to_truth(actual, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_by_its_fakes(dtype):
    """Checks shapes, and the order of arguments of PyTorch's GPU functions."""
    with FakeTensorMode():
        qkv, grad = (torch.empty(2, 1, 197, c * 12 * 64, dtype=dtype, device="cuda") for c in (3, 1))
        w = windows(12, (1, 197))
        assert whole_attention.takes(qkv, w)
        assert whole_attention.whole_attention(qkv, w).shape == grad.shape
        found = whole_attention.whole_attention_backward(grad, qkv, w)
        assert found.shape == qkv.shape and found.dtype == dtype and found.is_cuda


def test_the_triton_backend_takes_it_on_a_gpu_alone(monkeypatch):
    """Elsewhere, as in the interpreter, the backend runs its own kernels."""
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    from sgmim_fast.kernels import primitives

    with FakeTensorMode():
        qkv, grad = (torch.empty(2, 1, 197, c * 12 * 64, dtype=torch.bfloat16, device="cuda") for c in (3, 1))
        w = windows(12, (1, 197))
        assert primitives.window_attention(qkv, w).shape == grad.shape
        assert primitives.window_attention_backward(grad, qkv, w, ("qkv",))[0].shape == qkv.shape
    monkeypatch.setattr(primitives.windows, "window_attention", lambda *_: "own")
    assert primitives.window_attention(torch.zeros(2, 1, 17, 96), windows(2, (1, 17))) == "own"


def test_what_it_does_not_take():
    with FakeTensorMode():
        qkv = torch.empty(2, 4, 4, 3 * 32, dtype=torch.bfloat16, device="cuda")
        assert whole_attention.takes(qkv, windows(2, (4, 4)))
        assert not whole_attention.takes(qkv, windows(2, (2, 2)))
        assert not whole_attention.takes(qkv, windows(2, (4, 4), shift=(1, 0)))
        assert not whole_attention.takes(qkv, windows(2, (4, 4), bias=torch.empty(2, 16, 16)))
        assert not whole_attention.takes(qkv, windows(2, (4, 4), logit_scale=torch.empty(2)))
        assert not whole_attention.takes(qkv, windows(8, (4, 4)))  # heads of 4 channels
        assert not whole_attention.takes(qkv.float(), windows(2, (4, 4)))
        assert not whole_attention.takes(qkv[:0], windows(2, (4, 4)))
