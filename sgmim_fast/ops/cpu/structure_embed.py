"""The structure encoder's first mergings on the CPU, primitives: csrc/cpu/structure_embed.cpp, and gemms.

The result of a norm exists only between the norm and its gemm; the backward recomputes it. The first mergings use the
coordinates of the pixels (`collapsed_merges`), which saves most of their multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgmim_fast.ops.cpu import collapsed_merges, gemm
from sgmim_fast.ops.cpu.embedding import Embedding
from sgmim_fast.ops.primitives import Gradients, float32
from sgmim_fast.ops.structure_embed import Cells


def embedded(cells: Cells) -> int:
    return max(_collapsed(cells), 1)


def embed(cells: Cells, weight: Tensor, eps: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    statistics = [float32(2, cells.count), float32(2, cells.merged)]
    if collapsed := _collapsed(cells):
        dtype = _dtype(cells)
        x, inputs, statistics = collapsed_merges.forward(
            Embedding(cells._replace(dtype=dtype)), statistics, eps, collapsed
        )
        return x.to(cells.dtype), [t.to(cells.dtype) for t in inputs], statistics
    embedding = Embedding(cells)
    x = torch.empty(cells.merged, weight.shape[0], dtype=cells.dtype)
    for part in embedding.parts(statistics):
        y = torch.empty(part.merged.stop - part.merged.start, weight.shape[1], dtype=cells.dtype)
        torch.ops.sgmim_fast_cpu.embed_norm(part.embed(), *embedding.norms, eps, y, *part.statistics)
        x[part.merged] = gemm.linear(y, weight)
    return x, [], statistics


def embed_backward(
    dx: Tensor, cells: Cells, weight: Tensor, inputs: list[Tensor], statistics: list[Tensor], gradients: Gradients
) -> Tensor | None:
    if collapsed := _collapsed(cells):
        dtype = _dtype(cells)
        inputs, embedding = [t.to(dtype) for t in inputs[: collapsed - 1]], Embedding(cells._replace(dtype=dtype))
        return collapsed_merges.backward(embedding, inputs, statistics, dx.to(dtype), collapsed, gradients)
    embedding = Embedding(cells)
    ins, width = weight.shape[1], cells.w.embed_weight.shape[0]
    sums, dpatches = float32(2 * ins + 3 * width).zero_(), []
    dembed, dmerge = float32(width, cells.w.embed_weight[0].numel()).zero_(), float32(*weight.shape).zero_()
    for part in embedding.parts(statistics):
        tokens = part.embed()
        dy = gemm.dgrad(dx[part.merged], weight)
        y, partial = torch.empty_like(dy), torch.empty_like(sums)
        torch.ops.sgmim_fast_cpu.embed_norm_backward(dy, tokens, *embedding.norms, *part.statistics, y, partial)
        sums += partial
        dmerge += gemm.wgrad(dx[part.merged], y)
        dembedded = dy.view(-1, width)[: tokens.shape[0]]
        dembed += part.weight_gradient(dembedded)
        if "structure" in gradients:
            dpatches.append(part.patches_gradient(dembedded))
    names = "merge_norm_weights[0]", "merge_norm_biases[0]", "norm_weight", "norm_bias", "embed_bias"
    gradients.sums(dict(zip(names, sums.split([ins, ins, *[width] * 3]), strict=True)))
    gradients["merge_weights[0]"], gradients["embed_weight"] = dmerge, dembed
    return torch.cat(dpatches) if dpatches else None


def _dtype(cells: Cells) -> torch.dtype:
    """Returns the dtype of the collapsed mergings' gemms: bfloat16 if those can read the composed weights unrounded."""
    return cells.dtype if gemm.reads_float32_weights() else torch.float32


def _collapsed(cells: Cells) -> int:
    """Returns the number of collapsed mergings. Their multiplications cost double if in float32 instead of bfloat16."""
    return collapsed_merges.levels(cells.w, cells.rows.shape[0], 1 if cells.dtype == _dtype(cells) else 2)
