"""timm's ViT and BEiT blocks, with attention over all tokens, computed by this package's ops, see `block`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from timm.layers import Attention, LayerScale
from timm.models import beit, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.block import PATH1, PATH2, Fused, norm_arguments, norm_linear, split_heads, windows_reason
from sgmim_fast.fused.unmodified import IDENTITY, INACTIVE_DROP_PATH, LINEAR, NORM, UNBIASED, Check, Own
from sgmim_fast.ops import target


def one_window(
    x: Tensor,
    norm: nn.LayerNorm,
    attn: nn.Module,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    layer_scale: Tensor | None = None,
    residual: bool = False,
    rows: Tensor | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Computes the attention half of a block, including norm, layer scale and residual, with attention over all tokens
    of x (B, N, C). Without a relative position bias, x may be `place(rows)`: norm and qkv are then computed for the
    rows (n, C) only."""
    if bias is None and (place is not None or target.on_gpu(x)):
        qkv = norm_linear(x if place is None else rows, norm, attn.qkv.weight, qkv_bias)
        qkv, heads = qkv if place is None else place(qkv), attn.num_heads
        if target.on_gpu(x):
            attended = _flash(qkv, heads)
        else:
            attended = ops.window_attention(qkv.unsqueeze(1), heads, (1, x.shape[1])).squeeze(1)
        options = {"layer_scale": layer_scale, "residual": x if residual else None}
        return ops.norm_linear(attended, attn.proj.weight, attn.proj.bias, **options)
    layers = {"qkv_weight": attn.qkv.weight, "proj_weight": attn.proj.weight, "proj_bias": attn.proj.bias}
    options = {"qkv_bias": qkv_bias, "bias": bias, "index": index, **norm_arguments(norm)}
    options |= {"layer_scale": layer_scale, "residual": residual}
    return ops.norm_attention(x.unsqueeze(1), attn.num_heads, (1, x.shape[1]), **layers, **options).squeeze(1)


def _flash(qkv: Tensor, heads: int) -> Tensor:
    """Computes attention (B, N, 3 C) -> (B, N, C) by PyTorch's kernels. Without a bias this is FlashAttention, whose
    tiles do not have to hold all keys."""
    return F.scaled_dot_product_attention(*split_heads(qkv, heads)).transpose(1, 2).flatten(2)


BEIT_ATTENTION = unmodified.attention(
    beit.Attention,
    UNBIASED,
    tensors=("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index"),
    methods=("_get_rel_pos_bias",),
)


class BeitBlock(Fused, beit.Block):
    """BEiT: norm1 and qkv, attention over all tokens with relative position bias, projection; norm2 and MLP; each half
    with its layer scale."""

    timm = beit.Block
    attention = Check(norm1=NORM, attn=BEIT_ATTENTION)

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self.mlp_half.why(self)}

    def _attention_reason(self) -> str:
        if why := self.attention.why(self):
            return why
        attn = self.attn
        if attn.relative_position_bias_table is None:
            return ""
        tokens = attn.window_size[0] * attn.window_size[1] + 1
        index = attn.relative_position_index
        return "" if tuple(index.shape) == (tokens, tokens) else "relative_position_index does not fit the window size"

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        scales = (None, None) if self.gamma_1 is None else (self.gamma_1, self.gamma_2)  # like timm, test gamma_1 only
        if self._as_timm(x) or (scales[0] is not None and scales[1] is None):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        if self._falls_back("attention", self._attention_reason() or windows_reason(x, x.shape[1])):
            y = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
            x = self._added(x, y, scales[0], self.drop_path1)
        else:
            x = self._add(x, partial(self._fused, shared=shared_rel_pos_bias), PATH1, scales[0])
        if self._falls_back("mlp", self.mlp_half.why(self)):
            y = self.mlp(self.norm2(x))
            return self._added(x, y, scales[1], self.drop_path2)
        return self._add(x, self._mlp, PATH2, scales[1])

    def _fused(self, x: Tensor, shared: Tensor | None, **options: Any) -> Tensor:
        attn = self.attn
        qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        bias = attn.relative_position_bias_table
        index = None if bias is None else attn.relative_position_index
        if shared is not None:
            shared = shared.view(shared.shape[-3:])
            bias, index = shared if bias is None else attn._get_rel_pos_bias().squeeze(0) + shared, None
        return one_window(x, self.norm1, attn, qkv_bias, bias, index, **options)


# The defaults of `attn_mask` and, in newer versions, `is_causal`. timm's forward passes them on, visible to hooks.
_NO_MASK = {
    option.name: option.default
    for option in signature(vision_transformer.Block.forward).parameters.values()
    if option.default is not Parameter.empty
}
VIT_ATTENTION = unmodified.attention(Attention, LINEAR, q_norm=IDENTITY, k_norm=IDENTITY, norm=IDENTITY)


LAYER_SCALE = Own(
    nn.Identity,
    LayerScale,
    tensors=("gamma",),
    also=lambda scale: "in place" if getattr(scale, "inplace", False) else "",
)
SCALE1, SCALE2 = Check(ls1=LAYER_SCALE), Check(ls2=LAYER_SCALE)
SCALE_AND_PATH1 = Check(ls1=LAYER_SCALE, drop_path1=INACTIVE_DROP_PATH)
SCALE_AND_PATH2 = Check(ls2=LAYER_SCALE, drop_path2=INACTIVE_DROP_PATH)


class ViTBlock(Fused, vision_transformer.Block):
    """ViT: norm1 and qkv, attention over all tokens, projection; norm2 and MLP."""

    timm = vision_transformer.Block
    attention = Check(norm1=NORM, attn=VIT_ATTENTION)

    def reasons(self) -> dict[str, str]:
        return {
            "attention": self.attention.why(self),
            "mlp": self.mlp_half.why(self),
        }

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self._as_timm(x) or attn_mask is not None or is_causal:
            options = {"attn_mask": attn_mask, "is_causal": is_causal}
            return super().forward(x, **{name: options[name] for name in _NO_MASK})
        return self.second_half(self.first_half(x))

    def first_half(
        self, x: Tensor, rows: Tensor | None = None, place: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Computes the attention half of all tokens x (B, N, C). If many tokens are equal, x may be given as
        `place(rows)` with the distinct rows (n, C), for which norm and qkv are then computed."""
        attn = self.attn
        if self._falls_back("attention", self.attention.why(self) or windows_reason(x, x.shape[1])):
            return x + self.drop_path1(self.ls1(attn(self.norm1(x), **_NO_MASK)))
        half = partial(self._fused, rows=rows, place=place)
        return self._add(x, half, *self._after(SCALE1, PATH1, SCALE_AND_PATH1))

    def second_half(self, x: Tensor) -> Tensor:
        """Computes the MLP half of tokens (..., C)."""
        if self._falls_back("mlp", self.mlp_half.why(self)):
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self._add(x, self._mlp, *self._after(SCALE2, PATH2, SCALE_AND_PATH2))

    def _fused(self, x: Tensor, **options: Any) -> Tensor:
        return one_window(x, self.norm1, self.attn, self.attn.qkv.bias, None, None, **options)

    def _after(self, scale: Check, path: Check, both: Check) -> tuple[Check, Tensor | None]:
        """Returns the children that follow a half's op, and the layer scale that the op applies, if it can."""
        if scale.why(self):
            return both, None
        return path, getattr(getattr(self, scale.names[0]), "gamma", None)
