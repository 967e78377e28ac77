"""Loads initial weights for pre-training: `--init FILE | timm:NAME | RUN`.

A file may be written by `export_timm`, contain any other weights of the encoder's timm model, or be a checkpoint of the
published code. Its tensors are renamed to the names of `SGMIM`, resized to the model (positions, position tables,
channels of the stem), and loaded if all of them fit. Parameters that the file lacks, such as the branch's, keep their
random initialisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from sgmim_fast import weights
from sgmim_fast.checkpoints import published_names
from sgmim_fast.encoders import nearest_name
from sgmim_fast.engine import checkpoint
from sgmim_fast.errors import UserError
from sgmim_fast.model import SGMIM
from sgmim_fast.pretrain.config import Config

TIMM = "timm:"
_ENCODER, _TOKEN = "encoder.model.", "encoder.mask_token"
# layers that pre-training does not have: classifiers, pooling with parameters, and a norm after the pooling
_CLASSIFIERS = re.compile(r"^(head|head_dist|fc|classifier|attn_pool|pre_logits)(\.|$)")
_STEM = "patch_embed.proj.weight"
_NORM = re.compile(r"^fc_norm\.")


def load(model: SGMIM, config: Config) -> list[str]:
    """Loads the weights that `config.model.init` names into the model.

    Returns:
        Messages about the tensors that were loaded, resized, and left at their random initialisation.

    Raises:
        UserError: there are no such weights, or some do not fit and `model.init_partial` is not set. The message lists
            those that do not fit.
    """
    what = str(config.model.init)
    state, source, known = _read(model, config, what)
    own = model.state_dict()
    encoder = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
    rest = {k: v for k, v in state.items() if not k.startswith(_ENCODER)}
    target = model.encoder.model
    encoder, lines = _adapted(encoder, target, model.in_chans, what)
    fitted, notes = weights.fit(target, encoder, source, what=what, source_known=known, unused=_CLASSIFIERS)
    found = {_ENCODER + name: value for name, value in fitted.items()} | rest
    expected = {k: v for k, v in own.items() if not weights.is_buffer(k)}
    fits = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    # All of the encoder's parameters are required; of heads and branch, those that the file has.
    wanted = {k: v for k, v in expected.items() if k.startswith(_ENCODER) or k in found}
    problems = weights.differences(found, wanted)
    if not any(name.startswith(_ENCODER) for name in fits):
        raise UserError(f"{what} has no weights of a {config.model.encoder}; {problems}")
    if problems:
        if not config.model.init_partial:
            raise UserError(f"{what} does not fit the model; {problems}; --set model.init_partial=true loads the rest")
        lines.append(f"{what}: left out: {problems}")
    model.load_state_dict(fits, strict=False)
    parts = sorted({name.split(".")[0] for name in expected if name not in fits})
    lines.append(f"{what}: {len(fits)} of {len(expected)} tensors loaded")
    if parts:
        lines[-1] += f"; at random: {', '.join(f'{_missing(part, expected, fits)} of {part}' for part in parts)}"
    return lines[:-1] + notes + lines[-1:]


def _missing(part: str, expected: Mapping[str, Tensor], fits: Mapping[str, Tensor]) -> int:
    return sum(name.split(".")[0] == part and name not in fits for name in expected)


def _read(model: SGMIM, config: Config, what: str) -> tuple[dict[str, Tensor], nn.Module, bool]:
    """Reads the weights. Returns the tensors by their names in `SGMIM`; a timm model with the sizes for which the
    encoder's tensors were made; and whether the source names that model, rather than it being assumed."""
    if what.startswith(TIMM):
        state, source = _of_timm(what.removeprefix(TIMM))
        return _of_encoder(state, model), source, True
    path = Path(what)
    if path.is_dir():
        saved = checkpoint.find(path, None, Config, "pretrain")
        settings = saved.config.model
        with torch.device("meta"):
            arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.arguments.items()}
            arguments = {k: v for k, v in arguments.items() if not k.startswith("pretrained")}
            source = _create(settings.encoder, img_size=saved.config.data.size, **arguments)
        return checkpoint.read(saved.path, "model"), source, True
    state, name, arguments = weights.read(path)
    with torch.device("meta"):
        source = _create(name or config.model.encoder, **arguments)
    return _own_names(state, model), source, name is not None


def _of_timm(name: str) -> tuple[dict[str, Tensor], nn.Module]:
    base = name.split(".")[0]
    if not timm.is_model(base):
        raise UserError(f"--init timm:{name}: timm has no model {name!r}{nearest_name(base)}")
    tags = timm.list_pretrained(f"{base}.*") + timm.list_pretrained(base)
    if not tags or ("." in name and name not in tags):
        raise UserError(f"--init timm:{name}: timm has no weights of that name; it has {', '.join(tags) or 'none'}")
    try:
        source = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # raised by huggingface_hub, and for an invalid file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--init timm:{name}: cannot get the weights: {reason}; huggingface_hub keeps what it has loaded in "
            "HF_HOME, and HF_HUB_OFFLINE=1 uses nothing else"
        ) from error
    return source.state_dict(), source


def _create(name: str, **arguments: object) -> nn.Module:
    return timm.create_model(name, **{**arguments, "num_classes": 0})


def _own_names(state: Mapping[str, Tensor], model: SGMIM) -> dict[str, Tensor]:
    """Renames the tensors of a file, which has names of the published code, of SGMIM or of a timm model."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith(_ENCODER) for name in state):
        return state
    if not any(name.startswith("encoder.") for name in state):
        return _of_encoder(state, model)
    published = {theirs: ours for ours, theirs in published_names(model).items()}
    own, simmims = model.state_dict(), {"decoder.0.weight": "image_head.weight", "decoder.0.bias": "image_head.bias"}
    published |= simmims
    found = {}
    for name, value in state.items():
        ours = published.get(name, name if not name.startswith("encoder.") else f"{_ENCODER}{name[8:]}")
        if weights.is_buffer(name) or name.startswith("encoder.depth_patch_embed."):
            continue
        if ours in own and value.ndim == 4 and own[ours].ndim == 2:
            value = value.flatten(1)  # heads are 1 x 1 convolutions in the published code
        found[ours] = value
    return found


def _of_encoder(state: Mapping[str, Tensor], model: SGMIM) -> dict[str, Tensor]:
    """Renames the tensors of a timm model. A norm after the pooling becomes the final norm if the encoder has that."""
    own = model.encoder.model.state_dict()
    behind_pooling = "norm.weight" in own and "norm.weight" not in state
    found = {}
    for name, value in state.items():
        if name == "mask_token":
            found[_TOKEN] = value
            continue
        name = _NORM.sub("norm.", name) if behind_pooling else name
        if not (_NORM.match(name) and "fc_norm.weight" not in own):
            found[_ENCODER + name] = value
    return found


def _adapted(
    state: dict[str, Tensor], target: nn.Module, channels: int, what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapts a stem for 3 channels to another number of channels, as timm does; returns the tensors and messages."""
    weight = state.get(_STEM)
    if weight is None or weight.ndim != 4 or weight.shape[1] == channels:
        return state, []
    if weight.shape[1] != 3:
        other = "" if channels == 3 else " or of 3, which can be adapted"
        raise UserError(
            f"{what} has a stem of {weight.shape[1]} channels, images have {channels}; expected weights of {channels}"
            + other
        )
    how = "added up" if channels == 1 else f"repeated and divided by {channels / 3:.3g}"
    line = f"{what}: the stem's 3 channels adapted to {channels}: {how}"
    return {**state, _STEM: adapt_input_conv(channels, weight)}, [line]
