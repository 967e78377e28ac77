"""timm's EVA blocks, used by DINOv3 and other ViTs with rotary positions, computed by this package's ops.

See `block`. A norm and the gemm that follows it are one op; the last gemm of a half adds the residual in its epilogue.
Between the gemms of the attention timm's own steps are called: norms of queries and keys, the rotation, PyTorch's
attention, and a norm of its result. Between the gemms of a gated MLP are the activation and the elementwise product.
"""

from __future__ import annotations

from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from timm.layers import AttentionRope, GluMlp, LayerNorm, Mlp, SwiGLU
from timm.models import eva
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.block import PATH1, PATH2, Fused, norm_arguments, norm_linear, norm_mlp, split_heads
from sgmim_fast.fused.unmodified import BIASED, INACTIVE_DROPOUT, LINEAR, MLP, NORM, UNBIASED, Check, Own

# The defaults of `attn_mask` and, in newer versions, `is_causal`. timm's forward passes them on, visible to hooks.
_NO_MASK = {
    option.name: option.default
    for option in signature(eva.EvaBlock.forward).parameters.values()
    if option.default is not Parameter.empty and option.name != "rope"
}


def _separate(attn: nn.Module) -> str:
    own = attn.__dict__
    if own["training"] and getattr(own["_modules"]["attn_drop"], "p", 0):
        return unmodified.DROPOUT
    sizes = {own["_modules"][name]._parameters["weight"].shape[0] for name in ("q_proj", "k_proj", "v_proj")}
    width, rest = divmod(sizes.pop(), own["num_heads"])
    heads, all_heads = own["num_heads"], width * own["num_heads"]
    fits = not sizes and not rest and own["head_dim"] == width and own.get("attn_dim", all_heads) == all_heads
    if not fits or own["scale"] != width**-0.5 or own.get("num_kv_heads", heads) != heads:
        return "scale, num_heads or the head width does not fit the projections"
    return "gated attention is not supported" if own.get("gate") is not None else ""


_BETWEEN = {"q_norm": None, "k_norm": None, "norm": None}  # these modules are always called
_BIASES = ("q_bias", "k_bias", "v_bias")
_PARTS = {"attn_drop": INACTIVE_DROPOUT, "proj": LINEAR, "proj_drop": INACTIVE_DROPOUT, **_BETWEEN}
ATTENTIONS = {
    (eva.EvaAttention, True): unmodified.attention(eva.EvaAttention, UNBIASED, tensors=_BIASES, **_BETWEEN),
    (AttentionRope, True): unmodified.attention(AttentionRope, LINEAR, **_BETWEEN),
    **{
        (kind, False): Own(kind, also=_separate, q_proj=LINEAR, k_proj=LINEAR, v_proj=LINEAR, **_PARTS)
        for kind in (eva.EvaAttention, AttentionRope)
    },
}
ATTENTIONS = {key: Check(norm1=NORM, attn=own) for key, own in ATTENTIONS.items()}


def _inner_norm(norm: nn.Module) -> str:
    if type(norm) is nn.Identity:
        return ""
    if norm._parameters.get("weight") is None or norm._parameters.get("bias") is None:
        return "weight or bias is missing"
    return unmodified._norm(norm)


INNER_NORM = Own(nn.Identity, nn.LayerNorm, LayerNorm, tensors=("weight", "bias"), also=_inner_norm)
_REST = {"act": None, "drop1": None, "norm": INNER_NORM, "fc2": BIASED, "drop2": INACTIVE_DROPOUT}
MLPS = {
    Mlp: MLP,
    GluMlp: Own(
        GluMlp,
        fc1=LINEAR,
        also=lambda mlp: "" if mlp.chunk_dim == -1 else f"chunk_dim is {mlp.chunk_dim}; expected -1",
        **_REST,
    ),
    SwiGLU: Own(SwiGLU, fc1_g=LINEAR, fc1_x=LINEAR, **_REST),
}
MLPS = {kind: Check(norm2=NORM, mlp=own) for kind, own in MLPS.items()}


