"""timm's blocks computing the same function through this project's ops.

Each class derives from timm's and has its parameters, buffers and children: `accelerate` gives a module the class, and
taking it away again is all it needs to undo that. Every forward looks first at what it is about to bypass. A child that
is not timm's own (a hook, an adapter, a dropout at work, another activation) is called as timm would, one half of the
block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models import beit, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import backends, ops
from sgmim_fast.bypass import attention_reason, changed, first, mlp_reason, norm_reason, nothing
from sgmim_fast.ops.window_attention import most_tokens_on_a_gpu


def _vectors(norm: nn.LayerNorm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def norm_mlp(x: Tensor, norm: nn.LayerNorm | None, mlp: Mlp, residual: bool = False) -> Tensor:
    layers = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return ops.norm_mlp(x, *layers, **_vectors(norm), residual=residual)


def norm_linear(x: Tensor, norm: nn.LayerNorm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.norm_linear(x, weight, bias, **_vectors(norm))


def _through(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def add_linear(x: Tensor, y: Tensor, linear: nn.Linear, *between: nn.Module) -> Tensor:
    """x + linear(y), the projection's result going through layer scale and drop path first."""
    if nothing(between):
        return ops.norm_linear(y, linear.weight, linear.bias, residual=x)
    return x + _through(between, ops.norm_linear(y, linear.weight, linear.bias))


def add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Mlp, *between: nn.Module) -> Tensor:
    """x + mlp(norm(x)), the MLP's result going through layer scale and drop path first."""
    if nothing(between):
        return norm_mlp(x, norm, mlp, residual=True)
    return x + _through(between, norm_mlp(x, norm, mlp))


def here(x: Tensor) -> bool:
    """Whether there are kernels for a tensor like this; where there are none, timm's own forward runs."""
    return (x.device.type == "cpu" or x.dtype != torch.float64) and _has_kernels(x.device.type)


@torch.compiler.assume_constant_result
def _has_kernels(device: str) -> bool:
    """Whether the forced backend, or one of the device's own, has a window attention."""
    forced = backends.forced()
    if forced is not None:
        return forced == "torch" or forced in backends.MODULES["window_attention"]
    own = [name for name in backends.ORDER.get(device, ()) if name != "torch"]
    return any(backends.can_run("window_attention", name)[0] for name in own)


def _window_fits(x: Tensor, tokens: int) -> bool:
    """Whether a window of so many tokens is one for the kernels: on a GPU timm's own attention takes the large ones."""
    device = x.device.type
    if device == "cpu":
        return True
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return tokens <= most_tokens_on_a_gpu(dtype)


class _SwinHalves:
    """What both Swin blocks share."""

    def _size_fits(self, x: Tensor) -> bool:
        if not _window_fits(x, self.window_size[0] * self.window_size[1]):
            return False
        return getattr(self, "dynamic_mask", False) or tuple(x.shape[1:3]) == tuple(self.input_resolution)

    def _windows(self, qkv: Tensor, bias: Tensor, pad: Tensor | None, logit_scale: Tensor | None = None) -> Tensor:
        (height, width), window = qkv.shape[1:3], self.window_size
        return ops.window_attention(
            qkv,
            self.attn.num_heads,
            window,
            self.shift_size,
            bias=bias,
            index=self.attn.relative_position_index,
            logit_scale=logit_scale,
            pad=pad if height % window[0] or width % window[1] else None,
        )


