"""The primitives in Triton: the library's gemms, or our own with fused epilogues (`gemm`), and kernels between them."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from sgmim_fast.kernels import configs, gemm
from sgmim_fast.kernels import window_attention as windows
from sgmim_fast.kernels.gemm import dgrad, dgrad_gelu, dgrads, linear, linear_gelu, linears, wgrads  # noqa: F401
from sgmim_fast.kernels.launch import MOST_COLUMNS, on_device
from sgmim_fast.kernels.layer_norm import layer_norms, layer_norms_backward, normalise
from sgmim_fast.kernels.layer_scale import layer_scale_backward  # noqa: F401 - a primitive, as the following
from sgmim_fast.kernels.linear_l1 import linear_l1, linear_l1_backward  # noqa: F401 - primitives, as the following
from sgmim_fast.kernels.position_bias import position_bias, position_bias_backward  # noqa: F401
from sgmim_fast.kernels.relational_guidance import guidance_attention, guidance_attention_backward  # noqa: F401
from sgmim_fast.kernels.structure_embed import embed, embed_backward, embedded  # noqa: F401
from sgmim_fast.kernels.sums import column_sums
from sgmim_fast.kernels.sums import finished as finish  # noqa: F401
from sgmim_fast.ops import whole_attention
from sgmim_fast.ops.primitives import Norm, NormGradient, Request, Windows
from sgmim_fast.ops.weights import weights_in  # noqa: F401
from sgmim_fast.ops.window_attention import most_tokens_on_a_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS_INDICES = True  # the kernels clamp them: checking on the host would synchronise
MOST_WIDTH = 128  # channels of an attention head

batches_wgrads, guarded = gemm.fused, on_device


def takes(request: Request) -> tuple[bool, str]:
    for dtype in request.dtypes:
        if dtype not in DTYPES:
            return False, f"dtype {dtype}; the Triton kernels take float32, bfloat16 and float16"
    for width in request.widths:
        if width > MOST_COLUMNS:
            return False, f"rows of {width} numbers; the Triton kernels hold {MOST_COLUMNS} in registers"
    if request.embedding is not None:
        width, pixels, _ = request.embedding
        if width > 1024 or pixels > 256:
            return False, f"a patch embedding of {pixels} pixels to {width}; the kernel takes 256 to 1024 at most"
    if request.window is not None:
        (tokens, width), most = request.window, most_tokens_on_a_gpu(request.dtypes[-1])
        if tokens > most:
            return False, f"windows of {tokens} tokens; the Triton kernels hold {most} in {request.dtypes[-1]}"
        if width > MOST_WIDTH:
            return False, f"heads of {width} channels; the Triton kernels hold {MOST_WIDTH}"
    return True, ""


def variants(request: Request) -> list[str]:
    """Returns the tiles with which our gemms can replace the library's, for the element size of the call's dtype."""
    has_gemms = bool(request.widths) or request.window is None
    tiles = configs.tiles(request.dtypes[-1].itemsize) if has_gemms and gemm.may_vary() else []
    return ["x".join(map(str, tile)) for tile in tiles]


def varied(primitives: Any, bind: Callable[[Any], Callable[..., Any]], variant: str) -> Callable[..., Any]:
    """Binds a function to these primitives, or to others with the same gemms, with our gemms in the variant's tile."""
    function, tile = bind(primitives), configs.Config(*map(int, variant.split("x")))

    def run(*args: Any) -> Any:
        with configs.use(tile):
            return function(*args)

    return run


def linear_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor, Tensor]:
    t, (norm_weight, norm_bias, eps) = linear(x, weight, bias, residual=residual, rows=rows), norm
    return t, *layer_norms([Norm(t, norm_weight, norm_bias)], eps, t.dtype)[0]


def window_attention(qkv: Tensor, w: Windows) -> Tensor:
    """A ViT's attention without bias uses PyTorch's flash attention."""
    if qkv.is_cuda and whole_attention.takes(qkv, w):
        return whole_attention.whole_attention(qkv, w)
    return windows.window_attention(qkv, w)


def window_attention_backward(
    grad: Tensor, qkv: Tensor, w: Windows, wanted: Container[str], out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    if out is not None:
        out.copy_(window_attention(qkv, w))
    if qkv.is_cuda and whole_attention.takes(qkv, w) and "pad" not in wanted:
        dqkv = whole_attention.whole_attention_backward(grad, qkv, w)
        return dqkv, {"qkv_bias": column_sums([dqkv.flatten(0, 2)])[0]} if "qkv_bias" in wanted else {}
    return windows.window_attention_backward(grad, qkv, w, wanted)


def place_tokens(
    tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
    rows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Cost: writes the token to all rows, then the normalised tokens to theirs; 3 launches at most."""
    out = token.to(dtype).repeat(rows, 1)
    if norm is None:
        return out.index_copy_(0, visible, tokens.to(dtype)), None
    return out, *normalise([Norm(tokens, *norm)], [out], eps, [tokens.shape[0]], y_rows=visible)


def place_tokens_backward(
    dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
    norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Cost: reads the gradient twice; 6 launches at most."""
    masked = torch.ones(dout.shape[0], dtype=torch.uint8, device=dout.device).index_fill_(0, visible, 0)
    sums, dtokens = {"mask_token": column_sums([dout], masked)[0]}, dout[visible].to(dtype)
    if norm is None:
        return dtokens, sums | {"bias": column_sums([dtokens])[0]}
    (found,) = layer_norms_backward([NormGradient(dtokens, tokens, statistics, *norm, recompute=False, sum_dx=True)])
    return found.dx, sums | {"norm_weight": found.weight, "norm_bias": found.bias, "bias": found.dx_sum}
