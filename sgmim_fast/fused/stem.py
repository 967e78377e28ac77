"""timm's patch embedding for visible patches only, see `block`."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.layers.format import Format
from torch import Tensor, nn

from sgmim_fast import ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.block import gemm_dtype, supported
from sgmim_fast.fused.unmodified import IDENTITY, NORM, PATCHES, Check, Own


def _output(stem: PatchEmbed) -> str:
    fits = stem.flatten or stem.output_fmt == Format.NHWC
    return (
        ""
        if fits and tuple(stem.patch_size) == stem.proj.stride
        else "output_fmt is not supported, or patch_size differs from the stride"
    )


# Stems without and with a norm.
STEMS = tuple(
    Check(patch_embed=Own(PatchEmbed, methods=("dynamic_feat_size",), also=_output, proj=PATCHES, norm=norm))
    for norm in (IDENTITY, NORM)
)


def _token(token: Tensor | None, weight: Tensor) -> str:
    fits = type(token) in unmodified.PLAIN and token.dtype is weight.dtype and tuple(token.shape) == (1, 1, len(weight))
    return "" if fits else f"mask_token is not a plain tensor (1, 1, {len(weight)}) of {weight.dtype}"


def stem_fits(encoder: nn.Module, x: Tensor) -> bool:
    """Whether `masked_stem` or `visible_stem` may replace the stem of a masked encoder for images `x`."""
    stem = encoder.model.patch_embed
    why = unmodified.changed_call(x)
    if not why:
        expected = STEMS[0] if type(stem._modules.get("norm")) is nn.Identity else STEMS[1]
        why = expected.why(encoder.model)
        if not why and not encoder.visible_only:
            why = _token(encoder._parameters.get("mask_token"), stem.proj.weight)
    if why:
        unmodified.warn_once(f"the stem of a {type(encoder.model).__name__} runs through timm's own code: {why}")
        return False
    p = stem.patch_size[0]
    return supported(x) and x.shape[2] % p == 0 and x.shape[3] % p == 0  # timm pads other sizes


def masked_stem(stem: PatchEmbed, x: Tensor, mask_token: Tensor, visible: Tensor) -> Tensor:
    """Computes the stem's tokens, in timm's shape, from the visible patches of (B, C, H, W) images.

    visible: (n,) int64 rows among the B * (H / p) * (W / p) patches. All other tokens are the mask token.
    """
    norm = {}
    if not isinstance(stem.norm, nn.Identity):
        norm = {"norm_weight": stem.norm.weight, "norm_bias": stem.norm.bias, "eps": stem.norm.eps}
    tokens = ops.masked_patch_embed(x, stem.proj.weight, stem.proj.bias, mask_token.flatten(), visible, **norm)
    return tokens if stem.flatten else tokens.unflatten(1, stem.dynamic_feat_size(x.shape[2:]))


def visible_stem(stem: PatchEmbed, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """Computes the tokens of visible patches, plus positions, both (n, D). visible: see `masked_stem`."""
    patch = stem.patch_size[0]
    patches = ops.gather_patches(x, visible, cell=patch, patch=patch)
    patches = patches.to(gemm_dtype(patches))  # saved for the backward in the gemm's dtype, which may be smaller
    weight, bias = stem.proj.weight.flatten(1), stem.proj.bias
    if isinstance(stem.norm, nn.Identity):
        return ops.norm_linear(patches, weight, bias, residual=positions)
    return stem.norm(ops.norm_linear(patches, weight, bias)) + positions