class SwinTransformerBlock(_SwinHalves, swin_transformer.SwinTransformerBlock):
    """Swin: norm1 and qkv, window attention, projection; norm2 and MLP."""

    def reasons(self) -> dict[str, str]:
        """Why each half runs as timm's; "" where it is fused."""
        return {
            "attention": attention_reason(self.norm1, self.attn, swin_transformer.WindowAttention),
            "mlp": mlp_reason(self.norm2, self.mlp),
        }

    def forward(self, x: Tensor) -> Tensor:
        if not here(x):
            return super().forward(x)
        reasons, attn = self.reasons(), self.attn
        if reasons["attention"] or not self._size_fits(x):
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        else:
            qkv = norm_linear(x, self.norm1, attn.qkv.weight, attn.qkv.bias)
            attended = self._windows(qkv, attn.relative_position_bias_table, attn.qkv.bias)
            x = add_linear(x, attended, attn.proj, self.drop_path1)
        flat = x.flatten(1, 2)
        if reasons["mlp"]:
            flat = flat + self.drop_path2(self.mlp(self.norm2(flat)))
        else:
            flat = add_mlp(flat, self.norm2, self.mlp, self.drop_path2)
        return flat.view(x.shape)


class SwinTransformerV2Block(_SwinHalves, swin_transformer_v2.SwinTransformerV2Block):
    """SwinV2: qkv, window attention on cosines, projection, norm1; MLP, norm2."""

    def reasons(self) -> dict[str, str]:
        return {
            "attention": attention_reason(None, self.attn, swin_transformer_v2.WindowAttention),
            "mlp": mlp_reason(None, self.mlp),
        }

    def forward(self, x: Tensor) -> Tensor:
        if not here(x):
            return super().forward(x)
        reasons = self.reasons()
        attended = self._attn(x) if reasons["attention"] or not self._size_fits(x) else self._fused(x)
        x = x + self.drop_path1(self.norm1(attended))
        flat = x.flatten(1, 2)
        flat = flat + self.drop_path2(self.norm2(self.mlp(flat) if reasons["mlp"] else norm_mlp(flat, None, self.mlp)))
        return flat.view(x.shape)

    def _fused(self, x: Tensor) -> Tensor:
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
        qkv = norm_linear(x, None, attn.qkv.weight, bias)
        return norm_linear(
            self._windows(qkv, table, bias, attn.logit_scale.flatten()), None, attn.proj.weight, attn.proj.bias
        )


class PatchMerging(swin_transformer.PatchMerging):
    """Swin's: the norm and the reduction as one op, behind timm's gather of 2 x 2 neighbours."""

    def reasons(self) -> dict[str, str]:
        return {"reduction": norm_reason(self.norm) or changed(self.reduction, nn.Linear)}

    def forward(self, x: Tensor) -> Tensor:
        if not here(x) or any(self.reasons().values()):
            return super().forward(x)
        return norm_linear(_neighbours(x), self.norm, self.reduction.weight, self.reduction.bias)


class PatchMergingV2(swin_transformer_v2.PatchMerging):
    """SwinV2's: the norm comes after the reduction."""

    def reasons(self) -> dict[str, str]:
        return {"reduction": changed(self.reduction, nn.Linear)}

    def forward(self, x: Tensor) -> Tensor:
        if not here(x) or any(self.reasons().values()):
            return super().forward(x)
        return self.norm(norm_linear(_neighbours(x), None, self.reduction.weight, self.reduction.bias))


def _neighbours(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H / 2, W / 2, 4 C), neighbours (0, 0), (1, 0), (0, 1), (1, 1); an odd side is padded."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def _one_window(
    x: Tensor, norm: nn.Module, attn: nn.Module, qkv_bias: Tensor | None, bias: Tensor | None, index: Tensor | None
) -> Tensor:
    """Attention of all tokens (B, N, C) over all of them, with the norm before; what the projection reads."""
    qkv = norm_linear(x, norm, attn.qkv.weight, qkv_bias).unsqueeze(1)
    return ops.window_attention(qkv, attn.num_heads, (1, x.shape[1]), bias=bias, index=index).squeeze(1)