class EvaBlock(Fused, eva.EvaBlock):
    """EVA: norm1 and qkv, rotary attention over all tokens, projection; norm2 and an MLP, gated or not."""

    timm = eva.EvaBlock

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self._mlp_reason()}

    def _attention_reason(self) -> str:
        attn = self._modules.get("attn")
        check = ATTENTIONS.get((type(attn), "qkv" in getattr(attn, "_modules", ())))
        if getattr(attn, "num_kv_groups", 1) != 1:
            return "grouped-query attention is not supported"
        return f"attn is a {type(attn).__name__}; expected EvaAttention" if check is None else check.why(self)

    def _mlp_reason(self) -> str:
        mlp = self._modules.get("mlp")
        check = MLPS.get(type(mlp))
        return f"mlp is a {type(mlp).__name__}; expected Mlp" if check is None else check.why(self)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if self._as_timm(x) or attn_mask is not None or is_causal:
            options = {"attn_mask": attn_mask, "is_causal": is_causal}
            return super().forward(x, rope=rope, **{name: options[name] for name in _NO_MASK})
        if self._falls_back("attention", self._attention_reason()):
            x = self._added(x, self.attn(self.norm1(x), rope=rope, **_NO_MASK), self.gamma_1, self.drop_path1)
        else:
            x = self._add(x, partial(self._attend, rope=rope), PATH1, self.gamma_1)
        if self._falls_back("mlp", self._mlp_reason()):
            return self._added(x, self.mlp(self.norm2(x)), self.gamma_2, self.drop_path2)
        return self._add(x, self._gated, PATH2, self.gamma_2)

    def _attend(self, x: Tensor, rope: Tensor | None, residual: bool = False, **options: Any) -> Tensor:
        """Computes the attention half, including its norm."""
        attn = self.attn
        if "qkv" in attn._modules:
            qkv, heads = self._qkv(x), attn.num_heads
            if attn.q_norm._backward_hooks or attn.k_norm._backward_hooks:  # old ones are called per node of the graph
                q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
            else:
                q, k, v = split_heads(qkv, heads)
        else:
            q, k, v = (
                norm_linear(x, self.norm1, layer.weight, layer.bias).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
                for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            q, k = (_rotated(t, rope, attn).type_as(v) for t in (q, k))
        attended = attn.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        added = x if residual else None
        return ops.norm_linear(attended, attn.proj.weight, attn.proj.bias, residual=added, **options)

    def _qkv(self, x: Tensor) -> Tensor:
        attn = self.attn
        bias = attn.qkv.bias
        if isinstance(attn, eva.EvaAttention) and attn.q_bias is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        return norm_linear(x, self.norm1, attn.qkv.weight, bias)

    def _gated(self, x: Tensor, residual: bool = False, **options: Any) -> Tensor:
        """Computes the MLP half, including its norm."""
        mlp: Any = self.mlp
        if type(mlp) is Mlp:
            return norm_mlp(x, self.norm2, mlp, residual=residual, **options)
        if type(mlp) is GluMlp:
            first, second = norm_linear(x, self.norm2, mlp.fc1.weight, mlp.fc1.bias).chunk(2, -1)
            hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
        else:
            gate, hidden = (norm_linear(x, self.norm2, layer.weight, layer.bias) for layer in (mlp.fc1_g, mlp.fc1_x))
            hidden = mlp.act(gate) * hidden
        hidden = mlp.drop1(hidden)
        options |= {
            "residual": x if residual else None,
            **norm_arguments(None if type(mlp.norm) is nn.Identity else mlp.norm),
        }
        return ops.norm_linear(hidden, mlp.fc2.weight, mlp.fc2.bias, **options)


def _rotated(x: Tensor, rope: Tensor, attn: nn.Module) -> Tensor:
    """Rotates queries or keys (B, heads, N, d), except for the prefix tokens, which have no position."""
    prefix = attn.num_prefix_tokens
    rotated = eva.apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat((x[:, :, :prefix], rotated), dim=2)
