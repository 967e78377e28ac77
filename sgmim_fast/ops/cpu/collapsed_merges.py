"""Patch mergings of `structure_embed` in the coordinates of the pixels: the same numbers from fewer multiplications.

Numbers in parentheses are equations of docs/SPEC.md, "Mergings in the coordinates of the pixels", whose names are used
here. Swin-B, first merging: 69 inputs in place of 512, second: 277 in place of 1024. A level is collapsed where that
saves more multiplications in the rows than making A_i costs (`levels`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops.cpu import gemms
from sgmim_fast.ops.cpu.embedding import Embedding
from sgmim_fast.ops.primitives import Gradients
from sgmim_fast.ops.structure_embed import StructureParameters


def levels(w: StructureParameters, cells: int, cost: int = 1) -> int:
    """How many mergings to collapse, for so many shown cells; `cost` of a multiplication here, in those of the plain
    mergings."""
    inner, rows = w.embed_weight[0].numel() + 1, cells * 4 ** len(w.merge_weights)
    for level, weight in enumerate(w.merge_weights):
        rows //= 4
        wide = weight.shape[1]
        collapsed = 4 * inner + 1
        if rows * (wide - cost * collapsed) <= cost * wide * inner:  # both times 3 x the merging's width
            return level
        inner = collapsed
    return len(w.merge_weights)


def forward(
    embedding: Embedding, statistics: list[Tensor], eps: float, collapsed: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Embedding and the collapsed mergings: their result, the inputs of all but the first, and the statistics, of which
    the first two are filled."""
    w, kernels, inputs = embedding.w, torch.ops.sgmim_fast_cpu, []
    for part in embedding.parts(statistics):
        kernels.embed_norm(part.embed(), *embedding.norms, eps, None, *part.statistics)
    composed = compose(w, collapsed)
    z = first_coordinates(embedding, statistics)
    x = gemms.linear(z, composed[1].matrix, composed[1].constant)  # (3)
    for i in range(1, collapsed):
        x = x.view(-1, w.merge_weights[i].shape[1])
        inputs.append(x)
        statistics.append(torch.empty(2, x.shape[0]))
        kernels.row_statistics(x, eps, statistics[-1])
        z = next_coordinates(z, statistics[-1][1])
        x = gemms.linear(z, composed[i + 1].matrix, composed[i + 1].constant)  # (3)
    return x, inputs, statistics


def backward(
    embedding: Embedding,
    inputs: list[Tensor],
    statistics: list[Tensor],
    dx: Tensor,
    collapsed: int,
    gradients: Gradients,
) -> Tensor | None:
    """Gives the parameters' gradients and returns that of the patches, if it is wanted.

    What a row that was normalised gets through its statistics alone is a factor times xhat, (8).
    """
    w = embedding.w
    composed = compose(w, collapsed)
    z = [first_coordinates(embedding, statistics)]
    for i in range(1, collapsed):
        z.append(next_coordinates(z[-1], statistics[i + 1][1]))
    dmatrices, dconstants = [torch.empty(0)] * collapsed, [torch.empty(x.constant.shape[0]) for x in composed[1:]]
    dz = None
    for i in reversed(range(collapsed)):
        dmatrices[i] = gemms.wgrad(dx, z[i])  # (6), three lines
        torch.ops.sgmim_fast_cpu.column_sum(dx, dconstants[i])
        from_x = gemms.dgrad(dx, composed[i + 1].matrix)
        dz = from_x if dz is None else from_x.add_(dz)
        mean, rstd = statistics[i + 1]
        share = dz * z[i]
        scale = share.sum(1) * rstd / -w.merge_weights[i].shape[1]  # of xhat, (8)
        dz_below = dz[:, :-1] * rstd[:, None]  # (7)
        if i > 0:
            slope = (scale * rstd)[:, None]
            dx = torch.addcmul(-mean[:, None] * slope, inputs[i - 1], slope).view(-1, w.merge_weights[i - 1].shape[0])
            dz = dz_below.view(z[i - 1].shape)
    dembed, dbias, dgain, dshift, dpatches = _embedding_backward(
        embedding, statistics, share, scale, dz_below, "structure" in gradients
    )
    dweights, dgains, dshifts, (dmatrix, dbias_0, dgain_0, dshift_0) = compose_backward(
        w, composed, dmatrices, dconstants
    )
    for i in range(collapsed):
        gradients[f"merge_weights[{i}]"] = dweights[i]
        gradients[f"merge_norm_weights[{i}]"], gradients[f"merge_norm_biases[{i}]"] = dgains[i], dshifts[i]
    gradients["embed_weight"], gradients["embed_bias"] = dembed + dmatrix, dbias + dbias_0
    gradients["norm_weight"], gradients["norm_bias"] = dgain + dgain_0, dshift + dshift_0
    return dpatches


