"""Creates model, parameter groups, data sets and metrics from a configuration, and validates its settings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor
from torch.utils.data import Dataset

from sgmim_fast.engine.settings import OF_EVERY_RUN_0, OF_EVERY_RUN_1, at_least, check_numbers
from sgmim_fast.errors import UserError, by
from sgmim_fast.exported import IMAGENET, require_rgb, tuples, without_sources
from sgmim_fast.exported import normalisation as read_normalisation
from sgmim_fast.finetune import data
from sgmim_fast.finetune.config import Config, Model, Optim
from sgmim_fast.finetune.data.transform import scaled
from sgmim_fast.finetune.encoder import Features, create_features
from sgmim_fast.finetune.heads import DenseModel
from sgmim_fast.finetune.heads import create_model as with_head
from sgmim_fast.finetune.metrics import DepthMetrics, SegmentationMetrics

LEAST_PADDING = 0.02  # padded share of the crops above which `padding` returns a message
_TASKS = {"nyu": "depth", "kitti": "depth", "ade20k": "segmentation"}  # data sets that support one task only


def check(config: Config) -> None:
    """Validates the settings. Raises UserError with the setting, its value and what is expected."""
    settings, optim = config.data, config.optim
    at_least(config, 1, (*OF_EVERY_RUN_1, "model.head_channels", "evaluation.images"))
    at_least(config, 0, (*OF_EVERY_RUN_0, "data.classes", "optim.min_lr", "optim.warmup_epochs", "optim.power"))
    check_numbers(config)
    only = _TASKS.get(settings.source, settings.task)
    if only != settings.task:
        raise UserError(
            f"data.source is {settings.source}, which is for {only}; expected another one for {settings.task}"
        )
    for name in ("mean", "std"):
        if name in settings.augment:
            raise UserError(
                f"data.augment has {name}; expected none, since images are normalised as in the encoder's pre-training"
            )
    if min(settings.size) < 1:
        raise UserError(f"data.size is {settings.size}; expected height and width in pixels")
    if settings.source == "scenes":
        at_least(config, 1, ("data.scenes", "data.test_scenes"))
        if settings.size[0] != settings.size[1]:
            raise UserError(f"data.size is {settings.size}; procedural scenes are square")
    if not 0 <= optim.layer_decay <= 1:
        raise UserError(f"optim.layer_decay is {optim.layer_decay}; expected 0 to 1")
    if not 0 <= config.model.drop_path < 1:
        raise UserError(f"model.drop_path is {config.model.drop_path}; expected 0 or more, below 1")
    if config.run.fsdp:
        raise UserError("run.fsdp is true; fine-tuning on several processes is DDP only")


def create_features_of(config: Config, encoder: dict[str, Any] | None = None) -> Features:
    """Creates the encoder, with the initial weights of the configuration, or with random weights if a checkpoint will
    be loaded.

    Args:
        encoder: description of the encoder from a checkpoint; see `describe_encoder`. None: loads `model.encoder`.

    Raises:
        UserError: the encoder does not exist, or it does not fit the settings.
    """
    settings = config.model
    given: dict[str, Any] = {
        "img_size": tuple(config.data.size),
        "drop_path_rate": settings.drop_path,
        "accelerate": settings.accelerate,
    }
    if encoder is not None:
        return create_features(encoder["name"], **given, **tuples(without_sources(encoder["arguments"])))
    name, checkpoint = _name_and_file(settings)
    if settings.window_size is not None:
        sizes = settings.window_size
        given["window_size"] = sizes[0] if len(sizes) == 1 else sizes
    arguments = tuples(settings.arguments)
    features = create_features(name, checkpoint=checkpoint, pretrained=settings.pretrained, **given, **arguments)
    require_rgb(f"model.encoder {settings.encoder}", features.arguments.get("in_chans", 3))
    return features


def _name_and_file(settings: Model) -> tuple[str | None, Path | None]:
    """Returns the timm name (None: the file says it) and the file of the encoder's weights (None: there is none)."""
    path = Path(settings.encoder)
    if not settings.encoder:
        raise UserError(
            "model.encoder is missing; expected --encoder FILE.safetensors, the folder of a run, or a timm name"
        )
    if path.is_dir():
        path = path / "encoder.safetensors"
        if not path.is_file():
            raise UserError(
                f"model.encoder is {settings.encoder}, which has no encoder.safetensors; expected a finished run of "
                "sgmim-fast pretrain, or a file of sgmim-fast export"
            )
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        return settings.encoder, None if settings.weights is None else Path(settings.weights)
    if settings.weights is not None:
        raise UserError(f"model.weights is {settings.weights} and model.encoder is a file too; expected one of them")
    return None, path


