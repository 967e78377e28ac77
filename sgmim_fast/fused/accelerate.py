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
from sgmim_fast.fused.unmodified import DROPOUT, say
from sgmim_fast.fused.vit_blocks import BeitBlock, ViTBlock

BLOCKS = SwinTransformerBlock, SwinTransformerV2Block, PatchMerging, PatchMergingV2, BeitBlock, ViTBlock, EvaBlock
FAST: dict[type[nn.Module], type[nn.Module]] = {kind.timm: kind for kind in BLOCKS}  # timm's class -> ours


def accelerate(encoder: nn.Module) -> nn.Module:
    """Makes the blocks of a timm Swin, SwinV2, BEiT, ViT or EVA compute the same function through fused ops.

    Window attention needs no rolled or partitioned copies and no mask in memory, LayerNorm and GELU are recomputed in
    the backward instead of saved, and float32 gemms on CPUs use the fastest library. Parameters, buffers, names and the
    state dict do not change, and drop path, gradient checkpointing, autocast, training and evaluation mode,
    torch.compile, deepcopy and pickle (which needs this package when it is loaded) keep working. Differences: double
    backward raises, and results agree up to rounding, not bitwise.

    Of the published SG-MIM, SimMIM, Swin-Transformer and BEiT code it recognises the blocks by what they hold, tries
    once whether each kind of them computes what ours do, to 1e-10 in float64, and leaves what does not.

    It changes the class of each block it recognises, and nothing else. At each call a block looks
    whether what it bypasses is still timm's: with hooks of any kind, adapters, a `forward` of a module's own or of its
    class since import, parametrizations, parameters that are tensor subclasses or of several dtypes, dropout at work,
    attention masks, norms of queries and keys or another activation, that half of it runs as timm has it. So does
    attention in windows of more than 256 tokens (64 in float32) on a GPU, and everything where a device has no kernels,
    as for float64 on a GPU, under hooks on all modules, torch.jit.trace, torch.fx, torch.func's transforms and
    forward-mode differentiation. An `attn_mask` changed in place after torch.compile, or on a GPU through `.data`, is
    the one change that is not seen.

    Args:
        encoder: any module with such blocks: of `create_encoder`, a timm model, or a model that contains one. It is
            modified in place. Fine-tuning without masks works, too.

    Returns:
        `encoder`. Blocks that are not supported are left unchanged. These, later fallbacks with their reasons, and a
        missing C++ library are logged once, as warnings of the logger "sgmim_fast".
    """
    (usable, reason), (on_gpu, _) = (backends.can_run("window_attention", name) for name in ("cpu", "triton"))
    if not usable and not on_gpu and backends.forced() is None:
        say(f"accelerate leaves encoders as they are: {reason}")
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
            say(f"accelerate leaves {name}'s {type(module).__name__} as it is: {why}")
        if fast is not None:
            module.__class__ = fast
        if isinstance(module, ours):
            found = True
            if isinstance(module, Swin):
                module.see_mask()
            for part, why in module.reasons().items():
                if why and not why.endswith(DROPOUT):  # which evaluation turns off
                    say(f"accelerate leaves the {part} of {name}'s {type(module).__name__} as it is: {why}")
    if not found:
        say(
            f"accelerate leaves {name} as it is: it has no block of timm's Swin, SwinV2, BEiT, ViT or EVA, "
            "nor of the published code's"
        )
    return encoder
