"""timm's Swin and SwinV2 blocks and patch mergings, computed by this package's ops, see `block`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.block import PATH1, PATH2, Fused, norm_arguments, norm_linear, norm_mlp, windows_reason
from sgmim_fast.fused.unmodified import BIASED, INACTIVE_DROP_PATH, LINEAR, MLP, NORM, SOFTMAX, UNBIASED, Check, Own


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns a window or shift as (height, width). The published code has one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


class Swin(Fused):
    """Base class of both Swin blocks.

    The kernels compute the mask of shifted windows themselves, so the block may only be fused if its buffer `attn_mask`
    is timm's mask for its window and shift. On a CPU the buffer's values are compared with it. On a GPU that would
    synchronise, and under torch.compile values are unknown: there the buffer must be a tensor whose values were
    compared earlier, or the result of moving such a tensor to another device or dtype.
    """

    attention: ClassVar[Check]

    def _attention_reason(self) -> str:
        if why := self.attention.why(self):
            return why
        attn, window, shift = self._modules["attn"], _pair(self.window_size), _pair(self.shift_size)
        area = window[0] * window[1]
        # timm's Swin attention has an attribute `window_area`, SwinV2's does not
        areas = getattr(self, "window_area", area), getattr(attn, "window_area", area)
        if areas != (area, area) or tuple(attn.window_size) != window:
            return "the window sizes of the block and its attention differ"
        if attn._buffers["relative_position_index"].numel() != area * area:
            return "relative_position_index does not fit the window size"
        if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
            return f"shift_size is {shift}; expected 0 or more, less than window_size {window}"
        return self._mask_reason()

    def _mask_reason(self) -> str:
        if self.__dict__.get("dynamic_mask", False):
            return ""
        mask, shifted = self._buffers.get("attn_mask"), any(_pair(self.shift_size))
        if mask is None or not shifted:
            if mask is None and not shifted and self.__dict__.get("attn_mask") is None:
                return ""
            return "attn_mask does not fit shift_size"
        seen = self.__dict__.get("_seen_mask", (None, None))
        if torch.compiler.is_compiling():
            fits = mask is seen[0]
        elif type(mask) is Tensor and mask.device.type == "cpu":
            fits = self.see_mask()
        else:
            fits = mask is seen[0] and not mask.is_inference() and mask._version == seen[1]
        return "" if fits else "attn_mask differs from timm's"

    def see_mask(self) -> bool:
        """Whether the values of the mask are timm's; remembers the result. Synchronises."""
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
        if "_seen_mask" in state:  # the copied tensor has a version counter of its own
            self._seen_mask = self.attn_mask, self.attn_mask._version

    def _size_reason(self, x: Tensor) -> str:
        if not getattr(self, "dynamic_mask", False) and tuple(x.shape[1:3]) != tuple(self.input_resolution):
            return f"an input of {x.shape[1]}x{x.shape[2]} tokens"
        return windows_reason(x, self.window_area)

    def _position_bias(self) -> dict[str, Tensor]:
        """Returns the arguments of `norm_attention` for SwinV2's continuous relative position bias."""
        attn, mlp = self.attn, self.attn.cpb_mlp
        if self._falls_back("position bias", POSITION_BIAS.why(attn)):
            return {"bias": 16 * torch.sigmoid(mlp(attn.relative_coords_table).view(-1, attn.num_heads))}
        fc1, _, fc2 = mlp
        weights = {"fc1_weight": fc1.weight, "fc1_bias": fc1.bias, "fc2_weight": fc2.weight}
        return {"coordinates": attn.relative_coords_table, **weights}

    def _attend(self, x: Tensor, norm: nn.LayerNorm | None, qkv_bias: Tensor | None, **options: Any) -> Tensor:
        """Computes the attention half by `norm_attention`."""
        attn = self.attn
        layers = {"qkv_weight": attn.qkv.weight, "proj_weight": attn.proj.weight, "proj_bias": attn.proj.bias}
        sizes = attn.num_heads, _pair(self.window_size), _pair(self.shift_size)
        index = attn.relative_position_index
        return ops.norm_attention(
            x, *sizes, **layers, qkv_bias=qkv_bias, index=index, **norm_arguments(norm), **options
        )


