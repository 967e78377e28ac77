"""Modules of the guidance branch: parameters under the names of the field, arithmetic in `sgmim_fast.ops`.

Their `forward` is the visible-only arithmetic on packed rows; the dense one is `sgmim_fast.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.rows import Rows


def embedding_patch(stride: int) -> tuple[int, int]:
    """Side of the structure encoder's embedding patch and number of patch mergings for an encoder stride.

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


class PatchMerging(nn.Module):
    """2x2 neighbours concatenated, normalised and reduced to twice the width, as in Swin."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)


class StructureEncoder(nn.Module):
    """The "shallow MLP layers" that encode the structure map. SPEC "Structure encoder".

    Args:
        channels: channels S of the map.
        width: C of the tokens, that of the encoder; a multiple of 2^mergings.
        stride: pixels along a token, that of the encoder.

    Raises:
        ValueError: a width that the mergings cannot reach.
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

    def forward(self, structure: Tensor, shown: Rows) -> Tensor:
        """structure (B, S, H, W) -> (shown cells + 1, C), see `ops.structure_embed`."""
        return ops.structure_embed(structure, shown.index, self.parameters_for_op(), cell=self.stride)


class CrossAttention(nn.Module):
    """Projections of the guidance's attention; q, k and v have no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class RelationalGuidance(nn.Module):
    """Encoder features guided by structure tokens: one pre-norm block. SPEC "Relational guidance".

    Args:
        width: C of features and structure tokens, a multiple of `heads`.
        heads: attention heads.
        hidden_context: "keep" or "drop" the hidden structure cells in the attention.
        cells: with learned positions, the number of cells N of an image; 0: none.

    Raises:
        ValueError: a width that the heads do not divide, or an unknown hidden_context.
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

    def forward(self, features: Tensor, structure: Tensor, visible: Rows, shown: Rows) -> Tensor:
        """features (B * N, C), structure (shown cells + 1, C) -> (visible cells, C), see `ops.relational_guidance`."""
        return ops.relational_guidance(
            features,
            structure,
            visible,
            shown,
            self.parameters_for_op(),
            heads=self.heads,
            hidden_context=self.hidden_context,
        )
