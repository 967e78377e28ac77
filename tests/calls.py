"""Small calls of every op, made by `sgmim_fast.ops.cases`, and ops as functions of their floating-point tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sgmim_fast import backends, ops
from sgmim_fast.ops import cases

OPS = sorted(backends.MODULES)
REGISTERED = {op: cases.registered(op) for op in OPS}
NOT_DIFFERENTIABLE = ("selective_mask", "standardize_structure", "token_salience")
DIFFERENTIABLE = [op for op in OPS if op not in NOT_DIFFERENTIABLE]

# One call of each op, as small as possible, with every optional argument.
EXAMPLES: dict[str, Callable[..., Any]] = {
    "gather_patches": partial(cases.gather_patches, (1, 2), (2, 2)),
    "linear_l1": partial(cases.linear_l1, (2, 1), (2, 2), 2, 2, 6, valid=True, scale=0.5, decided=True),
    "masked_patch_embed": partial(cases.masked_patch_embed, 2, (2, 2), 3, 2, 5),
    "norm_attention": partial(cases.norm_attention, (1, 3, 4), 6, layer_scale=True, hottest=1.5, residual=True),
    "norm_linear": partial(cases.norm_linear, (4,), 6, 5, layer_scale=True, residual=True),
    "norm_mlp": partial(cases.norm_mlp, (4,), 6, 7, layer_scale=True, residual=True),
    "position_bias": partial(cases.position_bias, (2, 2), 3, 5),
    "relational_guidance": partial(cases.relational_guidance, (2, 3), (2, 1), 4, 6, 2, 7),
    "selective_mask": cases.selective_mask,
    "standardize_structure": cases.standardize_structure,
    "structure_embed": partial(cases.structure_embed, (1, 2), (2, 2), 1, 1, 2, 3),
    "token_salience": cases.token_salience,
    "window_attention": partial(cases.window_attention, (2, 5, 4), 2, 3, (2, 3), hottest=1.5),
}
# Further calls of an op, with other combinations of arguments.
VARIANTS: dict[str, dict[str, Callable[..., Any]]] = {
    "gather_patches": {
        "raster": partial(cases.gather_patches, (2, 0, 1), (1, 3), 2, 6, zorder=False),
        "nothing": partial(cases.gather_patches, (0, 0)),
    },
    "linear_l1": {
        "tokens-of-all-cells": partial(cases.linear_l1, (2, 4), (2, 3), 2, 3, 5, packed=False, decided=True),
        "squares": partial(cases.linear_l1, (2, 1), (1, 2), 1, 3, 4, squared=True, valid=True),
        "normalized": partial(cases.linear_l1, (2, 1), (1, 2), 2, 2, 3, normalized=True, decided=True),
        "normalized-squares": partial(cases.linear_l1, (2, 1), (1, 2), 2, 2, 3, normalized=True, squared=True),
        "nothing": partial(cases.linear_l1, (0, 0), (1, 2), 1, 2, 3),
    },
    "masked_patch_embed": {
        "bare": partial(cases.masked_patch_embed, 2, (2, 3), 2, 2, 5, norm=False, bias=False),
        "nothing": partial(cases.masked_patch_embed, 2, (2, 3), 2, 2, 5, share=0),
        "everything": partial(cases.masked_patch_embed, 1, (2, 3), 2, 3, 5, share=1, norm=False),
    },
    "norm_attention": {
        "bare": partial(cases.norm_attention, (1, 3, 4), 4, biases=False, norm=False, bias=None, shift=(0, 0)),
        "post-norm": partial(cases.norm_attention, (1, 3, 4), 4, hottest=2.0, residual=True, post_norm=True),
        "post-norm-alone": partial(cases.norm_attention, (2, 2, 3), 4, bias="dense", post_norm=True),
        "layer-scale": partial(cases.norm_attention, (1, 3, 4), 4, layer_scale=True),
        "position": partial(cases.norm_attention, (1, 3, 4), 4, bias="position", hottest=1.5, post_norm=True),
    },
    "norm_linear": {
        "bare": partial(cases.norm_linear, (2, 3), 5, 4, bias=False, norm=False),
        "norm": partial(cases.norm_linear, (2, 3), 5, 4),
        "residual": partial(cases.norm_linear, (2, 3), 5, 4, norm=False, residual=True),
        "layer-scale": partial(cases.norm_linear, (3,), 5, 4, norm=False, layer_scale=True),
    },
    "norm_mlp": {
        "bare": partial(cases.norm_mlp, (2, 3), 5, 6, 4, norm=False),
        "norm": partial(cases.norm_mlp, (2, 3), 5, 6, 4),
        "layer-scale": partial(cases.norm_mlp, (2, 3), 5, 6, layer_scale=True),
        "post-norm": partial(cases.norm_mlp, (2, 3), 5, 6, residual=True, post_norm=True),
        "post-norm-alone": partial(cases.norm_mlp, (2, 3), 5, 6, post_norm=True),
    },
    "position_bias": {"row": partial(cases.position_bias, (1, 4), 1, 3, scale=0.5)},
    "relational_guidance": {
        "ragged": partial(cases.relational_guidance, (2, 1, 0), None, 3, 4, 2, 3),
        "drop": partial(cases.relational_guidance, (0, 3), (2, 0), 3, 4, 1, 3, keep=False),
        "packed": partial(cases.relational_guidance, (1, 2), None, 3, 4, 2, 3, packed=True),
    },
    "structure_embed": {
        "patch-of-7": partial(cases.structure_embed, (1, 2), (1, 2), 1, 7, 1, 3),
        "stride-16": partial(cases.structure_embed, (1, 0), (1, 2), 1, 4, 2, 2),
    },
    "selective_mask": {"ragged": partial(cases.selective_mask, (3, 0, 6))},
    "standardize_structure": {
        "bfloat16": partial(cases.standardize_structure, make=cases.Make(torch.bfloat16)),
        "ignore": partial(cases.standardize_structure, ignore=True),
    },
    "token_salience": {
        "bfloat16": partial(cases.token_salience, make=cases.Make(torch.bfloat16)),
        "float16": partial(cases.token_salience, make=cases.Make(torch.float16)),
    },
    "window_attention": {
        "dense": partial(cases.window_attention, (2, 3, 2), 1, 3, (2, 2), (1, 0), bias="dense", pad=False),
        "bare": partial(cases.window_attention, (1, 1, 5), 2, 4, (1, 5), (0, 0), bias=None, pad=False),
    },
}
CALLS = {
    op: {"everything": EXAMPLES[op], **VARIANTS.get(op, {})} for op in OPS
}  # op -> variant -> function that makes the arguments; its parameter `make` defines dtype and device of the tensors


def overload(op: str) -> Any:
    return REGISTERED[op].overload


def example(op: str) -> list[Any]:
    assert op in EXAMPLES, f"{op} is new: EXAMPLES needs a valid call of it"
    torch.manual_seed(0)
    return [list(group) if isinstance(group, tuple) else group for group in EXAMPLES[op]()]


def public(op: str) -> Callable[[Any], Any]:
    """Returns an op's public function as a function of its `Arguments`. Both must have the same parameter names."""
    function = getattr(ops, op)
    return lambda a: function(**{name: value for name, value in a._asdict().items() if name != "dtype"})


