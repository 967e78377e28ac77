"""Feature maps of timm encoders for dense prediction."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import is_model
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from sgmim_fast import weights
from sgmim_fast.errors import UserError, by, nearest
from sgmim_fast.exported import ERRORS_OF_TIMM, tuples
from sgmim_fast.fused.accelerate import FAST
from sgmim_fast.fused.accelerate import accelerate as accelerate_blocks

_logger = logging.getLogger("sgmim_fast")

Size = int | tuple[int, int]  # side, or (height, width)
_MAPS = 4  # number of feature maps that the heads use


class Features(nn.Module):
    """A timm model that returns feature maps for a head. Use `create_features` to create one.

    Attributes:
        model: the timm module, without the layers after the last map. It has no classifier and no final norm, since
            these would get no gradient. Heads that need normalised maps have their own norm, as mmsegmentation's Swin.
        name, arguments: timm's name, and the arguments with which `create_features` recreates the model.
        channels, strides: number of channels and stride in pixels of each map, finest first.
        img_size: (height, width) for which the model was created.
        fixed_size: `img_size` if the model accepts no other size (BEiT, whose position tables belong to one grid), else
            None.
        notes: messages about resized weights and about assumptions, one line each.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        indices: Sequence[int],
        img_size: tuple[int, int],
        any_size: bool,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        info = [_feature_info(model)[index] for index in indices]
        self.model = model
        self.name = name
        self.arguments: dict[str, Any] = {}
        self.indices = list(indices)
        self.channels: list[int] = [level["num_chs"] for level in info]
        self.strides: list[int] = [level["reduction"] for level in info]
        self.img_size = img_size
        self.fixed_size = None if any_size else img_size
        self.notes = list(notes)
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)

    @property
    def uniform(self) -> bool:
        """Whether all maps have the same stride, as those of ViT and BEiT have."""
        return len(set(self.strides)) == 1

    def forward(self, x: Tensor) -> list[Tensor]:
        """Computes the maps (B, C_i, H / s_i, W / s_i) of images (B, 3, H, W), where H and W are multiples of the
        largest stride."""
        return self.model.forward_intermediates(
            x, indices=self.indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enables timm's gradient checkpointing, which recomputes the activations of blocks in the backward pass."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns timm's names of parameters without weight decay: class token, positions, position tables."""
        names = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in names}


def create_features(
    name: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    img_size: Size,
    window_size: int | Sequence[Any] | None = None,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    indices: Sequence[int] | None = None,
    accelerate: bool = True,
    **timm_arguments: Any,
) -> Features:
    """Creates a feature extractor from any timm model with `forward_intermediates`.

    Models with stages, such as Swin and SwinV2, return the maps of their last four stages (this project's small SwinV2
    has three). ViT and BEiT return the maps of four evenly spaced blocks, 2, 5, 8 and 11 of 12, without class and
    register tokens.

    Weights are resized for other image and window sizes: relative position tables (Swin, BEiT) by timm's
    `resize_rel_pos_bias_table` (interpolation on a geometric grid, as in BEiT), absolute positions by timm's
    `resample_abs_pos_embed`. SwinV2's bias is a function of distances relative to the window of pre-training. That
    window is kept when the window size changes (`pretrained_window_sizes`), as in timm's window12to16 models and the
    published fine-tuning of SimMIM (arXiv 2205.13543, `--pretrain_window_size`). It is read from an exported file; for
    other files timm's default for `name` is assumed, and `Features.notes` says so.

    Swin, SwinV2 and ViT then accept images whose sides are multiples of the largest stride. Swin uses `window_size`
    for all of them (unshifted where one window covered the whole map of `img_size`), and ViT resamples its positions.
    BEiT accepts `img_size` only (`Features.fixed_size`); larger images need sliding windows, see `inference.predict`.

    Args:
        name: timm's name; optional with a file of `export_timm`, which contains it.
        checkpoint: a file of `sgmim_fast.checkpoints.export_timm`, or any state dict of a timm model
            (.safetensors or .pth, also nested under "model" or "state_dict").
        img_size: image size for fine-tuning, side or (height, width) in pixels.
        window_size: window of Swin and SwinV2 in tokens: side, (height, width), or one per stage. Windows are clipped
            to the map. None: as in the file, or timm's default.
        pretrained: loads timm's own weights for `name`, instead of a file.
        drop_path_rate: largest rate of stochastic depth.
        indices: stages or blocks whose maps are returned. None: those named above.
        accelerate: computes the blocks through fused ops; see `sgmim_fast.accelerate`.
        timm_arguments: further arguments of `timm.create_model`; they override those of an exported file.

    Raises:
        UserError: the name is unknown, the file is unreadable, parameters are missing or unexpected (the message has
            the first ones), or timm does not accept the arguments.
    """
    state, written, shaping = (None, None, {}) if checkpoint is None else weights.read(checkpoint)
    if pretrained and checkpoint is not None:
        raise UserError(f"checkpoint {checkpoint} and pretrained weights are given; expected one of them")
    name = _checked_name(name, written, checkpoint)
    arguments = {**shaping, **timm_arguments}
    size = to_2tuple(img_size)
    source = None
    if checkpoint is not None or pretrained:
        with torch.device("meta"):  # only the sizes of its tensors are needed
            source = _create(name, arguments)
    if pretrained:
        state = _create(name, arguments, pretrained=True).state_dict()

    target_arguments = {k: v for k, v in arguments.items() if k not in ("img_size", "num_classes", "global_pool")}
    if window_size is not None:
        target_arguments["window_size"] = tuples(window_size)
    if isinstance(source, SwinTransformerV2):
        target_arguments.setdefault("pretrained_window_sizes", _trained_windows(source))
    model, any_size = _create_for_size(name, size, drop_path_rate, target_arguments)
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"timm's {name} returns no intermediate maps; expected a model with forward_intermediates, such as swin_*, "
            "swinv2_*, beit_* and vit_*"
        )
    notes: list[str] = []
    if state is not None:
        known = written is not None or pretrained
        notes = weights.load(model, state, source, what=str(checkpoint or name), source_known=known)
    for note in notes:
        _logger.info(note)
    features = Features(model, name, _indices(model, name, indices), size, any_size, notes)
    features.arguments = {**target_arguments, "indices": features.indices}
    if accelerate and any(type(module) in FAST for module in model.modules()):
        accelerate_blocks(model)
    return features


def _checked_name(name: str | None, written: str | None, checkpoint: str | os.PathLike[str] | None) -> str:
    if name is None and written is None:
        what = "there is no checkpoint" if checkpoint is None else f"{checkpoint} does not name its timm model"
        raise UserError(f"the encoder's name is missing and {what}; expected a timm name")
    if name is None:
        return str(written)
    base = name.split(".")[0]
    if not is_model(base):
        raise UserError(f"timm has no model {name!r}{nearest(base, timm.list_models())}")
    if written is not None and written.split(".")[0] != base:
        raise UserError(f"{checkpoint} holds a {written}, not a {name}; leave the name out, or give that one")
    return name


def _create(name: str, arguments: dict[str, Any], **more: Any) -> nn.Module:
    try:
        return timm.create_model(name, **{**arguments, **more})
    except (*ERRORS_OF_TIMM, OSError) as error:
        raise UserError(f"timm cannot create {name} with {arguments}: {_one_line(error)}") from error


def _create_for_size(
    name: str, size: tuple[int, int], drop_path_rate: float, arguments: dict[str, Any]
) -> tuple[nn.Module, bool]:
    """Creates the model for an image size with the arguments of its family; also returns whether it accepts other
    sizes."""
    attempts: list[dict[str, Any]] = [
        {"img_size": size, "strict_img_size": False},  # Swin
        {"img_size": size, "dynamic_img_size": True},  # ViT
        {"img_size": size},
        {},  # convolutional networks, which accept any size
    ]
    drop_path = {"drop_path_rate": drop_path_rate}
    refused = ""
    for extra in [{**one, **drop_path} for one in attempts] + ([] if drop_path_rate else [{}]):
        try:
            model = timm.create_model(name, **{**arguments, "num_classes": 0, **extra})
            strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
            return model, "img_size" not in extra or (len(extra) == 3 and not strict)
        except TypeError as error:
            refused = _one_line(error)
            if not any(f"'{argument}'" in refused for argument in extra):
                break
        except ERRORS_OF_TIMM as error:
            refused = _one_line(error)
            break
    raise UserError(f"timm cannot create {name} for {by(size)} with {arguments}: {refused}")


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = model.feature_info
    return info if isinstance(info, list) else list(info.info)


def _indices(model: nn.Module, name: str, given: Sequence[int] | None) -> list[int]:
    info = _feature_info(model)
    count = len(info)
    if given is not None:
        chosen = sorted(index % count for index in given if -count <= index < count)
        if len(chosen) != len(given) or len(set(chosen)) != len(chosen) or not chosen:
            raise UserError(f"indices are {list(given)}; {name} has stages or blocks 0 to {count - 1}")
        return chosen
    if len({level["reduction"] for level in info}) > 1:
        return list(range(max(0, count - _MAPS), count))
    maps = min(_MAPS, count)
    return [(index + 1) * count // maps - 1 for index in range(maps)]


def _trained_windows(source: SwinTransformerV2) -> tuple[tuple[int, int], ...]:
    """Returns the window size of each stage in pre-training."""
    attention = [stage.blocks[0].attn for stage in source.layers]
    return tuple(
        tuple(one.pretrained_window_size if one.pretrained_window_size[0] > 0 else one.window_size) for one in attention
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
