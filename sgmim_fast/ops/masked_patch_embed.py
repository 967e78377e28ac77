"""`masked_patch_embed`: patch embedding of the visible patches, mask token elsewhere. SPEC "Encoder"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgmim_fast.ops import _check
from sgmim_fast.ops._op import Op
from sgmim_fast.ops.gather_patches import gather_patches, gather_patches_backward
from sgmim_fast.ops.primitives import Gradients, Primitives, Request, storage_dtype, sum_dtype


class Arguments(NamedTuple):
    """The operator's arguments, see `masked_patch_embed`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask_token: Tensor
    visible: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    dtype: torch.dtype | None

    @property
    def storage(self) -> torch.dtype:
        return storage_dtype(self.x, self.dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the result, (B, N, D)."""
        p = self.weight.shape[2]
        return self.x.shape[0], (self.x.shape[2] // p) * (self.x.shape[3] // p), self.weight.shape[0]

    @property
    def norm(self) -> tuple[Tensor, Tensor] | None:
        return None if self.norm_weight is None else (self.norm_weight, self.norm_bias)

    def patches(self) -> Tensor:
        """Returns the visible patches, (n, C * p^2) in storage."""
        p = self.weight.shape[2]
        return gather_patches(self.x.detach(), self.visible, cell=p, patch=p).to(self.storage)


def masked_patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_token: Tensor,
    visible: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Embeds the visible patches of images and fills in the mask token for all others, which are never read.

    Plain PyTorch, with `mask` (B, N, 1), 1 = masked: `t = F.conv2d(x, weight, bias, stride=p).flatten(2).mT`, with a
    norm `t = F.layer_norm(t, (D,), norm_weight, norm_bias, eps)`, then `t * (1 - mask) + mask_token * mask`.

    Args:
        x: (B, C, H, W), images, floating point, any strides; H and W are multiples of p.
        weight: (D, C, p, p).
        bias: (D,) or None.
        mask_token: (D,).
        visible: (n,) int64, distinct indices of the visible (not masked) patches among the B * (H / p) * (W / p),
            row-major.
        norm_weight, norm_bias: (D,), parameters of the LayerNorm after the embedding; None, both: no LayerNorm.
        eps: eps of the LayerNorm.

    Returns:
        (B, N, D) tokens, N = (H / p) * (W / p), row-major, in autocast's dtype, or that of `x`. Differentiable in all
        floating-point arguments.

    Raises:
        ValueError, TypeError: with the argument's name, its actual and the expected value.
    """
    return _op(x, weight, bias, mask_token, visible, norm_weight, norm_bias, eps, None)[0]


def _check_arguments(a: Arguments) -> None:
    x, weight, bias, mask_token, visible, norm_weight, norm_bias, _, dtype = a
    _check.floating("x", x)
    _check.floating("weight", weight)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (D, C, p, p)")
    _check.cells("x", x, weight.shape[2])
    _check.index("visible", visible)
    width = weight.shape[0]
    _check.shape("weight", weight, (None, x.shape[1], None, None), "(D, channels of x, p, p)")
    if (norm_weight is None) != (norm_bias is None):
        missing = "norm_weight" if norm_weight is None else "norm_bias"
        raise ValueError(f"{missing} is None; expected norm_weight and norm_bias, or neither")
    vectors = {"bias": bias, "mask_token": mask_token, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        _check.parameter(name, vector, (width,), "(D,)")
    _check.same_dtype("x", x, "weight", weight, dtype)


def _forward(p: Primitives, a: Arguments) -> tuple[Tensor, list[Tensor]]:
    weight, bias = p.weights_in(a.storage, a.weight, a.bias)
    tokens = p.linear(a.patches(), weight.flatten(1), bias)
    batch, patches, _ = a.shape
    visible, dtype = a.visible.contiguous(), a.dtype or a.x.dtype
    out, statistics = p.place_tokens(tokens, visible, a.mask_token, a.norm, a.eps, batch * patches, dtype)
    return out.view(a.shape), [] if statistics is None else [tokens, statistics]


def _backward(p: Primitives, a: Arguments, saved: list[Tensor], grad: Tensor, gradients: Gradients) -> None:
    dout, (tokens, statistics) = grad.reshape(-1, a.shape[2]).contiguous(), saved or (None, None)
    dtokens, sums = p.place_tokens_backward(dout, tokens, statistics, a.visible.contiguous(), a.norm, a.storage)
    gradients.sums(sums)
    if "x" in gradients:
        (weight,) = p.weights_in(a.storage, a.weight, last=True)
        patch, pixels = a.weight.shape[2], p.dgrad(dtokens, weight.flatten(1))
        gradients["x"] = gather_patches_backward(pixels.to(a.x.dtype), a.visible, a.x.shape, patch, patch, False)
    if "weight" in gradients:
        gradients.weight("weight", dtokens, a.patches())


def _fake(a: Arguments) -> tuple[Tensor, list[Tensor]]:
    n, saved = a.visible.shape[0], []
    if a.norm_weight is not None:
        statistics = a.x.new_empty(2, n, dtype=sum_dtype(a.x.dtype))
        saved = [a.x.new_empty(n, a.weight.shape[0], dtype=a.storage), statistics]
    return a.x.new_empty(a.shape, dtype=a.dtype or a.x.dtype), saved


_op = Op(
    "masked_patch_embed",
    Arguments,
    _forward,
    backward=_backward,
    fake=_fake,
    check=_check_arguments,
    request=lambda a: Request((a.dtype or a.x.dtype,), (a.weight.shape[0],)),
    indices=lambda a: _check.rows("visible", a.visible, a.shape[0] * a.shape[1]),
    saves=True,
)