def _embedding_backward(
    embedding: Embedding, statistics: list[Tensor], share: Tensor, scale: Tensor, dz: Tensor, needs_patches: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What reaches the embedding's parameters through the first two statistics, and the patches' whole gradient.

    share: dz * z of the first merging, (merged rows, q_1); scale: of its rows; dz: of its neighbours' coordinates z_0.
    """
    w, count = embedding.w, embedding.cells.count
    width, rstd = w.embed_weight.shape[0], statistics[0][1]
    patch_scale = share[: count // 4, :-1].reshape(count, -1).sum(1) * rstd / -width
    sums, dembed, dpatches = torch.zeros(3 * width), torch.zeros(width, w.embed_weight[0].numel()), []
    for part in embedding.parts(statistics):
        dembedded, partial = part.embed(), torch.empty_like(sums)
        torch.ops.sgmim_fast_cpu.embed_statistics_backward(
            dembedded, *embedding.norms[:2], *part.statistics, scale[part.merged], patch_scale[part.embedded], partial
        )
        sums += partial
        dembed += part.weight_gradient(dembedded)
        if needs_patches:
            dpatches.append(part.patches_gradient(dembedded))
    dgain, dshift, dbias = sums.split(width)
    if not needs_patches:
        return dembed, dbias, dgain, dshift, None
    # The pixels are coordinates themselves, divided by the deviation of their patch.
    direct = dz[: count // 4].reshape(count, -1)[:, :-1] * rstd[:, None]
    return dembed, dbias, dgain, dshift, torch.cat(dpatches).add_(direct)


def first_coordinates(embedding: Embedding, statistics: list[Tensor]) -> Tensor:
    """z_1 by (1) and (2), (merged rows, q_1); zero for the hidden cell."""
    pixels = embedding.cells.patches()
    z = torch.zeros(pixels.shape[0] + embedding.cells.per_cell, pixels.shape[1] + 1)
    append_scaled(pixels, statistics[0][1], z[: pixels.shape[0]])
    z = next_coordinates(z, statistics[1][1])
    z[pixels.shape[0] // 4 :, -1] = 0
    return z


def next_coordinates(z: Tensor, rstd: Tensor) -> Tensor:
    """z_i from z_(i-1) by (2), (n, q_i)."""
    z = z.view(rstd.shape[0], -1)
    return append_scaled(z, rstd, torch.empty(z.shape[0], z.shape[1] + 1))


def append_scaled(z: Tensor, rstd: Tensor, out: Tensor) -> Tensor:
    """out = r [z, 1], a row at a time."""
    torch.mul(z, rstd[:, None], out=out[:, :-1])
    out[:, -1] = rstd
    return out


class Composed(NamedTuple):
    """A_i and a_i of one level, and the centred weight W_i diag(g_i) C that made them (level 0: C [W_0, b_0])."""

    matrix: Tensor  # (d_i, q_i)
    constant: Tensor  # (d_i,)
    centred: Tensor  # (d_i, 4 d_(i-1)); level 0: (D, q_0)


def compose(w: StructureParameters, count: int) -> list[Composed]:
    """Levels 0 to `count` by (4) and (5), float32."""
    embed = torch.cat([w.embed_weight.flatten(1), w.embed_bias[:, None]], 1).float()
    embed = embed - embed.mean(0)
    composed = [Composed(w.norm_weight.float()[:, None] * embed, w.norm_bias.float(), embed)]
    for weight, gain, shift in zip(w.merge_weights[:count], w.merge_norm_weights, w.merge_norm_biases, strict=False):
        below = composed[-1]
        centred = weight.float().contiguous() * gain.float()
        centred -= centred.mean(1, keepdim=True)
        blocks = centred.view(-1, below.constant.shape[0])  # (4 d_i, d_(i-1))
        matrix = gemms.dgrad(blocks, below.matrix).view(weight.shape[0], -1)
        last = (blocks @ below.constant).view(-1, 4).sum(1, keepdim=True)
        composed.append(Composed(torch.cat([matrix, last], 1), weight.float() @ shift.float(), centred))
    return composed


def compose_backward(
    w: StructureParameters, composed: list[Composed], dmatrices: list[Tensor], dconstants: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(9): gradients of A_1.. and a_1.. -> of merge weights, gains and shifts, and of the embedding and its norm."""
    dweights, dgains, dshifts = [], [], []
    dmatrix, dconstant = dmatrices[-1], dconstants[-1]
    for i in reversed(range(len(dmatrices))):
        weight, below, centred = w.merge_weights[i].float(), composed[i], composed[i + 1].centred
        outer, width = weight.shape[0], below.constant.shape[0]
        blocks = centred.view(-1, width)
        dblocks, dlast = dmatrix[:, :-1].reshape(4 * outer, -1), dmatrix[:, -1]
        dcentred = gemms.linear(dblocks, below.matrix).view(outer, 4, width)
        dcentred = (dcentred + dlast[:, None, None] * below.constant).view(outer, 4 * width)
        dscaled = dcentred - dcentred.mean(1, keepdim=True)
        dweights.append(dscaled * w.merge_norm_weights[i] + dconstant[:, None] * w.merge_norm_biases[i])
        dgains.append((dscaled * weight).sum(0))
        dshifts.append(weight.t() @ dconstant)
        dmatrix = gemms.wgrad(blocks, dblocks)
        dconstant = centred.view(outer, 4, width).sum(1).t() @ dlast
        if i > 0:
            dmatrix, dconstant = dmatrix + dmatrices[i - 1], dconstant + dconstants[i - 1]
    dgain = (dmatrix * composed[0].centred).sum(1)
    dembed = w.norm_weight.float()[:, None] * dmatrix
    dembed -= dembed.mean(0)
    return dweights[::-1], dgains[::-1], dshifts[::-1], [dembed[:, :-1], dembed[:, -1], dgain, dconstant]
