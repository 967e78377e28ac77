"""Published protocols of fine-tuning, by data set and head. docs/DOWNSTREAM.md says where each number is from."""

from __future__ import annotations

from typing import Any

# arXiv 2205.13543 and its code, SwinTransformer/MIM-Depth-Estimation: SwinV2-B, deconvolution head, SiLog, 25 epochs
_MIM_DEPTH = {
    "optim": {"epochs": 25, "batch": 24, "lr": 5e-4, "min_lr": 3e-5, "schedule": "triangle", "layer_decay": 0.9},
    "run": {"checkpoint_every": 1000},
}
# mmsegmentation: 160,000 steps of 16 images of 512 x 512, which is 126.68 epochs of 1263 steps
_ADE20K = {
    "data": {"task": "segmentation", "source": "ade20k", "size": [512, 512]},
    "evaluation": {"slide": True, "stride": [341, 341], "flip": False},
    "run": {"checkpoint_every": 16000},
}
_160K = {"epochs": 126.6825, "batch": 16, "schedule": "poly", "power": 1.0, "min_lr": 0.0, "warmup_epochs": 1.1876}

PRESETS: dict[str, dict[str, Any]] = {
    "nyu_deconv_swin": {
        **_MIM_DEPTH,
        "model": {"head": "deconv", "drop_path": 0.3, "window_size": [30, 30, 30, 15]},
        "data": {"task": "depth", "source": "nyu", "size": [480, 480]},
        "evaluation": {"slide": True, "stride": [480, 160], "flip": True},
    },
    "kitti_deconv_swin": {
        **_MIM_DEPTH,
        "model": {"head": "deconv", "drop_path": 0.3, "window_size": [22, 22, 22, 11]},
        "data": {"task": "depth", "source": "kitti", "size": [352, 352]},
        "evaluation": {"slide": True, "stride": [352, 58], "flip": True},
    },
    "ade20k_upernet_swin": {
        **_ADE20K,
        "model": {"head": "upernet", "drop_path": 0.3},
        "optim": {**_160K, "lr": 6e-5, "weight_decay": 0.01, "layer_decay": 1.0},
    },
    "ade20k_upernet_vit": {
        **_ADE20K,
        "model": {"head": "upernet", "drop_path": 0.1},
        "optim": {**_160K, "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.65},
    },
    # procedural scenes, minutes on a CPU: what the demo of `sgmim-fast pretrain` is good for
    "tiny_demo": {
        "model": {"head": "upernet", "head_channels": 64, "drop_path": 0.0},
        "data": {"source": "scenes", "scenes": 512, "test_scenes": 64, "size": [96, 96]},
        "optim": {
            **{"epochs": 8, "batch": 16, "lr": 2e-3, "min_lr": 1e-5, "schedule": "cosine", "warmup_epochs": 1.0},
            **{"layer_decay": 0.9, "clip": 5.0},
        },
        "evaluation": {"slide": False, "flip": True},
        "run": {"log_every": 16, "checkpoint_every": 128, "pictures_every": 0},
    },
}
