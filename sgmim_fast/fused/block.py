"""Base class of the fused blocks: decides when a block falls back to timm's forward, and calls the ops it consists of.

Each class of `swin_blocks`, `vit_blocks` and `eva_blocks` derives from timm's class and has the same parameters,
buffers and children. `accelerate` assigns it to `module.__class__`; assigning timm's class again undoes this. Every
forward first checks the modules that it would bypass (`fused.unmodified`). If one is not timm's own (a hook, an
adapter, an active dropout, another activation), that half of the block runs as in timm, and this is logged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from sgmim_fast import backends, ops
from sgmim_fast.fused import unmodified
from sgmim_fast.fused.unmodified import INACTIVE_DROP_PATH, MLP, NORM, Check
from sgmim_fast.ops.window_attention import most_tokens_on_a_gpu

PATH1, PATH2 = Check(drop_path1=INACTIVE_DROP_PATH), Check(drop_path2=INACTIVE_DROP_PATH)


def norm_arguments(norm: nn.LayerNorm | None) -> dict[str, Any]:
    return {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def norm_mlp(x: Tensor, norm: nn.LayerNorm | None, mlp: Mlp, **options: Any) -> Tensor:
    layers = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return ops.norm_mlp(x, *layers, **norm_arguments(norm), **options)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Returns queries, keys and values (B, heads, N, d) of qkv (B, N, 3 C), as views.

    The backward of `chunk` concatenates rows of three (B, N, C) tensors. That of a permuted `unbind` would stack and
    transpose them, in two passes with small accesses, which take 5 times as long on an H200.
    """
    return tuple([part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2)])


def norm_linear(x: Tensor, norm: nn.LayerNorm | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.norm_linear(x, weight, bias, **norm_arguments(norm))


def supported(x: Tensor) -> bool:
    """Whether there are kernels for the device and dtype of x. If not, timm's own forward runs."""
    return (x.device.type == "cpu" or x.dtype != torch.float64) and _has_kernels(x.device.type)


@torch.compiler.assume_constant_result
def _has_kernels(device: str) -> bool:
    """Whether the forced backend has the ops of a block, or else a backend of the device other than `torch` can run
    window attention."""
    forced = backends.forced()
    if forced is not None:
        return forced == "torch" or forced in backends.MODULES["norm_mlp"]
    own = [name for name in backends.ORDER.get(device, ()) if name != "torch"]
    return any(backends.can_run("window_attention", name)[0] for name in own)


def windows_reason(x: Tensor, tokens: int) -> str:
    """Returns the reason why the kernels do not support windows of so many tokens; "" if they do. On a GPU timm's own
    attention computes large windows."""
    fit = x.device.type == "cpu" or tokens <= most_tokens_on_a_gpu(gemm_dtype(x))
    return "" if fit else f"windows of {tokens} tokens are too large for the kernels"


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of gemms with input x: that of autocast if it is enabled, else that of x."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # autocast never casts float64
    return torch.get_autocast_dtype(device) if cast else x.dtype


def _scales_weights(scale: Tensor, x: Tensor) -> bool:
    """Whether the ops can apply a layer scale to tokens x. Their backward scales the weight instead of the result's
    gradient, which could underflow in float16."""
    fits = type(scale) in unmodified.PLAIN and scale.shape == x.shape[-1:] and gemm_dtype(x) != torch.float16
    return fits and (scale.dtype != torch.float64 or x.dtype == torch.float64)


class Fused:
    """Base class of the fused blocks: checks when to fall back to timm's forward, and logs the reasons."""

    timm: ClassVar[type[nn.Module]]  # timm's class
    methods: ClassVar[tuple[str, ...]] = ()  # methods of timm's class that are bypassed in addition to its forward
    mlp_half = Check(norm2=NORM, mlp=MLP)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "timm" in cls.__dict__:
            cls._timms_forward = staticmethod(cls.timm.forward)
            cls._bypassed = tuple((name, getattr(cls.timm, name)) for name in cls.methods)

    def _changed(self) -> str:
        """Returns how the block's class or methods differ from timm's at import; "" if they do not."""
        if self.timm.forward is not self._timms_forward:
            return f"{self.timm.__name__}.forward was replaced after import"
        kind, own = type(self), self.__dict__
        for name, at_import in self._bypassed:
            if name in own or getattr(kind, name) is not at_import:
                return f"{name} was replaced after import"
        return ""

    def reasons(self) -> dict[str, str]:
        """Returns for each part of the block the reason why it runs as in timm; "" if it is fused."""
        raise NotImplementedError

    def _as_timm(self, x: Tensor) -> bool:
        """Whether timm's own forward must run for the whole block, independently of the children."""
        why = unmodified.changed_call(x) or self._changed()
        if not why and not supported(x):
            why = f"there are no kernels for {x.dtype} on {x.device.type}"
        return self._falls_back("whole", why)

    def _falls_back(self, part: str, why: str) -> bool:
        """Whether a part runs as in timm, i.e. `why` is not empty. Logs the reason once."""
        if why:
            unmodified.warn_once(f"the {part} of a {type(self).__name__} runs through timm's own code: {why}")
        return bool(why)

    def _call_children(self, after: Check, x: Tensor) -> Tensor:
        for name in after.names:
            x = getattr(self, name)(x)
        return x

    def _add(self, x: Tensor, half: Callable[..., Tensor], after: Check, scale: Tensor | None = None) -> Tensor:
        """Computes x + after(scale * half(x)) with scale and residual in the op if possible, where the children `after`
        are called only if they are active."""
        outside = scale is not None and not _scales_weights(scale, x)
        options = {} if scale is None or outside else {"layer_scale": scale}
        if not outside and not after.why(self):
            return half(x, residual=True, **options)
        y = half(x, **options)
        return x + self._call_children(after, scale * y if outside else y)

    @staticmethod
    def _added(x: Tensor, y: Tensor, scale: Tensor | None, path: nn.Module) -> Tensor:
        """Computes x + path(scale * y), the unfused end of a half."""
        return x + path(y if scale is None else scale * y)

    def _mlp(self, x: Tensor, **options: Any) -> Tensor:
        return norm_mlp(x, self.norm2, self.mlp, **options)


def linear_weights(model: nn.Module, also: Iterable[nn.Module] = ()) -> list[Tensor]:
    """Returns weights and biases of the linear layers in a model's fused blocks and in the modules `also`. The list is
    empty if a module on the way has forward hooks, which may change the weights unnoticed."""
    found, also = dict[int, Tensor](), set(also)
    modules = [(model, False)]  # `nn.Module.modules` takes several times as long
    while modules:
        module, read = modules.pop()
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return []
        read = read or isinstance(module, Fused) or module in also
        if read and type(module) is nn.Linear:
            found |= {id(t): t for t in own["_parameters"].values() if type(t) in unmodified.PLAIN}
        modules += [(child, read) for child in own["_modules"].values() if child is not None]
    return list(found.values())
