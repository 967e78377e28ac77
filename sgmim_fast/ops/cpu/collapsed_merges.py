"""Patch mergings of `structure_embed` in the coordinates of the pixels: the same results with fewer multiplications.

Numbers in parentheses are equations of docs/SPEC.md, "Mergings in the coordinates of the pixels", and names are those
used there. For Swin-B the first merging has 69 inputs instead of 512, the second 277 instead of 1024. A level is
collapsed if that saves more multiplications in the rows than computing A_i costs (`levels`).

Here coordinates have one more entry, 1, and A_i one more column, a_i, so that no gemm needs a separate bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops.cpu import gemm
from sgmim_fast.ops.cpu.embedding import Embedding
from sgmim_fast.ops.primitives import Gradients, float32
from sgmim_fast.ops.structure_embed import StructureParameters


def levels(w: StructureParameters, cells: int, cost: int = 1) -> int:
    """Returns the number of mergings to collapse for `cells` shown cells. cost: of a multiplication here, relative to
    one of the plain mergings."""
    inner, rows = w.embed_weight[0].numel() + 1, cells * 4 ** len(w.merge_weights)
    for level, weight in enumerate(w.merge_weights):
        rows //= 4
        ins = weight.shape[1]
        collapsed = 4 * inner + 1
        if rows * (ins - cost * collapsed) <= cost * ins * inner:  # both sides divided by 3 x the merging's width
            return level
        inner = collapsed
    return len(w.merge_weights)


def forward(
    embedding: Embedding, statistics: list[Tensor], eps: float, collapsed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Computes the embedding and the collapsed mergings. Returns their result, the inputs of all mergings but the
    first, and the statistics, of which the first two are written in place."""
    w, kernels, inputs = embedding.w, torch.ops.sgmim_fast_cpu, []
    for part in embedding.parts(statistics):
        kernels.embed_norm(part.embed(), *embedding.norms, eps, None, *part.statistics)
    composed = compose(embedding, collapsed)
    z = first_coordinates(embedding, statistics)
    x = gemm.linear(z, composed[1].matrix)  # (3)
    for i in range(1, collapsed):
        x = x.view(-1, w.merge_weights[i].shape[1])
        inputs.append(x)
        statistics.append(float32(2, x.shape[0]))
        kernels.row_statistics(x, eps, statistics[-1])
        z = next_coordinates(z, statistics[-1][1])
        x = gemm.linear(z, composed[i + 1].matrix)  # (3)
    return x, inputs, statistics


def backward(
    embedding: Embedding,
    inputs: list[Tensor],
    statistics: list[Tensor],
    dx: Tensor,
    collapsed: int,
    gradients: Gradients,
) -> Tensor | None:
    """Stores the parameters' gradients in `gradients`, and returns the patches' gradient if it is wanted.

    Through its statistics alone, a normalised row gets a gradient that is a factor times xhat, (8). Clears `inputs`.
    """
    composed = compose(embedding, collapsed)
    z = [first_coordinates(embedding, statistics)]
    for i in range(1, collapsed):
        z.append(next_coordinates(z[-1], statistics[i + 1][1]))
    dmatrices = [float32(0)] * collapsed
    dz = None
    for i in reversed(range(collapsed)):
        dmatrices[i] = gemm.wgrad(dx, z[i]).float()  # (6), this and the next line
        above, dz = dz, gemm.dgrad(dx, composed[i + 1].matrix, dtype=torch.float32)
        width, below = embedding.w.merge_weights[i].shape[1], inputs[i - 1] if i > 0 else None
        scale, shares = float32(dz.shape[0]), None if i > 0 else float32(dz.shape[0], 4)
        dx = None if below is None else torch.empty_like(below)
        torch.ops.sgmim_fast_cpu.coordinates_backward(  # (7) and (8)
            dz, z[i], above, *statistics[i + 1], below, width, scale, shares, dx
        )
        dx = None if dx is None else dx.view(-1, composed[i].matrix.shape[0])
    dembed, dbias, dnorm_weight, dnorm_bias, dpatches = _embedding_backward(
        embedding, statistics, shares, scale, dz, "structure" in gradients
    )
    del z, dz, above, below, dx, shares  # free the rows before the matrices are allocated
    inputs.clear()
    dweights, dnorm_weights, dnorm_biases, (dmatrix, dbias_0, dnorm_weight_0, dnorm_bias_0) = compose_backward(
        embedding.w, composed, dmatrices
    )
    for i in range(collapsed):
        gradients[f"merge_weights[{i}]"] = dweights[i]
        gradients.sums({f"merge_norm_weights[{i}]": dnorm_weights[i], f"merge_norm_biases[{i}]": dnorm_biases[i]})
    gradients["embed_weight"], gradients["embed_bias"] = dembed + dmatrix, dbias + dbias_0
    gradients["norm_weight"], gradients["norm_bias"] = dnorm_weight + dnorm_weight_0, dnorm_bias + dnorm_bias_0
    return dpatches


