"""Gemms through the fastest library call of the machine, and the dtype in which they are computed.

On a CPU, PyTorch computes float32 gemms with MKL, which on AMD processors with AVX-512 reaches a third of oneDNN's
rate. oneDNN is reached through `mkldnn::_linear_pointwise`, which PyTorch ships for its own compiler. A CPU without
bfloat16 instructions multiplies bfloat16 matrices at a fifth of its float32 rate (33 against 160 GFLOP/s, 2 cores with
AVX2), so there bfloat16 gemms are computed in float32, which is faster and more precise. `benchmarks/NOTES.md` has the
measurements.

Environment: `SGMIM_FAST_PRODUCTS=auto|float32|bfloat16` sets the dtype in which a CPU computes bfloat16 calls.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

BFLOAT16_IN: contextvars.ContextVar[torch.dtype | None] = contextvars.ContextVar("sgmim_fast.bfloat16", default=None)


@contextlib.contextmanager
def compute_bfloat16_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, bfloat16 calls on a CPU are computed in `dtype`, torch.float32 or torch.bfloat16.

    The setting is local to the thread or task, and holds for the backward of what is computed within the block.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.bfloat16")
    token = BFLOAT16_IN.set(dtype)
    try:
        yield
    finally:
        BFLOAT16_IN.reset(token)


@functools.cache
def _bfloat16_on_cpu() -> torch.dtype:
    wanted = os.environ.get("SGMIM_FAST_PRODUCTS", "auto")
    if wanted not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"SGMIM_FAST_PRODUCTS is {wanted!r}; expected auto, float32 or bfloat16")
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if _has_bfloat16() else torch.float32


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which gemms of a call in `dtype` are computed, and their operands kept."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        return BFLOAT16_IN.get() or _bfloat16_on_cpu()
    return dtype


@functools.cache
def _has_onednn() -> bool:
    """Whether `mkldnn::_linear_pointwise` exists and computes `F.linear`."""
    try:
        x, weight = 2 * torch.eye(8, dtype=torch.float32), torch.arange(64, dtype=torch.float32).view(8, 8)
        bias = torch.ones_like(weight[0])
        with torch.no_grad():
            y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(y, 2 * weight.t() + 1)


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 instructions for its gemms."""
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether MKL is slow in every shape: AMD with AVX-512. Elsewhere MKL's wgrad is as fast as oneDNN's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or platform.system() != "Linux":
        return False
    with open("/proc/cpuinfo") as lines:
        return any("AuthenticAMD" in line for line in lines)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # the op ignores its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _use_onednn(x: Tensor, bias: Tensor | None = None) -> bool:
    """In bfloat16, PyTorch's own call uses oneDNN too, but first copies the bias to every row."""
    if x.device.type != "cpu" or x.numel() == 0 or not _has_onednn():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and bias is not None and _has_bfloat16())


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(x (n, i) . weight (o, i)^T + bias (o,)), cast to x's dtype, * scale (o,) + residual (n, o), in `dtype`, by
    default x's."""
    bias = None if bias is None else bias.to(x.dtype)
    product = _onednn(x, weight, bias) if _use_onednn(x, bias) else torch.nn.functional.linear(x, weight, bias)
    product = _added(product if scale is None else product * scale, residual)
    return product if dtype is None else product.to(dtype)


def dgrad(dy: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """dy (n, o) . weight (o, i) + residual (n, i) -> (n, i), in the wider dtype of dy and residual."""
    return _added(_onednn(dy, weight.t()) if _use_onednn(dy) else dy @ weight, residual)


def _added(product: Tensor, residual: Tensor | None) -> Tensor:
    """product + residual, in place unless the residual is wider: faster than oneDNN's "add"."""
    if residual is None:
        return product
    narrower = torch.promote_types(product.dtype, residual.dtype) != product.dtype
    return product + residual if narrower else product.add_(residual)


def wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """dy (n, o)^T . x (n, i) -> (o, i)."""
    # For a few columns (a patch of 16 pixels) the transposed copies cost more than the gemm.
    if _use_onednn(dy) and _mkl_is_slow() and x.shape[1] >= 64:
        return _onednn(dy.t(), x.t())
    return dy.t() @ x
