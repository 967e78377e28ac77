"""`structure_embed`: the structure encoder on the shown cells only. SPEC "Structure encoder"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward
from sgmim_fast.ops.primitives import Gradients, Norm, NormGradient, Primitives, Request, storage_dtype, sum_dtype


class StructureParameters(NamedTuple):
    """Weights of the structure encoder. The lists have one entry per patch merging; each merging doubles the width."""

    embed_weight: Tensor  # (D, S, e, e), e the side of an embedded patch in pixels
    embed_bias: Tensor  # (D,)
    norm_weight: Tensor  # (D,)
    norm_bias: Tensor  # (D,)
    merge_norm_weights: list[Tensor]  # (4d,), d = D, 2D, 4D, ...
    merge_norm_biases: list[Tensor]  # (4d,)
    merge_weights: list[Tensor]  # (2d, 4d)

    def flat(self) -> list[Tensor]:
        return [*self[:4], *self.merge_norm_weights, *self.merge_norm_biases, *self.merge_weights]

    @classmethod
    def names(cls, count: int) -> list[str]:
        """Returns the names of the `count` tensors of `flat()`."""
        lists = [f"{name}[{i}]" for name in cls._fields[4:] for i in range((count - 4) // 3)]
        return [*cls._fields[:4], *lists]

    @classmethod
    def nested(cls, flat: list[Any]) -> StructureParameters:
        """Inverse of `flat()`, for any list with one entry per parameter in that order."""
        if len(flat) < 4 or (len(flat) - 4) % 3:
            raise ValueError(f"parameters has {len(flat)} tensors; expected 4, and 3 for each merging")
        k = (len(flat) - 4) // 3
        return cls(*flat[:4], list(flat[4 : 4 + k]), list(flat[4 + k : 4 + 2 * k]), list(flat[4 + 2 * k :]))


class Arguments(NamedTuple):
    """The operator's arguments, see `structure_embed`."""

    structure: Tensor
    rows: Tensor
    parameters: StructureParameters
    cell: int
    eps: float
    dtype: torch.dtype | None


class Cells(NamedTuple):
    """The shown cells and how to embed them. Tokens are in Z-order within their cell; the hidden cell comes last."""

    structure: Tensor  # (B, S, H, W)
    rows: Tensor  # (n,)
    w: StructureParameters
    cell: int
    dtype: torch.dtype  # storage

    @property
    def per_cell(self) -> int:
        """Number of embedded patches per cell."""
        return 4 ** len(self.w.merge_weights)

    @property
    def count(self) -> int:
        """Number of embedded patches of the shown cells."""
        return self.rows.shape[0] * self.per_cell

    @property
    def merged(self) -> int:
        """Number of rows after the first merging, including the hidden cell's."""
        return (self.count + self.per_cell) // 4

    def patches(self, rows: Tensor | None = None) -> Tensor:
        """Returns the pixels of the patches, (patches, S * e^2)."""
        rows, pixels = self.rows if rows is None else rows, self.structure.detach().to(self.dtype)
        return gather_patches(pixels, rows, cell=self.cell, patch=self.w.embed_weight.shape[2], order="z")


