"""Checks whether the forward of a module may be bypassed: its class is unchanged since import, and it has no hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.layers.activations import GELU
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of_all

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # tensor types that the ops support; not DTensor, quantised weights etc.
DROPOUT = "dropout is active"

_logger = logging.getLogger("sgmim_fast")
_said: set[str] = set()


@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """Logs a warning once per message, also while torch.compile traces."""
    if message not in _said:
        _said.add(message)
        _logger.warning(message)


class Own:
    """Conditions under which the forward of a module may be bypassed.

    Args:
        types: the module's type must be exactly one of these, not a subclass.
        tensors: names of the parameters and buffers that the module may have.
        required: names of parameters that the module must have.
        methods: names of the methods that the module's forward calls.
        also: a further check, which returns the reason against bypassing or "".
        children: the conditions of all the module's children; None: a child that is called as usual.
    """

    def __init__(
        self,
        *types: type[nn.Module],
        tensors: tuple[str, ...] = (),
        required: tuple[str, ...] = (),
        methods: tuple[str, ...] = (),
        also: Callable[[Any], str] | None = None,
        **children: Own | None,
    ):
        self.types, self.also, self.children = types, also, children
        self.tensors, self.required, self.methods = tensors, required, methods
        # In a module's own __dict__ these names would shadow the class's methods, parameters and children.
        self.attributes = ("forward", "_call_impl", "_compiled_call_impl", *methods, *tensors, *children)

    def steps(self, path: str, parent: int, into: list[tuple[str, int, str, Own]]) -> None:
        """Appends this module's conditions and then its children's, each with path, number of the parent and name."""
        into.append((path, parent, path.rpartition(".")[2], self))
        number = len(into)
        for name, child in self.children.items():
            if child is not None:
                child.steps(f"{path}.{name}", number, into)


class Check:
    """Checks whether the forwards of given children of a module, and of their children, may be bypassed.

    They may be bypassed if they have exactly the expected classes, these have the same methods as at import, no module
    has methods of its own or hooks, all parameters are plain tensors of one dtype, and all settings are supported.
    """

    def __init__(self, **children: Own):
        self.names = tuple(children)
        self.steps: list[tuple[str, int, str, Own]] = []
        for name, child in children.items():
            child.steps(name, 0, self.steps)
        methods = {kind: own.methods for *_, own in self.steps for kind in own.types}
        self.calls = [(kind, kind.forward, kind.__call__, kind._call_impl) for kind in methods]
        self.methods = [(kind, name, getattr(kind, name, None)) for kind, names in methods.items() for name in names]

    def why(self, module: nn.Module) -> str:
        """Returns the reason against bypassing the children of `module` now; "" if there is none."""
        for kind, forward, call, call_impl in self.calls:
            if kind.forward is not forward or kind.__call__ is not call or kind._call_impl is not call_impl:
                return f"{kind.__name__}.forward or __call__ was replaced after import"
        for kind, name, at_import in self.methods:
            if getattr(kind, name, None) is not at_import:
                return f"{kind.__name__}.{name} was replaced after import"
        dtype = None
        inside, settings = [module.__dict__], []
        for name in self.names:
            if name in inside[0]:
                return f"{name} is an attribute; expected a child module"
        for path, parent, name, own in self.steps:
            child = inside[parent]["_modules"].get(name)
            if type(child) not in own.types:
                return f"{path} is a {type(child).__name__}; expected {own.types[0].__name__}"
            found = child.__dict__
            inside.append(found)
            if (
                found["_forward_hooks"]
                or found["_forward_pre_hooks"]
                or found["_backward_hooks"]
                or found["_backward_pre_hooks"]
            ):
                return f"{path} has hooks"
            for name in own.attributes:  # torch.compile of torch 2.11 cannot trace `found.keys()`
                if name in found and (found[name] is not None or name == "forward"):
                    return f"{path}.{name} was replaced on the instance"
            for name, tensor in found["_parameters"].items():
                if tensor is None:
                    continue
                if dtype is None:
                    dtype = tensor.dtype
                if type(tensor) not in PLAIN or name not in own.tensors or tensor.layout is not torch.strided:
                    return f"{path}.{name} is a {type(tensor).__name__} that the fused ops do not support"
                if tensor.dtype is not dtype:
                    return f"{path}.{name} has dtype {tensor.dtype}; other parameters have {dtype}"
            for name in own.required:
                if found["_parameters"].get(name) is None:
                    return f"{path} has no parameter {name}"
            if found["_buffers"]:
                for name, tensor in found["_buffers"].items():
                    if tensor is not None and (name not in own.tensors or type(tensor) not in PLAIN):
                        return f"{path}.{name} is a {type(tensor).__name__} that the fused ops do not support"
            if len(found["_modules"]) != len(own.children):
                return f"{path} has children {', '.join(found['_modules'])}; expected {', '.join(own.children)}"
            if own.also is not None:
                settings.append((path, own.also, child))
        for path, also, child in settings:  # after the loop, since these checks read children that must be checked
            if why := also(child):
                return f"{path}: {why}"
        return ""


def changed_call(x: Tensor) -> str:
    """Returns the reason against bypassing any module in a call with `x`; "" if there is none."""
    if type(x) not in PLAIN:
        return f"the input is a {type(x).__name__}; expected a plain tensor"
    if (
        hooks_of_all._global_forward_hooks
        or hooks_of_all._global_forward_pre_hooks
        or hooks_of_all._global_backward_hooks
        or hooks_of_all._global_backward_pre_hooks
    ):
        return "global module hooks are registered"
    if _functions() != _FUNCTIONS:
        return "a function of torch or timm was replaced after import"
    return transformed()


def transformed() -> str:
    """Returns the active tracer or transform that supports PyTorch's own operators only; "" if there is none."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active"
    if _in_functorch():
        return "a transform of torch.func is active"
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return "torch.export traces without strict=True"
    return "forward-mode differentiation is active" if forward_ad._current_level >= 0 else ""


