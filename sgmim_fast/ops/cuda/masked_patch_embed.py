"""The primitives of `masked_patch_embed` on NVIDIA GPUs: csrc/cuda/masked_patch_embed.cu, and the library's gemms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops._plain import (  # noqa: F401 - primitives
    batches_wgrads,
    dgrad,
    finish,
    layer_scale_backward,
    linear,
    wgrads,
)
from sgmim_fast.ops.weights import weights_in  # noqa: F401

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS_INDICES = True


def can_run(part: str, a: Any) -> tuple[bool, str]:
    dtype, width = a.dtype or a.x.dtype, a.weight.shape[0]
    if dtype not in DTYPES:
        return False, f"dtype {dtype}; the CUDA kernels take {', '.join(str(d)[6:] for d in DTYPES)}"
    fits = torch.ops.sgmim_fast_cuda.place_tokens_parts(1, width) > 0
    return fits, f"rows of {width} numbers; the CUDA kernel sums at most 6144 in shared memory"


def place_tokens(
    tokens: Tensor, visible: Tensor, token: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float,
    rows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Cost: reads the tokens and writes every row once; 1 launch, and one for each vector that is not float32."""
    out, statistics = torch.empty(rows, tokens.shape[1], dtype=dtype, device=tokens.device), None
    if norm is not None:
        statistics = torch.empty(2, visible.shape[0], dtype=torch.float32, device=tokens.device)
    vectors = (_vector(t) for t in (token, *(norm or (None, None))))
    torch.ops.sgmim_fast_cuda.place_tokens(tokens, visible, _inverse(out), *vectors, eps, out, statistics)
    return out, statistics


def place_tokens_backward(
    dout: Tensor, tokens: Tensor | None, statistics: Tensor | None, visible: Tensor,
    norm: tuple[Tensor, Tensor] | None, dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Cost: reads the gradient once; 1 launch, and one for each vector."""
    count, width = dout.shape
    dtokens = torch.empty(visible.shape[0], width, dtype=dout.dtype, device=dout.device)
    parts = torch.ops.sgmim_fast_cuda.place_tokens_parts(count, width)
    partials, sums = (torch.empty(*n, 4, width, dtype=torch.float32, device=dout.device) for n in ((parts,), ()))
    weight = None if norm is None else _vector(norm[0])
    arguments = dout, tokens, visible, _inverse(dout), weight, statistics, dtokens, partials, sums
    torch.ops.sgmim_fast_cuda.place_tokens_backward(*arguments)
    return dtokens.to(dtype), dict(zip(("mask_token", "norm_weight", "norm_bias", "bias"), sums, strict=True))


def _inverse(tokens: Tensor) -> Tensor:
    """Allocates the inverse of the list of visible patches."""
    return torch.empty(tokens.shape[0], dtype=torch.int64, device=tokens.device)


def _vector(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()
