"""Gemms on a GPU: several small ones in one launch, with fused epilogues.

One kernel computes C = A . B, (M, K) times (K, N), for a few problems, which it distinguishes by the program's number,
in the three kinds that a linear layer of weight W (outs, ins) needs over its rows. A dash marks an operand that is
`None`:

                    fprop, y = x . W^T          dgrad, dx = dy . W              wgrad, dW = dy^T . x
    a               x (rows, ins)               dy (rows, outs)                 dy (rows, outs), transposed
    b               W (outs, ins), transposed   W (outs, ins)                   x (rows, ins), or x[index]
    c               y (rows, outs)              dx (rows, ins), or dx[index]    dW (outs, ins)
    bias            (outs,), added              -                               -
    pre_activation  written                     read                            -
    activated       -                           written, gelu(pre_activation)   -
    residual        or residual[index], added   -                               -
    scale           -                           multiplies, times factor        multiplies, times factor
    sums            -                           dx's column sums per tile       dy's column sums (bias gradient)

`SGMIM_FAST_TRITON_PRODUCTS=auto|triton|library` selects the implementation. "triton" is this kernel. "library" is
PyTorch's gemm (cuBLAS), with an elementwise kernel as the epilogue. "auto" is what `sgmim_fast.tune` has measured to be
faster for an op and shape, by default the library: on an H200, in Swin-B's step, this kernel's gemms with their
epilogues took twice as long as the library's and the elementwise kernels together (benchmarks/NOTES.md).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgmim_fast.kernels import configs
from sgmim_fast.kernels.arithmetic import TYPES, cast, dot, gelu, gelu_derivative, inside_of
from sgmim_fast.kernels.gelu import gelu_backward, gelu_forward
from sgmim_fast.kernels.launch import cdiv, launch, tf32
from sgmim_fast.kernels.sums import Sum, column_sums
from sgmim_fast.kernels.sums import finish as finish_sums

FPROP, DGRAD, WGRAD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sides(rows, ins, outs, KIND: tl.constexpr):
    """Returns M, N and K of a problem."""
    if KIND == FPROP:
        M, N, K = rows, outs, ins
    elif KIND == DGRAD:
        M, N, K = rows, ins, outs
    else:
        M, N, K = outs, ins, rows
    return M, N, K


@triton.jit
def _swizzle(tile, down, across, GROUP: tl.constexpr):
    """Row and column of a tile, in columns of GROUP tiles, so that neighbouring programs share operands in L2."""
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    return group * GROUP + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit
def _load_a(a, m, k, M, K, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Loads (BLOCK_M, BLOCK_K)."""
    if KIND == WGRAD:
        x = tl.load(a + k.to(tl.int64)[:, None] * M + m[None, :], mask=(k < K)[:, None] & (m < M)[None, :], other=0)
        x = tl.trans(cast(x, DTYPE))
    else:
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        x = cast(tl.load(a + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0), DTYPE)
    return x


