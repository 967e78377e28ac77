"""Creates model, optimizer, masks and data sets from a configuration, and validates its settings."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor
from torch.utils.data import Dataset, Subset

from sgmim_fast import data
from sgmim_fast.data.pairs import Pairs
from sgmim_fast.data.seeds import mix
from sgmim_fast.decoder import Decoder
from sgmim_fast.encoders import create_encoder, nearest_name
from sgmim_fast.engine import checkpoint
from sgmim_fast.engine.checkpoint import Saved
from sgmim_fast.engine.settings import OF_EVERY_RUN_0, OF_EVERY_RUN_1, at_least, check_numbers
from sgmim_fast.errors import UserError
from sgmim_fast.exported import ERRORS_OF_TIMM, IMAGENET, without_sources
from sgmim_fast.masking import SHOWN, SelectiveMask, selective_mask
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain.config import Config, Mask, Model, Optim


def create_model(config: Config) -> SGMIM:
    """Creates the model of a configuration. The initialisation uses torch's default generator.

    Raises:
        UserError: timm does not know the encoder (the message names similar ones), or sizes do not fit together.
    """
    settings, size = config.model, config.data.size
    base = settings.encoder.split(".")[0]
    if not timm.is_model(base):
        raise UserError(f"timm has no model {settings.encoder!r}{nearest_name(base)}")
    check(config)
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.arguments.items()}
    if "img_size" in arguments:
        raise UserError("model.arguments has img_size; expected data.size to say it, for the images as well")
    try:
        own = {"visible_only": settings.visible_only, "positions": settings.encoder_positions}
        if config.data.image_channels is not None:
            arguments["in_chans"] = config.data.image_channels
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
    except ERRORS_OF_TIMM as error:
        raise UserError(f"model.encoder {settings.encoder} with {settings.arguments}: {error}") from error


def check(config: Config) -> None:
    """Validates the settings: their ranges, and that the image size is a multiple of the stride and of the mask unit.

    Raises:
        UserError: a setting is invalid. The message has the setting, its value and what is expected.
    """
    size, stride, unit = config.data.size, config.model.stride, config.mask.unit
    at_least(config, 1, (*OF_EVERY_RUN_1, "model.stride", "data.size", "data.epoch_images", "mask.unit"))
    at_least(config, 0, (*OF_EVERY_RUN_0, "data.scenes", "optim.warmup_lr", "optim.min_lr", "optim.warmup_epochs"))
    check_numbers(config)
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
    if config.data.probe is not None and config.data.probe_kind == "semantic" and config.data.probe_classes is None:
        raise UserError("data.probe_classes is missing; with data.probe_kind=semantic it says how many there are")
    _check_channels(config)
    if config.data.limit is not None and config.data.limit <= 0:
        raise UserError(f"data.limit is {config.data.limit}; expected more than 0, or null for none")
    if not 0 < config.mask.ratio < 1:
        raise UserError(f"mask.ratio is {config.mask.ratio}; expected a share between 0 and 1")
    units, most = (size // unit) ** 2, config.mask.ratio
    if config.mask.masking == "salience":
        _check_salience(config.mask)
        most += 0 if config.mask.adaptive == "none" else config.mask.spread
    if math.ceil(most * units) == units:
        raise UserError(f"mask.ratio is {config.mask.ratio} of {units} mask units, which leaves none visible")
    shown = read_shown(config.mask.shown)
    if shown not in SHOWN if isinstance(shown, str) else not 0 <= shown <= 1:
        raise UserError(f"mask.shown is {config.mask.shown!r}; expected {', '.join(SHOWN)} or a share between 0 and 1")
    if not 0 <= config.optim.ema < 1:
        raise UserError(f"optim.ema is {config.optim.ema}; expected 0 (none) or more, less than 1")
    for name, given in (("optim.ema", config.optim.ema), ("data.probe", config.data.probe)):
        if given and config.run.fsdp:
            raise UserError(f"{name} is {given} with run.fsdp, whose weights are in shards; expected one of them")
    if not 0 < config.optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay is {config.optim.layer_decay}; expected more than 0, at most 1")
    settings = config.data
    if not 0 <= settings.val < 1:
        raise UserError(f"data.val is {settings.val}; expected a share of the data, 0 or more and less than 1")
    if settings.val_structure is not None and settings.val_images is None:
        raise UserError("data.val_images is missing; expected --val-images DIR with --val-structure DIR")
    if settings.val and settings.val_images is not None:
        raise UserError(f"data.val is {settings.val} with data.val_images; expected one of them")
    if settings.val_images is not None and settings.val_structure is None and config.model.guidance:
        raise UserError("data.val_structure is missing; expected --val-structure DIR with --val-images DIR")
    if settings.val and settings.shards is not None:
        raise UserError("data.val does not split shards; expected --val-images DIR and --val-structure DIR")


def _check_salience(settings: Mask) -> None:
    ratio, spread = settings.ratio, settings.spread
    if spread < 0 or not 0 < ratio - spread <= ratio + spread < 1:
        raise UserError(f"mask.spread is {spread} around mask.ratio {ratio}; expected shares between 0 and 1")
    if not 0 <= settings.threshold <= 1:
        raise UserError(f"mask.threshold is {settings.threshold}; expected a number between 0 and 1")


def structure_kind(config: Config) -> data.StructureKind:
    """Returns the kind of structure maps that `config.data` describes.

    Raises:
        UserError: a setting that the kind needs is missing, or a setting is given that the kind does not have.
    """
    settings = config.data
    given = {"channels": settings.channels, "classes": settings.classes, "ignore": settings.ignore}
    return data.structure_kind(settings.structure_kind, **given, limit=settings.limit, prefix="data.")


def normalisation(config: Config) -> dict[str, tuple[float, ...]]:
    """Returns the keyword arguments `mean` and `std`, with which the channels of the images are normalised."""
    settings = config.data
    if settings.mean is None or settings.std is None:
        return dict(IMAGENET)
    return {"mean": settings.mean, "std": settings.std}


def _check_channels(config: Config) -> None:
    settings, channels = config.data, config.data.image_channels
    given = {"data.mean": settings.mean, "data.std": settings.std}
    missing = [name for name, value in given.items() if value is None]
    if channels is not None:
        at_least(config, 1, ("data.image_channels",))
        if settings.images is None:
            raise UserError(f"data.image_channels is {channels} without data.images; expected --images DIR")
        if missing:
            raise UserError(
                f"{missing[0]} is missing with data.image_channels {channels}; sgmim-fast data stats {settings.images} "
                f"--channels {channels} measures it"
            )
    if settings.scenes and len(missing) < 2:
        raise UserError("data.mean and data.std are given with data.scenes, which are normalised by ImageNet's")
    if len(missing) == 1:
        raise UserError(f"{missing[0]} is missing; expected data.mean and data.std, or neither")
    for name, value in given.items():
        if value is not None and len(value) != (channels or 3):
            raise UserError(f"{name} has {len(value)} numbers; expected {channels or 3}, one for each channel")
    if settings.std is not None and min(settings.std) <= 0:
        raise UserError(f"data.std is {list(settings.std)}; expected numbers above 0")
    own = config.model.arguments.get("in_chans", channels or 3)
    if own != (channels or 3):
        raise UserError(f"model.arguments.in_chans is {own}, images have {channels or 3} channels; leave it out")


def check_windows(model: object, size: int) -> None:
    """Validates that the tokens of every stage of a Swin divide into windows. timm would pad them, which the published
    models never do.

    Raises:
        UserError: a stage does not divide. The message has its number.
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
    """Creates the data set of a configuration. Its items are of the type `sgmim_fast.data.Item`.

    Raises:
        UserError: no source, several sources or half of a source is given, or settings do not fit the source.
        DataError: the source is unusable.
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
    cut = {"scale": settings.scale, "ratio": settings.ratio, "flip": settings.flip}
    try:
        transform = data.PairTransform(settings.size, **cut, **normalisation(config))
    except ValueError as error:  # the message starts with the name of the argument
        raise UserError(f"data.{error}") from error
    guided = config.model.guidance  # without guidance, which is SimMIM, no maps are read
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
    options = {"seed": seed, "missing": settings.missing, "kind": kind, "channels": settings.image_channels}
    return data.FolderPairs(settings.images, structure, transform, **options)


def hold_out(config: Config, dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """Splits a data set into training and held-out data.

    Returns:
        The training data, and the held-out data, which uses central crops instead of random ones, or None.

    Raises:
        UserError: no training data would be left.
        DataError: the folders of held-out data are unusable.
    """
    settings = config.data
    if settings.val_images is not None:
        source = {"images": settings.val_images, "structure": settings.val_structure, "shards": None, "scenes": 0}
        other = create_dataset(dataclasses.replace(config, data=dataclasses.replace(settings, **source)))
        return dataset, _deterministic(other, config)
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
    return dataset.part(rest), _deterministic(dataset.part(held_out), config)


def _deterministic(dataset: Dataset, config: Config) -> Dataset:
    if isinstance(dataset, Pairs):
        dataset.transform = data.PairTransform.evaluation(config.data.size, **normalisation(config))
    return dataset


class Scores(NamedTuple):
    """Random numbers of salience-based masks. The masks themselves depend on the images, too."""

    noise: Tensor  # (images, units), uniform in [0, 1); part of the units' scores
    seed: int  # with `first`, the seed of the generator for the other random numbers
    first: int = 0  # index of the first image within the step

    def part(self, first: int, count: int) -> Scores:
        """Returns the random numbers of `count` images from `first` on."""
        return Scores(self.noise[first : first + count], self.seed, self.first + first)


Drawn = SelectiveMask | Scores


def draw_masks(
    settings: Mask, size: int, images: int, seed: int, step: int, device: torch.device, stride: int | None = None
) -> SelectiveMask:
    """Draws random masks for all images of a step on the device, without synchronising.

    Args:
        size: pixels along each side of an image, a multiple of the mask unit.
        images: number of images of the step, over all processes.
        stride: the encoder's stride. If it divides the unit, the masks are returned on the grid of cells, so that the
            model need not resize them.
    """
    generator = torch.Generator(device).manual_seed(mix(seed, "masks", step))
    options = {"shown": read_shown(settings.shown), "scale": _scale(settings.unit, stride)}
    return selective_mask(images, size // settings.unit, settings.ratio, generator=generator, **options)


def draw_step(config: Config, images: int, seed: int, step: int, device: torch.device) -> Drawn:
    """Draws the masks of all images of a step, over all processes, on the device, without synchronising.

    The result depends on `seed` and `step` alone. With salience-based masking it contains the random numbers of the
    masks, from which `masks_of` computes them.
    """
    settings, size = config.mask, config.data.size
    if settings.masking == "random":
        return draw_masks(settings, size, images, seed, step, device, stride=config.model.stride)
    generator = torch.Generator(device).manual_seed(mix(seed, "masks", step))
    noise = torch.rand(images, (size // settings.unit) ** 2, generator=generator, device=device)
    return Scores(noise, mix(seed, "shown", step))


def masks_of(drawn: Drawn, config: Config, model: SGMIM, images: Tensor) -> SelectiveMask:
    """Returns the masks of the images from what `draw_step` drew for them. Salience-based masking synchronises."""
    if isinstance(drawn, SelectiveMask):
        return drawn
    settings = config.mask
    generator = torch.Generator(images.device).manual_seed(mix(drawn.seed, drawn.first))
    own = {name: getattr(settings, name) for name in ("masking", "ratio", "spread", "threshold", "adaptive")}
    own |= {"shown": read_shown(settings.shown), "scale": _scale(settings.unit, config.model.stride)}
    salience = model.salience(images).nan_to_num(0)  # the loss of a non-finite image is not finite: the step is skipped
    units = config.data.size // settings.unit
    return selective_mask(len(images), units, salience=salience, noise=drawn.noise, generator=generator, **own)


def _scale(unit: int, stride: int | None) -> int:
    return 1 if stride is None or unit % stride else unit // stride


def read_shown(text: str) -> str | float:
    """Parses the setting `mask.shown`. Returns the argument of `selective_mask`: a number or a name."""
    try:
        return float(text)
    except ValueError:
        return text


def create_optimizer(model: SGMIM, settings: Optim) -> torch.optim.AdamW:
    """Creates a fused AdamW, without weight decay on vectors, biases, mask and class token, positions and position
    tables.

    `layer_decay` lowers the learning rate of the encoder's layers, which are those of timm's
    `param_groups_layer_decay`: it multiplies the last layer's rate once, and that of each earlier layer once more.
    Heads, branch and mask token have the full rate.
    """
    decay, names = settings.weight_decay, model.no_weight_decay()
    groups = param_groups_weight_decay(model, decay, no_weight_decay_list=names)
    if settings.layer_decay != 1:
        encoder = model.encoder.model
        layers = param_groups_layer_decay(
            encoder, decay, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=settings.layer_decay
        )
        own = {id(p) for p in encoder.parameters()}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        groups = [{**group, "lr_scale": group["lr_scale"] * settings.layer_decay} for group in layers] + rest
    return torch.optim.AdamW(groups, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)


def learning_rate(settings: Optim, step: int, steps_per_epoch: int, total_batch: int) -> float:
    """Returns the learning rate of a step.

    All rates of `settings` are multiplied by total_batch / 512. The linear warm-up replaces the start of the schedule
    without shifting it, as in timm's `CosineLRScheduler` (warmup_prefix=False) and SimMIM.

    Args:
        step: index of the optimizer step, counted from 0 over the whole run.
        steps_per_epoch: optimizer steps per epoch.
        total_batch: images per optimizer step, over all processes and accumulated backward passes.
    """
    scale = total_batch / 512
    high, low, start = scale * settings.lr, scale * settings.min_lr, scale * settings.warmup_lr
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return start + step * (high - start) / warmup
    if settings.schedule == "multistep":
        milestones = [round(epoch * steps_per_epoch) for epoch in settings.milestones]
        return high * settings.gamma ** bisect_right(milestones, step)
    steps = max(1, round(settings.epochs * steps_per_epoch))
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * step / steps))


def find(run: Path, name: str | None = None) -> Saved:
    """Finds a checkpoint of a pre-training run; see `engine.checkpoint.find`."""
    return checkpoint.find(run, name, Config, "pretrain")


def without_initial_weights(config: Config) -> Config:
    """Returns the configuration without the sources of initial weights, so that none are downloaded or read. A
    checkpoint replaces them."""
    arguments = without_sources(config.model.arguments)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, arguments=arguments))


def load(saved: Saved) -> SGMIM:
    """Loads the model of a checkpoint, on the CPU, in evaluation mode. Where the checkpoint has averaged weights, these
    are loaded."""
    with torch.random.fork_rng(devices=[]):
        model = create_model(without_initial_weights(saved.config))
    model.load_state_dict(checkpoint.read(saved.path, "model") | checkpoint.averages(saved.path))
    return model.eval()