def normalisation(config: Config, encoder: dict[str, Any] | None = None) -> dict[str, tuple[float, ...]]:
    """Returns the keyword arguments `mean` and `std` of transforms: those of the encoder's pre-training, and ImageNet's
    if these are not known.

    Args:
        encoder: description of the encoder from a checkpoint; None: reads the file of its weights.

    Raises:
        UserError: the file is missing or invalid, or its encoder does not take RGB images.
    """
    if encoder is not None:
        return {name: tuple(encoder.get(name, usual)) for name, usual in IMAGENET.items()}
    _, path = _name_and_file(config.model)
    if path is None or path.suffix != ".safetensors":
        return dict(IMAGENET)
    found = read_normalisation(path)
    require_rgb(str(path), len(found["mean"]))
    return found


def describe_encoder(features: Features) -> dict[str, Any]:
    """Returns name and arguments from which `create_features_of` recreates the encoder; serialisable as JSON."""
    return {"name": features.name, "arguments": features.arguments}


def create_model(config: Config, outputs: int, encoder: dict[str, Any] | None = None) -> DenseModel:
    """Creates the encoder and a head with `outputs` channels. For `encoder` see `create_features_of`.

    Raises:
        UserError: see `create_features_of`; also if the head does not support the encoder.
    """
    model = with_head(
        create_features_of(config, encoder), config.model.head, outputs, channels=config.model.head_channels
    )
    if config.model.freeze:
        model.freeze()
    if config.model.checkpointing:
        model.set_grad_checkpointing()
    return model


