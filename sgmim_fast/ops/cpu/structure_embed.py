"""`structure_embed` on the CPU: library products, the norms in csrc/cpu/structure_embed.cpp and layer_norm.cpp.

Each norm's result exists only between the norm and its product, in the forward and again in the backward. In float32
the first mergings work in the coordinates of the pixels (`collapsed_merges`), which saves most of their products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgmim_fast.ops import products
from sgmim_fast.ops.cpu import collapsed_merges
from sgmim_fast.ops.cpu.embedding import Embedding
from sgmim_fast.ops.cpu.layer_norm import layer_norm, layer_norm_backward
from sgmim_fast.ops.cpu.linear_l1 import NATIVE
from sgmim_fast.ops.gather_patches import gather_patches_backward
from sgmim_fast.ops.relational_guidance import collect
from sgmim_fast.ops.structure_embed import Saved, StructureParameters, storage_dtype


def can_run(part: str, args: tuple[Any, ...]) -> tuple[bool, str]:
    structure, dtype = args[0] if part == "forward" else args[1], args[-1]
    parameters = args[2] if part == "forward" else args[3]
    wanted = dtype or structure.dtype
    if len(parameters) == 4:
        return False, "an encoder stride without patch mergings; the C++ kernel joins the norms of patch and merging"
    return wanted in NATIVE, f"dtype {wanted}; the C++ kernels take float32 and bfloat16"


def forward(
    structure: Tensor, rows: Tensor, parameters: list[Tensor], cell: int, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    w = StructureParameters.nested(parameters)
    storage = storage_dtype(structure, dtype)
    embedding = Embedding(structure, rows, w, cell, storage)
    statistics = [torch.empty(2, embedding.patches_count), torch.empty(2, embedding.merged_count)]
    saved = Saved([], statistics, products.copies(w.merge_weights, storage))
    weights = saved.copies or w.merge_weights
    collapsed = _collapsed(embedding)
    below = collapsed_merges.forward if collapsed else _forward_first
    x = below(embedding, saved, eps, collapsed)
    for i in range(max(collapsed, 1), len(w.merge_weights)):
        x = x.view(-1, w.merge_weights[i].shape[1])
        saved.inputs.append(x)
        y, statistics = layer_norm(x, w.merge_norm_weights[i], w.merge_norm_biases[i], eps, storage)
        saved.statistics.append(statistics)
        x = products.linear(y, weights[i])
    return x.to(dtype or structure.dtype), saved.flat()


def backward(
    grad: Tensor,
    structure: Tensor,
    rows: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    cell: int,
    needs: list[bool],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    w = StructureParameters.nested(parameters)
    s = Saved.nested(saved, len(w.merge_weights))
    weights = s.copies or w.merge_weights
    embedding = Embedding(structure, rows, w, cell, storage_dtype(structure, dtype))
    collapsed = _collapsed(embedding)
    dw = StructureParameters.nested(list(parameters))
    dx = grad.to(embedding.dtype).contiguous()
    for i in reversed(range(max(collapsed, 1), len(w.merge_weights))):
        above = dx
        dx, y, (dw.merge_norm_weights[i], dw.merge_norm_biases[i]) = layer_norm_backward(
            products.linear_input_gradient(above, weights[i]),
            s.inputs[i - 1],
            s.statistics[i + 1],
            w.merge_norm_weights[i],
            w.merge_norm_biases[i],
        )
        dw.merge_weights[i] = products.linear_weight_gradient(above, y)
        dx = dx.view(-1, w.merge_weights[i - 1].shape[0])
    below = collapsed_merges.backward if collapsed else _backward_first
    first, dpatches = below(embedding, s, dx, dw, needs[0], collapsed)
    dw = dw._replace(**first)
    dstructure = structure
    if dpatches is not None:
        dstructure = gather_patches_backward(dpatches, rows, structure.shape, cell, w.embed_weight.shape[2], True)
    return collect([structure, *parameters], needs, [dstructure, *dw.flat()])


def _collapsed(embedding: Embedding) -> int:
    """Mergings in the pixels' coordinates; only in float32, where their products are as exact as the plain ones."""
    if embedding.dtype != torch.float32:
        return 0
    return collapsed_merges.levels(embedding.w, embedding.rows.shape[0])


def _forward_first(embedding: Embedding, saved: Saved, eps: float, _: int) -> Tensor:
    """Embedding and first merging, (merged rows, 2D). Fills the statistics."""
    weight = (saved.copies or embedding.w.merge_weights)[0]
    x = torch.empty(embedding.merged_count, weight.shape[0], dtype=embedding.dtype)
    for part in embedding.parts(saved.statistics):
        y = torch.empty(part.merged.stop - part.merged.start, weight.shape[1], dtype=embedding.dtype)
        torch.ops.sgmim_fast_cpu.embed_norm(part.embed(), *embedding.norms, eps, y, *part.statistics)
        x[part.merged] = products.linear(y, weight)
    return x


def _backward_first(
    embedding: Embedding, s: Saved, dx: Tensor, dw: StructureParameters, needs_patches: bool, _: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Fills the first entries of `dw`'s lists; returns its other fields and, where wanted, the patches' gradient."""
    w = embedding.w
    wide, width = w.merge_weights[0].shape[1], w.embed_weight.shape[0]
    sums, dpatches = torch.zeros(2 * wide + 3 * width), []
    dembed, dmerge = torch.zeros(width, w.embed_weight[0].numel()), torch.zeros(w.merge_weights[0].shape)
    for part in embedding.parts(s.statistics):
        embedded = part.embed()
        dy = products.linear_input_gradient(dx[part.merged], (s.copies or w.merge_weights)[0])
        y, partial = torch.empty_like(dy), torch.empty_like(sums)
        torch.ops.sgmim_fast_cpu.embed_norm_backward(dy, embedded, *embedding.norms, *part.statistics, y, partial)
        sums += partial
        dmerge += products.linear_weight_gradient(dx[part.merged], y)
        dembedded = dy.view(-1, width)[: embedded.shape[0]]
        dembed += part.weight_gradient(dembedded)
        if needs_patches:
            dpatches.append(part.patches_gradient(dembedded))
    dw.merge_weights[0] = dmerge
    dw.merge_norm_weights[0], dw.merge_norm_biases[0], dgain, dshift, dbias = sums.split([wide, wide, *[width] * 3])
    return embedding.gradients(dembed, dbias, dgain, dshift), torch.cat(dpatches) if needs_patches else None