def structure_embed(
    structure: Tensor, rows: Tensor, parameters: StructureParameters, *, cell: int, eps: float = 1e-5
) -> Tensor:
    """Computes the structure tokens of the shown cells, and the token h that all hidden cells share.

    A hidden cell's embedded patches are multiplied by 0 after their norm, so its token depends on the parameters alone.
    Plain PyTorch: the rows `rows` of `sgmim_fast.guidance.StructureEncoder`'s result, and one of the others.

    Args:
        structure: (B, S, H, W), standardised map; H and W are multiples of `cell`.
        rows: (n,) int64, distinct indices of the shown cells among the B * (H / cell) * (W / cell), row-major.
        parameters: weights of the encoder, with log2(cell / e) mergings.
        cell: side of a cell in pixels, the encoder's stride.
        eps: eps of every LayerNorm.

    Returns:
        (n + 1, C): the shown cells' tokens in the order of `rows`, then h, in autocast's dtype, or that of `structure`.
        Differentiable in `structure` and the parameters.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    lists = [len(tensors) for tensors in parameters[4:]]
    if len(set(lists)) > 1:
        raise ValueError(f"the lists of the mergings have {lists} tensors; expected the same number in each")
    return _op(structure, rows, parameters.flat(), cell, eps, None)[0]


def _check_arguments(a: Arguments) -> None:
    structure, rows, w, cell, _, dtype = a
    _check.floating("structure", structure)
    _check.cells("structure", structure, cell)
    _check.index("rows", rows)
    parameters = w.flat()
    names = StructureParameters.names(len(parameters))
    weight, mergings = w.embed_weight, len(w.merge_weights)
    if weight.ndim != 4 or weight.shape[1] != structure.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"embed_weight has shape {tuple(weight.shape)}; expected (D, {structure.shape[1]}, e, e)")
    width = weight.shape[0]
    shapes = [weight.shape, *[(width,)] * 3]
    shapes += [(4 * width << i,) for i in range(mergings)] * 2
    shapes += [(2 * width << i, 4 * width << i) for i in range(mergings)]
    for name, tensor, shape in zip(names, parameters, shapes, strict=True):
        _check.parameter(name, tensor, shape, f"that of {mergings} mergings from width {width}")
        if tensor.ndim > 1:
            _check.same_dtype("structure", structure, name, tensor, dtype)
    if weight.shape[2] << mergings != cell:
        raise ValueError(
            f"embed_weight has patches of {weight.shape[2]} pixels and there are {mergings} mergings; "
            f"expected patches of cell / 2^mergings = {cell} / {1 << mergings} pixels"
        )


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    w, storage = a.parameters, storage_dtype(a.structure, a.dtype)
    cells = Cells(a.structure, a.rows.contiguous(), w, a.cell, storage)
    weights = p.weights_in(storage, *w.merge_weights)
    x, inputs, statistics = p.embed(cells, weights[0] if weights else None, a.eps)
    for i in range(p.embedded(cells), len(weights)):
        x = x.view(-1, weights[i].shape[1])
        inputs.append(x)
        ((y, found),) = p.layer_norms([Norm(x, w.merge_norm_weights[i], w.merge_norm_biases[i])], a.eps, storage)
        statistics.append(found)
        (x,) = p.linears([y], [weights[i]])
    return x.to(a.dtype or a.structure.dtype), [*inputs, *statistics]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    w, storage = a.parameters, storage_dtype(a.structure, a.dtype)
    cells = Cells(a.structure, a.rows.contiguous(), w, a.cell, storage)
    weights = p.weights_in(storage, *w.merge_weights, last=True)
    inputs, statistics = saved[: len(weights) - 1], saved[len(weights) - 1 :]
    dx = grad.to(storage).contiguous()
    for i in reversed(range(p.embedded(cells), len(weights))):
        dy = p.dgrad(dx, weights[i])
        vectors = w.merge_norm_weights[i], w.merge_norm_biases[i]
        (norm,) = p.layer_norms_backward([NormGradient(dy, inputs[i - 1], statistics[i + 1], *vectors)])
        gradients.weight(f"merge_weights[{i}]", dx, norm.y)
        gradients.norm(f"merge_norm_weights[{i}]", f"merge_norm_biases[{i}]", norm)
        dx = norm.dx.to(storage).view(-1, weights[i - 1].shape[0])
    dpatches = p.embed_backward(dx, cells, weights[0] if weights else None, inputs, statistics, gradients)
    if dpatches is not None:
        dpatches, patch = dpatches.to(a.structure.dtype), w.embed_weight.shape[2]
        gradients["structure"] = gather_patches_backward(dpatches, a.rows, a.structure.shape, a.cell, patch, True)


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    w, accumulator = a.parameters, sum_dtype(a.structure.dtype)
    cells = Cells(a.structure, a.rows, w, a.cell, storage_dtype(a.structure, a.dtype))
    inputs: list[Tensor] = []
    statistics = [a.structure.new_empty(2, cells.count, dtype=accumulator)]
    tokens, width = cells.count + cells.per_cell, w.embed_weight.shape[0]
    for i, weight in enumerate(w.merge_weights):
        tokens, width = tokens // 4, weight.shape[1]
        if i > 0:
            inputs.append(a.structure.new_empty(tokens, width, dtype=cells.dtype))
        statistics.append(a.structure.new_empty(2, tokens, dtype=accumulator))
        width = weight.shape[0]
    return a.structure.new_empty(tokens, width, dtype=a.dtype or a.structure.dtype), [*inputs, *statistics]


def _request(a: Arguments) -> Request:
    w = a.parameters
    width = w.merge_weights[-1].shape[1] if w.merge_weights else w.embed_weight.shape[0]
    embedding = w.embed_weight.shape[0], w.embed_weight[0].numel(), len(w.merge_weights)
    return Request((a.dtype or a.structure.dtype,), (width,), embedding)


def _check_indices(a: Arguments) -> None:
    cells = a.structure.shape[0] * (a.structure.shape[2] // a.cell) * (a.structure.shape[3] // a.cell)
    _check.rows("rows", a.rows, cells)


_op = Op(
    "structure_embed",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=_request,
    indices=_check_indices,
    saves=True,
)
