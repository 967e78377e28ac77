"""The configuration of a pre-training run, which `engine.settings` reads, and the published recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sgmim_fast.engine import settings
from sgmim_fast.engine.settings import Run
from sgmim_fast.salience import SPREAD, THRESHOLD


@dataclass(frozen=True)
class Model:
    """Arguments of `create_encoder`, `Decoder` and `SGMIM`."""

    encoder: str = "swin_base_patch4_window7_224"  # a timm name
    arguments: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model, except img_size
    stride: int = 32  # pixels along each side of an output token of the encoder
    guidance: bool = True  # False: SimMIM
    hidden_context: Literal["keep", "drop"] = "keep"
    position_embedding: bool = False
    accelerate: bool = True  # compute timm's blocks through fused ops
    init: str | None = None  # weights to start from: a file, "timm:NAME", or the folder of a run
    init_partial: bool = False  # load only the weights that fit; False: weights that do not fit are an error
    target: Literal["pixels", "normalized_patch"] = "pixels"  # target of the image loss
    loss: Literal["l1", "l2"] = "l1"  # image loss
    encoder_positions: Literal["timm", "sincos"] = "timm"  # position embedding; sincos: fixed, as in MAE
    visible_only: bool = False  # encode visible patches alone, as MAE does; the paper does not
    decoder_depth: int = 8  # number of blocks of the decoder; the decoder is used with visible_only alone
    decoder_width: int = 512
    decoder_heads: int = 16


@dataclass(frozen=True)
class Data:
    """Source of images and maps: two mirrored folders, shards, or procedural scenes."""

    images: str | None = None  # folder of images
    structure: str | None = None  # mirrored folder of structure maps
    shards: str | None = None  # WebDataset shards, such as "train-{000..099}.tar"
    epoch_images: int | None = None  # images per epoch; required with shards, whose number of images is not known
    scenes: int = 0  # number of procedural scenes
    val: float = 0.0  # share of the images to hold out for evaluation; scenes are added for that instead
    val_images: str | None = None  # alternatively, a separate folder of images for evaluation
    val_structure: str | None = None  # mirrored folder of structure maps of val_images
    missing: float | None = 0.0  # integer that marks missing values in maps; None: no integer does
    structure_kind: Literal["depth", "channels", "normals", "semantic"] = "depth"  # kind of the maps: docs/DATA.md
    channels: int | None = None  # number of channels of maps of the kind "channels"
    classes: int | None = None  # number of classes in maps of the kind "semantic"
    ignore: int | None = 255  # id of unlabelled pixels in maps of the kind "semantic"; None: all are labelled
    limit: float | None = None  # clamps standardised depth and channels to ± this; None, as published: no clamping
    image_channels: int | None = None  # channels of images in .npy, PNG or TIFF; None: RGB photographs; docs/DATA.md
    mean: tuple[float, ...] | None = None  # mean of each channel, integers scaled to [0, 1]; None: ImageNet's
    std: tuple[float, ...] | None = None  # standard deviation of each channel, likewise
    probe: str | None = None  # folder with images/ and labels/ for a linear probe of frozen features
    probe_kind: Literal["depth", "semantic"] = "depth"  # kind of the probe's labels
    probe_classes: int | None = None  # number of classes in labels of the kind "semantic"
    size: int = 192  # pixels along each side of an image
    scale: tuple[float, float] = (0.67, 1.0)  # range of the crop's area, relative to the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's aspect ratio, width / height
    flip: bool = True  # random horizontal flips
    workers: int | None = None  # data loader workers per training process; None: as the cores allow, at most 8


@dataclass(frozen=True)
class Mask:
    """Arguments of `selective_mask`."""

    unit: int = 32  # pixels along each side of a mask unit
    ratio: float = 0.6  # share of masked units; with --set mask.masking=salience the default is 0.75
    masking: Literal["random", "salience"] = "random"  # docs/SPEC.md "Salience-based masking"
    spread: float = SPREAD  # salience: the ratio of an image is within ± this of `ratio`
    threshold: float = THRESHOLD  # salience: patches above it count as salient
    adaptive: Literal["image", "batch", "none"] = "image"  # salience: ratio per image, batch mean, or `ratio` for all
    shown: str = "masked"  # where the structure is shown: "masked", "visible", "all" or the share hidden at random


@dataclass(frozen=True)
class Optim:
    """Optimizer and schedule (docs/SPEC.md "Published recipes"). Learning rates are for a total batch of 512, and are
    scaled in proportion to the run's total batch."""

    epochs: float = 800
    batch: int = 128  # images per process and backward pass
    accumulate: int = 1  # gradient accumulation: backward passes per step
    lr: float = 1e-4  # after the warm-up
    warmup_lr: float = 5e-7  # at the first step
    min_lr: float = 0.0  # at the end of the cosine schedule
    schedule: Literal["cosine", "multistep"] = "multistep"
    warmup_epochs: float = 10
    milestones: tuple[float, ...] = (700,)  # epochs after which multistep multiplies by gamma
    gamma: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0  # largest gradient norm; 0: no clipping
    ema: float = 0.0  # decay of the weights' moving average, which is evaluated, drawn and exported; 0: no average
    layer_decay: float = 1.0  # factor of the rate from each encoder layer to the one before it, for use with model.init


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


# Recipes by name: those of docs/SPEC.md "Published recipes", and MAE's with guidance ("Visible tokens only").
_SWIN_BASE = {"encoder": "swin_base_patch4_window7_224", "arguments": {"window_size": 6}}
_800 = {"epochs": 800, "lr": 1e-4, "warmup_lr": 5e-7, "schedule": "multistep", "milestones": [700]}
_BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}


def _mae(encoder: str) -> dict[str, Any]:
    return {
        "model": {
            **{"encoder": encoder, "stride": 16, "visible_only": True, "encoder_positions": "sincos"},
            **{"target": "normalized_patch", "loss": "l2"},
        },
        "data": {"size": 224, "scale": [0.2, 1.0]},
        "mask": {"unit": 16, "ratio": 0.75},
        "optim": {
            **{"epochs": 800, "lr": 3e-4, "warmup_lr": 0.0, "min_lr": 0.0, "warmup_epochs": 40, "schedule": "cosine"},
            **{"betas": [0.9, 0.95], "clip": 0.0},
        },
    }


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
    # The paper has no recipe for SwinV2; this is Swin's of 800 epochs.
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
    "vit_small_mae": _mae("vit_small_patch16_224"),
    "vit_base_mae": _mae("vit_base_patch16_224"),
    "vit_large_mae": _mae("vit_large_patch16_224"),
    # For 1,000 to 100,000 images on one GPU, preferably from initial weights (docs/SMALL_DATA.md). Not measured.
    "small_data": {
        "model": {"encoder": "vit_small_patch16_224", "arguments": {"drop_path_rate": 0.1}, "stride": 16},
        "data": {"size": 224, "val": 0.05, "limit": 3.0},
        "optim": {
            **{"epochs": 200, "batch": 64, "accumulate": 4, "lr": 3e-4, "warmup_lr": 1e-6, "min_lr": 1e-6},
            **{"schedule": "cosine", "warmup_epochs": 10, "layer_decay": 0.75, "ema": 0.999},
        },
    },
    # A small encoder on procedural scenes, which exercises everything within minutes on a CPU.
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
    """Returns the configuration of a preset, which is one of `PRESETS`.

    Raises:
        UserError: there is no preset of that name. The message has similar names.
    """
    return settings.preset(Config(), PRESETS, name)
