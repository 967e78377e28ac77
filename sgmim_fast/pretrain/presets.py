"""The named recipes: docs/SPEC.md "Published recipes"."""

from __future__ import annotations

from typing import Any

from sgmim_fast.engine import settings
from sgmim_fast.pretrain.config import Config

_SWIN_BASE = {"encoder": "swin_base_patch4_window7_224", "arguments": {"window_size": 6}}
_800 = {"epochs": 800, "lr": 1e-4, "warmup_lr": 5e-7, "schedule": "multistep", "milestones": [700]}
_BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}

PRESETS: dict[str, dict[str, Any]] = {
    "swin_base_100ep": {
        "model": _SWIN_BASE,
        "optim": {"epochs": 100, "lr": 2e-4, "warmup_lr": 1e-6, "min_lr": 1e-5, "schedule": "cosine"},
    },
    "swin_base_800ep": {"model": _SWIN_BASE, "optim": _800},
    "swin_large_800ep": {
        "model": {"encoder": "swin_large_patch4_window7_224", "arguments": {"window_size": 12}},
        "optim": _800,
    },
    # the paper gives no recipe of its own for SwinV2: Swin's of 800 epochs
    "swinv2_base": {"model": {"encoder": "swinv2_base_window12_192", "arguments": {"window_size": 12}}, "optim": _800},
    "vit_base_800ep": {
        "model": {
            "encoder": "beit_base_patch16_224",
            "arguments": {**_BEIT, "drop_path_rate": 0.1},
            "stride": 16,
        },
        "data": {"size": 224},
        "optim": _800,
    },
    # procedural scenes and a small encoder: minutes on a CPU, to see everything work
    "tiny_demo": {
        "model": {
            "encoder": "swinv2_tiny_window8_256",
            "arguments": {"embed_dim": 48, "depths": [2, 2, 2], "num_heads": [3, 6, 12], "window_size": 6},
            "stride": 16,
        },
        "data": {"scenes": 1600, "val": 0.08, "limit": 3.0, "size": 96},
        "mask": {"unit": 16},
        "optim": {
            **{"epochs": 8, "batch": 16, "lr": 2e-3 * 32, "warmup_lr": 1e-4, "min_lr": 1e-4},
            **{"schedule": "cosine", "warmup_epochs": 0.5},
        },
        "run": {"log_every": 20, "checkpoint_every": 200, "pictures_every": 200},
    },
}


def preset(name: str) -> Config:
    """A published recipe, or the demo.

    Raises:
        UserError: there is none of that name; the nearest ones are named.
    """
    return settings.preset(Config(), PRESETS, name)
