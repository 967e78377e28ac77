"""timm's blocks computing the same function through this project's ops.

Each class derives from timm's and has its parameters, buffers and children: `accelerate` gives a module the class, and
taking it away again is all it needs to undo that. Every forward looks first at what it is about to bypass
(`fused.unmodified`). A child that is not timm's own (a hook, an adapter, a dropout at work, another activation) is
called as timm would, one half of the block at a time, and the log says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from timm.layers import Attention, LayerScale, Mlp, PatchEmbed
from timm.layers.format import Format
from timm.models import beit, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import backends, ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.unmodified import (
    IDENTITY,
    INACTIVE_DROP_PATH,
    LINEAR,
    MLP,
    NORM,
    PATCHES,
    SOFTMAX,
    UNBIASED,
    Check,
    Own,
)
from sgmim_fast.ops import target
from sgmim_fast.ops.window_attention import most_tokens_on_a_gpu


def _vectors(norm: nn.LayerNorm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """A window or a shift, which the published code has as one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


def norm_mlp(x: Tensor, norm: nn.LayerNorm | None, mlp: Mlp, **options: Any) -> Tensor:
    layers = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return ops.norm_mlp(x, *layers, **_vectors(norm), **options)


def norm_linear(x: Tensor, norm: nn.LayerNorm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.norm_linear(x, weight, bias, **_vectors(norm))


def here(x: Tensor) -> bool:
    """Whether there are kernels for a tensor like this; where there are none, timm's own forward runs."""
    return (x.device.type == "cpu" or x.dtype != torch.float64) and _has_kernels(x.device.type)


@torch.compiler.assume_constant_result
def _has_kernels(device: str) -> bool:
    """Whether the forced backend has all that a block is made of, or one of the device's own a window attention."""
    forced = backends.forced()
    if forced is not None:
        return forced == "torch" or forced in backends.MODULES["norm_mlp"]
    own = [name for name in backends.ORDER.get(device, ()) if name != "torch"]
    return any(backends.can_run("window_attention", name)[0] for name in own)


def _window_fits(x: Tensor, tokens: int) -> bool:
    """Whether a window of so many tokens is one for the kernels: on a GPU timm's own attention takes the large ones."""
    return x.device.type == "cpu" or tokens <= most_tokens_on_a_gpu(gemm_dtype(x))


def gemm_dtype(x: Tensor) -> torch.dtype:
    """That gemms are asked for in."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which is never cast
    return torch.get_autocast_dtype(device) if cast else x.dtype


def _scales_weights(scale: Tensor, x: Tensor) -> bool:
    """Whether the ops take a layer scale of tokens x: scale * weight in place of scale * result, for which float16 is
    too narrow."""
    fits = type(scale) in unmodified.PLAIN and scale.shape == x.shape[-1:] and gemm_dtype(x) != torch.float16
    return fits and (scale.dtype != torch.float64 or x.dtype == torch.float64)


class _Fused:
    """What all classes here share: when to step aside, and saying so."""

    timm: ClassVar[type[nn.Module]]  # timm's class
    methods: ClassVar[tuple[str, ...]] = ()  # of timm's class, which are bypassed besides its forward
    mlp_half = Check(norm2=NORM, mlp=MLP)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "timm" in cls.__dict__:
            cls._timms_forward = staticmethod(cls.timm.forward)
            cls._bypassed = tuple((name, getattr(cls.timm, name)) for name in cls.methods)

    def _changed(self) -> str:
        """Why the block as a whole is not timm's."""
        if self.timm.forward is not self._timms_forward:
            return f"{self.timm.__name__}.forward is not what it was at import"
        kind, own = type(self), self.__dict__
        for name, at_import in self._bypassed:
            if name in own or getattr(kind, name) is not at_import:
                return f"{name} is not what it was at import"
        return ""

    def reasons(self) -> dict[str, str]:
        """Why each part runs as timm's; "" where it is fused."""
        raise NotImplementedError

    def _as_timm(self, x: Tensor) -> bool:
        """Whether timm's own forward has to run, whatever the children are."""
        why = unmodified.changed_call(x) or self._changed()
        if not why and not here(x):
            why = f"there are no kernels for {x.dtype} on {x.device.type}"
        return self._left("whole", why)

    def _left(self, part: str, why: str) -> bool:
        """Whether there is a reason to leave a part to timm; logs it."""
        if why:
            unmodified.say(f"the {part} of a {type(self).__name__} runs as timm has it: {why}")
        return bool(why)

    def _through(self, after: Check, x: Tensor) -> Tensor:
        for name in after.names:
            x = getattr(self, name)(x)
        return x

    def _add(self, x: Tensor, half: Callable[..., Tensor], after: Check, scale: Tensor | None = None) -> Tensor:
        """x + scale * half(x), going through the children in `after` before it is added, if they do anything."""
        outside = scale is not None and not _scales_weights(scale, x)
        options = {} if scale is None or outside else {"layer_scale": scale}
        if not outside and not after.why(self):
            return half(x, residual=True, **options)
        y = half(x, **options)
        return x + self._through(after, scale * y if outside else y)

    @staticmethod
    def _added(x: Tensor, y: Tensor, scale: Tensor | None, path: nn.Module) -> Tensor:
        """x + path(scale * y), what comes behind a half, one by one."""
        return x + path(y if scale is None else scale * y)

    def _mlp(self, x: Tensor, **options: Any) -> Tensor:
        return norm_mlp(x, self.norm2, self.mlp, **options)


def _windows_fit(x: Tensor, tokens: int) -> str:
    return "" if _window_fits(x, tokens) else f"windows of {tokens} tokens are too large for the kernels"


class Swin(_Fused):
    """What both Swin blocks share.

    `attn_mask` is what the kernels compute on their way, as long as it is that of the block's window and shift. On a
    CPU its values are looked at; elsewhere, as in torch.compile, that would wait for the device: there it must be a
    tensor that has been looked at, or that such a one was moved to.
    """

    attention: ClassVar[Check]

    def _attention_reason(self) -> str:
        if why := self.attention.why(self):
            return why
        attn, window, shift = self._modules["attn"], _pair(self.window_size), _pair(self.shift_size)
        area = window[0] * window[1]
        # windows of Swin's attention have an area, those of SwinV2's a size
        areas = getattr(self, "window_area", area), getattr(attn, "window_area", area)
        if areas != (area, area) or tuple(attn.window_size) != window:
            return "windows of several sizes"
        if attn._buffers["relative_position_index"].numel() != area * area:
            return "relative positions of other windows"
        if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
            return f"a shift of {shift} in windows of {window}"
        return self._mask_reason()

    def _mask_reason(self) -> str:
        if self.__dict__.get("dynamic_mask", False):
            return ""
        mask, shifted = self._buffers.get("attn_mask"), any(_pair(self.shift_size))
        if mask is None or not shifted:
            if mask is None and not shifted and self.__dict__.get("attn_mask") is None:
                return ""
            return "an attn_mask that does not fit the shift"
        seen = self.__dict__.get("_seen_mask", (None, None))
        if torch.compiler.is_compiling():
            fits = mask is seen[0]
        elif type(mask) is Tensor and mask.device.type == "cpu":
            fits = self.see_mask()
        else:
            fits = mask is seen[0] and not mask.is_inference() and mask._version == seen[1]
        return "" if fits else "an attn_mask of its own"

    def see_mask(self) -> bool:
        """Looks at the values of the mask: whether they are timm's. Waits for the device."""
        mask = self._buffers.get("attn_mask")
        if mask is None or mask.is_meta:
            return mask is None
        settings = tuple(self.input_resolution), _pair(self.window_size), _pair(self.shift_size)
        fits = torch.equal(mask.cpu(), _mask(self._timm_mask, *settings, mask.dtype))
        self._remember_mask(fits)
        return fits

    def _remember_mask(self, fits: bool) -> None:
        mask = self._buffers.get("attn_mask")
        if not fits or mask is None or mask.is_inference():
            self.__dict__.pop("_seen_mask", None)
        elif self.__dict__.get("_seen_mask", (None, None))[0] is not mask:
            self._seen_mask = mask, mask._version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        fits = not self._mask_reason()
        super()._apply(fn, recurse)
        self._remember_mask(fits)
        return self

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self._remember_mask(not self._changed())

    def __reduce_ex__(self, protocol: int) -> Any:
        self._remember_mask(not self._mask_reason())
        return super().__reduce_ex__(protocol)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_seen_mask" in state:  # a copy counts its changes anew
            self._seen_mask = self.attn_mask, self.attn_mask._version

    def _size_reason(self, x: Tensor) -> str:
        if not getattr(self, "dynamic_mask", False) and tuple(x.shape[1:3]) != tuple(self.input_resolution):
            return f"an input of {x.shape[1]}x{x.shape[2]} tokens"
        return _windows_fit(x, self.window_area)

    def _attend(self, x: Tensor, norm: nn.LayerNorm | None, qkv_bias: Tensor | None, **options: Any) -> Tensor:
        """The attention half through `norm_attention`."""
        attn = self.attn
        layers = {"qkv_weight": attn.qkv.weight, "proj_weight": attn.proj.weight, "proj_bias": attn.proj.bias}
        sizes = attn.num_heads, _pair(self.window_size), _pair(self.shift_size)
        index = attn.relative_position_index
        return ops.norm_attention(x, *sizes, **layers, qkv_bias=qkv_bias, index=index, **_vectors(norm), **options)


@lru_cache(maxsize=64)
def _mask(
    timms: Callable[..., Tensor],
    resolution: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """timm's attention mask of a shifted block, which is small: once for all blocks that share it."""
    block = SimpleNamespace(
        input_resolution=resolution, window_size=window, shift_size=shift, window_area=window[0] * window[1]
    )
    return timms(block, device=torch.device("cpu"), dtype=dtype)


SWIN_ATTENTION = unmodified.attention(
    swin_transformer.WindowAttention,
    LINEAR,
    tensors=("relative_position_bias_table", "relative_position_index"),
    methods=("_get_rel_pos_bias",),
    softmax=SOFTMAX,
)


PATH1, PATH2 = Check(drop_path1=INACTIVE_DROP_PATH), Check(drop_path2=INACTIVE_DROP_PATH)


class SwinTransformerBlock(Swin, swin_transformer.SwinTransformerBlock):
    """Swin: norm1 and qkv, window attention, projection; norm2 and MLP."""

    timm, methods = swin_transformer.SwinTransformerBlock, ("_attn", "get_attn_mask")
    attention = Check(norm1=NORM, attn=SWIN_ATTENTION)
    _timm_mask = staticmethod(swin_transformer.SwinTransformerBlock.get_attn_mask)

    def reasons(self) -> dict[str, str]:
        return {
            "attention": self._attention_reason(),
            "mlp": self.mlp_half.why(self),
        }

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x):
            return super().forward(x)
        why = self._attention_reason() or self._size_reason(x)
        if self._left("attention", why):
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        else:
            table, added = self.attn.relative_position_bias_table, not PATH1.why(self)
            y = self._attend(x, self.norm1, self.attn.qkv.bias, bias=table, residual=added)
            x = y if added else x + self.drop_path1(y)
        why = self.mlp_half.why(self)
        if not why and not PATH2.why(self):
            return self._mlp(x, residual=True)
        flat = x.flatten(1, 2)
        y = self.mlp(self.norm2(flat)) if self._left("mlp", why) else self._mlp(flat)
        return (flat + self.drop_path2(y)).view(x.shape)


SWINV2_ATTENTION = unmodified.attention(
    swin_transformer_v2.WindowAttention,
    UNBIASED,
    tensors=("logit_scale", "q_bias", "k_bias", "v_bias", "relative_coords_table", "relative_position_index"),
    softmax=SOFTMAX,
    cpb_mlp=None,
)


NORM_AND_PATH1 = Check(norm1=NORM, drop_path1=INACTIVE_DROP_PATH)
NORM_AND_PATH2 = Check(norm2=NORM, drop_path2=INACTIVE_DROP_PATH)


class SwinTransformerV2Block(Swin, swin_transformer_v2.SwinTransformerV2Block):
    """SwinV2: qkv, window attention on cosines, projection, norm1; MLP, norm2. The norms and what follows them are part
    of the halves if they are timm's own, too."""

    timm, methods = swin_transformer_v2.SwinTransformerV2Block, ("_attn", "get_attn_mask")
    attention, mlp_half = Check(attn=SWINV2_ATTENTION), Check(mlp=MLP)
    _timm_mask = staticmethod(swin_transformer_v2.SwinTransformerV2Block.get_attn_mask)

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self.mlp_half.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x):
            return super().forward(x)
        why = self._attention_reason() or self._size_reason(x)
        fused = not self._left("attention", why)
        x = self._fused(x) if fused else x + self.drop_path1(self.norm1(self._attn(x)))
        why = self.mlp_half.why(self)
        if not why and not NORM_AND_PATH2.why(self):
            return self._mlp(x, residual=True, post_norm=True)
        flat = x.flatten(1, 2)
        y = self.mlp(flat) if self._left("mlp", why) else norm_mlp(flat, None, self.mlp)
        return (flat + self.drop_path2(self.norm2(y))).view(x.shape)

    def _fused(self, x: Tensor) -> Tensor:
        """The attention half, with norm and residual as far as nothing is between them."""
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
        options = {"bias": table, "logit_scale": attn.logit_scale.flatten()}
        if NORM_AND_PATH1.why(self):
            return x + self.drop_path1(self.norm1(self._attend(x, None, bias, **options)))
        return self._attend(x, self.norm1, bias, **options, residual=True, post_norm=True)


