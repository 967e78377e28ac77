"""`structure_embed`: the structure encoder on the shown cells only. SPEC "Structure encoder"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check, products
from sgmim_fast.ops._op import Op
from sgmim_fast.ops._plain import apply_norm, layer_norm, layer_norm_backward, wide_dtype
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward
from sgmim_fast.ops.relational_guidance import collect


class StructureParameters(NamedTuple):
    """Weights of the structure encoder; one entry per patch merging in the three lists, merging i doubles the width."""

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
        """What the tensors of `flat()`, so many, are called."""
        lists = [f"{name}[{i}]" for name in cls._fields[4:] for i in range((count - 4) // 3)]
        return [*cls._fields[:4], *lists]

    @classmethod
    def nested(cls, flat: list[Any]) -> StructureParameters:
        """From `flat()`, or from anything that has one entry per parameter in that order."""
        k = (len(flat) - 4) // 3
        return cls(*flat[:4], list(flat[4 : 4 + k]), list(flat[4 + k : 4 + 2 * k]), list(flat[4 + 2 * k :]))


class Saved(NamedTuple):
    """What the forward keeps for the backward. Tokens are in Z-order inside their cell, the hidden cell's last."""

    inputs: list[Tensor]  # tokens each merging but the first reads; the embedded patches are cheaper to compute again
    statistics: list[Tensor]  # (2, tokens) of each norm: the embedded patches' (no hidden cell), then each merging's

    copies: list[Tensor]  # of the mergings' weights in the dtype of the products, where that is another

    def flat(self) -> list[Tensor]:
        return [*self.inputs, *self.statistics, *self.copies]

    @classmethod
    def nested(cls, flat: list[Tensor], mergings: int) -> Saved:
        k = max(mergings - 1, 0)
        return cls(list(flat[:k]), list(flat[k : k + mergings + 1]), list(flat[k + mergings + 1 :]))


def structure_embed(
    structure: Tensor, rows: Tensor, parameters: StructureParameters, *, cell: int, eps: float = 1e-5
) -> Tensor:
    """Structure tokens of the shown cells, and the one token h that every hidden cell has.

    A hidden cell's embedded patches are multiplied by 0 after their norm, so what comes out of the mergings depends on
    the parameters alone. Plain PyTorch: see `sgmim_fast.guidance.StructureEncoder`, of which this computes the rows
    `rows` and one of the others.

    Args:
        structure: (B, S, H, W) standardised map; H and W multiples of `cell`.
        rows: (n,) int64, distinct indices of the shown cells among the B * (H / cell) * (W / cell), row-major.
        parameters: of the encoder, with log2(cell / e) mergings.
        cell: side of a cell in pixels, the encoder's stride.
        eps: of every LayerNorm.

    Returns:
        (n + 1, C): the shown cells' tokens in the order of `rows`, then h. The autocast dtype, or the structure's.
        Differentiable in `structure` and the parameters.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is expected.
    """
    lists = [len(tensors) for tensors in parameters[4:]]
    if len(set(lists)) > 1:
        raise ValueError(f"the lists of the mergings have {lists} tensors; expected as many in each")
    return _op(structure, rows, parameters.flat(), cell, eps, None)[0]


def _check_arguments(
    structure: Tensor, rows: Tensor, parameters: list[Tensor], cell: int, eps: float, dtype: torch.dtype | None
) -> None:
    _check.floating("structure", structure)
    _check.cells("structure", structure, cell)
    _check.index("rows", rows)
    if len(parameters) < 4 or (len(parameters) - 4) % 3:
        raise ValueError(f"parameters has {len(parameters)} tensors; expected 4, and 3 for each merging")
    names, w = StructureParameters.names(len(parameters)), StructureParameters.nested(list(parameters))
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


def patches(structure: Tensor, rows: Tensor, weight: Tensor, cell: int, dtype: torch.dtype) -> Tensor:
    """The shown cells' patches in Z-order, (n * patches per cell, S * e^2)."""
    return gather_patches(structure.detach().to(dtype), rows, cell=cell, patch=weight.shape[2], order="z")


