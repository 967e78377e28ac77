"""Whether what a fused block bypasses is still timm's own: each check says in words why it is not, or ""."""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers import DropPath, LayerNorm, Mlp
from timm.layers.activations import GELU
from torch import nn


def changed(module: nn.Module | None, *types: type) -> str:
    """Why the module's own forward may not be bypassed: it is not exactly of one of the types, or has hooks."""
    if type(module) not in types:
        return f"{type(module).__name__} in place of {types[0].__name__}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"hooks on a {types[0].__name__}"
    return ""


def active(dropout: nn.Module | None) -> str:
    """Dropout that does something."""
    if type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not (dropout.training and dropout.p)):
        return ""
    return "dropout"


def norm_reason(norm: nn.Module) -> str:
    if why := changed(norm, nn.LayerNorm, LayerNorm):
        return why
    if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return "a LayerNorm without weight and bias of a vector"
    return "timm's fast norm" if getattr(norm, "_fast_norm", False) else ""


def first(reasons: Iterable[str]) -> str:
    return next(filter(None, reasons), "")


def mlp_reason(norm: nn.Module | None, mlp: nn.Module) -> str:
    """Why norm and MLP cannot be one op; "" if they can. A norm of None is left out."""
    if why := changed(mlp, Mlp):
        return why
    if type(mlp.act) is nn.GELU and mlp.act.approximate != "none":
        return "an approximate GELU"
    return first(
        (
            "" if norm is None else norm_reason(norm),
            changed(mlp.fc1, nn.Linear),
            changed(mlp.act, nn.GELU, GELU),
            active(mlp.drop1),
            changed(mlp.norm, nn.Identity),
            changed(mlp.fc2, nn.Linear),
            active(mlp.drop2),
            "" if mlp.fc1.bias is not None and mlp.fc2.bias is not None else "an MLP without bias",
        )
    )


def attention_reason(norm: nn.Module | None, attn: nn.Module, kind: type, *identities: str) -> str:
    if why := changed(attn, kind):
        return why
    scale = (attn.qkv.weight.shape[0] // 3 // attn.num_heads) ** -0.5 if type(attn.qkv) is nn.Linear else None
    return first(
        (
            "" if norm is None else norm_reason(norm),
            changed(attn.qkv, nn.Linear),
            active(attn.attn_drop),
            changed(attn.proj, nn.Linear),
            active(attn.proj_drop),
            *(changed(getattr(attn, name, None), nn.Identity) for name in identities),
            "gated attention" if getattr(attn, "gate", None) is not None else "",
            "another scale of the attention" if getattr(attn, "scale", scale) != scale else "",
        )
    )


def nothing(between: Iterable[nn.Module]) -> bool:
    """Whether none of it does anything, as a drop path at rest, so that the op may add the residual itself."""
    return not any(
        changed(module, nn.Identity, DropPath) or (type(module) is DropPath and module.training and module.drop_prob)
        for module in between
    )