class BeitBlock(beit.Block):
    """BEiT: norm1 and qkv, attention over all tokens with relative position bias, projection; norm2 and MLP.

    Its layer scale keeps the residuals outside the ops.
    """

    def reasons(self) -> dict[str, str]:
        return {
            "attention": attention_reason(self.norm1, self.attn, beit.Attention),
            "mlp": mlp_reason(self.norm2, self.mlp),
        }

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        if not here(x):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        reasons = self.reasons()
        if reasons["attention"] or not _window_fits(x, x.shape[1]):
            attended = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        else:
            attended = self._fused(x, shared_rel_pos_bias)
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        hidden = self.mlp(self.norm2(x)) if reasons["mlp"] else norm_mlp(x, self.norm2, self.mlp)
        return x + self.drop_path2(hidden if self.gamma_2 is None else self.gamma_2 * hidden)

    def _fused(self, x: Tensor, shared: Tensor | None) -> Tensor:
        attn = self.attn
        qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        bias, index = attn.relative_position_bias_table, attn.relative_position_index
        if shared is not None:
            shared = shared.view(shared.shape[-3:])
            bias, index = shared if bias is None else attn._get_rel_pos_bias().squeeze(0) + shared, None
        attended = _one_window(x, self.norm1, attn, qkv_bias, bias, index)
        return norm_linear(attended, None, attn.proj.weight, attn.proj.bias)


class ViTBlock(vision_transformer.Block):
    """ViT: norm1 and qkv, attention over all tokens, projection; norm2 and MLP."""

    def reasons(self) -> dict[str, str]:
        return {
            "attention": attention_reason(self.norm1, self.attn, Attention, "q_norm", "k_norm", "norm"),
            "mlp": mlp_reason(self.norm2, self.mlp),
        }

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not here(x) or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        reasons, attn = self.reasons(), self.attn
        if reasons["attention"] or not _window_fits(x, x.shape[1]):
            x = x + self.drop_path1(self.ls1(attn(self.norm1(x))))
        else:
            attended = _one_window(x, self.norm1, attn, attn.qkv.bias, None, None)
            x = add_linear(x, attended, attn.proj, self.ls1, self.drop_path1)
        if reasons["mlp"]:
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return add_mlp(x, self.norm2, self.mlp, self.ls2, self.drop_path2)


def stem_fits(stem: PatchEmbed, x: Tensor) -> bool:
    """Whether the stem of images `x` may be computed by `masked_stem`."""
    p, conv = stem.patch_size[0], stem.proj
    why = first(
        (
            changed(stem, PatchEmbed),
            changed(conv, nn.Conv2d),
            "" if isinstance(stem.norm, nn.Identity) else norm_reason(stem.norm),
        )
    )
    whole = x.shape[2] % p == 0 and x.shape[3] % p == 0  # else timm pads
    return here(x) and not why and whole and conv.kernel_size == conv.stride == (p, p)


def masked_stem(stem: PatchEmbed, x: Tensor, mask_token: Tensor, visible: Tensor) -> Tensor:
    """The stem's tokens, in the shape that it gives them, embedding only the visible patches of (B, C, H, W) images.

    visible: (n,) int64 rows among the B * (H / p) * (W / p) patches. All others are the mask token.
    """
    norm = {}
    if not isinstance(stem.norm, nn.Identity):
        norm = {"norm_weight": stem.norm.weight, "norm_bias": stem.norm.bias, "eps": stem.norm.eps}
    tokens = ops.masked_patch_embed(x, stem.proj.weight, stem.proj.bias, mask_token.flatten(), visible, **norm)
    return tokens if stem.flatten else tokens.unflatten(1, stem.dynamic_feat_size(x.shape[2:]))


# timm's class -> ours
FAST: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: SwinTransformerBlock,
    swin_transformer.PatchMerging: PatchMerging,
    swin_transformer_v2.SwinTransformerV2Block: SwinTransformerV2Block,
    swin_transformer_v2.PatchMerging: PatchMergingV2,
    beit.Block: BeitBlock,
    vision_transformer.Block: ViTBlock,
}
