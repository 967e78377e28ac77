"""The blocks of the published SG-MIM, SimMIM, Swin-Transformer and BEiT code, computed by this package's ops.

Their classes are not part of an importable package, so they are recognised by the names of their children, parameters,
buffers and settings. Once for each kind of block, a copy in float64 with random parameters runs its own forward and
ours. Blocks with another result, like blocks that are not recognised, are left unchanged. Everything else is as in
`block`: our class derives from the module's own class and checks at each call the modules that it would bypass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from inspect import isfunction
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from sgmim_fast import backends
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.block import Fused, norm_linear, windows_reason
from sgmim_fast.fused.swin_blocks import Swin, neighbours
from sgmim_fast.fused.unmodified import BIASED, INACTIVE_DROP_PATH, INACTIVE_DROPOUT, LINEAR, NORM, SOFTMAX, Check, Own
from sgmim_fast.fused.vit_blocks import one_window
from sgmim_fast.ops.window_attention import MAX_LOGIT_SCALE

_BLOCK = {"norm1", "attn", "drop_path", "norm2", "mlp"}
_ACT = Own(nn.GELU, also=unmodified._gelu)
_INACTIVE = Check(drop_path=INACTIVE_DROP_PATH)
_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}
_PLAIN = (bool, int, float, str, tuple)
CLOSE = 1e-10  # tolerance of a float64 result, relative; blocks that compute the same differ by 1e-15


class _Published(Fused):
    """Base class of the classes in this file. `timm` is the module's own class."""

    globals: ClassVar[tuple[tuple[dict[str, Any], str, Any], ...]] = ()  # global functions that bypassed forwards call

    def _changed(self) -> str:
        if _settings(self) != self.__dict__.get("_accelerated_with"):
            return "its settings changed after it was accelerated"
        for names, name, at_first in self.globals:
            if names.get(name) is not at_first:
                return f"{name} was replaced after the block was accelerated"
        return super()._changed()

    def _falls_back(self, part: str, why: str) -> bool:
        if why and "_tried" not in self.__dict__:
            unmodified.warn_once(f"the {part} of a {self.timm.__name__} runs through its own class's code: {why}")
        return bool(why)

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickles the module by its own class, which pickle finds by name; `_revived` restores ours."""
        return _revived, (self.timm, type(self).family), self.__dict__

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a module has the children and settings that this class requires."""
        raise NotImplementedError

    @classmethod
    def checks(cls, module: nn.Module) -> dict[str, Check]:
        """Returns the checks of the modules that are bypassed, for the classes of this module's children."""
        raise NotImplementedError

    @classmethod
    def example(cls, module: nn.Module) -> tuple[int, ...]:
        """Returns the shape of an input to test the module with."""
        raise NotImplementedError

    @classmethod
    def signature(cls, module: nn.Module) -> tuple[Any, ...]:
        """Returns what distinguishes kinds of blocks of the same class; each kind is tested once."""
        raise NotImplementedError


class _Halves(_Published):
    """A block of two halves that share one drop path."""

    attention: ClassVar[Check]
    mlp_half: ClassVar[Check]

    @classmethod
    def checks(cls, module: nn.Module) -> dict[str, Check]:
        kind, layers = type(module.mlp), {"fc1": BIASED, "act": _ACT, "fc2": BIASED, "drop": INACTIVE_DROPOUT}
        mlp = Own(kind, methods=_methods(kind), **layers)
        return {
            "attention": Check(norm1=NORM, attn=cls.attention_of(module.attn)),
            "mlp_half": Check(norm2=NORM, mlp=mlp),
        }

    @classmethod
    def attention_of(cls, attn: nn.Module) -> Own:
        raise NotImplementedError

    def reasons(self) -> dict[str, str]:
        return {"attention": self._attention_reason(), "mlp": self.mlp_half.why(self)}


