"""Model and data set of a configuration, and what can be wrong with it, each in one sentence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import timm

from sgmim_fast.encoders import create_encoder
from sgmim_fast.engine.settings import OF_EVERY_RUN_0, OF_EVERY_RUN_1, at_least
from sgmim_fast.errors import UserError, nearest
from sgmim_fast.masking import SHOWN
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain import masks
from sgmim_fast.pretrain.config import Config

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from sgmim_fast.data import StructureKind


def create_model(config: Config) -> SGMIM:
    """The model, its parameters drawn from torch's default generator.

    Raises:
        UserError: an unknown timm name (the nearest ones are named), or sizes that do not fit together.
    """
    settings, size = config.model, config.data.size
    base = settings.encoder.split(".")[0]
    if not timm.is_model(base):
        families = ("swin_*", "swinv2_*", "beit_*", "beitv2_*", "vit_*", "deit_*")
        raise UserError(f"timm has no model {settings.encoder!r}{nearest(base, timm.list_models(list(families)))}")
    check(config)
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.arguments.items()}
    if "img_size" in arguments:
        raise UserError("model.arguments has img_size; expected data.size to say it, for the images as well")
    try:
        encoder = create_encoder(settings.encoder, img_size=size, **arguments)
        check_windows(encoder.model, size)
        return SGMIM(
            encoder,
            settings.stride,
            guidance=settings.guidance,
            structure_channels=structure_kind(config).channels,
            hidden_context=settings.hidden_context,
            position_embedding=settings.position_embedding,
            accelerate=settings.accelerate,
        )
    except UserError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # timm's own words
        raise UserError(f"model.encoder {settings.encoder} with {settings.arguments}: {error}") from error


def check(config: Config) -> None:
    """That images divide into tokens and mask units, that there is something to mask, and that numbers are possible.

    Raises:
        UserError: naming the setting, what came and what is expected.
    """
    size, stride, unit = config.data.size, config.model.stride, config.mask.unit
    at_least(config, 1, (*OF_EVERY_RUN_1, "model.stride", "data.size", "data.epoch_images", "mask.unit"))
    at_least(config, 0, (*OF_EVERY_RUN_0, "data.scenes", "optim.warmup_lr", "optim.min_lr", "optim.warmup_epochs"))
    for name, step in (("the encoder's stride (model.stride)", stride), ("the mask unit (mask.unit)", unit)):
        if size % step:
            both = math.lcm(stride, unit)
            fitting = sorted({max(both, size // both * both), size // both * both + both})
            raise UserError(
                f"data.size is {size}, no multiple of {name} {step}; next that fit: {' or '.join(map(str, fitting))}"
            )
    structure_kind(config)
    if config.data.limit is not None and config.data.limit <= 0:
        raise UserError(f"data.limit is {config.data.limit}; expected more than 0, or null for none")
    if not 0 < config.mask.ratio < 1:
        raise UserError(f"mask.ratio is {config.mask.ratio}; expected a share between 0 and 1")
    units = (size // unit) ** 2
    if math.ceil(config.mask.ratio * units) == units:
        raise UserError(f"mask.ratio is {config.mask.ratio} of {units} mask units, which leaves none visible")
    shown = masks.read_shown(config.mask.shown)
    if shown not in SHOWN if isinstance(shown, str) else not 0 <= shown <= 1:
        raise UserError(f"mask.shown is {config.mask.shown!r}; expected {', '.join(SHOWN)} or a share between 0 and 1")


def structure_kind(config: Config) -> StructureKind:
    """What the structure maps hold.

    Raises:
        UserError: a number that it needs is missing, or one is given that it does not have.
    """
    from sgmim_fast import data

    settings = config.data
    given = {"channels": settings.channels, "classes": settings.classes, "ignore": settings.ignore}
    return data.structure_kind(settings.structure_kind, **given, limit=settings.limit, prefix="data.")


def check_windows(model: object, size: int) -> None:
    """That every stage of a Swin divides into its windows: timm would pad it, and the published models do not.

    Raises:
        UserError: naming the stage.
    """
    for stage, layer in enumerate(getattr(model, "layers", ())):
        block = layer.blocks[0]
        for tokens, window in zip(block.input_resolution, block.window_size, strict=True):
            if tokens % window:
                raise UserError(
                    f"data.size is {size}: stage {stage} has {tokens} tokens along a side, no multiple of its window "
                    f"{window}; expected another data.size or model.arguments.window_size"
                )


def create_dataset(config: Config) -> Dataset:
    """The data set of the configuration: items as described in `sgmim_fast.data`.

    Raises:
        UserError: none or several sources are given.
        DataError: there is something wrong with the source.
    """
    from sgmim_fast import data

    settings, seed = config.data, config.run.seed
    folders = settings.images is not None or settings.structure is not None
    sources = [folders, settings.shards is not None, settings.scenes > 0]
    if sum(sources) != 1:
        found = "none" if not any(sources) else "several"
        raise UserError(
            f"the images come from {found} of data.images with data.structure, data.shards, data.scenes; expected one: "
            "--images DIR --structure DIR, --shards TARS or --set data.scenes=1000"
        )
    kind = structure_kind(config)
    if settings.scenes:
        if kind.name != "depth":
            raise UserError(
                f"data.structure_kind is {kind.name} with data.scenes, which have depth; expected --images DIR and "
                "--structure DIR, or --shards TARS"
            )
        return data.Scenes(settings.scenes, settings.size, seed=seed)
    transform = data.PairTransform(settings.size, scale=settings.scale, ratio=settings.ratio, flip=settings.flip)
    guided = config.model.guidance  # SimMIM needs no maps
    if settings.shards is not None:
        if settings.epoch_images is None:
            raise UserError("data.epoch_images is missing; with shards it says how many images count as an epoch")
        structure = kind.name if guided else None
        options = {"length": settings.epoch_images, "seed": seed, "missing": settings.missing, "structure": structure}
        return data.ShardPairs(settings.shards, transform, kind=kind, **options)
    for name in ("images", "structure") if guided else ("images",):
        if getattr(settings, name) is None:
            raise UserError(
                f"data.{name} is missing; expected --images DIR and --structure DIR together, or "
                "--set model.guidance=false for SimMIM, which needs images alone"
            )
    structure = settings.structure if guided else None
    return data.FolderPairs(settings.images, structure, transform, seed=seed, missing=settings.missing, kind=kind)
