"""The structure encoder's patch embedding, a stretch of the shown cells at a time.

At this level the tokens are the most and the widest per cell. A stretch fits in the cache, and its embedded patches are
computed again where they are needed: the product has 16 inputs and costs less than keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops.structure_embed import StructureParameters, patches, per_cell

PART_ELEMENTS = 1 << 20  # values of a part after the first merging's norm: 4 MiB of float32


@dataclass
class Embedding:
    """The cells to embed, and how."""

    structure: Tensor  # (B, S, H, W)
    rows: Tensor  # (n,) shown cells
    w: StructureParameters
    cell: int
    dtype: torch.dtype  # of products and stored activations

    @property
    def patches_count(self) -> int:
        return self.rows.shape[0] * per_cell(self.w)

    @property
    def merged_count(self) -> int:
        """Rows after the first merging, the hidden cell's included."""
        return (self.patches_count + per_cell(self.w)) // 4

    @property
    def norms(self) -> list[Tensor]:
        """Weights and biases of the patches' norm and of the first merging's."""
        w = self.w
        vectors = w.norm_weight, w.norm_bias, w.merge_norm_weights[0], w.merge_norm_biases[0]
        return [vector.float().contiguous() for vector in vectors]  # as the kernels read them

    def patches(self, rows: Tensor | None = None) -> Tensor:
        """Pixels of the patches in Z-order, (patches, S * e^2)."""
        return patches(self.structure, self.rows if rows is None else rows, self.w.embed_weight, self.cell, self.dtype)

    def parts(self, statistics: list[Tensor]) -> Iterator[Part]:
        tokens, wide = per_cell(self.w), self.w.merge_weights[0].shape[1]
        step = max(PART_ELEMENTS * 4 // (tokens * wide), 1)
        count = self.rows.shape[0]
        for begin in range(0, max(count, 1), step):
            end = min(begin + step, count)
            embedded = slice(begin * tokens, end * tokens)
            merged = slice(begin * tokens // 4, (end + (end == count)) * tokens // 4)
            views = statistics[0][:, embedded], statistics[1][:, merged]
            yield Part(self, self.rows[begin:end], embedded, merged, views)

    def gradients(self, dembed: Tensor, dbias: Tensor, dgain: Tensor, dshift: Tensor) -> dict[str, Tensor]:
        """Fields of StructureParameters."""
        shape = self.w.embed_weight.shape
        return {
            "embed_weight": dembed.reshape(shape),
            "embed_bias": dbias,
            "norm_weight": dgain,
            "norm_bias": dshift,
        }


@dataclass
class Part:
    """A stretch of the shown cells; the last one has the hidden cell too."""

    embedding: Embedding
    rows: Tensor
    embedded: slice  # its patches
    merged: slice  # its rows after the first merging
    statistics: tuple[Tensor, Tensor]  # of its embedded patches and of its merged rows

    def patches(self) -> Tensor:
        return self.embedding.patches(self.rows)

    def embed(self) -> Tensor:
        w = self.embedding.w
        return products.linear(self.patches(), w.embed_weight.flatten(1), w.embed_bias)

    def weight_gradient(self, dembedded: Tensor) -> Tensor:
        """Share of the embedding's weight gradient, (D, S * e^2), float32."""
        return products.linear_weight_gradient(dembedded, self.patches()).float()

    def patches_gradient(self, dembedded: Tensor) -> Tensor:
        return products.linear_input_gradient(dembedded, self.embedding.w.embed_weight.flatten(1))
