"""The structure encoder's patch embedding, computed for one part of the shown cells at a time.

At this level tokens take the most memory per cell. A part fits in the cache, and its embedded patches are recomputed
where they are needed: their gemm has 16 inputs per patch and costs less than storing them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sgmim_fast.ops.cpu import gemm
from sgmim_fast.ops.structure_embed import Cells
from sgmim_fast.ops.weights import weights_in

PART_ELEMENTS = 1 << 20  # elements of a part after the first merging's norm: 4 MiB in float32


class Embedding:
    """The embedding's parameters as the kernels read them."""

    def __init__(self, cells: Cells):
        self.cells, self.w = cells, cells.w
        weight, self.bias = weights_in(cells.dtype, cells.w.embed_weight, cells.w.embed_bias)
        self.weight, self.patches = weight.flatten(1), cells.patches()

    @property
    def norms(self) -> list[Tensor]:
        """Weights and biases of the patches' norm and of the first merging's norm."""
        w = self.w
        vectors = w.norm_weight, w.norm_bias, w.merge_norm_weights[0], w.merge_norm_biases[0]
        return [vector.float().contiguous() for vector in vectors]

    def parts(self, statistics: list[Tensor]) -> Iterator[Part]:
        cells, tokens, ins = self.cells, self.cells.per_cell, self.w.merge_weights[0].shape[1]
        step = max(PART_ELEMENTS * 4 // (tokens * ins), 1)
        count = cells.rows.shape[0]
        for begin in range(0, max(count, 1), step):
            end = min(begin + step, count)
            embedded = slice(begin * tokens, end * tokens)
            merged = slice(begin * tokens // 4, (end + (end == count)) * tokens // 4)
            views = statistics[0][:, embedded], statistics[1][:, merged]
            yield Part(self, embedded, merged, views)


@dataclass
class Part:
    """A range of the shown cells; the last part also has the hidden cell."""

    embedding: Embedding
    embedded: slice  # rows of its embedded patches
    merged: slice  # its rows after the first merging
    statistics: tuple[Tensor, Tensor]  # of the embedded patches and of the merged rows

    def embed(self) -> Tensor:
        return gemm.linear(self.embedding.patches[self.embedded], self.embedding.weight, self.embedding.bias)

    def weight_gradient(self, dembedded: Tensor) -> Tensor:
        """Returns the part's contribution to the embedding's weight gradient, (D, S * e^2) float32."""
        return gemm.wgrad(dembedded, self.embedding.patches[self.embedded]).float()

    def patches_gradient(self, dembedded: Tensor) -> Tensor:
        return gemm.dgrad(dembedded, self.embedding.weight)