@lru_cache(maxsize=64)
def _mask(
    timms: Callable[..., Tensor],
    resolution: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Computes timm's attention mask of a shifted block, once for all blocks with the same settings."""
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
        if self._falls_back("attention", why):
            x = x + self.drop_path1(self._attn(self.norm1(x)))
        else:
            table, added = self.attn.relative_position_bias_table, not PATH1.why(self)
            y = self._attend(x, self.norm1, self.attn.qkv.bias, bias=table, residual=added)
            x = y if added else x + self.drop_path1(y)
        why = self.mlp_half.why(self)
        if not why and not PATH2.why(self):
            return self._mlp(x, residual=True)
        flat = x.flatten(1, 2)
        y = self.mlp(self.norm2(flat)) if self._falls_back("mlp", why) else self._mlp(flat)
        return (flat + self.drop_path2(y)).view(x.shape)


SWINV2_ATTENTION = unmodified.attention(
    swin_transformer_v2.WindowAttention,
    UNBIASED,
    tensors=("logit_scale", "q_bias", "k_bias", "v_bias", "relative_coords_table", "relative_position_index"),
    softmax=SOFTMAX,
    cpb_mlp=None,
)


# The MLP of SwinV2's continuous relative position bias, a child of its attention.
POSITION_BIAS = Check(cpb_mlp=Own(nn.Sequential, **{"0": BIASED, "1": Own(nn.ReLU), "2": UNBIASED}))

NORM_AND_PATH1 = Check(norm1=NORM, drop_path1=INACTIVE_DROP_PATH)
NORM_AND_PATH2 = Check(norm2=NORM, drop_path2=INACTIVE_DROP_PATH)


class SwinTransformerV2Block(Swin, swin_transformer_v2.SwinTransformerV2Block):
    """SwinV2: qkv, cosine window attention, projection, norm1; MLP, norm2. A half's op includes its norm and residual
    if the norm is timm's own and the drop path inactive."""

    timm, methods = swin_transformer_v2.SwinTransformerV2Block, ("_attn", "get_attn_mask")
    attention, mlp_half = Check(attn=SWINV2_ATTENTION), Check(mlp=MLP)
    _timm_mask = staticmethod(swin_transformer_v2.SwinTransformerV2Block.get_attn_mask)

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self.mlp_half.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x):
            return super().forward(x)
        why = self._attention_reason() or self._size_reason(x)
        fused = not self._falls_back("attention", why)
        x = self._fused(x) if fused else x + self.drop_path1(self.norm1(self._attn(x)))
        why = self.mlp_half.why(self)
        if not why and not NORM_AND_PATH2.why(self):
            return self._mlp(x, residual=True, post_norm=True)
        flat = x.flatten(1, 2)
        y = self.mlp(flat) if self._falls_back("mlp", why) else norm_mlp(flat, None, self.mlp)
        return (flat + self.drop_path2(self.norm2(y))).view(x.shape)

    def _fused(self, x: Tensor) -> Tensor:
        """Computes the attention half; norm and residual are part of the op if norm and drop path may be bypassed."""
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        options = {**self._position_bias(), "logit_scale": attn.logit_scale.flatten()}
        if NORM_AND_PATH1.why(self):
            return x + self.drop_path1(self.norm1(self._attend(x, None, bias, **options)))
        return self._attend(x, self.norm1, bias, **options, residual=True, post_norm=True)


class PatchMerging(Fused, swin_transformer.PatchMerging):
    """Swin's patch merging: after the gather of 2 x 2 neighbours, norm and reduction are one op."""

    timm = swin_transformer.PatchMerging
    bypassed = Check(norm=NORM, reduction=LINEAR)

    def reasons(self) -> dict[str, str]:
        return {"reduction": self.bypassed.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._falls_back("reduction", self.reasons()["reduction"]):
            return super().forward(x)
        return norm_linear(neighbours(x), self.norm, self.reduction.weight, self.reduction.bias)


class PatchMergingV2(Fused, swin_transformer_v2.PatchMerging):
    """SwinV2's patch merging: the norm follows the reduction."""

    timm = swin_transformer_v2.PatchMerging
    bypassed = Check(reduction=LINEAR)

    def reasons(self) -> dict[str, str]:
        return {"reduction": self.bypassed.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._falls_back("reduction", self.reasons()["reduction"]):
            return super().forward(x)
        return self.norm(norm_linear(neighbours(x), None, self.reduction.weight, self.reduction.bias))


def neighbours(x: Tensor) -> Tensor:
    """Concatenates neighbours (0, 0), (1, 0), (0, 1), (1, 1), (B, H, W, C) -> (B, H / 2, W / 2, 4 C). Odd sides are
    padded with zeros."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
