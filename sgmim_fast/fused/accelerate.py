"""`accelerate`: the same timm encoder, computed faster."""

from __future__ import annotations

from torch import nn

from sgmim_fast import backends
from sgmim_fast.fused import published_blocks
from sgmim_fast.fused.eva_blocks import EvaBlock
from sgmim_fast.fused.swin_blocks import (
    PatchMerging,
    PatchMergingV2,
    Swin,
    SwinTransformerBlock,
    SwinTransformerV2Block,
)
from sgmim_fast.fused.unmodified import DROPOUT, warn_once
from sgmim_fast.fused.vit_blocks import BeitBlock, ViTBlock

BLOCKS = SwinTransformerBlock, SwinTransformerV2Block, PatchMerging, PatchMergingV2, BeitBlock, ViTBlock, EvaBlock
FAST: dict[type[nn.Module], type[nn.Module]] = {kind.timm: kind for kind in BLOCKS}  # timm's class -> ours


def accelerate(encoder: nn.Module) -> nn.Module:
    """Makes the blocks of a timm Swin, SwinV2, BEiT, ViT or EVA compute the same function through fused ops. In place.

    Window attention makes no rolled or partitioned copies and keeps no mask in memory, LayerNorm and GELU are
    recomputed in the backward instead of saved, and float32 gemms on CPUs use the fastest library. Parameters, buffers,
    names and the state dict do not change. Drop path, gradient checkpointing, autocast, training and evaluation mode,
    torch.compile, deepcopy and pickle (which needs this package when loading) keep working. Differences: double
    backward raises, and results agree up to rounding, not bitwise.

    Blocks of the published SG-MIM, SimMIM, Swin-Transformer and BEiT code are recognised by their children, parameters,
    buffers and settings. Each kind of block is tested once: if it does not compute the same as the fused block, to
    1e-10 in float64, it is left unchanged.

    Only the class of each recognised block changes. At each call a block checks that the modules it bypasses are
    unmodified. A half of a block runs as in timm if it has hooks of any kind, adapters, a `forward` that was replaced
    in a module or its class since import, parametrizations, parameters that are tensor subclasses or of several dtypes,
    active dropout, attention masks, norms of queries and keys, or another activation; attention also does so in windows
    of more than 1024 tokens (64 in float32) on a GPU. The whole block runs as in timm if the device has no kernels for
    the dtype (e.g. float64 on a GPU), with hooks on all modules, and under torch.jit.trace, torch.fx, torch.func's
    transforms and forward-mode differentiation. The only undetected change is one of an `attn_mask` in place, after
    torch.compile, or on a GPU through `.data`.

    Args:
        encoder: any module with such blocks: an encoder of `create_encoder`, a timm model, or a model that contains
            one. It can also be used without masks, e.g. for fine-tuning.

    Returns:
        `encoder`, modified in place. Unsupported blocks are unchanged. These, later fallbacks with their reasons, and a
        missing C++ library are logged once, as warnings of the logger "sgmim_fast".
    """
    (usable, reason), (on_gpu, _) = (backends.can_run("window_attention", name) for name in ("cpu", "triton"))
    if not usable and not on_gpu and backends.forced() is None:
        warn_once(f"accelerate leaves encoders unchanged: {reason}")
        return encoder
    name = type(getattr(encoder, "model", encoder)).__name__
    if hasattr(encoder, "accelerate_stem"):
        encoder.accelerate_stem()
    found, ours = False, (*FAST.values(), *published_blocks.FAMILIES.values())
    for module in encoder.modules():
        fast, why = FAST.get(type(module)), ""
        if fast is None and not isinstance(module, ours):
            fast, why = published_blocks.recognised(module)
        if why:
            warn_once(f"accelerate leaves {name}'s {type(module).__name__} unchanged: {why}")
        if fast is not None:
            module.__class__ = fast
        if isinstance(module, ours):
            found = True
            if isinstance(module, Swin):
                module.see_mask()
            for part, why in module.reasons().items():
                if why and not why.endswith(DROPOUT):  # dropout is inactive in evaluation mode
                    warn_once(f"accelerate leaves the {part} of {name}'s {type(module).__name__} unchanged: {why}")
    if not found:
        warn_once(
            f"accelerate leaves {name} unchanged: it has no block of timm's Swin, SwinV2, BEiT, ViT or EVA, "
            "or of the published code"
        )
    return encoder
