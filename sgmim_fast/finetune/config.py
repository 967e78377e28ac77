"""The configuration of a fine-tuning run, which `engine.settings` reads, and the published protocols."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sgmim_fast.engine.settings import Run


@dataclass(frozen=True)
class Model:
    """Arguments of `create_features` and `create_model`."""

    encoder: str = ""  # an exported file, a pre-training run's folder, or a timm name
    weights: str | None = None  # file of timm weights, if `encoder` is a timm name
    pretrained: bool = False  # load timm's own weights, which timm downloads, if `encoder` is a timm name
    arguments: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    window_size: tuple[int, ...] | None = None  # window of Swin's stages in tokens, or one for all; None: unchanged
    drop_path: float = 0.1
    head: Literal["deconv", "dpt", "upernet"] = "deconv"
    head_channels: int | None = None  # width of the head; None: the published width
    freeze: bool = False  # train the head alone
    accelerate: bool = True  # compute timm's blocks through fused ops
    checkpointing: bool = False  # gradient checkpointing: recompute activations in the backward pass to save memory


@dataclass(frozen=True)
class Data:
    """Data for training and evaluation. Which of these settings apply depends on the source."""

    task: Literal["depth", "segmentation"] = "depth"
    source: Literal["folders", "nyu", "kitti", "ade20k", "scenes"] = "folders"
    root: str | None = None  # nyu, kitti, ade20k: folder of the data set
    train_list: str | None = None  # nyu, kitti, folders: file that lists the training images; None: see test_list
    test_list: str | None = None  # the test images; None: nyu and kitti use the usual list in root, folders all images
    images: str | None = None  # folders: training images
    maps: str | None = None  # folders: mirrored folder of depth or label maps
    test_images: str | None = None
    test_maps: str | None = None
    scale: float | None = None  # folders: stored integer of one metre, such as 1000
    check_units: bool = True  # refuse depth whose median is far outside the range of evaluation
    classes: int = 0  # folders: number of classes in label maps
    ignore: int = 255  # folders: label of pixels that are ignored
    reduce_zero: bool = False  # folders: also ignore label 0, and subtract 1 from the others
    scenes: int = 0  # scenes: number of procedural scenes to train on
    test_scenes: int = 100
    min_depth: float | None = None  # metres; depth out of range is invalid. None: the data set's usual range
    max_depth: float | None = None
    crop: Literal["eigen", "garg", "none"] | None = None  # part of an image that is evaluated; None: the data set's
    size: tuple[int, int] = (480, 480)  # height and width of training crops, pixels
    augment: dict[str, Any] = field(default_factory=dict)  # further arguments of DenseTransform, such as {flip: 0}
    workers: int | None = None  # data loader workers per training process; None: as the cores allow, at most 8


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule. Learning rates are not scaled by the batch size."""

    epochs: float = 25
    batch: int = 16  # images per process and backward pass
    accumulate: int = 1  # gradient accumulation: backward passes per step
    lr: float = 5e-4  # peak rate of the head; layer_decay lowers it for the encoder
    min_lr: float = 3e-5  # rate at both ends of "triangle", and at the end of the other schedules
    schedule: Literal["triangle", "poly", "cosine"] = "triangle"
    power: float = 0.9  # exponent of triangle and poly
    warmup_epochs: float = 0.0  # linear warm-up from 0, for poly and cosine
    layer_decay: float = 0.9  # factor of the learning rate from each layer to the one before it
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0  # largest gradient norm; 0: no clipping


@dataclass(frozen=True)
class Evaluation:
    """How the model is evaluated, before every checkpoint and by `sgmim-fast evaluate`."""

    flip: bool = True  # average with the prediction for the mirrored image
    slide: bool = True  # predict windows of data.size and average them; False: predict the whole image at once
    stride: tuple[int, int] | None = None  # pixels between windows, down and across; None: 2/3 of data.size
    images: int | None = None  # number of evenly spaced test images to evaluate at checkpoints; None: all


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)


# Protocols by data set and head. docs/DOWNSTREAM.md has the source of each number.
# Depth: arXiv 2205.13543 and its code, SwinTransformer/MIM-Depth-Estimation: SwinV2-B, deconvolution head, SiLog.
_MIM_DEPTH = {
    "optim": {"epochs": 25, "batch": 24, "lr": 5e-4, "min_lr": 3e-5, "schedule": "triangle", "layer_decay": 0.9},
    "run": {"checkpoint_every": 1000},
}
# Segmentation: mmsegmentation, 160,000 steps of 16 images of 512 x 512, which are 126.68 epochs of 1263 steps.
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
    # Procedural scenes, for the encoder of `sgmim-fast pretrain --preset tiny_demo`. It takes minutes on a CPU.
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