class Call:
    """A call of an op as a function of its floating-point tensors; all other arguments are constant.

    Args:
        op: name of the op.
        arguments: arguments of one call, as `cases` returns them.
        device: device of all tensors.
        dtype: dtype of the floating-point tensors; None keeps theirs.
    """

    def __init__(self, op: str, arguments: Any, device: Any = "cpu", dtype: torch.dtype | None = None):
        self.op, self.given, self.declared = op, arguments, REGISTERED[op].declared
        self.lengths = self.declared.lengths(arguments)
        self.flat = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in self.declared.flat(arguments)]
        self.at = [i for i, leaf in enumerate(self.flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        self.names = [self.declared.layout(self.lengths).names[i] for i in self.at]
        self.tensors = [self.flat[i].to(dtype or self.flat[i].dtype) for i in self.at]

    def arguments(self, *tensors: Tensor) -> Any:
        """Returns the arguments of the call, with these floating-point tensors if there are any."""
        flat = list(self.flat)
        for i, tensor in zip(self.at, tensors or self.tensors, strict=True):
            flat[i] = tensor
        args = zip(self.given, self.declared.unflat(flat, self.lengths), strict=True)
        return self.given._make(type(old)._make(new) if hasattr(old, "_make") else new for old, new in args)

    def __call__(self, *tensors: Tensor) -> Any:
        return cases.call(self.op, self.arguments(*tensors))

    def by(self, function: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
        """Converts a function of the op's arguments to a function of the floating-point tensors."""
        return lambda *tensors: function(self.arguments(*tensors))
