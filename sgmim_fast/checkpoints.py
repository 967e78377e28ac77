"""Converts checkpoints from and to the published code, and exports encoders to timm.

| here | published (SG-MIM, SimMIM) |
|---|---|
| `encoder.mask_token`, `encoder.model.*` | `encoder.mask_token`, `encoder.*` |
| ... of a Swin, `layers.{i + 1}.downsample` | `layers.{i}.downsample`: the end of stage i, not the start of the next |
| `structure_encoder.patch_embed.*` | `depth_encoder.depth_patch_embed.*` |
| `structure_encoder.merges.{i}.*` | `depth_encoder.patch_merging_{i + 1}.*` |
| `guidance.attn.*`, other `guidance.*` | `fusion_blk_img.cross_attn.*`, `fusion_blk_img.*` |
| `image_head.*` | `img_decoder.0.*`; without guidance, as in SimMIM, `decoder.0.*` |
| `structure_head.*` | `dep_decoder.0.*` |

Heads are linear layers here, (O, C), and 1x1 convolutions in the published code, (O, C, 1, 1). The names of a foreign
encoder (any module that `create_encoder` did not make, such as the published classes) are not changed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .encoders import MaskedEncoder

# Derived buffers, which timm recomputes, and a stem in the published Swin class that its forward never uses.
_IGNORED = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$|^(encoder\.)?depth_patch_embed\."
)

# Own names outside the encoder -> published names, applied in turn.
_RULES = (
    (r"^structure_encoder\.patch_embed\.", "depth_encoder.depth_patch_embed."),
    (r"^structure_encoder\.merges\.(\d+)\.", lambda m: f"depth_encoder.patch_merging_{int(m[1]) + 1}."),
    (r"^guidance\.attn\.", "fusion_blk_img.cross_attn."),
    (r"^guidance\.", "fusion_blk_img."),
    (r"^image_head\.", "img_decoder.0."),
    (r"^structure_head\.", "dep_decoder.0."),
)

# Arguments of timm.create_model that do not determine the names and shapes of parameters.
_RUN_TIME_ARGUMENTS = re.compile(
    r"(\w+_)?drop_rate|drop_path_rate|pretrained\w*|cache_dir|checkpoint_path|scriptable|exportable|no_jit|device|dtype"
)


def load_published(model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Loads a checkpoint of the published SG-MIM or SimMIM code. If an entry does not fit, the model is unchanged.

    Buffers that are computed from sizes (`relative_position_index`, `relative_coords_table`, `attn_mask`) are ignored,
    and so is `encoder.depth_patch_embed`, which the published Swin has but never uses.

    Args:
        model: `SGMIM`, or only an encoder of `create_encoder`. An `SGMIM` with `guidance=False` loads checkpoints of
            SimMIM. An encoder loads the `encoder.*` entries of either, or the same entries without the prefix.
        state_dict: maps published names to tensors, optionally inside `{"model": ...}` as the published code saves
            it; or the path of such a file (`.pth`, loaded with `weights_only`, or `.safetensors`). The prefix `module.`
            of data-parallel training is removed. Values are cast to the parameters' dtype.

    Raises:
        TypeError: `model` is neither an SGMIM nor an encoder.
        ValueError: names are missing or unexpected, or shapes differ (the message lists them all); or the file cannot
            be read.
        OSError: the file does not exist, or is a directory.
    """
    if isinstance(state_dict, (str, os.PathLike)):
        state_dict = _read(state_dict)
    model = _known(model)
    own = model.state_dict()
    published = _published_names(model, own)
    given = _unwrap(state_dict)
    if "image_head.weight" not in own and any(name.startswith("encoder.") for name in given):
        given = {name.removeprefix("encoder."): v for name, v in given.items() if name.startswith("encoder.")}
    given = {name: v for name, v in given.items() if name in published.values() or not _IGNORED.search(name)}
    published = {own_name: name for own_name, name in published.items() if name in given or not _IGNORED.search(name)}
    expected = {name: _published_shape(own_name, own[own_name]) for own_name, name in published.items()}
    unreadable = [name for name, value in given.items() if name in expected and not _readable(value)]
    if unreadable:
        raise ValueError(f"state_dict has no dense tensors of real numbers in {', '.join(unreadable)}")
    _require_same("state_dict does not fit the model", given, expected)
    loaded = {own_name: given[name].reshape(own[own_name].shape) for own_name, name in published.items()}
    model.load_state_dict(loaded, strict=False)