def storage_dtype(structure: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What products are done in and activations saved in."""
    return products.compute_dtype(dtype or structure.dtype, structure.device)


def per_cell(parameters: StructureParameters) -> int:
    """Embedded patches of one cell."""
    return 4 ** len(parameters.merge_weights)


def _with_hidden(tokens: Tensor, w: StructureParameters) -> Tensor:
    return torch.cat([tokens, tokens.new_zeros(per_cell(w), tokens.shape[1])])


def _forward(
    structure: Tensor, rows: Tensor, parameters: list[Tensor], cell: int, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    _check.rows("rows", rows, structure.shape[0] * (structure.shape[2] // cell) * (structure.shape[3] // cell))
    w = StructureParameters.nested(parameters)
    storage = storage_dtype(structure, dtype)
    x = patches(structure, rows, w.embed_weight, cell, storage)
    x = products.linear(x, w.embed_weight.flatten(1), w.embed_bias)
    saved = Saved([], [], products.copies(w.merge_weights, storage))
    x, statistics = layer_norm(x, w.norm_weight, w.norm_bias, eps)
    x = _with_hidden(x, w)
    saved.statistics.append(statistics)
    for i, weight in enumerate(saved.copies or w.merge_weights):
        x = x.view(-1, weight.shape[1])
        if i > 0:
            saved.inputs.append(x)
        y, statistics = layer_norm(x, w.merge_norm_weights[i], w.merge_norm_biases[i], eps)
        saved.statistics.append(statistics)
        x = products.linear(y, weight)
    return x.to(dtype or structure.dtype, copy=True), saved.flat()


def _backward(
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
    pixels = patches(structure, rows, w.embed_weight, cell, storage_dtype(structure, dtype))
    embedded, statistics = products.linear(pixels, w.embed_weight.flatten(1), w.embed_bias), s.statistics[0]
    tokens = _with_hidden(apply_norm(embedded, statistics, w.norm_weight, w.norm_bias), w)
    dw = StructureParameters.nested(list(parameters))
    dx = grad.to(embedded.dtype)
    for i in reversed(range(len(w.merge_weights))):
        x = tokens.view(-1, w.merge_weights[0].shape[1]) if i == 0 else s.inputs[i - 1]
        y = apply_norm(x, s.statistics[i + 1], w.merge_norm_weights[i], w.merge_norm_biases[i])
        dw.merge_weights[i] = products.linear_weight_gradient(dx, y)
        dy = products.linear_input_gradient(dx, weights[i])
        dx, dw.merge_norm_weights[i], dw.merge_norm_biases[i] = layer_norm_backward(
            dy, x, s.statistics[i + 1], w.merge_norm_weights[i]
        )
        dx = dx.to(dy.dtype).view(-1, x.shape[1] // 4 if i == 0 else w.merge_weights[i - 1].shape[0])
    dx, dnorm_weight, dnorm_bias = layer_norm_backward(dx[: embedded.shape[0]], embedded, statistics, w.norm_weight)
    dembed_bias, dx = dx.sum(0), dx.to(embedded.dtype)
    dembed = products.linear_weight_gradient(dx, pixels).view_as(w.embed_weight)
    dw = dw._replace(embed_weight=dembed, embed_bias=dembed_bias, norm_weight=dnorm_weight, norm_bias=dnorm_bias)
    dstructure = structure
    if needs[0]:
        dpatches = products.linear_input_gradient(dx, w.embed_weight.flatten(1))
        dstructure = gather_patches_backward(dpatches, rows, structure.shape, cell, w.embed_weight.shape[2], True)
    return collect([structure, *parameters], needs, [dstructure, *dw.flat()])


def _fake(structure, rows, parameters, cell, eps, dtype):
    w = StructureParameters.nested(parameters)
    storage, wide = storage_dtype(structure, dtype), wide_dtype(structure)
    tokens, width = rows.shape[0] * per_cell(w), w.embed_weight.shape[0]
    inputs: list[Tensor] = []
    statistics = [structure.new_empty(2, tokens, dtype=wide)]
    tokens += per_cell(w)
    for i, weight in enumerate(w.merge_weights):
        tokens, width = tokens // 4, weight.shape[1]
        if i > 0:
            inputs.append(structure.new_empty(tokens, width, dtype=storage))
        statistics.append(structure.new_empty(2, tokens, dtype=wide))
        width = weight.shape[0]
    saved = Saved(inputs, statistics, products.fake_copies(w.merge_weights, storage))
    return structure.new_empty(tokens, width, dtype=dtype or structure.dtype), saved.flat()


_op = Op(
    "structure_embed",
    "(Tensor structure, Tensor rows, Tensor[] parameters, SymInt cell, float eps, ScalarType? dtype) "
    "-> (Tensor, Tensor[])",
    forward=_forward,
    fake=_fake,
    check=_check_arguments,
    fields={"parameters": StructureParameters.names},
)


def _save(ctx: Any, inputs: tuple, results: tuple) -> None:
    structure, rows, parameters, ctx.cell, _, ctx.dtype = inputs
    ctx.count = len(parameters)
    ctx.save_for_backward(structure, rows, *parameters, *results[1])


def _gradients(ctx: Any, needs: tuple, grad: Tensor) -> tuple:
    structure, rows, *rest = ctx.saved_tensors
    parameters, saved = rest[: ctx.count], rest[ctx.count :]
    flags = [needs[0], *needs[2]]
    grads = _op.backward(grad, structure, rows, parameters, saved, ctx.cell, flags, ctx.dtype)
    return grads[0], None, grads[1:]


def _fake_backward(grad, structure, rows, parameters, saved, cell, needs, dtype):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else t.new_empty(0)
        for t, need in zip([structure, *parameters], needs, strict=True)
    ]


_op.differentiable(
    "(Tensor grad, Tensor structure, Tensor rows, Tensor[] parameters, Tensor[] saved, SymInt cell, bool[] needs, "
    "ScalarType? dtype) -> Tensor[]",
    backward=_backward,
    fake=_fake_backward,
    save=_save,
    gradients=_gradients,
)
