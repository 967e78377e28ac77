"""Small encoders, models and batches for the tests of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sgmim_fast
from sgmim_fast import SGMIM, SelectiveMask
from sgmim_fast.ops.cases import away_from_zero


class ConvEncoder(nn.Module):
    """A masked encoder as a user may write it: stem, mask token, and a second convolution to reach the stride."""

    def __init__(self, width: int = 16, patch: int = 4, stride: int = 16, in_chans: int = 3, layout: str = "tokens"):
        super().__init__()
        self.num_features, self.in_chans, self.patch_size, self.layout = width, in_chans, patch, layout
        self.stem = nn.Conv2d(in_chans, width, patch, patch)
        self.mask_token = nn.Parameter(torch.randn(width))
        self.merge = nn.Conv2d(width, width, stride // patch, stride // patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.where(mask[:, None], self.mask_token[:, None, None].to(x.dtype), x)
        x = self.norm(self.merge(x).permute(0, 2, 3, 1))
        return x.flatten(1, 2) if self.layout == "tokens" else x.permute(0, 3, 1, 2)


SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
VIT = {"depth": 1, "embed_dim": 48, "num_heads": 3}
BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1, **VIT}

# name -> timm name, arguments of the timm model, image size, encoder stride
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int], int]] = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 3, **SWIN}, (96, 96), 32),
    "swin-oblong": ("swin_tiny_patch4_window7_224", {"img_size": (64, 128), **SWIN}, (64, 128), 32),
    "swin-stride-16": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
        (64, 64),
        16,
    ),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, "window_size": 2, **SWIN}, (64, 64), 32),
    "beit": ("beit_base_patch16_224", {"img_size": 64, **BEIT}, (64, 64), 16),
    "beit-oblong": ("beit_base_patch16_224", {"img_size": (32, 64), **BEIT}, (32, 64), 16),
    "vit": ("vit_base_patch16_224", {"img_size": 64, **VIT}, (64, 64), 16),
    "eva": ("vit_small_patch16_dinov3", {"img_size": 64, **VIT}, (64, 64), 16),
    "vit-patch-14": ("vit_base_patch16_224", {"img_size": 56, "patch_size": 14, **VIT}, (56, 56), 14),
}


def family(name: str, **options: Any) -> tuple[SGMIM, tuple[int, int]]:
    """Returns a tiny model with a timm encoder of that family, and its image size. `options` go to `SGMIM`."""
    timm_name, arguments, size, stride = FAMILIES[name]
    torch.manual_seed(0)
    return SGMIM(sgmim_fast.create_encoder(timm_name, **arguments), stride, **options), size


def foreign(*, width: int = 16, patch: int = 4, stride: int = 16, layout: str = "tokens", **options: Any) -> SGMIM:
    """Returns a model around `ConvEncoder`. `options` are passed to `SGMIM`."""
    torch.manual_seed(0)
    return SGMIM(ConvEncoder(width, patch, stride, layout=layout), stride, **options)


def batch(model: SGMIM, size: tuple[int, int], count: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns images and structure maps in float64. The values are float32 numbers and not close to zero."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, model.in_chans, *size, generator=generator)
    structure = torch.randn(count, model.structure_channels, *size, generator=generator)
    return away_from_zero(images).double(), away_from_zero(structure).double()


def drawn(model: SGMIM, size: tuple[int, int], count: int = 2, seed: int = 2, **options: Any) -> SelectiveMask:
    """Returns a mask on the encoder's cells. `options` are passed to `selective_mask`."""
    grid = size[0] // model.encoder_stride, size[1] // model.encoder_stride
    return sgmim_fast.selective_mask(count, grid, generator=torch.Generator().manual_seed(seed), **options)


def stem_mask(model: SGMIM, size: tuple[int, int], mask: SelectiveMask) -> Tensor:
    """Converts a drawn mask to the tensor (B, H / p, W / p), 1 = masked, which the model accepts as well."""
    return sgmim_fast.masking.resize(mask.mask, size[0] // model.patch_size, size[1] // model.patch_size)


@contextlib.contextmanager
def nothing_searched() -> Iterator[None]:
    """Raises if a mask tensor is searched for its marked elements, or if the host reads a value."""

    class Searches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            name = func._opname
            masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
                x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
            )
            found = name.startswith(("nonzero", "argwhere", "masked_select", "unique", "where.default"))
            read = torch.Tag.data_dependent_output in func.tags
            assert not (masks or found or read), f"{func} searches a mask or reads a value"
            return func(*args, **(kwargs or {}))

    with Searches():
        yield


def gradients(model: SGMIM, total: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of all parameters and inputs by name, and leaves `.grad` of the model unchanged."""
    leaves = dict(model.named_parameters()) | {f"input {i}": x for i, x in enumerate(inputs)}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
