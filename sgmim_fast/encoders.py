"""Masked encoders: any timm Swin, SwinV2, BEiT, plain ViT or EVA, with SimMIM's mask token (SPEC.md, "Encoder").

An encoder computes the stem, replaces masked tokens by one learned token, adds positions, and computes the blocks and
the norm. Stem, blocks and norm are timm's own modules; this file only defines the order in which they are called.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq, is_model_in_modules
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgmim_fast.errors import nearest
from sgmim_fast.fused.stem import masked_stem, stem_fits
from sgmim_fast.fused.unmodified import Check, Own
from sgmim_fast.masking import SelectiveMask, aligned, resize
from sgmim_fast.ops import token_salience
from sgmim_fast.visible_encoder import VisibleEncoder, fix_positions

SUPPORTED = (
    "timm's Swin (swin_*), SwinV2 (swinv2_*), BEiT (beit_*, beitv2_*), plain ViT (vit_*, deit_*) and EVA, the ViTs "
    "with rotary positions (eva*, vit_*_rope_*, vit_*_dinov3)"
)
# timm module -> why its models, which users often request, are not supported
_UNSUPPORTED = {
    "hiera": "the patches of its stem overlap, so that visible tokens would read masked pixels",
    "convnext": "its convolutions would mix masked places into visible ones unless every one of them was masked",
}
MODULES = {"swin_transformer", "swin_transformer_v2", "beit", "vision_transformer", "deit", "eva"}  # of timm.models


class MaskedEncoder(nn.Module):
    """A timm encoder whose masked tokens are replaced by a mask token. Created by `create_encoder`.

    Attributes:
        model: the timm module, without classifier and pooling; `model.forward_features` ends with the final norm.
        mask_token: parameter (1, 1, D), where D is the width of the stem.
        num_features: width C of the output tokens.
        in_chans: number of channels of the images.
        patch_size: patch size p of the stem in pixels; an int, or (height, width) if the two differ.
        stride: pixels per output token; an int, or (height, width) if the two differ.
        timm_name, timm_arguments: the arguments of `create_encoder`.
        visible_stem: whether the stem embeds visible patches only, if it is given their row list; set by `accelerate`.
        visible_only: whether the blocks process visible patches only, see `visible_encoder`.
    """

    visible_stem = False
    visible_only = False

    def __init__(self, model: nn.Module, timm_name: str, timm_arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.timm_name = timm_name
        self.timm_arguments = timm_arguments
        stem = model.patch_embed
        self.num_features: int = model.num_features
        self.in_chans: int = stem.proj.in_channels
        self.patch_size = _int_or_pair(stem.patch_size)
        # Every Swin stage except the first halves the grid. A ViT has no stages.
        halvings = len(model.layers) - 1 if hasattr(model, "layers") else 0
        self.stride = _int_or_pair([p * 2**halvings for p in stem.patch_size])
        if self.visible_only:
            self.register_parameter("mask_token", None)
            return
        weight = stem.proj.weight
        self.mask_token = nn.Parameter(torch.empty(1, 1, weight.shape[0], device=weight.device, dtype=weight.dtype))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | SelectiveMask | None = None, visible: Tensor | None = None) -> Tensor:
        """Encodes the images without reading masked patches.

        Args:
            x: (B, in_chans, H, W) images, floating point.
            mask: (B, H/p, W/p), bool or 0/1 numbers, 1 = masked; or a `SelectiveMask` on this grid of patches or on one
                that divides it, with which an accelerated stem embeds visible patches only. None: nothing is masked,
                and the result is bitwise that of `model.forward_features`.
            visible: (n,) int64, only with a mask tensor: ascending indices of the visible patches among the
                B * (H/p) * (W/p) of the batch, for an accelerated stem. None: the stem embeds every patch.

        Returns:
            (B, N, C) tokens, row-major over the grid, without class, distillation and register tokens.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: a shape or device is wrong. Values of the mask are not checked, to avoid synchronising.
        """
        self._check(x, mask)
        stem = self.model.patch_embed
        drawn = isinstance(mask, SelectiveMask)
        patches = stem.dynamic_feat_size(x.shape[2:]) if drawn else None
        if mask is not None and (drawn or visible is not None) and self.visible_stem and stem_fits(self, x):
            if drawn:
                visible = mask.visible.on(tuple(mask.mask.shape[1:]), patches).index
            return self._after_stem(masked_stem(stem, x, self.mask_token, visible))
        tokens = stem(x)  # (B, L, D), or (B, H/p, W/p, D)
        if mask is not None:
            masked = resize(mask.mask, *patches) if drawn else mask.bool()
            tokens = torch.where(masked.reshape(*tokens.shape[:-1], 1), self.mask_token, tokens)
        return self._after_stem(tokens)

    def accelerate_stem(self) -> None:
        """Lets the stem embed visible patches only, unless a subclass overrides `forward`. Called by `accelerate`."""
        if type(self).forward in (MaskedEncoder.forward, VisibleEncoder.forward):
            self.visible_stem = True

    def _after_stem(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def salience(self, x: Tensor) -> Tensor:
        """Returns the salience of each patch of unmasked images, from which `selective_mask` can draw masks.

        It is `ops.token_salience` of the stem's tokens with positions added, before any block (SPEC "Salience-based
        masking").

        Args:
            x: (B, in_chans, H, W) images, as for `forward`.

        Returns:
            (B, H/p, W/p) from 0 to 1, float32 (float64 for float64). All NaN for an image with a non-finite value.

        Raises:
            TypeError, ValueError: see `forward`.
        """
        self._check(x, None)
        tokens = self._with_positions(self.model.patch_embed(x))
        return token_salience(tokens).unflatten(1, self.model.patch_embed.dynamic_feat_size(x.shape[2:]))

    def _with_positions(self, tokens: Tensor) -> Tensor:
        """Returns the stem's tokens as (B, N, D), with the model's absolute positions added."""
        raise NotImplementedError

    def _check(self, x: Tensor, mask: Tensor | SelectiveMask | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"images must have shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point, got {x.dtype}")
        stem = self.model.patch_embed
        height, width = x.shape[2:]
        if stem.strict_img_size and (height, width) != tuple(stem.img_size):
            raise ValueError(
                f"images must be {stem.img_size[0]}x{stem.img_size[1]} pixels, got {height}x{width}: pass img_size="
                f"({height}, {width}) to create_encoder"
            )
        if not stem.dynamic_img_pad and (height % stem.patch_size[0] or width % stem.patch_size[1]):
            raise ValueError(f"images of {height}x{width} pixels do not divide into patches of {stem.patch_size}")
        if mask is None:
            return
        expected = (x.shape[0], *stem.dynamic_feat_size((height, width)))
        if isinstance(mask, SelectiveMask):
            mask = mask.mask
            fits = mask.shape[0] == expected[0] and aligned(mask.shape[1:], expected[1:])
        else:
            fits = tuple(mask.shape) == expected
        if not fits:
            raise ValueError(
                f"mask must have shape (B, H/p, W/p) = {expected} for patches of {stem.patch_size} pixels, "
                f"got {tuple(mask.shape)}"
            )
        if mask.device != x.device:
            raise ValueError(f"mask must be on the device of the images, {x.device}, got {mask.device}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: timm's (class token, positions, position tables) and ours."""
        own = set() if self.mask_token is None else {"mask_token"}
        return own | {f"model.{name}" for name in self.model.no_weight_decay()}