def _embedding_backward(
    embedding: Embedding, statistics: list[Tensor], shares: Tensor, scale: Tensor, dz: Tensor, needs_patches: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the gradients of the embedding's parameters through the first two statistics, and the patches' gradient.

    shares: sums of dz * z of the first merging, (merged rows, 4); scale: factors of its rows, (8); dz: after (7),
    (merged rows, q_1 + 1).
    """
    w, count = embedding.w, embedding.cells.count
    width, rstd = w.embed_weight.shape[0], statistics[0][1]
    patch_scale = shares.flatten()[:count] * rstd / -width
    sums, dembed, dpatches = float32(3 * width).zero_(), float32(width, w.embed_weight[0].numel()).zero_(), []
    for part in embedding.parts(statistics):
        dembedded, partial = part.embed(), torch.empty_like(sums)
        torch.ops.sgmim_fast_cpu.embed_statistics_backward(
            dembedded, *embedding.norms[:2], *part.statistics, scale[part.merged], patch_scale[part.embedded], partial
        )
        sums += partial
        dembed += part.weight_gradient(dembedded)
        if needs_patches:
            dpatches.append(part.patches_gradient(dembedded))
    dnorm_weight, dnorm_bias, dbias = sums.split(width)
    if not needs_patches:
        return dembed, dbias, dnorm_weight, dnorm_bias, None
    # The pixels are themselves coordinates, divided by the standard deviation of their patch.
    direct = dz[: count // 4, :-2].reshape(count, -1)[:, :-1] * rstd[:, None]
    return dembed, dbias, dnorm_weight, dnorm_bias, torch.cat(dpatches) + direct


def first_coordinates(embedding: Embedding, statistics: list[Tensor]) -> Tensor:
    """Returns z_1 by (1) and (2), (merged rows, q_1 + 1); zero for the hidden cell."""
    return _coordinates(embedding.patches, statistics[0][1], statistics[1][1])


def next_coordinates(z: Tensor, rstd: Tensor) -> Tensor:
    """Returns z_i from z_(i-1) by (2), (n, q_i + 1)."""
    return _coordinates(z, None, rstd)


def _coordinates(x: Tensor, patch_rstd: Tensor | None, rstd: Tensor) -> Tensor:
    neighbour = x.shape[1] - 1 if patch_rstd is None else x.shape[1] + 1
    z = torch.empty(rstd.shape[0], 4 * neighbour + 2, dtype=x.dtype)
    torch.ops.sgmim_fast_cpu.coordinates(x, patch_rstd, rstd, z)
    return z


class Composed(NamedTuple):
    """[A_i, a_i] of one level, and the centred weight W_i diag(g_i) C that it is made of (level 0: C [W_0, b_0])."""

    matrix: Tensor  # (d_i, q_i + 1), float32
    centred: Tensor  # (d_i, 4 d_(i-1)) in the gemms' dtype; level 0: (D, q_0), float32


def compose(embedding: Embedding, count: int) -> list[Composed]:
    """Returns levels 0 to `count` by (4) and (5)."""
    w = embedding.w
    embed = torch.cat([w.embed_weight.flatten(1), w.embed_bias[:, None]], 1).float()
    embed = embed - embed.mean(0)
    matrix = torch.cat([w.norm_weight.float()[:, None] * embed, w.norm_bias.float()[:, None]], 1)
    composed = [Composed(matrix, embed)]
    for weight, norm_weight, norm_bias in zip(*_float32(w, count), strict=True):
        (outs, ins), (width, columns) = weight.shape, matrix.shape
        centred, constant = torch.empty(outs, ins, dtype=embedding.cells.dtype), float32(outs)
        torch.ops.sgmim_fast_cpu.centre(weight, norm_weight, norm_bias, centred, constant)
        blocks = gemm.dgrad(centred.view(-1, width), matrix, dtype=torch.float32).view(outs, 4, columns)
        last = blocks[..., -1].sum(1, keepdim=True)
        matrix = torch.cat([blocks[..., :-1].flatten(1), last, constant[:, None]], 1)
        composed.append(Composed(matrix, centred))
    return composed


def compose_backward(
    w: StructureParameters, composed: list[Composed], dmatrices: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """From the gradients of [A_i, a_i], i >= 1, returns those of merge weights, of their norms, and of the embedding
    and its norm, by (9)."""
    dweights, dnorm_weights, dnorm_biases = [], [], []
    weights, norm_weights, norm_biases = _float32(w, len(dmatrices))
    dmatrix = dmatrices[-1]
    for i in reversed(range(len(dmatrices))):
        below, centred, outer = composed[i].matrix, composed[i + 1].centred, weights[i].shape[0]
        width, columns = below.shape
        dblocks = torch.empty(outer, 4, columns, dtype=centred.dtype)
        dblocks[..., :-1] = dmatrix[:, :-2].view(outer, 4, -1)
        dblocks[..., -1] = dmatrix[:, -2, None]
        dblocks = dblocks.view(-1, columns)
        dweight = gemm.linear(dblocks, below, dtype=torch.float32).view_as(weights[i])
        sums = float32(2, weights[i].shape[1])
        dconstant = dmatrix[:, -1].contiguous()
        torch.ops.sgmim_fast_cpu.centre_backward(dweight, weights[i], norm_weights[i], norm_biases[i], dconstant, sums)
        dweights.append(dweight)
        dnorm_weights.append(sums[0])
        dnorm_biases.append(sums[1])
        dmatrix = gemm.wgrad(centred.view(-1, width), dblocks).float()
        if i > 0:
            dmatrix += dmatrices[i - 1]
    dembed = dmatrix[:, :-1]
    dnorm_weight = (dembed * composed[0].centred).sum(1)
    dembed = w.norm_weight.float()[:, None] * dembed
    dembed -= dembed.mean(0)
    return (
        dweights[::-1],
        dnorm_weights[::-1],
        dnorm_biases[::-1],
        [dembed[:, :-1], dembed[:, -1], dnorm_weight, dmatrix[:, -1]],
    )


def _float32(w: StructureParameters, count: int) -> list[list[Tensor]]:
    """Returns weights, norm weights and norm biases of the first `count` mergings as the kernels read them."""
    lists = w.merge_weights, w.merge_norm_weights, w.merge_norm_biases
    return [[tensor.float().contiguous() for tensor in tensors[:count]] for tensors in lists]