class _PublishedSwin(Swin, _Halves):
    """Base class of both Swin blocks: (B, H * W, C) tokens; window and shift are one number; windows divide the map."""

    _timm_mask = staticmethod(SwinTransformerBlock.get_attn_mask)
    attention_children: ClassVar[set[str]]

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        attn = module._modules.get("attn")
        return (
            module._modules.keys() == _BLOCK
            and attn is not None
            and attn._modules.keys() == cls.attention_children
            and all(isinstance(getattr(module, name, None), int) for name in ("window_size", "shift_size"))
            and all(side % module.window_size == 0 for side in getattr(module, "input_resolution", ()))
        )

    @classmethod
    def example(cls, module: nn.Module) -> tuple[int, ...]:
        height, width = module.input_resolution
        return 2, height * width, module.attn.qkv.weight.shape[1]

    @classmethod
    def signature(cls, module: nn.Module) -> tuple[Any, ...]:
        return module.window_size, module.shift_size, tuple(module.input_resolution), module.attn.num_heads

    def _map(self, x: Tensor) -> Tensor:
        return x.unflatten(1, tuple(self.input_resolution))

    def _size_reason(self, x: Tensor) -> str:
        height, width = self.input_resolution
        if x.ndim != 3 or x.shape[1] != height * width:
            return f"the input has shape {tuple(x.shape)}; expected (B, {height * width}, C)"
        return windows_reason(x, self.window_size**2)


