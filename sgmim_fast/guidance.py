"""Modules of the guidance branch.

`forward` is the dense computation in plain PyTorch. `visible` bypasses it and computes visible cells only, as packed
rows, through `sgmim_fast.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.fused.unmodified import BIASED, BIASED_PATCHES, NORM_EPS_1E5, UNBIASED, Check, Own
from sgmim_fast.masking import resize
from sgmim_fast.rows import Rows


def embedding_patch(stride: int) -> tuple[int, int]:
    """Returns the side of the structure encoder's patches and the number of patch mergings for an encoder stride.

    The stride is halved while it is even and the half is at least 4: 32 -> (4, 3), 16 -> (4, 2), 14 -> (7, 1).
    """
    mergings = 0
    while stride % 2 == 0 and stride >= 8:
        stride, mergings = stride // 2, mergings + 1
    return stride, mergings


class PatchEmbed(nn.Module):
    """Patch embedding with norm; `proj.weight` is (width, channels, patch, patch)."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, S, H, W) -> (B, H / patch, W / patch, width)."""
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Concatenates 2x2 neighbours, normalises them and projects them to twice the width, as in Swin."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x))


class StructureEncoder(nn.Module):
    """The "shallow MLP layers" that encode the structure map. SPEC "Structure encoder".

    Args:
        channels: number of channels S of the map.
        width: width C of the tokens, equal to the encoder's; a multiple of 2^mergings.
        stride: pixels along a token, equal to the encoder's.

    Raises:
        ValueError: `width` is not a multiple of 2^mergings.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        patch, mergings = embedding_patch(stride)
        if width % (1 << mergings):
            raise ValueError(
                f"encoder.num_features is {width}; expected a multiple of 2^{mergings}, for {mergings} patch mergings"
            )
        first = width >> mergings
        self.patch_embed = PatchEmbed(channels, first, patch)
        self.merges = nn.ModuleList(PatchMerging(first << i) for i in range(mergings))

    def parameters_for_op(self) -> ops.StructureParameters:
        embed = self.patch_embed
        return ops.StructureParameters(
            embed.proj.weight,
            embed.proj.bias,
            embed.norm.weight,
            embed.norm.bias,
            [merge.norm.weight for merge in self.merges],
            [merge.norm.bias for merge in self.merges],
            [merge.reduction.weight for merge in self.merges],
        )

    def forward(self, structure: Tensor, shown: Tensor) -> Tensor:
        """Encodes structure (B, S, H, W) where shown (B, H / p, W / p) bool is True -> (B, N, C)."""
        x = self.patch_embed(structure)  # (B, H / e, W / e, D)
        down, across = x.shape[1:3]
        # If the encoder's patches do not consist of whole embedding patches, one is shown if all its pixels are.
        if down % shown.shape[1] or across % shown.shape[2]:
            pixels = resize(shown, *structure.shape[2:])
            shown = pixels.unflatten(2, (across, -1)).unflatten(1, (down, -1)).all(4).all(2)
        x = x * resize(shown, down, across)[..., None].to(x.dtype)
        for merge in self.merges:
            x = merge(x)
        return x.flatten(1, 2)

    def visible(self, structure: Tensor, shown: Rows) -> Tensor:
        """Encodes shown cells only, structure (B, S, H, W) -> (shown cells + 1, C), see `ops.structure_embed`."""
        return ops.structure_embed(structure, shown.index, self.parameters_for_op(), cell=self.stride)


class CrossAttention(nn.Module):
    """The guidance's multi-head cross-attention; the projections q, k and v have no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, heads: int, shown: Tensor | None = None) -> Tensor:
        """query, key, value (B, N, C), shown (B, N) bool -> (B, N, C). Keys that are not shown are masked out; None:
        all keys count."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)

        q, k, v = split(self.q(query)), split(self.k(key)), split(self.v(value))
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if shown is not None:
            logits = logits.masked_fill(~shown[:, None, None], -torch.inf)
            # An image without any key gets weights 0; softmax of -inf alone would be NaN.
            weights = torch.where(shown.any(1)[:, None, None, None], logits, 0).softmax(-1)
            weights = weights * shown[:, None, None]
        else:
            weights = logits.softmax(-1)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden_features: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_features)
        self.fc2 = nn.Linear(hidden_features, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RelationalGuidance(nn.Module):
    """Pre-norm block in which encoder features attend to structure tokens. SPEC "Relational guidance".

    Args:
        width: width C of features and structure tokens, a multiple of `heads`.
        heads: number of attention heads.
        hidden_context: "keep" or "drop" the hidden structure cells in the attention.
        cells: number of cells N of an image, for learned positions; 0: no positions.

    Raises:
        ValueError: `width` is not a multiple of `heads`, or hidden_context is unknown.
    """

    def __init__(self, width: int, heads: int = 8, hidden_context: str = "keep", cells: int = 0):
        super().__init__()
        if width % heads:
            raise ValueError(f"encoder.num_features is {width}; expected a multiple of the guidance's {heads} heads")
        if hidden_context not in ("keep", "drop"):
            raise ValueError(f"hidden_context is {hidden_context!r}; expected 'keep' or 'drop'")
        self.heads, self.hidden_context = heads, hidden_context
        self.query_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.attn = CrossAttention(width)
        self.out_norm = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, cells, width), std=0.02)) if cells else None

    def parameters_for_op(self) -> ops.GuidanceParameters:
        return ops.GuidanceParameters(
            self.query_norm.weight,
            self.query_norm.bias,
            self.context_norm.weight,
            self.context_norm.bias,
            self.attn.q.weight,
            self.attn.k.weight,
            self.attn.v.weight,
            self.attn.proj.weight,
            self.attn.proj.bias,
            self.out_norm.weight,
            self.out_norm.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
        )

    def forward(self, features: Tensor, structure: Tensor, shown: Tensor) -> Tensor:
        """features, structure (B, N, C), shown (B, N) bool -> (B, N, C).

        `shown` is used with hidden_context="drop" only, which masks out the keys of cells that are not shown.
        """
        query, context = self.query_norm(features), self.context_norm(structure)
        position = 0 if self.pos_embed is None else self.pos_embed.to(query.dtype)
        keys = shown if self.hidden_context == "drop" else None
        t = features + self.attn(query + position, context + position, context, self.heads, keys)
        return t + self.mlp(self.out_norm(t))

    def visible(
        self, features: Tensor, structure: Tensor, visible: Rows, shown: Rows, cells: int | None = None
    ) -> Tensor:
        """Computes visible cells only, features (B * N, C), or (visible cells, C) with cells = N, and structure
        (shown cells + 1, C) -> (visible cells, C); see `ops.relational_guidance`."""
        return ops.relational_guidance(
            features,
            structure,
            visible,
            shown,
            self.parameters_for_op(),
            heads=self.heads,
            hidden_context=self.hidden_context,
            cells=cells,
        )


def _structure_encoder(mergings: int) -> Own:
    def also(encoder: StructureEncoder) -> str:
        sides = encoder.patch_embed.proj.stride[0], len(encoder.merges)
        return "" if sides == embedding_patch(encoder.stride) else f"cells that are not {encoder.stride} pixels wide"

    merge = Own(PatchMerging, norm=NORM_EPS_1E5, reduction=UNBIASED)
    return Own(
        StructureEncoder,
        methods=("visible", "parameters_for_op"),
        also=also,
        patch_embed=Own(PatchEmbed, proj=BIASED_PATCHES, norm=NORM_EPS_1E5),
        merges=Own(nn.ModuleList, methods=("__iter__",), **{str(i): merge for i in range(mergings)}),
    )


_GUIDANCE = Own(
    RelationalGuidance,
    methods=("visible", "parameters_for_op"),
    query_norm=NORM_EPS_1E5,
    context_norm=NORM_EPS_1E5,
    attn=Own(CrossAttention, q=UNBIASED, k=UNBIASED, v=UNBIASED, proj=BIASED),
    out_norm=NORM_EPS_1E5,
    mlp=Own(Mlp, fc1=BIASED, fc2=BIASED),
)
_HEAD = Check(image_head=BIASED)
# Indexed by the number of patch mergings. With 8 mergings a cell has at least 4 * 2^8 pixels a side.
_BRANCH = tuple(
    Check(image_head=BIASED, structure_encoder=_structure_encoder(i), guidance=_GUIDANCE, structure_head=BIASED)
    for i in range(9)
)


def changed(model: nn.Module) -> str:
    """Returns the reason to call the heads and the branch of an `SGMIM`; "" if the ops may replace the calls."""
    if model._modules.get("guidance") is None:
        return _HEAD.why(model)
    if model.guidance.pos_embed is not None:
        return "hidden cells differ where positions are learned"
    mergings = embedding_patch(model.encoder_stride)[1]
    return _BRANCH[mergings].why(model) if mergings < len(_BRANCH) else f"cells of {model.encoder_stride} pixels"