def param_groups(model: DenseModel, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Returns parameter groups with "params", "weight_decay" and "lr_scale", by which the caller multiplies the
    learning rate.

    Layers are those of timm's `param_groups_layer_decay`: the stem, then each block. A Swin's downsampling belongs to
    the following block. Layer i of n has the scale layer_decay ** (n - i). The head is layer n and has the scale 1, so
    that the last block has the scale layer_decay, as in the protocols of BEiT and MIM. (The published MIM depth code
    counts a Swin's three downsamplings as separate layers, which lowers the rates of the first layers further.)

    Vectors, biases, and the parameters that timm's `no_weight_decay` names have no weight decay.

    Args:
        layer_decay: factor per layer, at most 1 (no decay). 0 freezes the encoder (`DenseModel.freeze`), and returns no
            group for it.

    Raises:
        UserError: layer_decay is outside 0 to 1.
    """
    if not 0 <= layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}; expected 0 (a frozen encoder) to 1 (no decay)")
    head = param_groups_weight_decay(model.head, weight_decay)
    groups = [{**group, "lr_scale": 1.0} for group in head]
    if layer_decay == 0:
        model.freeze()
        return groups
    encoder = model.features.model
    names = getattr(encoder, "no_weight_decay", set)()
    layers = param_groups_layer_decay(encoder, weight_decay, no_weight_decay_list=names, layer_decay=layer_decay)
    # The scale of the last block is 1 in timm. Here the head follows as one more layer.
    return [{**group, "lr_scale": group["lr_scale"] * layer_decay} for group in layers] + groups


def learning_rate(settings: Optim, step: int, steps: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step, counted from 0, in a run of `steps`.

    "triangle" rises from `min_lr` to `lr` over the first half of the run and falls back over the second half, as
    progress**power. It is the depth schedule of "Revealing the Dark Secrets of Masked Image Modeling" (arXiv
    2205.13543). "poly" decays from `lr` as (1 - progress)**power, as in mmsegmentation, and "cosine" as half a cosine;
    both end at `min_lr`. A linear warm-up from 0 replaces the start of "poly" and "cosine" without shifting them.
    """
    low, high = settings.min_lr, settings.lr
    if settings.schedule == "triangle":
        half = max(1.0, steps / 2)
        if step < half:
            return low + (high - low) * (step / half) ** settings.power
        return high - (high - low) * min(1.0, step / half - 1) ** settings.power
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    share = step / steps
    if settings.schedule == "poly":
        rate = low + (high - low) * (1 - share) ** settings.power
    else:
        rate = low + 0.5 * (high - low) * (1 + math.cos(math.pi * share))
    return rate * (step + 1) / (warmup + 1) if step < warmup else rate


def create_dataset(config: Config, train: bool, images: dict[str, tuple[float, ...]]) -> Dataset:
    """Creates the data set for training or for testing, which is one of `sgmim_fast.finetune.data`.

    Args:
        images: mean and standard deviation with which images are normalised; see `normalisation`.

    Raises:
        UserError: settings of the source are missing.
        DataError: the source is unusable.
    """
    settings, seed = config.data, config.run.seed
    if settings.source == "scenes":
        count = settings.scenes if train else settings.test_scenes
        return data.SceneMaps(settings.task, count, settings.size[0], seed, train, **images)
    dataset = _read(config, train)
    dataset.transform = _transform(config, dataset, train, images)
    return dataset


def _read(config: Config, train: bool) -> Any:
    settings, seed = config.data, config.run.seed
    names = settings.train_list if train else settings.test_list
    if settings.source == "ade20k":
        return data.ADE20K(_required(settings, "root"), "train" if train else "test", seed=seed)
    if settings.source != "folders":
        kind = {"nyu": data.NYU, "kitti": data.KITTI}[settings.source]
        options = {"split_file": names, "check_units": settings.check_units, "seed": seed}
        return kind(_required(settings, "root"), "train" if train else "test", **options)
    images, maps = (_required(settings, name if train else f"test_{name}") for name in ("images", "maps"))
    if settings.task == "depth":
        known = {"min_depth": settings.min_depth, "max_depth": settings.max_depth}
        known = {name: value for name, value in known.items() if value is not None}
        return data.DepthFolders(
            *(images, maps),
            names=names,
            scale=settings.scale,
            check_units=settings.check_units,
            seed=seed,
            **known,
        )
    if settings.classes < 2:
        raise UserError(f"data.classes is {settings.classes}; expected the number of classes in data.maps, 2 or more")
    return data.SegmentationFolders(
        *(images, maps),
        classes=settings.classes,
        names=names,
        ignore=settings.ignore,
        reduce_zero=settings.reduce_zero,
        seed=seed,
    )


def _transform(config: Config, dataset: Any, train: bool, images: dict[str, tuple[float, ...]]) -> Any:
    settings = config.data
    if not train:
        return data.DenseTransform.evaluation(settings.task, tuple(settings.size), **images)
    given = tuples(settings.augment)
    if settings.task == "depth":
        given.setdefault("max_depth", depth_range(config, dataset)[1])
    try:
        return data.DenseTransform(tuple(settings.size), settings.task, **given, **images)
    except TypeError as error:
        raise UserError(f"data.augment is {settings.augment}; expected arguments of DenseTransform: {error}") from error


def padding(config: Config, dataset: Any) -> str:
    """Returns a message if training crops are padded, judged by the sizes of some images, and "" otherwise."""
    transform = getattr(dataset, "transform", None)
    if not isinstance(transform, data.DenseTransform):
        return ""
    sizes = [tuple(size) for size in dataset.sizes()]
    empty = []
    for size in sizes:
        fitted = scaled(size, transform.fit, sum(transform.scale) / 2)
        empty.append(1 - math.prod(min(1.0, have / want) for have, want in zip(fitted, transform.size, strict=True)))
    share = sum(empty) / max(1, len(empty))
    if share < LEAST_PADDING:
        return ""
    return (
        f"{share:.0%} of the crops of {by(transform.size)} is padding: images measure {by(min(sizes))} to "
        f"{by(max(sizes))}; a smaller data.size has less"
    )


def depth_range(config: Config, dataset: Any) -> tuple[float, float]:
    """Returns smallest and largest depth in metres, from the configuration or else from the data set."""
    low = dataset.min_depth if config.data.min_depth is None else config.data.min_depth
    high = dataset.max_depth if config.data.max_depth is None else config.data.max_depth
    if not 0 < low < high:
        raise UserError(
            f"data.min_depth is {low} and data.max_depth {high}; expected 0 < smallest < largest, in metres"
        )
    return low, high


def create_metrics(config: Config, dataset: Any) -> DepthMetrics | SegmentationMetrics:
    """Creates the metrics of the task, with the range, crop or classes of the configuration or else of the data set."""
    if config.data.task == "segmentation":
        return SegmentationMetrics(dataset.classes)
    crop = dataset.crop if config.data.crop is None else config.data.crop
    return DepthMetrics(*depth_range(config, dataset), crop=None if crop == "none" else crop)


def plain(found: dict[str, Tensor]) -> dict[str, float]:
    """Returns the scalar metrics as floats."""
    return {name: value.item() for name, value in found.items() if value.ndim == 0}


def _required(settings: Any, name: str) -> str:
    value = getattr(settings, name)
    if value is None:
        raise UserError(
            f"data.{name} is missing; expected --{name.replace('_', '-')} DIR with data.source {settings.source}"
        )
    return value