def published_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict under the published names, the inverse of `load_published`.

    Args:
        model: `SGMIM`, or only an encoder of `create_encoder`, whose names then have no prefix `encoder.`.

    Returns:
        A dict from published names to tensors, which share memory with the model. It does not contain the buffers that
        the published classes also save (the published code loads with `strict=False` and computes them itself), except
        for those of a foreign encoder. Names without a published counterpart follow the table above: the guidance's
        learned positions are `fusion_blk_img.pos_embed`, and a plain ViT has timm's names.

    Raises:
        TypeError: `model` is neither an SGMIM nor an encoder.
    """
    model = _known(model)
    own = model.state_dict()
    names = _published_names(model, own)
    return {name: own[own_name].reshape(_published_shape(own_name, own[own_name])) for own_name, name in names.items()}


def published_names(model: nn.Module) -> dict[str, str]:
    """Returns a dict from own to published name, with every parameter and buffer that the published code also has."""
    model = _known(model)
    return _published_names(model, model.state_dict())


def export_timm(
    model: nn.Module,
    path: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **timm_arguments: Any,
) -> None:
    """Writes the encoder to a safetensors file that timm loads strictly::

        timm.create_model(encoder.timm_name, **encoder.timm_arguments, checkpoint_path=path)

    `forward_features` of that model returns bitwise the encoder's tokens, (B, h, w, C) for Swin, after class and
    register tokens for other models. The arguments are those of `create_encoder`; only those that determine the
    parameters matter (`img_size`, `window_size`, `use_shared_rel_pos_bias`, ...). The file contains them, too::

        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata()
        timm.create_model(meta["timm_name"], **json.loads(meta["timm_arguments"]), checkpoint_path=path)

    `checkpoint_path` does not resize anything. For another image size or number of classes, or for timm's default
    arguments, timm's filters resize the position tables (square windows only) and remove the classifier::

        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path, custom_load=False))

    The classifier in the file is zero and must be trained. It is included because timm loads strictly, and because the
    Swin and SwinV2 filters of older timm versions mistake a file without `head.fc.weight` for one of Microsoft's and
    renumber its `downsample` entries.

    For BEiT and the `gap` ViTs timm's default is average pooling *before* the final norm, `fc_norm`. The file then has
    the encoder's norm as `fc_norm`, and the tokens are `timm_model.fc_norm(timm_model.forward_features(x))`. To have
    the norm inside `forward_features`, export with `global_pool="token"` (or "") and pass the same argument to timm.

    Args:
        model: `SGMIM`, or only an encoder. The encoder must be one of `create_encoder`.
        path: path of the file, which must end in `.safetensors`, since timm selects the format by the suffix.
        num_classes: number of classes of the timm model; None: timm's default for this name. 0: no classifier, for
            `timm.create_model(name, num_classes=0, checkpoint_path=path)`.
        mean, std: mean and standard deviation of each channel, with which images were normalised in pre-training. The
            file then contains them, and `sgmim-fast finetune` and `fourier` use them. None: ImageNet's are assumed.
        timm_arguments: changes to the arguments with which the timm model will be created, e.g. `global_pool`.

    Raises:
        TypeError: the encoder is foreign.
        ValueError: `path` has another suffix, or the timm model would have parameters that the encoder does not have or
            has in another shape; the message lists them.
    """
    encoder = _uncompiled(getattr(_uncompiled(model), "encoder", model))
    if not isinstance(encoder, MaskedEncoder):
        raise TypeError(
            f"model must have an encoder of create_encoder to be exported to timm, got a {type(encoder).__name__}"
        )
    if not os.fspath(path).endswith(".safetensors"):
        raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
    arguments = {**encoder.timm_arguments, "num_classes": num_classes, **timm_arguments}
    arguments = {k: v for k, v in arguments.items() if v is not None and not _RUN_TIME_ARGUMENTS.fullmatch(k)}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # do not change the random state of a training
        target = timm.create_model(encoder.timm_name, **arguments)
    expected = target.state_dict()

    state = _uncompiled(encoder.model).state_dict()
    if "fc_norm.weight" in expected and "norm.weight" not in expected:
        state = {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in state.items()}
    classifiers = target.pretrained_cfg["classifier"]
    for classifier in (classifiers,) if isinstance(classifiers, str) else classifiers:
        for name in (f"{classifier}.weight", f"{classifier}.bias"):
            if name in expected:
                state[name] = torch.zeros_like(expected[name])
    _require_same(
        f"the encoder does not fit timm.create_model({encoder.timm_name!r}, **{arguments})",
        state,
        {name: value.shape for name, value in expected.items()},
    )
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {
        "format": "pt",
        "timm_name": encoder.timm_name,
        "timm_arguments": json.dumps(arguments, default=repr),
        **{name: json.dumps(list(value)) for name, value in (("mean", mean), ("std", std)) if value is not None},
    }
    save_file(state, os.fspath(path), metadata)


def _read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    with open(path, "rb") as file:
        start = file.read(4)
    try:
        if not start.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's formats, zip and (older) pickle
            raise pickle.UnpicklingError("neither a zip archive nor a pickle")
        # the published code saves its settings, a subclass of dict, besides the weights
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # another format, truncated, or contains code
        raise ValueError(
            f"cannot read {path}; expected a checkpoint of torch.save with nothing but data in it. If it is whole and "
            "you trust it, pass torch.load(path, weights_only=False)"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a state dict")
    return found


def _known(model: nn.Module) -> nn.Module:
    """Returns the model, or the one that was compiled. Raises TypeError unless it is an SGMIM or an encoder."""
    model = _uncompiled(model)
    if not isinstance(model, MaskedEncoder) and not (hasattr(model, "encoder") and hasattr(model, "image_head")):
        raise TypeError(f"model must be an SGMIM or an encoder of create_encoder, got a {type(model).__name__}")
    return model


def _published_names(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns a dict from own to published name, with all entries of the state dict but timm's ignored buffers."""
    alone = isinstance(model, MaskedEncoder)
    encoder = model if alone else _uncompiled(model.encoder)
    prefix = "" if alone else "encoder."
    rules = list(_RULES)
    if "structure_head.weight" not in own:
        rules.insert(0, (r"^image_head\.", "decoder.0."))

    published = {}
    for name in own:
        new = name.replace("_orig_mod.", "")  # prefix of compiled submodules
        if not new.startswith(prefix):
            for pattern, replacement in rules:
                new = re.sub(pattern, replacement, new)
        elif isinstance(encoder, MaskedEncoder):
            if _IGNORED.search(new):
                continue
            new = prefix + new.removeprefix(prefix).removeprefix("model.")
            if hasattr(encoder.model, "layers"):
                new = re.sub(r"(?<=layers\.)(\d+)(?=\.downsample\.)", lambda m: str(int(m[1]) - 1), new)
        published[name] = new
    return published


def _published_shape(name: str, value: Tensor) -> torch.Size:
    convolution = name in ("image_head.weight", "structure_head.weight")
    return torch.Size((*value.shape, 1, 1)) if convolution else value.shape


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = state_dict.get("model", state_dict) if isinstance(state_dict, Mapping) else state_dict
    if not isinstance(inner, Mapping) or not all(isinstance(name, str) for name in inner):
        raise TypeError(f"state_dict is a {type(inner).__name__}; expected a dict from names to tensors, or a path")
    if all(name.startswith("module.") for name in inner):
        return {name.removeprefix("module."): value for name, value in inner.items()}
    return dict(inner)


def _readable(value: Any) -> bool:
    """Whether `copy_` can read a value: it is a dense tensor of real numbers, with storage."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return dense and not value.is_quantized and not value.is_complex()


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _require_same(what: str, given: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
    if listed:
        raise ValueError(f"{what}; {listed}")
