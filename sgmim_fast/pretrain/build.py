"""Model, optimizer, masks and data sets of a configuration, and what can be wrong with it, each in one sentence."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from pathlib import Path

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch.utils.data import Dataset, Subset

from sgmim_fast import data
from sgmim_fast.data.pairs import Pairs
from sgmim_fast.data.seeds import mix
from sgmim_fast.decoder import Decoder
from sgmim_fast.encoders import create_encoder
from sgmim_fast.engine import checkpoint
from sgmim_fast.engine.checkpoint import Saved
from sgmim_fast.engine.settings import OF_EVERY_RUN_0, OF_EVERY_RUN_1, at_least
from sgmim_fast.errors import UserError, nearest
from sgmim_fast.exported import without_sources
from sgmim_fast.masking import SHOWN, SelectiveMask, selective_mask
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain.config import Config, Mask, Model, Optim


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
        own = {"visible_only": settings.visible_only, "positions": settings.encoder_positions}
        encoder = create_encoder(settings.encoder, **own, img_size=size, **arguments)
        check_windows(encoder.model, size)
        decoder = None
        if settings.visible_only:
            decoder = Decoder(encoder, settings.decoder_depth, settings.decoder_width, settings.decoder_heads)
        return SGMIM(
            encoder,
            settings.stride,
            guidance=settings.guidance,
            structure_channels=structure_kind(config).channels,
            hidden_context=settings.hidden_context,
            position_embedding=settings.position_embedding,
            accelerate=settings.accelerate,
            decoder=decoder,
            target=settings.target,
            loss=settings.loss,
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
    for name in ("decoder_depth", "decoder_width", "decoder_heads"):
        value = getattr(config.model, name)
        if not config.model.visible_only and value != getattr(Model, name):
            raise UserError(f"model.{name} is {value} without a decoder; expected model.visible_only=true with it")
    structure_kind(config)
    if config.data.limit is not None and config.data.limit <= 0:
        raise UserError(f"data.limit is {config.data.limit}; expected more than 0, or null for none")
    if not 0 < config.mask.ratio < 1:
        raise UserError(f"mask.ratio is {config.mask.ratio}; expected a share between 0 and 1")
    units = (size // unit) ** 2
    if math.ceil(config.mask.ratio * units) == units:
        raise UserError(f"mask.ratio is {config.mask.ratio} of {units} mask units, which leaves none visible")
    shown = read_shown(config.mask.shown)
    if shown not in SHOWN if isinstance(shown, str) else not 0 <= shown <= 1:
        raise UserError(f"mask.shown is {config.mask.shown!r}; expected {', '.join(SHOWN)} or a share between 0 and 1")
    settings = config.data
    if not 0 <= settings.val < 1:
        raise UserError(f"data.val is {settings.val}; expected a share of the data, 0 or more and less than 1")
    if settings.val_structure is not None and settings.val_images is None:
        raise UserError("data.val_images is missing; expected --val-images DIR with --val-structure DIR")
    if settings.val and settings.val_images is not None:
        raise UserError(f"data.val is {settings.val} with data.val_images; expected one of them")
    if settings.val and settings.shards is not None:
        raise UserError("data.val does not split shards; expected --val-images DIR and --val-structure DIR")


def structure_kind(config: Config) -> data.StructureKind:
    """What the structure maps hold.

    Raises:
        UserError: a number that it needs is missing, or one is given that it does not have.
    """
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


def hold_out(config: Config, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """What is trained on of a data set, and what is held out, cut and resized without chance; None: nothing is.

    Raises:
        UserError: nothing would be left to train on.
        DataError: there is something wrong with the folders of held-out data.
    """
    settings = config.data
    if settings.val_images is not None:
        source = {"images": settings.val_images, "structure": settings.val_structure, "shards": None, "scenes": 0}
        other = create_dataset(dataclasses.replace(config, data=dataclasses.replace(settings, **source)))
        return dataset, _without_chance(other, settings.size)
    if not settings.val:
        return dataset, None
    count = max(1, round(settings.val * len(dataset)))
    if isinstance(dataset, data.Scenes):
        more = data.Scenes(len(dataset) + count, settings.size, seed=dataset.seed)
        return dataset, Subset(more, range(len(dataset), len(more)))
    if count == len(dataset):
        raise UserError(f"data.val is {settings.val} of {len(dataset)} images, which leaves none to train on")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(mix(config.run.seed, "held out")))
    held_out, rest = (sorted(part.tolist()) for part in order.split([count, len(dataset) - count]))
    return dataset.part(rest), _without_chance(dataset.part(held_out), settings.size)


def _without_chance(dataset: Dataset, size: int) -> Dataset:
    if isinstance(dataset, Pairs):
        dataset.transform = data.PairTransform.evaluation(size)
    return dataset


def draw_masks(
    settings: Mask, size: int, images: int, seed: int, step: int, device: torch.device, stride: int | None = None
) -> SelectiveMask:
    """Masks of all images of a step, on the device; nothing waits for it.

    Args:
        size: pixels along an image, a multiple of the mask unit.
        images: number of images of the step, over all processes.
        stride: pixels along the encoder's cells, on which the masks are drawn where they make up the units.
    """
    generator = torch.Generator(device).manual_seed(mix(seed, "masks", step))
    return selective_mask(
        images,
        size // settings.unit,
        settings.ratio,
        generator=generator,
        shown=read_shown(settings.shown),
        scale=1 if stride is None or settings.unit % stride else settings.unit // stride,
    )


def read_shown(text: str) -> str | float:
    """The setting `mask.shown` as `selective_mask` takes it."""
    try:
        return float(text)
    except ValueError:
        return text


def create_optimizer(model: SGMIM, settings: Optim) -> torch.optim.AdamW:
    """Fused AdamW. No weight decay on vectors, biases, mask and class token, positions and position tables."""
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=model.no_weight_decay())
    return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)


def learning_rate(settings: Optim, step: int, steps_per_epoch: int, total_batch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run.

    Rates are those of `settings` times total_batch / 512, the warm-up's and the last one too. Warm-up is linear in the
    step; behind it cosine is where it would be without warm-up, as in timm's `CosineLRScheduler` and SimMIM.

    Args:
        steps_per_epoch: optimizer steps of an epoch.
        total_batch: images of a step, over all processes and accumulated backwards.
    """
    scale = total_batch / 512
    high, low, start = scale * settings.lr, scale * settings.min_lr, scale * settings.warmup_lr
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + step * (high - start) / warmup
    if settings.schedule == "multistep":
        milestones = [round(epoch * steps_per_epoch) for epoch in settings.milestones]
        return high * settings.gamma ** bisect_right(milestones, step)
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / round(settings.epochs * steps_per_epoch)))


def find(run: Path, name: str | None = None) -> Saved:
    """The checkpoint of a run of pre-training, see `engine.checkpoint.find`."""
    return checkpoint.find(run, name, Config, "pretrain")


def trained(config: Config) -> Config:
    """The same without weights to start from, which a checkpoint replaces: nothing is downloaded or read for them."""
    arguments = without_sources(config.model.arguments)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arguments=arguments))


def load(saved: Saved) -> SGMIM:
    """The model of a checkpoint, on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        model = create_model(trained(saved.config))
    model.load_state_dict(checkpoint.read(saved.path, "model"))
    return model.eval()