class _MaskedSwin(MaskedEncoder):
    """Swin and SwinV2: (B, h, w, D) tokens, no absolute positions."""

    def _after_stem(self, tokens: Tensor) -> Tensor:
        model = self.model
        return model.norm(model.layers(tokens)).flatten(1, 2)

    def _with_positions(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, 2)


class _MaskedBeit(MaskedEncoder):
    """BEiT: class token, optional absolute positions, relative position bias per block or shared."""

    def _after_stem(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = torch.cat((model.cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        return self._blocks(model.pos_drop(x))[:, model.num_prefix_tokens :]

    def _blocks(self, x: Tensor) -> Tensor:
        """Computes the blocks and the final norm."""
        model = self.model
        bias = None if model.rel_pos_bias is None else model.rel_pos_bias()
        for block in model.blocks:
            if model.grad_checkpointing:
                x = checkpoint(block, x, shared_rel_pos_bias=bias, use_reentrant=False)
            else:
                x = block(x, shared_rel_pos_bias=bias)
        return model.norm(x)

    def _with_positions(self, tokens: Tensor) -> Tensor:
        positions = self.model.pos_embed
        return tokens if positions is None else tokens + positions[:, self.model.num_prefix_tokens :]


class _MaskedViT(MaskedEncoder):
    """Plain ViT and DeiT: after masked tokens are replaced, positions are added and prefix tokens prepended."""

    def _after_stem(self, tokens: Tensor) -> Tensor:
        return self._blocks(self.model._pos_embed(tokens))[:, self.model.num_prefix_tokens :]

    def _blocks(self, x: Tensor) -> Tensor:
        """Computes the pre-norm, if the model has one, the blocks and the final norm."""
        model = self.model
        x = model.norm_pre(x)
        x = checkpoint_seq(model.blocks, x) if model.grad_checkpointing else model.blocks(x)
        return model.norm(x)

    def _with_positions(self, tokens: Tensor) -> Tensor:
        return self.model._pos_embed(tokens)[:, self.model.num_prefix_tokens :]


class _VisibleViT(VisibleEncoder, _MaskedViT):
    def _encode(self, x: Tensor, cells: Tensor, rotary: Tensor | None) -> Tensor:
        return self._blocks(x)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        return self._embedded_zeros(grid)[0], None


class _VisibleBeit(VisibleEncoder, _MaskedBeit):
    def _encode(self, x: Tensor, cells: Tensor, rotary: Tensor | None) -> Tensor:
        return self._blocks(x)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        model, count = self.model, grid[0] * grid[1]
        table = torch.cat([model.cls_token[0], model.cls_token.new_zeros(count, model.cls_token.shape[2])])
        return (table if model.pos_embed is None else table + model.pos_embed[0]), None


class _MaskedEva(MaskedEncoder):
    """EVA and EVA-02, DINOv3 and the other ViTs with rotary positions.

    Rotary positions depend on a token's cell, not on its content. A masked token therefore has those of its cell, as in
    timm's own forward.
    """

    def _after_stem(self, tokens: Tensor) -> Tensor:
        return self._blocks(*self.model._pos_embed(tokens))[:, self.model.num_prefix_tokens :]

    def _blocks(self, x: Tensor, rope: Tensor | None, cells: Tensor | None = None) -> Tensor:
        """Computes the pre-norm, if the model has one, the blocks and the final norm. `cells` (b, V) are the indices of
        each image's patches; None: x has all patches."""
        model = self.model
        x = model.norm_pre(x)
        if not model.rope_mixed:
            rope = _of_cells(rope, cells)
        for number, block in enumerate(model.blocks):
            own = _of_cells(rope[number], cells) if model.rope_mixed else rope  # with rope_mixed each block has its own
            x = checkpoint(block, x, use_reentrant=False, rope=own) if model.grad_checkpointing else block(x, rope=own)
        return model.norm(x)

    def _with_positions(self, tokens: Tensor) -> Tensor:
        """Adds absolute positions only; rotary ones are applied in the attention."""
        return self.model._pos_embed(tokens)[0][:, self.model.num_prefix_tokens :]


class _VisibleEva(VisibleEncoder, _MaskedEva):
    def _encode(self, x: Tensor, cells: Tensor, rotary: Tensor | None) -> Tensor:
        return self._blocks(x, rotary, cells)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        table, rotary = self._embedded_zeros(grid)
        return table[0], rotary


def _of_cells(rope: Tensor | None, cells: Tensor | None) -> Tensor | None:
    """Selects the patches `cells` (b, V) of rotary positions (N, d) or (heads, N, d) -> (b, 1 or heads, V, d)."""
    if rope is None or cells is None:
        return rope
    found = rope.index_select(-2, cells.flatten()).unflatten(-2, cells.shape)
    return found.unsqueeze(1) if rope.ndim == 2 else found.transpose(0, 1)


_FAMILIES = (
    (SwinTransformer, _MaskedSwin),
    (SwinTransformerV2, _MaskedSwin),
    (Beit, _MaskedBeit),
    (VisionTransformer, _MaskedViT),
    (Eva, _MaskedEva),
)

# Whether `forward` may be called with the visible patches: it has no hooks and is not overridden.
VISIBLE = Check(encoder=Own(*{masked for _, masked in _FAMILIES}, tensors=("mask_token",), model=None))


def create_encoder(
    timm_name: str, *, visible_only: bool = False, positions: str = "timm", **timm_arguments: Any
) -> MaskedEncoder:
    """Creates a masked encoder around a timm model.

    Any image size that timm allows works, square or not. Stochastic depth is off unless `drop_path_rate` is given
    (timm's own default for Swin is 0.1; SPEC.md, "Published recipes"). The classifier and the pooling are removed. If
    timm applies the final norm after pooling (`fc_norm`, the default of BEiT and the `gap` ViTs), it is applied to all
    tokens instead, as in SimMIM.

    The published recipes::

        create_encoder("swin_base_patch4_window7_224", img_size=192, window_size=6)
        create_encoder("swin_large_patch4_window7_224", img_size=192, window_size=12)
        create_encoder("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False,
                       use_abs_pos_emb=False, init_values=0.1, drop_path_rate=0.1)

    Args:
        timm_name: name of a timm model of the families swin_*, swinv2_*, beit_*, beitv2_*, vit_*, deit_* and eva*, with
            or without rotary positions, including DINOv3 (vit_*_dinov3).
        visible_only: encode visible patches only, without mask tokens, as MAE does. The model then needs a decoder
            (`sgmim_fast.Decoder`). This costs half to a third, and is not what the paper does. Only for ViTs, with
            absolute or rotary positions.
        positions: "timm", or "sincos": fixed sines and cosines, as in MAE, in place of timm's learned absolute
            positions.
        timm_arguments: further arguments of `timm.create_model`, for instance `img_size`, `window_size`, `pretrained`.

    Returns:
        The encoder, a `MaskedEncoder`.

    Raises:
        ValueError: timm has no model of that name (the message lists the nearest names); the model belongs to another
            family (hybrid stems, relative positions outside BEiT, NaFlex, and convolutional stages such as Hiera's and
            ConvNeXt-V2's, in which every convolution would have to exclude masked positions); an argument requests a
            classifier, feature pyramids or dropped patches; or visible_only is True for a model that needs all tokens.
    """
    base = timm_name.split(".")[0]
    if not is_model_in_modules(base, MODULES):
        raise ValueError(f"timm_name must name one of {SUPPORTED}, got {timm_name!r}{_why_not(base)}")
    for argument in ("num_classes", "features_only", "patch_drop_rate"):
        if timm_arguments.get(argument):
            raise ValueError(f"{argument} must be left out for a masked encoder, got {timm_arguments[argument]!r}")
    model = timm.create_model(timm_name, **{"drop_path_rate": 0.0, **timm_arguments, "num_classes": 0})
    # A class that overrides forward_features may compute something other than _after_stem does.
    masked_class = next(
        (
            masked
            for plain, masked in _FAMILIES
            if isinstance(model, plain) and type(model).forward_features is plain.forward_features
        ),
        None,
    )
    if masked_class is None:
        raise ValueError(f"timm_name must name one of {SUPPORTED}, got {timm_name!r}, a {type(model).__name__}")
    if type(model.patch_embed) is not PatchEmbed:
        raise ValueError(
            f"the stem of {timm_name!r} must be timm's PatchEmbed, whose patches do not overlap, "
            f"got {type(model.patch_embed).__name__}"
        )
    if positions not in ("timm", "sincos"):
        raise ValueError(f"positions must be 'timm' or 'sincos', got {positions!r}")
    if visible_only:
        masked_class = _visible_class(masked_class, model, timm_name)
    if positions == "sincos":
        fix_positions(model)
    _drop_pooling(model)
    return masked_class(model, timm_name, timm_arguments)


def image_size(encoder: object) -> tuple[int, int] | None:
    """Returns the image size (height, width) of an encoder or of its timm model; None if neither has one."""
    stem = getattr(getattr(encoder, "model", encoder), "patch_embed", None)
    size = getattr(encoder, "img_size", None) or getattr(stem, "img_size", None)
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def _why_not(base: str) -> str:
    """Returns the part of the error message that explains why a model is not supported."""
    if timm.is_model(base):
        return next((f": {why}" for module, why in _UNSUPPORTED.items() if is_model_in_modules(base, {module})), "")
    return f"; timm has no model of that name{nearest_name(base)}"


def nearest_name(base: str) -> str:
    """Returns `errors.nearest` among timm's names that `create_encoder` supports. `base` is a name without its tag."""
    return nearest(base, (name for name in timm.list_models() if is_model_in_modules(name, MODULES)))


def _visible_class(masked: type[MaskedEncoder], model: nn.Module, timm_name: str) -> type[MaskedEncoder]:
    """Returns the visible-only class for a timm model whose class with mask tokens is `masked`.

    Raises:
        ValueError: the model has windowed attention, or relative positions between all tokens.
    """
    if masked is _MaskedViT:
        return _VisibleViT
    if masked is _MaskedEva:
        return _VisibleEva
    if masked is _MaskedBeit:
        relative = model.rel_pos_bias is not None or any(
            block.attn.relative_position_bias_table is not None for block in model.blocks
        )
        if not relative:
            return _VisibleBeit
        why = "relative positions (use_rel_pos_bias=False, use_abs_pos_emb=True leaves them out)"
    else:
        why = "windows and stages of whole images"
    raise ValueError(
        f"visible_only is True for {timm_name!r}, which has {why}; expected a plain ViT (vit_*, deit_*) or one with "
        "rotary positions (eva*, vit_*_dinov3), which can compute visible patches alone"
    )


def _drop_pooling(model: nn.Module) -> None:
    if isinstance(model.norm, nn.Identity) and hasattr(model, "fc_norm"):
        model.norm, model.fc_norm = model.fc_norm, model.norm
    model.reset_classifier(0, "")  # also removes attention pooling, whose parameters would never get a gradient


def _int_or_pair(pair: tuple[int, int] | list[int]) -> int | tuple[int, int]:
    height, width = pair
    return height if height == width else (height, width)
