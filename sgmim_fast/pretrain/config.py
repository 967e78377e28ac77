"""The configuration of a pre-training run; `settings` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Model:
    """`create_encoder` and `SGMIM`."""

    encoder: str = "swin_base_patch4_window7_224"  # a timm name
    arguments: dict[str, Any] = field(default_factory=dict)  # further ones of timm.create_model; img_size is data.size
    stride: int = 32  # pixels along an output token of the encoder
    guidance: bool = True  # False: SimMIM
    hidden_context: Literal["keep", "drop"] = "keep"
    position_embedding: bool = False
    accelerate: bool = True  # timm's blocks through fused ops


@dataclass(frozen=True)
class Data:
    """Where images and maps come from: two mirrored folders, shards, or procedural scenes."""

    images: str | None = None  # a folder
    structure: str | None = None  # the mirrored folder of maps
    shards: str | None = None  # WebDataset shards, as "train-{000..099}.tar"
    epoch_images: int | None = None  # of shards, whose number is not known: images that count as an epoch
    scenes: int = 0  # that many procedural scenes
    val: float = 0.0  # share of the images that is held out to measure the losses on; of scenes, as many are added
    val_images: str | None = None  # or a folder of images of its own for that
    val_structure: str | None = None  # and the mirrored folder of maps
    missing: float | None = 0.0  # integer that means "no value" in maps; None: none does
    structure_kind: Literal["depth", "channels", "normals", "semantic"] = "depth"  # what maps hold: docs/DATA.md
    channels: int | None = None  # of maps of the kind "channels"
    classes: int | None = None  # in maps of the kind "semantic"
    ignore: int | None = 255  # id in those that means that no class is known; None: none does
    limit: float | None = None  # standardised depth and channels are cut off at ± this; None, as published: nowhere
    size: int = 192  # pixels along an image
    scale: tuple[float, float] = (0.67, 1.0)  # area of a crop, share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width by height of a crop
    flip: bool = True
    workers: int | None = None  # loading processes of each training process; None: what the cores allow, at most 8


@dataclass(frozen=True)
class Mask:
    """`selective_mask`."""

    unit: int = 32  # pixels along a mask unit
    ratio: float = 0.6  # share of masked units
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


@dataclass(frozen=True)
class Run:
    """How it runs and what it leaves behind. None of it but seed, precision and fsdp changes what is computed."""

    seed: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    fsdp: bool = False  # parameters, gradients and optimizer state in shards over the processes
    capture: bool = True  # forward and backward as a CUDA graph, where that can be; the same numbers without
    log_every: int = 50  # steps
    checkpoint_every: int = 1000  # steps
    keep: int = 2  # newest checkpoints kept, besides the one with the lowest loss, on held-out data where there are
    pictures_every: int = 5000  # steps; 0: only at the end
    pictures: int = 4  # rows of the grid
    tensorboard: bool = False
    nonfinite: int = 10  # so many steps in a row without a finite loss end the run


@dataclass(frozen=True)
class Config:
    preset: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