class PatchMerging(_Fused, swin_transformer.PatchMerging):
    """Swin's: the norm and the reduction as one op, behind timm's gather of 2 x 2 neighbours."""

    timm = swin_transformer.PatchMerging
    bypassed = Check(norm=NORM, reduction=LINEAR)

    def reasons(self) -> dict[str, str]:
        return {"reduction": self.bypassed.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._left("reduction", self.reasons()["reduction"]):
            return super().forward(x)
        return norm_linear(_neighbours(x), self.norm, self.reduction.weight, self.reduction.bias)


class PatchMergingV2(_Fused, swin_transformer_v2.PatchMerging):
    """SwinV2's: the norm comes after the reduction."""

    timm = swin_transformer_v2.PatchMerging
    bypassed = Check(reduction=LINEAR)

    def reasons(self) -> dict[str, str]:
        return {"reduction": self.bypassed.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._left("reduction", self.reasons()["reduction"]):
            return super().forward(x)
        return self.norm(norm_linear(_neighbours(x), None, self.reduction.weight, self.reduction.bias))


def _neighbours(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H / 2, W / 2, 4 C), neighbours (0, 0), (1, 0), (0, 1), (1, 1); an odd side is padded."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)


def _one_window(
    x: Tensor,
    norm: nn.LayerNorm,
    attn: nn.Module,
    qkv_bias: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    layer_scale: Tensor | None = None,
    residual: bool = False,
    rows: Tensor | None = None,
    place: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The attention half of all tokens (B, N, C) over all of them, with the norm before, times `layer_scale`. x may be
    `place(rows)`, where there is no bias: norm and qkv are then computed of the rows (n, C)."""
    if bias is None and (place is not None or target.on_gpu(x)):
        qkv = norm_linear(x if place is None else rows, norm, attn.qkv.weight, qkv_bias)
        attended = _unbiased(qkv if place is None else place(qkv), attn.num_heads)
        options = {"layer_scale": layer_scale, "residual": x if residual else None}
        return ops.norm_linear(attended, attn.proj.weight, attn.proj.bias, **options)
    layers = {"qkv_weight": attn.qkv.weight, "proj_weight": attn.proj.weight, "proj_bias": attn.proj.bias}
    options = {"qkv_bias": qkv_bias, "bias": bias, "index": index, **_vectors(norm)}
    options |= {"layer_scale": layer_scale, "residual": residual}
    return ops.norm_attention(x.unsqueeze(1), attn.num_heads, (1, x.shape[1]), **layers, **options).squeeze(1)


def _unbiased(qkv: Tensor, heads: int) -> Tensor:
    """Attention without a bias, (B, N, 3 C) -> (B, N, C). On a GPU by PyTorch's own kernels: FlashAttention's, whose
    tiles need not hold all keys."""
    if not target.on_gpu(qkv):
        return ops.window_attention(qkv.unsqueeze(1), heads, (1, qkv.shape[1])).squeeze(1)
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


BEIT_ATTENTION = unmodified.attention(
    beit.Attention,
    UNBIASED,
    tensors=("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index"),
    methods=("_get_rel_pos_bias",),
)


class BeitBlock(_Fused, beit.Block):
    """BEiT: norm1 and qkv, attention over all tokens with relative position bias, projection; norm2 and MLP; each half
    with its layer scale."""

    timm = beit.Block
    attention = Check(norm1=NORM, attn=BEIT_ATTENTION)

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self.mlp_half.why(self)}

    def _attention_reason(self) -> str:
        if why := self.attention.why(self):
            return why
        attn = self.attn
        if attn.relative_position_bias_table is None:
            return ""
        tokens = attn.window_size[0] * attn.window_size[1] + 1
        index = attn.relative_position_index
        return "" if tuple(index.shape) == (tokens, tokens) else "relative positions of another window"

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        scales = (None, None) if self.gamma_1 is None else (self.gamma_1, self.gamma_2)  # as timm asks, gamma_1 alone
        if self._as_timm(x) or (scales[0] is not None and scales[1] is None):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        if self._left("attention", self._attention_reason() or _windows_fit(x, x.shape[1])):
            y = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
            x = self._added(x, y, scales[0], self.drop_path1)
        else:
            x = self._add(x, partial(self._fused, shared=shared_rel_pos_bias), PATH1, scales[0])
        if self._left("mlp", self.mlp_half.why(self)):
            y = self.mlp(self.norm2(x))
            return self._added(x, y, scales[1], self.drop_path2)
        return self._add(x, self._mlp, PATH2, scales[1])

    def _fused(self, x: Tensor, shared: Tensor | None, **options: Any) -> Tensor:
        attn = self.attn
        qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        bias = attn.relative_position_bias_table
        index = None if bias is None else attn.relative_position_index
        if shared is not None:
            shared = shared.view(shared.shape[-3:])
            bias, index = shared if bias is None else attn._get_rel_pos_bias().squeeze(0) + shared, None
        return _one_window(x, self.norm1, attn, qkv_bias, bias, index, **options)


# `attn_mask` and, in newer versions, `is_causal`: timm passes them on, and hooks see them
_NO_MASK = {
    option.name: option.default
    for option in signature(vision_transformer.Block.forward).parameters.values()
    if option.default is not Parameter.empty
}
VIT_ATTENTION = unmodified.attention(Attention, LINEAR, q_norm=IDENTITY, k_norm=IDENTITY, norm=IDENTITY)


LAYER_SCALE = Own(
    nn.Identity,
    LayerScale,
    tensors=("gamma",),
    also=lambda scale: "in place" if getattr(scale, "inplace", False) else "",
)
SCALE1, SCALE2 = Check(ls1=LAYER_SCALE), Check(ls2=LAYER_SCALE)
SCALE_AND_PATH1 = Check(ls1=LAYER_SCALE, drop_path1=INACTIVE_DROP_PATH)
SCALE_AND_PATH2 = Check(ls2=LAYER_SCALE, drop_path2=INACTIVE_DROP_PATH)


class ViTBlock(_Fused, vision_transformer.Block):
    """ViT: norm1 and qkv, attention over all tokens, projection; norm2 and MLP."""

    timm = vision_transformer.Block
    attention = Check(norm1=NORM, attn=VIT_ATTENTION)

    def reasons(self) -> dict[str, str]:
        return {
            "attention": self.attention.why(self),
            "mlp": self.mlp_half.why(self),
        }

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self._as_timm(x) or attn_mask is not None or is_causal:
            options = {"attn_mask": attn_mask, "is_causal": is_causal}
            return super().forward(x, **{name: options[name] for name in _NO_MASK})
        return self.second_half(self.first_half(x))

    def first_half(
        self, x: Tensor, rows: Tensor | None = None, place: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Attention of all tokens (B, N, C). They may be `place(rows)`, where many are the same row of (n, C)."""
        attn = self.attn
        if self._left("attention", self.attention.why(self) or _windows_fit(x, x.shape[1])):
            return x + self.drop_path1(self.ls1(attn(self.norm1(x), **_NO_MASK)))
        half = partial(self._fused, rows=rows, place=place)
        return self._add(x, half, *self._after(SCALE1, PATH1, SCALE_AND_PATH1))

    def second_half(self, x: Tensor) -> Tensor:
        """The MLP of every token by itself, (..., C)."""
        if self._left("mlp", self.mlp_half.why(self)):
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self._add(x, self._mlp, *self._after(SCALE2, PATH2, SCALE_AND_PATH2))

    def _fused(self, x: Tensor, **options: Any) -> Tensor:
        return _one_window(x, self.norm1, self.attn, self.attn.qkv.bias, None, None, **options)

    def _after(self, scale: Check, path: Check, both: Check) -> tuple[Check, Tensor | None]:
        """What comes after a half of the block, and what its result is multiplied by before."""
        if scale.why(self):
            return both, None
        return path, getattr(getattr(self, scale.names[0]), "gamma", None)


def _output(stem: PatchEmbed) -> str:
    fits = stem.flatten or stem.output_fmt == Format.NHWC
    return "" if fits and tuple(stem.patch_size) == stem.proj.stride else "another format, or patches of another size"


# a stem's norm is optional
STEMS = tuple(
    Check(patch_embed=Own(PatchEmbed, methods=("dynamic_feat_size",), also=_output, proj=PATCHES, norm=norm))
    for norm in (IDENTITY, NORM)
)


def _token(token: Tensor | None, weight: Tensor) -> str:
    fits = type(token) in unmodified.PLAIN and token.dtype is weight.dtype and tuple(token.shape) == (1, 1, len(weight))
    return "" if fits else "a mask token that is no parameter, or of another shape or dtype"


def stem_fits(encoder: nn.Module, x: Tensor) -> bool:
    """Whether the stem of a masked encoder may be computed by `masked_stem` for images `x`."""
    stem = encoder.model.patch_embed
    why = unmodified.changed_call(x)
    if not why:
        expected = STEMS[0] if type(stem._modules.get("norm")) is nn.Identity else STEMS[1]
        why = expected.why(encoder.model)
        if not why and not encoder.visible_only:
            why = _token(encoder._parameters.get("mask_token"), stem.proj.weight)
    if why:
        unmodified.say(f"the stem of a {type(encoder.model).__name__} runs as timm has it: {why}")
        return False
    p = stem.patch_size[0]
    return here(x) and x.shape[2] % p == 0 and x.shape[3] % p == 0  # else timm pads


def masked_stem(stem: PatchEmbed, x: Tensor, mask_token: Tensor, visible: Tensor) -> Tensor:
    """The stem's tokens, in the shape that it gives them, embedding only the visible patches of (B, C, H, W) images.

    visible: (n,) int64 rows among the B * (H / p) * (W / p) patches. All others are the mask token.
    """
    norm = {}
    if not isinstance(stem.norm, nn.Identity):
        norm = {"norm_weight": stem.norm.weight, "norm_bias": stem.norm.bias, "eps": stem.norm.eps}
    tokens = ops.masked_patch_embed(x, stem.proj.weight, stem.proj.bias, mask_token.flatten(), visible, **norm)
    return tokens if stem.flatten else tokens.unflatten(1, stem.dynamic_feat_size(x.shape[2:]))


def visible_stem(stem: PatchEmbed, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """The stem's tokens of the visible patches alone, with their positions, both (n, D). visible: see `masked_stem`."""
    patch = stem.patch_size[0]
    patches = ops.gather_patches(x, visible, cell=patch, patch=patch)
    patches = patches.to(gemm_dtype(patches))  # kept for the backward, as narrow as the gemm reads them
    weight, bias = stem.proj.weight.flatten(1), stem.proj.bias
    if isinstance(stem.norm, nn.Identity):
        return ops.norm_linear(patches, weight, bias, residual=positions)
    return stem.norm(ops.norm_linear(patches, weight, bias)) + positions


def linear_weights(model: nn.Module, also: Iterable[nn.Module] = ()) -> list[Tensor]:
    """Weights and biases of the linear layers in a model's blocks of these classes, and in others of its modules. None
    where hooks are called in between, which may change them unseen."""
    found, also = dict[int, Tensor](), set(also)
    modules = [(model, False)]  # `nn.Module.modules` takes several times as long
    while modules:
        module, read = modules.pop()
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return []
        read = read or isinstance(module, _Fused) or module in also
        if read and type(module) is nn.Linear:
            found |= {id(t): t for t in own["_parameters"].values() if type(t) in unmodified.PLAIN}
        modules += [(child, read) for child in own["_modules"].values() if child is not None]
    return list(found.values())


# timm's class -> ours
FAST: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: SwinTransformerBlock,
    swin_transformer.PatchMerging: PatchMerging,
    swin_transformer_v2.SwinTransformerV2Block: SwinTransformerV2Block,
    swin_transformer_v2.PatchMerging: PatchMergingV2,
    beit.Block: BeitBlock,
    vision_transformer.Block: ViTBlock,
}