class PublishedSwinBlock(_PublishedSwin):
    """Swin: norm1 and qkv, window attention, projection; norm2 and MLP."""

    family = "swin"
    attention_children: ClassVar[set[str]] = {*_ATTENTION, "softmax"}

    @classmethod
    def attention_of(cls, attn: nn.Module) -> Own:
        tensors = "relative_position_bias_table", "relative_position_index"
        options = {"required": tensors[:1], "softmax": SOFTMAX, "methods": _methods(type(attn))}
        return unmodified.attention(type(attn), LINEAR, tensors=tensors, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._falls_back("attention", self._attention_reason() or self._size_reason(x)):
            return super().forward(x)
        attn, added = self.attn, not _INACTIVE.why(self)
        table = attn.relative_position_bias_table
        y = self._attend(self._map(x), self.norm1, attn.qkv.bias, bias=table, residual=added).flatten(1, 2)
        x = y if added else x + self.drop_path(y)
        if self._falls_back("mlp", self.mlp_half.why(self)):
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return self._add(x, self._mlp, _INACTIVE)


class PublishedSwinV2Block(_PublishedSwin):
    """SwinV2: qkv, window attention on cosines, projection, norm1; MLP, norm2."""

    family = "swinv2"
    attention_children: ClassVar[set[str]] = {*_ATTENTION, "softmax", "cpb_mlp"}

    @classmethod
    def attention_of(cls, attn: nn.Module) -> Own:
        buffers = "relative_coords_table", "relative_position_index"
        tensors = "logit_scale", "q_bias", "v_bias", *buffers
        options = {"required": ("logit_scale",), "softmax": SOFTMAX, "cpb_mlp": None, "methods": _methods(type(attn))}
        return unmodified.attention(type(attn), unmodified.UNBIASED, tensors=tensors, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self._as_timm(x) or self._falls_back("attention", self._attention_reason() or self._size_reason(x)):
            return super().forward(x)
        attn = self.attn
        if x.dtype == torch.float64 and (torch.compiler.is_compiling() or (attn.logit_scale > MAX_LOGIT_SCALE).any()):
            return super().forward(x)  # the published code clamps at float32's log 100, our op at float64's
        options: dict[str, Any] = {**self._position_bias(), "logit_scale": attn.logit_scale.flatten()}
        added = not _INACTIVE.why(self)
        y = self._attend(self._map(x), self.norm1, _qkv_bias(attn), **options, residual=added, post_norm=True)
        y = y.flatten(1, 2)
        x = y if added else x + self.drop_path(y)
        if self._falls_back("mlp", self.mlp_half.why(self)):
            return x + self.drop_path(self.norm2(self.mlp(x)))
        return self._add(x, partial(self._mlp, post_norm=True), _INACTIVE)


class PublishedViTBlock(_Halves):
    """ViT blocks of BEiT, SimMIM and MAE: norm1 and qkv, attention over all tokens with or without biases, projection;
    norm2 and MLP; with or without layer scale."""

    family = "vit"

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        attn = module._modules.get("attn")
        return (
            module._modules.keys() == _BLOCK
            and attn is not None
            and attn._modules.keys() == _ATTENTION
            and not hasattr(module, "input_resolution")
        )

    @classmethod
    def attention_of(cls, attn: nn.Module) -> Own:
        tensors = "q_bias", "v_bias", "relative_position_bias_table", "relative_position_index"
        return unmodified.attention(type(attn), LINEAR, tensors=tensors, methods=_methods(type(attn)))

    @classmethod
    def example(cls, module: nn.Module) -> tuple[int, ...]:
        index = getattr(module.attn, "relative_position_index", None)
        return 2, 7 if index is None else index.shape[0], module.attn.qkv.weight.shape[1]

    @classmethod
    def signature(cls, module: nn.Module) -> tuple[Any, ...]:
        held = [getattr(module, name, None) is not None for name in ("gamma_1", "gamma_2")]
        attn, names = module.attn, ("q_bias", "v_bias", "relative_position_bias_table")
        held += [getattr(attn, name, None) is not None for name in names]
        return *held, attn.qkv.bias is not None, attn.num_heads, cls.example(module)[1]

    def _attention_reason(self) -> str:
        if why := self.attention.why(self):
            return why
        attn = self.attn
        if getattr(attn, "q_bias", None) is not None and attn.qkv.bias is not None:
            return "both attn.q_bias and attn.qkv.bias are set"
        return ""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        shared = given[0] if given else None
        if len(given) > 1 or self._as_timm(x):
            return super().forward(x, *args, **kwargs)
        why = self._attention_reason() or self._own_reason(x, shared) or windows_reason(x, x.shape[1])
        if self._falls_back("attention", why):
            return super().forward(x, *args, **kwargs)
        gamma_1, gamma_2 = (getattr(self, name, None) for name in ("gamma_1", "gamma_2"))
        x = self._add(x, partial(self._fused, shared=shared), _INACTIVE, gamma_1)
        if self._falls_back("mlp", self.mlp_half.why(self)):
            return self._added(x, self.mlp(self.norm2(x)), gamma_2, self.drop_path)
        return self._add(x, self._mlp, _INACTIVE, gamma_2)

    def _fused(self, x: Tensor, shared: Tensor | None, **options: Any) -> Tensor:
        attn = self.attn
        table = getattr(attn, "relative_position_bias_table", None)
        bias, index = table, None if table is None else attn.relative_position_index
        if shared is not None:
            bias, index = shared if table is None else shared + table[index].movedim(2, 0), None
        return one_window(x, self.norm1, attn, _qkv_bias(attn), bias, index, **options)

    def _own_reason(self, x: Tensor, shared: Any) -> str:
        """Returns the reason to call the block's own forward, apart from its children; "" if there is none."""
        if (getattr(self, "gamma_1", None) is None) != (getattr(self, "gamma_2", None) is None):
            return "only one of gamma_1 and gamma_2 is set"
        heads, tokens = self.attn.num_heads, x.shape[1]
        index = getattr(self.attn, "relative_position_index", None)
        if index is not None and tuple(index.shape) != (tokens, tokens):
            return "relative_position_index does not fit the number of tokens"
        if shared is None:
            return ""
        fits = type(shared) in unmodified.PLAIN and tuple(shared.shape) == (heads, tokens, tokens)
        return "" if fits else f"the second argument is not a bias of shape ({heads}, {tokens}, {tokens})"


def _qkv_bias(attn: nn.Module) -> Tensor | None:
    """Returns the bias of qkv. If queries and values have biases of their own, that of the keys is zero."""
    bias = getattr(attn, "q_bias", None)
    return attn.qkv.bias if bias is None else torch.cat((bias, torch.zeros_like(attn.v_bias), attn.v_bias))


class PublishedPatchMerging(_Published):
    """Patch merging of Swin, whose norm precedes the reduction, and of SwinV2, whose norm follows it."""

    family = "merging"
    merging: ClassVar[Check]

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return module._modules.keys() == {"norm", "reduction"} and hasattr(module, "input_resolution")

    @classmethod
    def checks(cls, module: nn.Module) -> dict[str, Check]:
        return {"merging": Check(norm=NORM, reduction=LINEAR)}

    @classmethod
    def example(cls, module: nn.Module) -> tuple[int, ...]:
        height, width = module.input_resolution
        return 2, height * width, module.reduction.weight.shape[1] // 4

    @classmethod
    def signature(cls, module: nn.Module) -> tuple[Any, ...]:
        return (cls.before(module),)

    @staticmethod
    def before(module: nn.Module) -> bool:
        return module.norm.weight.shape[0] == module.reduction.weight.shape[1]

    def reasons(self) -> dict[str, str]:
        return {"reduction": self.merging.why(self)}

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.input_resolution
        why = self.reasons()["reduction"]
        if not why and (x.ndim != 3 or x.shape[1] != height * width or height % 2 or width % 2):
            why = f"the input has shape {tuple(x.shape)}; expected (B, H * W, C) with even H and W"
        if self._as_timm(x) or self._falls_back("reduction", why):
            return super().forward(x)
        merged = neighbours(x.unflatten(1, (height, width))).flatten(1, 2)
        weight, bias = self.reduction.weight, self.reduction.bias
        if self.before(self):
            return norm_linear(merged, self.norm, weight, bias)
        return self.norm(norm_linear(merged, None, weight, bias))


FAMILIES = {
    kind.family: kind for kind in (PublishedSwinBlock, PublishedSwinV2Block, PublishedViTBlock, PublishedPatchMerging)
}
_classes: dict[tuple[type, str], type[_Published]] = {}
_tried: dict[tuple[Any, ...], str] = {}


def recognised(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """Returns our class for a module of the published code and "". Returns None and the reason for a module that
    resembles a block but differs, None and "" for any other module."""
    kind = type(module)
    if kind.__module__.startswith(("timm.", "torch.")):
        return None, ""
    family = next((family for family in FAMILIES.values() if family.fits(module)), None)
    if family is None:
        alike = module._modules.keys() >= {"norm1", "attn", "norm2", "mlp"}
        return None, "its children, parameters or buffers differ from those of the published code" if alike else ""
    parts = tuple(type(m) for m in module.modules())
    fast = _class(kind, family, module)
    module.__class__ = fast
    left = tuple(part for part, why in module.reasons().items() if why)
    module.__class__ = kind
    settings = module.__dict__["_accelerated_with"] = _settings(module)
    key = kind, kind.forward, parts, settings, family.signature(module), left
    if key not in _tried:
        _tried[key] = _difference(module, fast)
    if _tried[key]:
        del module.__dict__["_accelerated_with"]
        return None, _tried[key]
    return fast, ""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Returns the numbers, strings and flags of a block, its attention and its MLP, any of which forward may use."""
    found = []
    for part in (module, module._modules.get("attn"), module._modules.get("mlp")):
        held = {} if part is None else part.__dict__
        found.append(tuple((k, v) for k, v in held.items() if type(v) in _PLAIN and k[0] != "_" and k != "training"))
    return tuple(found)


def _class(kind: type[nn.Module], family: type[_Published], module: nn.Module) -> type[_Published]:
    """Returns our class for the modules of a class, created at the first call."""
    key = kind, family.family
    if key not in _classes:
        found = {"timm": kind, "methods": _methods(kind), "globals": tuple(_names(module)), **family.checks(module)}
        _classes[key] = type(f"Fast{kind.__name__}", (family, kind), found)
    return _classes[key]


def _revived(kind: type[nn.Module], family: str) -> nn.Module:
    """Creates the empty module that a pickle or a copy is restored into. It has our class, or the module's own class if
    ours has not been created in this process, which requires the children."""
    return nn.Module.__new__(_classes.get((kind, family), kind))


def _methods(kind: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of all methods of a class and its bases but forward, since forward may call any of them."""
    found = {name: v for base in kind.__mro__ if base is not nn.Module for name, v in vars(base).items()}
    return tuple(name for name, v in found.items() if isfunction(v) and name != "forward" and name[:2] != "__")


def _names(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yields the global functions that methods of a block, its attention and its MLP refer to by name."""
    for part in (module, getattr(module, "attn", None), getattr(module, "mlp", None)):
        for method in () if part is None else ("forward", *_methods(type(part))):
            function = getattr(type(part), method)
            names = getattr(function, "__globals__", {})
            for name in function.__code__.co_names if names else ():
                if callable(names.get(name)):
                    yield names, name, names[name]


def _difference(module: nn.Module, fast: type[nn.Module]) -> str:
    """Compares a module's own forward with ours on a copy. Returns the difference, "" if there is none."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "it is on the meta device, so that its forward cannot be tested"
    generator = torch.Generator().manual_seed(0)
    own = copy.deepcopy(module)
    for m in own.modules():  # the comparison must not call the user's hooks
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(m, name).clear()
    own = own.cpu().double().eval().requires_grad_(False)
    for parameter in own.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(fast.example(module), generator=generator, dtype=torch.float64)
    ours = copy.deepcopy(own)
    ours.__class__ = fast
    ours.__dict__["_tried"] = True
    if isinstance(ours, Swin):
        ours.see_mask()
    try:
        expected = own(x)
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        return f"its forward does not accept {tuple(x.shape)} tokens: {str(error).partition(chr(10))[0][:80]}"
    with backends.use("torch"):
        actual = ours(x)
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return "its forward returns a different type or shape"
    off = float((actual - expected).norm() / expected.norm())
    return "" if off <= CLOSE else f"its forward computes a different result (relative error {off:.0e})"