# torch.compile guards active transforms itself. Without the decorator its graph would contain this call.
@torch.compiler.assume_constant_result
def _in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def _functions() -> tuple[Callable, ...]:
    """Returns functions that timm's forwards call and that users may have replaced."""
    return (
        F.linear,
        F.layer_norm,
        F.gelu,
        F.relu,
        F.conv2d,
        F.scaled_dot_product_attention,
        swin_transformer.window_partition,
        swin_transformer.window_reverse,
        swin_transformer_v2.window_partition,
        swin_transformer_v2.window_reverse,
    )


_FUNCTIONS = _functions()


def _norm(norm: nn.LayerNorm) -> str:
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] != norm._parameters["weight"].numel():
        return "it normalizes more than the last dimension"
    return "timm's fast norm is enabled" if getattr(norm, "_fast_norm", False) else ""


def _dropout(dropout: nn.Module) -> str:
    return DROPOUT if type(dropout) is nn.Dropout and dropout.training and dropout.p else ""


def _drop_path(path: nn.Module) -> str:
    return "drop path is active" if type(path) is DropPath and path.training and path.drop_prob else ""


def _gelu(act: nn.Module) -> str:
    return (
        f"approximate is {act.approximate!r}; expected 'none'"
        if type(act) is nn.GELU and act.approximate != "none"
        else ""
    )


def _patches(conv: nn.Conv2d) -> str:
    size = tuple(conv.weight.shape[2:])
    plain = conv.stride == size and conv.padding in ("valid", (0, 0)) and conv.dilation == (1, 1) and conv.groups == 1
    return "" if plain and size[0] == size[1] else "the patches are not square, overlap or have gaps"


_BOTH = ("weight", "bias")
LINEAR = Own(nn.Linear, tensors=_BOTH, required=("weight",))
UNBIASED = Own(nn.Linear, tensors=("weight",), required=("weight",))
BIASED = Own(nn.Linear, tensors=_BOTH, required=_BOTH)
NORM = Own(nn.LayerNorm, LayerNorm, tensors=_BOTH, required=_BOTH, also=_norm)
# norm of an op that has no argument eps
NORM_EPS_1E5 = Own(
    nn.LayerNorm,
    tensors=_BOTH,
    required=_BOTH,
    also=lambda norm: _norm(norm) or ("" if norm.eps == 1e-5 else f"eps is {norm.eps}; expected 1e-5"),
)
IDENTITY = Own(nn.Identity)
INACTIVE_DROPOUT = Own(nn.Dropout, nn.Identity, also=_dropout)
INACTIVE_DROP_PATH = Own(DropPath, nn.Identity, also=_drop_path)
SOFTMAX = Own(nn.Softmax, also=lambda softmax: "" if softmax.dim == -1 else f"dim is {softmax.dim}; expected -1")
MLP = Own(
    Mlp,
    fc1=BIASED,
    act=Own(nn.GELU, GELU, also=_gelu),
    drop1=INACTIVE_DROPOUT,
    norm=IDENTITY,
    fc2=BIASED,
    drop2=INACTIVE_DROPOUT,
)
PATCHES = Own(nn.Conv2d, tensors=_BOTH, required=("weight",), methods=("_conv_forward",), also=_patches)
BIASED_PATCHES = Own(nn.Conv2d, tensors=_BOTH, required=_BOTH, methods=("_conv_forward",), also=_patches)


def attention(kind: type[nn.Module], qkv: Own, **details: Any) -> Own:
    """Returns the conditions of one of timm's attention classes. `details` are further arguments of `Own`."""
    children = {"qkv": qkv, "attn_drop": INACTIVE_DROPOUT, "proj": LINEAR, "proj_drop": INACTIVE_DROPOUT}
    return Own(kind, also=_attention, **children, **details)


def _attention(attn: nn.Module) -> str:
    own = attn.__dict__
    if own["training"] and getattr(own["_modules"]["attn_drop"], "p", 0):
        return DROPOUT  # timm's fused attention applies dropout if `attn` is in training mode, whatever `attn_drop` is
    heads = own["num_heads"]
    outs, channels = own["_modules"]["qkv"]._parameters["weight"].shape
    width, rest = divmod(outs, 3 * heads)
    if rest or own.get("scale", width**-0.5) != width**-0.5:
        return "scale is not head_dim ** -0.5, or num_heads does not divide the width"
    if own.get("head_dim", width) != width or own.get("attn_dim", width * heads) != width * heads:
        return "head_dim or attn_dim does not fit qkv"
    if outs != 3 * channels:
        return f"the heads have {outs // 3} channels together; expected the block's {channels}"
    table = own["_parameters"].get("relative_position_bias_table")
    if table is not None and tuple(table.shape[1:]) != (heads,):
        return "relative_position_bias_table has a different number of heads"
    scale = own["_parameters"].get("logit_scale")
    if scale is not None and tuple(scale.shape) != (heads, 1, 1):
        return "logit_scale has a different number of heads"
    return "gated attention is not supported" if own.get("gate") is not None else ""
