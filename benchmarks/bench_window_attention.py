"""`window_attention` against timm's arithmetic between the projections: pytest benchmarks/bench_window_attention.py"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES

from sgmim_fast.ops.window_attention import MAX_LOGIT_SCALE, window_attention

WINDOWS = {"swin_base": 6, "swinv2_base": 12}  # tokens along a window; a ViT has one window
CASES = [("swin_base", False), ("swin_base", True), ("swinv2_base", False), ("vit_base", False)]  # encoder, shifted


def shift_mask(side: int, window: int, shift: int) -> torch.Tensor:
    """As timm makes it once: (windows, n, n), -100 between tokens that only the cyclic shift has made neighbours."""
    group = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift)
    groups = window_partition((3 * group[:, None] + group)[None, :, :, None], (window, window)).flatten(1)
    return torch.where(groups[:, None] == groups[:, :, None], 0.0, -100.0)


@pytest.mark.parametrize(("encoder", "shifted"), CASES, ids=[f"{e}{', shifted' if s else ''}" for e, s in CASES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_window_attention(benchmark, name, dtype, encoder, shifted):
    """Forward and backward, in the encoder's deepest stage; a Swin's bias from its table, a ViT without."""
    torch.manual_seed(0)
    shape, kind = SHAPES[encoder], DTYPES[dtype]
    side, width = shape.deepest
    heads = width // (64 if shape.prefix else 32)
    window = WINDOWS.get(encoder, 0)
    n, shift = window**2, window // 2 if shifted else 0
    grid = (1, side**2 + shape.prefix) if shape.prefix else (side, side)
    qkv = torch.randn(BATCH, *grid, 3 * width, requires_grad=True)
    cotangent = torch.randn(BATCH, *grid, width)
    leaves = [qkv]
    if window:
        table = torch.randn((2 * window - 1) ** 2, heads, requires_grad=True)
        index, mask = torch.randint(len(table), (n, n)), shift_mask(side, window, shift)[:, None]
        leaves.append(table)
    if encoder == "swinv2_base":
        logit_scale = torch.full((heads,), 10.0).log().requires_grad_()
        leaves.append(logit_scale)

    def plain(qkv, table=None, logit_scale=None):
        def split(x):
            return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

        if table is None:
            return F.scaled_dot_product_attention(*split(qkv[:, 0])).transpose(1, 2).flatten(2)[:, None]
        rolled = qkv.roll((-shift, -shift), (1, 2)) if shift else qkv
        q, k, v = split(window_partition(rolled, (window, window)).flatten(1, 2))
        bias = table[index].permute(2, 0, 1)
        if shift:
            bias = bias + mask.repeat(BATCH, 1, 1, 1)
        if logit_scale is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(q), -1, -1, -1))
        else:
            scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
            y = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * scale + bias).softmax(-1).to(v.dtype) @ v
        y = window_reverse(y.transpose(1, 2).flatten(2).unflatten(1, (window, window)), (window, window), *grid)
        return y.roll((shift, shift), (1, 2)) if shift else y

    def fused(qkv, table=None, logit_scale=None):
        size, options = (window, window) if window else grid, {} if table is None else {"bias": table, "index": index}
        return window_attention(qkv, heads, size, (shift, shift), logit_scale=logit_scale, **options)

    def run(function, dtype=kind):
        y = function(qkv.to(dtype), *leaves[1:])  # as the projection leaves it under autocast
        return [y.detach().float(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]

    group = f"{encoder}{', shifted' if shifted else ''}, {dtype}"
    compare(benchmark, "window_attention", name, group, DTYPES[dtype], run, fused, plain=plain)