@triton.jit
def _load_b(b, k, n, K, N, index, limit, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Loads (BLOCK_K, BLOCK_N)."""
    if KIND == FPROP:
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.trans(tl.load(b + at, mask=(n < N)[:, None] & (k < K)[None, :], other=0))
    else:
        row = k.to(tl.int64)
        if KIND == WGRAD and index is not None:
            row = inside_of(tl.load(index + k, mask=k < K, other=0), limit)
        w = tl.load(b + row[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0)
    return cast(w, DTYPE)


@triton.jit
def _gemm_kernel(
    a, b, c, bias,  # per problem
    residual, pre_activation, activated, index, limit, scale, sums, factor,
    rows, ins, outs,  # per problem
    KIND: tl.constexpr, DTYPE: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program
    A, B, C, R, I, O = a[0], b[0], c[0], rows[0], ins[0], outs[0]  # noqa: E741
    if bias is not None:
        Bias = bias[0]
    first = 0  # first tile of problem i
    for i in tl.static_range(len(a)):
        if program >= first:
            tile = program - first
            A, B, C, R, I, O = a[i], b[i], c[i], rows[i], ins[i], outs[i]  # noqa: E741
            if bias is not None:
                Bias = bias[i]
        down, across, _ = _sides(rows[i], ins[i], outs[i], KIND)
        first += tl.cdiv(down, BLOCK_M) * tl.cdiv(across, BLOCK_N)
    M, N, K = _sides(R, I, O, KIND)
    m_tile, n_tile = _swizzle(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m.to(tl.int64)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if KIND == WGRAD and sums is not None:
        ones = cast(tl.full([BLOCK_K, 16], 1.0, tl.float32), DTYPE)
        bias_total = tl.zeros([BLOCK_M, 16], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_a(A, m, k, M, K, KIND, DTYPE)
        total = dot(x, _load_b(B, k, n, K, N, index, limit, KIND, DTYPE), total, PRECISION)
        if KIND == WGRAD and sums is not None:
            bias_total = dot(x, ones, bias_total, PRECISION)

    inside = (m < M)[:, None] & (n < N)[None, :]
    at = row[:, None] * N + n[None, :]
    if bias is not None:
        total += tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        multiplier = tl.load(scale).to(tl.float32) * factor
        total *= multiplier
        if KIND == WGRAD and sums is not None:  # sixteen equal columns; the first column of tiles writes their mean
            bias_total = tl.sum(bias_total, 1) * 0.0625 * multiplier
            tl.store(sums + m, cast(bias_total, sums.dtype.element_ty), mask=(m < M) & (n_tile + 0 * m == 0))
    total = _epilogue(
        total, at, row, m < M, n, N, inside, residual, pre_activation, activated, index, limit, KIND, GELU
    )
    if KIND == DGRAD and sums is not None:
        tl.store(sums + m_tile.to(tl.int64) * N + n, tl.sum(total, 0), mask=n < N)
    if KIND == DGRAD and index is not None:
        at = inside_of(tl.load(index + m, mask=m < M, other=0), limit)[:, None] * N + n[None, :]
    tl.store(C + at, cast(total, C.dtype.element_ty), mask=inside)


@triton.jit
def _epilogue(
    total, at, row, here, n, N, inside, residual, pre_activation, activated, index, limit,
    KIND: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Applies the epilogue. at: offsets of the result's elements."""
    if GELU:
        if KIND == FPROP:
            total = cast(total, pre_activation.dtype.element_ty)  # rounded as the backward will read it
            tl.store(pre_activation + at, total, mask=inside)
            total = gelu(total.to(tl.float32))
        else:
            x = tl.load(pre_activation + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(activated + at, cast(gelu(x), activated.dtype.element_ty), mask=inside)
            total *= gelu_derivative(x)
    if residual is not None:
        place = row
        if index is not None:
            place = inside_of(tl.load(index + row, mask=here, other=0), limit)
        total += tl.load(residual + place[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _add_rows_kernel(x, scale, residual, index, limit, y, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (n < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + n[None, :]
    place = at
    if index is not None:
        place = inside_of(tl.load(index + row, mask=row < rows, other=0), limit)[:, None] * width + n[None, :]
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        total *= tl.load(scale + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, cast(total, y.dtype.element_ty), mask=inside)


def fused() -> bool:
    """Whether gemms use this kernel rather than the library."""
    return configs.chosen() is not None or _wanted() == "triton"


def may_vary() -> bool:
    """Whether `sgmim_fast.tune` may choose the implementation of gemms."""
    return _wanted() == "auto"


@functools.cache
def _wanted() -> str:
    wanted = os.environ.get("SGMIM_FAST_TRITON_PRODUCTS", "auto")
    if wanted not in ("auto", "triton", "library"):
        raise ValueError(f"SGMIM_FAST_TRITON_PRODUCTS is {wanted!r}; expected auto, triton or library")
    return wanted


_SIDES = {0: (0, 2), 1: (0, 1), 2: (2, 1)}  # kind -> positions of the result's height and width in (rows, ins, outs)


def _config(kind: tl.constexpr, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> configs.Config:
    down, across = _SIDES[kind.value]
    m, n = sum(shape[down] for shape in shapes), max(shape[across] for shape in shapes)
    return configs.gemm(m, n, dtype.itemsize)


def _run(
    kind: tl.constexpr,
    dtype: torch.dtype,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    c: Sequence[Tensor],
    shapes: list[tuple[int, int, int]],
    *,
    bias: list[Tensor] | None = None,
    residual: Tensor | None = None,
    pre_activation: Tensor | None = None,
    activated: Tensor | None = None,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    factor: float = 1.0,
    sums: Tensor | None = None,
) -> None:
    """Launches the gemms of one kind. shapes: (rows, ins, outs) of every problem."""
    sides = _SIDES[kind.value]
    config = _config(kind, dtype, shapes)
    tiles = sum(cdiv(shape[sides[0]], config.block_m) * cdiv(shape[sides[1]], config.block_n) for shape in shapes)
    rows, ins, outs = (tuple(sizes) for sizes in zip(*shapes, strict=True))
    launch(
        _gemm_kernel,
        (tiles,),
        tuple(a),
        tuple(b),
        tuple(c),
        None if bias is None else tuple(bias),
        residual,
        pre_activation,
        activated,
        index,
        (b[0] if kind is WGRAD else c[0] if residual is None else residual).shape[0],
        scale,
        sums,
        factor,
        rows,
        ins,
        outs,
        KIND=kind,
        DTYPE=TYPES[dtype],
        GELU=pre_activation is not None,
        PRECISION=tf32(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=8,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _add(
    product: Tensor, scale: Tensor | None, residual: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns product * scale + residual[index], or + residual, in `dtype`, in place if that is product's. Cost: 1
    launch."""
    y = product if product.dtype == dtype else torch.empty_like(product, dtype=dtype)
    if scale is index is None and product.dtype == residual.dtype == dtype:
        return torch.add(product, residual, out=y)  # PyTorch's vectorised kernel takes one dtype
    rows, width = product.shape
    scale = None if scale is None else scale.contiguous()
    launch(
        _add_rows_kernel, (cdiv(rows, 4), cdiv(width, 512)),
        product, scale, residual, index, rows if residual is None else residual.shape[0], y, rows, width,
        ROWS=4, BLOCK=512,
    )  # fmt: skip
    return y


def linears(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """fprop x . W^T of each pair, (n, in) and (out, in), of one dtype. Cost: 1 launch; library: 1 per pair."""
    dtype = xs[0].dtype
    if not fused():
        return [torch.nn.functional.linear(x, weight) for x, weight in zip(xs, weights, strict=True)]
    ys = [torch.empty(x.shape[0], w.shape[0], dtype=dtype, device=x.device) for x, w in zip(xs, weights, strict=True)]
    shapes = [(x.shape[0], w.shape[1], w.shape[0]) for x, w in zip(xs, weights, strict=True)]
    _run(FPROP, dtype, xs, weights, ys, shapes)
    return ys


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """fprop (x . W^T + bias) * scale + residual[rows], or + residual, in `dtype`, by default x's.

    Cost: 1 launch, and 1 more with a scale; library: 1 more for both, and for a cast of the bias.
    """
    dtype, residual = dtype or x.dtype, None if residual is None else residual.contiguous()
    if fused() and scale is None:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
        shape, biases = (x.shape[0], weight.shape[1], weight.shape[0]), None if bias is None else [bias]
        _run(FPROP, x.dtype, [x], [weight], [y], [shape], bias=biases, residual=residual, index=rows)
        return y
    product = linear(x, weight, bias) if fused() else torch.nn.functional.linear(x, weight, bias)
    return product.to(dtype) if scale is residual is None else _add(product, scale, residual, rows, dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pre-activation h = x . W^T + bias and gelu(h). Cost: 1 launch; library: 2."""
    if not fused():
        pre_activation = torch.nn.functional.linear(x, weight, bias)
        return pre_activation, gelu_forward(pre_activation)
    pre_activation = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    activated = torch.empty_like(pre_activation)
    shape = x.shape[0], weight.shape[1], weight.shape[0]
    _run(FPROP, x.dtype, [x], [weight], [activated], [shape], bias=[bias], pre_activation=pre_activation)
    return pre_activation, activated


def dgrads(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """dgrad dy . W of each pair, (n, out) and (out, in), of one dtype. Cost: 1 launch; library: 1 per pair."""
    dtype = dys[0].dtype
    if not fused():
        return [torch.mm(dy, weight) for dy, weight in zip(dys, weights, strict=True)]
    dxs = [
        torch.empty(dy.shape[0], w.shape[1], dtype=dtype, device=dy.device) for dy, w in zip(dys, weights, strict=True)
    ]
    shapes = [(dy.shape[0], w.shape[1], w.shape[0]) for dy, w in zip(dys, weights, strict=True)]
    _run(DGRAD, dtype, dys, weights, dxs, shapes)
    return dxs


def dgrad(dy: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """dy . W + residual. Cost: 1 launch; 1 more for a residual that the library's gemm cannot add."""
    if residual is not None and residual.dtype == dy.dtype and not fused():
        return torch.addmm(residual, dy, weight)
    (dx,) = dgrads([dy], [weight])
    if residual is None:
        return dx
    return _add(dx, None, residual.contiguous(), None, torch.promote_types(dx.dtype, residual.dtype))


def dgrad_gelu(dy: Tensor, weight: Tensor, pre_activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx = dy . W * gelu'(pre_activation), gelu(pre_activation), and partial sums of dx over its rows.

    Cost: 1 launch; library: 2.
    """
    if not fused():
        return gelu_backward(torch.mm(dy, weight), pre_activation)
    dx, activated = torch.empty_like(pre_activation), torch.empty_like(pre_activation)
    shape = dy.shape[0], weight.shape[1], weight.shape[0]
    tiles = cdiv(shape[0], _config(DGRAD, dy.dtype, [shape]).block_m)
    partials = torch.empty(tiles, shape[1], dtype=torch.float32, device=dy.device)
    _run(
        DGRAD,
        dy.dtype,
        [dy],
        [weight],
        [dx],
        [shape],
        pre_activation=pre_activation,
        activated=activated,
        sums=partials,
    )
    return dx, activated, partials


def dgrad_of_signs(
    signs: Tensor, weight: Tensor, scale: Tensor, factor: float, dx: Tensor, rows: Tensor | None
) -> None:
    """Writes signs . W * scale * factor into dx, or its rows `rows`. signs: (n, out), int8, or differences.

    Cost: 1 launch; library: 4.
    """
    if fused():
        shape = signs.shape[0], weight.shape[1], weight.shape[0]
        _run(DGRAD, weight.dtype, [signs], [weight], [dx], [shape], index=rows, scale=scale, factor=factor)
        return
    product = (signs.to(weight.dtype) @ weight * (scale * factor)).to(dx.dtype)
    dx.copy_(product) if rows is None else dx.index_copy_(0, rows, product)


def wgrad_of_signs(
    signs: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    factor: float,
    rows: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Writes signs^T . x[rows], or . x, times scale * factor, and the sums of signs over rows times the same. signs:
    (n, out), int8, or differences. x is cast to `dtype`, that of the gemms, when it is loaded.

    Cost: 1 launch; library: 7.
    """
    if fused():
        shape = signs.shape[0], x.shape[1], signs.shape[1]
        options = {"index": rows, "scale": scale, "factor": factor, "sums": dbias}
        _run(WGRAD, dtype, [signs], [x], [dweight], [shape], **options)
        return
    multiplier = scale * factor
    product = signs.to(dtype).t() @ (x if rows is None else x[rows]).to(dtype)
    dweight.copy_(product * multiplier)
    finish_sums([Sum(column_sums([signs])[0], dbias)], multiplier)


def wgrads(dys: Sequence[Tensor], xs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """wgrad dy^T . x of each pair, (n, out) and (n, in), in the given dtypes.

    Cost: 1 launch; library: 1 per pair, and casts.
    """
    dtype = xs[0].dtype
    if fused() and len(set(dtypes)) == 1:
        dws = [
            torch.empty(dy.shape[1], x.shape[1], dtype=dtypes[0], device=x.device)
            for dy, x in zip(dys, xs, strict=True)
        ]
        shapes = [(dy.shape[0], x.shape[1], dy.shape[1]) for dy, x in zip(dys, xs, strict=True)]
        _run(WGRAD, dtype, dys, xs, dws, shapes)
        return dws
    return [_wgrad(dy, x, wanted) for dy, x, wanted in zip(dys, xs, dtypes, strict=True)]


def _wgrad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T . x by the library, which on a GPU can write its float32 accumulator as float32."""
    if dtype == torch.float32 and dy.dtype != dtype and dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=dtype)
    return torch.mm(dy.t(), x).to(dtype)
