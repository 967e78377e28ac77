"""Reads files of timm models, and fits their weights to a model for another image or window size."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import load_state_dict
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from sgmim_fast import exported
from sgmim_fast.errors import UserError, by

_TABLE = "relative_position_bias_table"
# Names of modules that dense prediction does not use: classifier, pooling, the norm before them, and the mask token.
_UNUSED = re.compile(r"^(head|head_dist|fc|classifier|norm|fc_norm|attn_pool|pre_logits|mask_token)(\.|$)")
_BUFFERS = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|k_bias)$")

Pair = tuple[int, int]


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None, dict[str, Any]]:
    """Reads a state dict, and the timm name and arguments that `export_timm` wrote (None and {} in other files).

    Raises:
        UserError: there is no such file, or it does not contain a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected a timm checkpoint (.safetensors, .pth)")
    name, arguments = exported.describe(path) if path.suffix == ".safetensors" else (None, {})
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):  # torch and timm advise to run its code
            reason = "it is no checkpoint of torch.save with tensors alone"
        raise UserError(f"cannot read {path}: {reason}") from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; expected a timm checkpoint (.safetensors, .pth)")
    return state, name, arguments


def load(
    model: nn.Module, state: Mapping[str, Tensor], source: nn.Module, *, what: str, source_known: bool
) -> list[str]:
    """Loads those weights of another size of the same model that dense prediction uses.

    Args:
        model: the model without classifier, before any of its modules is removed.
        state: state dict of the file.
        source: the model that the weights belong to. Only its sizes are read, so it may be on the meta device.
        what: description of the weights, for messages.
        source_known: whether `source` is known to be that model; False: it is timm's default for the name.

    Returns:
        A line for each kind of resizing, which says so if the sizes of pre-training had to be guessed.

    Raises:
        UserError: parameters are missing, unexpected or of another shape; the message names the first ones.
    """
    fitted, notes = fit(model, state, source, what=what, source_known=source_known, unused=_UNUSED)
    if problems := differences(fitted, _used(model.state_dict(), _UNUSED)):
        raise UserError(f"{what} does not fit the encoder; {problems}")
    model.load_state_dict(fitted, strict=False)
    return notes


def fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: nn.Module,
    *,
    what: str,
    source_known: bool,
    unused: re.Pattern[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Resizes the weights for the model, without loading them. Returns them and the lines that `load` returns.

    Args:
        model, state, source, what, source_known: see `load`.
        unused: pattern of names to leave out.
    """
    fitted = dict(state)
    # The position tables are resized here, since timm's filters assume that every table belongs to a square window.
    positions = {name: fitted.pop(name) for name, value in state.items() if _is_position(name, value, model)}
    convert: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    fitted = _used(fitted if convert is None else convert(fitted, model), unused)
    by_timm = [name for name, value in fitted.items() if name in state and value.shape != state[name].shape]
    resized: dict[str, set[tuple[Pair, Pair]]] = {"relative position bias tables": set(), "absolute positions": set()}
    expected = _used(model.state_dict(), unused)
    for name, value in positions.items():
        if name == "pos_embed" and expected.get(name) is not None:
            value, change = _absolute(value, expected[name], model, source)
            kind = "absolute positions"
        elif name in expected:
            value, change = _table(name, value, model, source)
            kind = "relative position bias tables"
        else:
            kind, change = "", None
        if change is not None:
            resized[kind].add(change)
        fitted[name] = value
    notes = [f"{what}: resized by timm's filter: {_first(by_timm)}"] if by_timm else []
    return fitted, notes + _notes(resized, model, what, source_known)


def _used(state: Mapping[str, Tensor], unused: re.Pattern[str]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not unused.match(name) and not _BUFFERS.search(name)}


def _is_position(name: str, value: Tensor, model: nn.Module) -> bool:
    """Whether a tensor has positions in the layout of Swin, BEiT and ViT. timm's filters fit those of other models."""
    if name == "pos_embed":
        return value.ndim == 3 and getattr(getattr(model, "patch_embed", None), "grid_size", None) is not None
    return name.endswith(_TABLE) and value.ndim == 2


def _table(name: str, value: Tensor, model: nn.Module, source: nn.Module) -> tuple[Tensor, tuple[Pair, Pair] | None]:
    module = model.get_submodule(name.rpartition(".")[0])
    new, shape = tuple(module.window_size), module.relative_position_bias_table.shape
    old = _window_of(source, name, value)
    if value.shape[-1] != shape[-1] or new == old or (old is None and value.shape == shape):
        return value, None
    if old is None:
        extra = shape[0] - (2 * new[0] - 1) * (2 * new[1] - 1)
        side = (round((value.shape[0] - extra) ** 0.5) + 1) // 2
        if (2 * side - 1) ** 2 + extra != value.shape[0]:
            return value, None  # `load` then reports another shape
        old = (side, side)
    oblong = {} if old[0] == old[1] else {"old_window_size": old}
    try:
        value = resize_rel_pos_bias_table(value, new_window_size=new, new_bias_shape=shape, **oblong)
    except TypeError:  # an older timm, without old_window_size, supports square windows only
        raise UserError(
            f"timm {timm.__version__} cannot resize {name} from oblong windows of {by(old)}; install a newer timm"
        ) from None
    return value, (old, new)


def _window_of(source: nn.Module, name: str, value: Tensor) -> Pair | None:
    """Returns the window size of a table in the source model; None if that has no table of the same shape."""
    try:
        module = source.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
    table = getattr(module, _TABLE, None)
    return tuple(module.window_size) if table is not None and table.shape == value.shape else None


def _absolute(
    value: Tensor, expected: Tensor, model: nn.Module, source: nn.Module
) -> tuple[Tensor, tuple[Pair, Pair] | None]:
    new = tuple(model.patch_embed.grid_size)
    prefix = expected.shape[1] - new[0] * new[1]
    old = tuple(source.patch_embed.grid_size)
    if old[0] * old[1] + prefix != value.shape[1]:
        side = round((value.shape[1] - prefix) ** 0.5)
        old = (side, side)
    if old == new or old[0] * old[1] + prefix != value.shape[1]:
        return value, None
    return resample_abs_pos_embed(value, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix), (old, new)


def is_buffer(name: str) -> bool:
    """Whether a name is that of a buffer that models compute from their sizes. Files may contain it, too."""
    return bool(_BUFFERS.search(name))


def differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describes what is missing, unexpected or of another shape, with the first names of each; "" if nothing is."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names)


def _first(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _notes(resized: Mapping[str, set[tuple[Pair, Pair]]], model: nn.Module, what: str, source_known: bool) -> list[str]:
    notes = []
    for kind, changes in resized.items():
        if changes:
            unit = "windows" if kind.startswith("relative") else "a grid"
            listed = ", ".join(f"{by(old)} -> {by(new)}" for old, new in sorted(changes, reverse=True))
            notes.append(f"{what}: {kind} resized for {unit} of tokens: {listed}")
    if isinstance(model, SwinTransformerV2):
        pairs = [(new.blocks[0].attn.pretrained_window_size, new.blocks[0].attn.window_size) for new in model.layers]
        changes = [f"{by(old)} -> {by(new)}" for old, new in pairs if tuple(old) != tuple(new)]
        if changes:
            guessed = "" if source_known else " (timm's default for the name: the file does not say)"
            notes.append(
                f"{what}: SwinV2's continuous position bias computed for other windows, in units of those of "
                f"pre-training{guessed}: {', '.join(dict.fromkeys(changes))}"
            )
    return notes
