"""Small encoders for the tests of fine-tuning."""

from __future__ import annotations

from typing import Any

import torch

from sgmim_fast.finetune.encoder import Features, create_features

_SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
_VIT = {"depth": 5, "embed_dim": 48, "num_heads": 3}
_SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}

# name -> timm name, arguments of the timm model
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", _SWIN),
    "swinv2": ("swinv2_tiny_window8_256", _SWIN),
    "swinv2-3-stages": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 24, "depths": (1, 2, 1), "num_heads": (1, 2, 4), "window_size": 2},
    ),
    "beit": ("beit_base_patch16_224", _VIT),
    "beit-shared": ("beit_base_patch16_224", {**_VIT, **_SHARED}),
    "vit": ("vit_base_patch16_224", _VIT),
    "resnet": ("resnet18", {}),
}
FAMILIES = ("swin", "swinv2", "swinv2-3-stages", "beit-shared", "vit")


def features(kind: str, img_size: int | tuple[int, int] = 64, **arguments: Any) -> Features:
    torch.manual_seed(0)
    name, own = ENCODERS[kind]
    return create_features(name, img_size=img_size, **{**own, **arguments})
