"""The configuration of a fine-tuning run, which `engine.settings` reads, and the published protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sgmim_fast.engine.settings import Run


@dataclass(frozen=True)
class Model:
    """`create_features` and `create_model`."""

    encoder: str = ""  # an exported file, a pre-training run's folder, or a timm name
    weights: str | None = None  # a file of any timm weights for a timm name
    pretrained: bool = False  # timm's own weights for a timm name, which timm downloads
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of timm.create_model
    window_size: tuple[int, ...] | None = None  # of Swin's stages, in tokens; one number: of all; None: as it was
    drop_path: float = 0.1
    head: Literal["deconv", "dpt", "upernet"] = "deconv"
    head_channels: int | None = None  # its width; None: the published one
    freeze: bool = False  # train the head alone
    accelerate: bool = True  # timm's blocks through fused ops
    checkpointing: bool = False  # gradient checkpointing: recompute activations in the backward to save memory


@dataclass(frozen=True)
class Data:
    """Data for training and evaluation. Which of these settings apply depends on the source."""

    task: Literal["depth", "segmentation"] = "depth"
    source: Literal["folders", "nyu", "kitti", "ade20k", "scenes"] = "folders"
    root: str | None = None  # of nyu, kitti, ade20k
    train_list: str | None = None  # file with the names of a split, of all sources but ade20k; None: nyu's and kitti's
    test_list: str | None = None  # usual ones, under root, and all of folders
    images: str | None = None  # of folders: images to train on
    maps: str | None = None  # the mirrored folder of depth or label maps
    test_images: str | None = None
    test_maps: str | None = None
    scale: float | None = None  # of folders: what an integer map has for one metre, such as 1000
    check_units: bool = True  # refuse depth whose median is far outside the range of evaluation
    classes: int = 0  # of folders of labels
    ignore: int = 255  # label that does not count
    reduce_zero: bool = False  # label 0 does not count, and 1 becomes 0
    scenes: int = 0  # of scenes: procedural ones to train on
    test_scenes: int = 100
    min_depth: float | None = None  # metres; depth outside is invalid. None: the data set's usual range
    max_depth: float | None = None
    crop: Literal["eigen", "garg", "none"] | None = None  # part of an image that is evaluated; None: the data set's
    size: tuple[int, int] = (480, 480)  # height and width of training crops, pixels
    augment: dict[str, Any] = field(default_factory=dict)  # further arguments of DenseTransform, such as {flip: 0}
    workers: int | None = None  # data loader workers per training process; None: as the cores allow, at most 8


@dataclass(frozen=True)
class Optim:
    """Learning rates are not scaled by the batch size."""

    epochs: float = 25
    batch: int = 16  # images per process and backward pass
    accumulate: int = 1  # gradient accumulation: backward passes per step
    lr: float = 5e-4  # peak rate of the head; layer_decay lowers it for the encoder
    min_lr: float = 3e-5  # at the beginning and the end of "triangle", at the end of the others
    schedule: Literal["triangle", "poly", "cosine"] = "triangle"
    power: float = 0.9  # of triangle and poly
    warmup_epochs: float = 0.0  # of poly and cosine: linear from 0
    layer_decay: float = 0.9  # factor of the learning rate from each layer to the one before it
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0  # largest gradient norm; 0: none


@dataclass(frozen=True)
class Evaluation:
    """How the model is evaluated, before every checkpoint and by `sgmim-fast evaluate`."""

    flip: bool = True  # average with the prediction for the mirrored image
    slide: bool = True  # in windows of data.size, whose predictions are averaged; False: the whole image at once
    stride: tuple[int, int] | None = None  # pixels from window to window, down and across; None: two thirds
    images: int | None = None  # number of evenly spaced test images to evaluate at checkpoints; None: all


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)


# the protocols by data set and head; docs/DOWNSTREAM.md says where each number is from
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
