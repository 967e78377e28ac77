"""`window_attention` against timm's arithmetic between the projections: pytest benchmarks/bench_window_attention.py"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from tools.op_bench import BACKENDS, BATCH, DTYPES, compare
from tools.shapes import SHAPES

from sgmim_fast.ops import cases
from sgmim_fast.ops.window_attention import MAX_LOGIT_SCALE

WINDOWS = {"swin_base": 6, "swinv2_base": 12}  # tokens along each side of a window; a ViT's tokens are one window
CASES = [("swin_base", False), ("swin_base", True), ("swinv2_base", False), ("vit_base", False)]  # encoder, shifted


def shift_mask(side: int, window: int, shift: int) -> torch.Tensor:
    """Returns timm's mask, (windows, n, n): -100 between tokens that are in one window only by the cyclic shift."""
    group = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift)
    groups = window_partition((3 * group[:, None] + group)[None, :, :, None], (window, window)).flatten(1)
    return torch.where(groups[:, None] == groups[:, :, None], 0.0, -100.0)


@pytest.mark.parametrize(("encoder", "shifted"), CASES, ids=[f"{e}{', shifted' if s else ''}" for e, s in CASES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *BACKENDS])
def test_window_attention(benchmark, name, dtype, encoder, shifted):
    """Forward and backward, in the encoder's deepest stage. A Swin's bias comes from its table; a ViT has no bias."""
    torch.manual_seed(0)
    shape = SHAPES[encoder]
    side, width = shape.deepest
    heads, window, shift = width // (64 if shape.prefix else 32), WINDOWS.get(encoder), 0
    if window is None:
        one = (1, side**2 + shape.prefix)
        a = cases.window_attention((BATCH, *one), heads, 64, one, (0, 0), bias=None, pad=False)
    else:
        shift, hottest = window // 2 if shifted else 0, 2.3 if encoder == "swinv2_base" else None
        options = {"hottest": hottest, "pad": False}
        a = cases.window_attention((BATCH, side, side), heads, 32, (window, window), (shift, shift), **options)
        mask = shift_mask(side, window, shift)[:, None]

    def plain(a):
        def split(x):
            return x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)

        if a.bias is None:
            return F.scaled_dot_product_attention(*split(a.qkv[:, 0])).transpose(1, 2).flatten(2)[:, None]
        rolled = a.qkv.roll((-shift, -shift), (1, 2)) if shift else a.qkv
        q, k, v = split(window_partition(rolled, (window, window)).flatten(1, 2))
        bias = a.bias[a.index].permute(2, 0, 1)
        if shift:
            bias = bias + mask.repeat(BATCH, 1, 1, 1)
        if a.logit_scale is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(q), -1, -1, -1))
        else:
            scale = a.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()[:, None, None]
            y = ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * scale + bias).softmax(-1).to(v.dtype) @ v
        y = window_reverse(y.transpose(1, 2).flatten(2).unflatten(1, (window, window)), (window, window), side, side)
        return y.roll((shift, shift), (1, 2)) if shift else y

    compare(benchmark, "window_attention", name, f"{encoder}{', shifted' if shifted else ''}", dtype, a, plain=plain)
