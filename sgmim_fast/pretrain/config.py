"""The configuration of a pre-training run, which `engine.settings` reads, and the published recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sgmim_fast.engine import settings
from sgmim_fast.engine.settings import Run
from sgmim_fast.salience import SPREAD, THRESHOLD


@dataclass(frozen=True)
class Model:
    """`create_encoder`, `Decoder` and `SGMIM`."""

    encoder: str = "swin_base_patch4_window7_224"  # a timm name
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of timm.create_model; img_size is data.size
    stride: int = 32  # pixels along an output token of the encoder
    guidance: bool = True  # False: SimMIM
    hidden_context: Literal["keep", "drop"] = "keep"
    position_embedding: bool = False
    accelerate: bool = True  # timm's blocks through fused ops
    init: str | None = None  # weights to start from: a file, "timm:NAME", or the folder of a run
    init_partial: bool = False  # load what fits of them; otherwise what does not is listed and ends the run
    target: Literal["pixels", "normalized_patch"] = "pixels"  # of the image
    loss: Literal["l1", "l2"] = "l1"  # of the image
    encoder_positions: Literal["timm", "sincos"] = "timm"  # sincos: fixed, as MAE's
    visible_only: bool = False  # the encoder sees visible patches alone, as MAE's; not what the paper does
    decoder_depth: int = 8  # with visible_only
    decoder_width: int = 512
    decoder_heads: int = 16


@dataclass(frozen=True)
class Data:
    """Where images and maps come from: two mirrored folders, shards, or procedural scenes."""

    images: str | None = None  # a folder
    structure: str | None = None  # the mirrored folder of maps
    shards: str | None = None  # WebDataset shards, as "train-{000..099}.tar"
    epoch_images: int | None = None  # of shards, whose number is not known: images that count as an epoch
    scenes: int = 0  # that many procedural scenes
    val: float = 0.0  # share of the images to hold out for evaluation; scenes are added
    val_images: str | None = None  # or a folder of images of its own for that
    val_structure: str | None = None  # and the mirrored folder of maps
    missing: float | None = 0.0  # integer that means "no value" in maps; None: none does
    structure_kind: Literal["depth", "channels", "normals", "semantic"] = "depth"  # what maps hold: docs/DATA.md
    channels: int | None = None  # of maps of the kind "channels"
    classes: int | None = None  # in maps of the kind "semantic"
    ignore: int | None = 255  # id in those that means that no class is known; None: none does
    limit: float | None = None  # standardised depth and channels are cut off at ± this; None, as published: nowhere
    image_channels: int | None = None  # of images that are no photographs: .npy, PNG, TIFF; docs/DATA.md
    mean: tuple[float, ...] | None = None  # of each channel, of integers as 0 to 1; None: ImageNet's, of photographs
    std: tuple[float, ...] | None = None
    probe: str | None = None  # a folder with images/ and labels/ that frozen features are probed on
    probe_kind: Literal["depth", "semantic"] = "depth"  # what the labels hold
    probe_classes: int | None = None  # in labels of the kind "semantic"
    size: int = 192  # pixels along an image
    scale: tuple[float, float] = (0.67, 1.0)  # area of a crop, share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width by height of a crop
    flip: bool = True
    workers: int | None = None  # data loader workers per training process; None: as the cores allow, at most 8


@dataclass(frozen=True)
class Mask:
    """`selective_mask`."""

    unit: int = 32  # pixels along a mask unit
    ratio: float = 0.6  # share of masked units; with --set mask.masking=salience 0.75, unless it is given
    masking: Literal["random", "salience"] = "random"  # SPEC "Salience-based masking"
    spread: float = SPREAD  # of "salience": the ratio of an image is within ± this of `ratio`
    threshold: float = THRESHOLD  # of "salience": patches above it count as salient
    adaptive: Literal["image", "batch", "none"] = "image"  # of "salience": whose ratio an image has
    shown: str = "masked"  # where the structure is shown: "masked", "visible", "all" or the share hidden at random


@dataclass(frozen=True)
class Optim:
    """docs/SPEC.md "Published recipes". Learning rates are for a total batch of 512 and scaled to the run's."""

    epochs: float = 800
    batch: int = 128  # images per process and backward
    accumulate: int = 1  # backwards per step
    lr: float = 1e-4
    warmup_lr: float = 5e-7
    min_lr: float = 0.0  # cosine's end
    schedule: Literal["cosine", "multistep"] = "multistep"
    warmup_epochs: float = 10
    milestones: tuple[float, ...] = (700,)  # epochs after which multistep multiplies by gamma
    gamma: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0  # largest gradient norm; 0: none
    ema: float = 0.0  # decay of the weights' moving average, which is tested, drawn and exported; 0: none
    layer_decay: float = 1.0  # of the rate from one layer of the encoder to the one before: for model.init


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


# the recipes by name: docs/SPEC.md "Published recipes"; and MAE's, with guidance: "Visible tokens only"
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
    "vit_small_mae": _mae("vit_small_patch16_224"),
    "vit_base_mae": _mae("vit_base_patch16_224"),
    "vit_large_mae": _mae("vit_large_patch16_224"),
    # for 1,000 to 100,000 images of one's own on one GPU, best from weights: docs/SMALL_DATA.md; not measured
    "small_data": {
        "model": {"encoder": "vit_small_patch16_224", "arguments": {"drop_path_rate": 0.1}, "stride": 16},
        "data": {"size": 224, "val": 0.05, "limit": 3.0},
        "optim": {
            **{"epochs": 200, "batch": 64, "accumulate": 4, "lr": 3e-4, "warmup_lr": 1e-6, "min_lr": 1e-6},
            **{"schedule": "cosine", "warmup_epochs": 10, "layer_decay": 0.75, "ema": 0.999},
        },
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
