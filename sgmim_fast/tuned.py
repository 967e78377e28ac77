"""Stores the choices of `sgmim_fast.tune` for this machine in files, and looks them up in every call of an op.

A table is a folder of the user's cache. Its name depends on everything that affects the times: the device and its
architecture, the number of threads, the versions of this package, torch, Triton and CUDA, and the compiled libraries.
Another version has another folder, so measurements of an older one are not read. Each measurement of a model is a file
in the folder and is replaced atomically, so that several processes can tune and read concurrently without locks. A file
with a wrong format, machine or checksum is ignored, with one warning.

Environment: `SGMIM_FAST_TUNED=0` disables the tables. `SGMIM_FAST_CACHE=folder` sets their location; the default is
`$XDG_CACHE_HOME/sgmim_fast` or `~/.cache/sgmim_fast`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import operator
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgmim_fast import _native

FORMAT = 1
SETTINGS = ("SGMIM_FAST_PRODUCTS", "SGMIM_FAST_TRITON_PRODUCTS", "SGMIM_FAST_LIBRARY")  # settings that affect times

# Arguments that determine the time of an op: two tensors, by their shapes (a list by its length) and the dtype of the
# first; then other arguments, if any, by value. The backward of a composed op has the same key as its forward.
SHAPED_BY: dict[tuple[str, str], tuple[str, ...]] = {
    ("gather_patches", "backward"): ("grad", "rows", "cell", "patch", "zorder"),
    ("gather_patches", "forward"): ("pixels", "rows", "cell", "patch", "zorder"),
    ("selective_mask", "forward"): ("seed", "masked", "gh", "gw", "scale"),
    ("standardize_structure", "forward"): ("structure", "structure", "ignore"),
    ("token_salience", "forward"): ("x", "x"),
    **{
        (op, part): names
        for part in ("forward", "backward")
        for op, names in {
            "linear_l1": ("x", "weight", "packed", "squared", "normalized", "dtype"),
            "masked_patch_embed": ("x", "visible", "dtype"),
            "norm_attention": ("x", "index", "heads", "post_norm", "dtype"),
            "norm_linear": ("x", "weight", "dtype"),
            "norm_mlp": ("x", "fc1_weight", "post_norm", "dtype"),
            "position_bias": ("coordinates", "fc2_weight"),
            "relational_guidance": ("features", "structure", "keep_hidden", "dtype"),
            "structure_embed": ("structure", "rows", "cell", "dtype"),
            "window_attention": ("qkv", "bias", "heads"),
        }.items()
    },
}

Key = tuple[Any, ...]
Table = dict[tuple[str, str, Key], str]  # op, part, key -> backend or "BACKEND:VARIANT", see `backends.implementation`

_tables: dict[str, Table] = {}  # device type -> the table that was read; empty if there is none
generation = 0  # how often the tables of this process have changed


@functools.cache
def _places(op: str, part: str) -> tuple[int, int, Callable[[Sequence[Any]], Any]]:
    """Returns the indices of the two tensors in a call's arguments, and a function that gets the rest of its key."""
    overload = getattr(torch.ops.sgmim_fast, op if part == "forward" else f"{op}_backward").default
    names = [argument.name for argument in overload._schema.arguments]
    first, second, *rest = (names.index(name) for name in SHAPED_BY[op, part])
    return first, second, operator.itemgetter(*rest) if rest else lambda args: ()


def key(op: str, part: str, args: Sequence[Any]) -> Key:
    """Returns the key of a call in a table."""
    first, second, rest = _places(op, part)
    x, y = args[first], args[second]
    shape = y.shape if isinstance(y, torch.Tensor) else y if y is None else len(y)
    return x.shape, x.dtype, shape, rest(args)


def lookup(op: str, part: str, device: str, args: Sequence[Any]) -> str | None:
    """Returns the backend that was fastest for such a call, or None if it was not measured."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _first(device)
    return table.get((op, part, key(op, part, args))) if table else None


def _first(device: str) -> Table:
    there = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    return read(device) if there and enabled() else {}


def enabled() -> bool:
    """Whether tables are used, which SGMIM_FAST_TUNED=0 disables.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    wanted = os.environ.get("SGMIM_FAST_TUNED", "1").strip() or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"SGMIM_FAST_TUNED is {wanted!r}; expected 0 or 1")
    return wanted == "1"


def forget() -> None:
    """Clears the tables of this process, so that the next call reads the files again."""
    global generation
    _tables.clear()
    generation += 1


def folder() -> Path:
    """Returns the folder of all tables."""
    own = os.environ.get("SGMIM_FAST_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgmim_fast"
    return (Path(own) if own else cache) / "tuned"


def machine(device: str) -> dict[str, str]:
    """Returns everything that times on a device of this type depend on."""
    facts = {name: version(name) for name in ("torch", "triton")}
    facts["sgmim_fast"] = importlib.import_module("sgmim_fast").__version__
    facts |= {name: os.environ.get(name, "") for name in SETTINGS}
    facts["built"] = _built()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"device": properties.name, "architecture": f"sm_{properties.major}{properties.minor}"}
        return facts | {"multiprocessors": str(properties.multi_processor_count), "cuda": torch.version.cuda or ""}
    facts |= {"device": cpu_model(), "architecture": torch.backends.cpu.get_cpu_capability()}
    return facts | {"threads": str(torch.get_num_threads())}


def version(package: str) -> str:
    """Returns the version of an installed package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _built() -> str:
    """Returns a string that identifies the build of the compiled libraries."""
    found = sorted(Path(_native.__file__).parent.glob("_C*.so"))
    return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in found)


def cpu_model() -> str:
    """Returns the system's name of the CPU model."""
    info = Path("/proc/cpuinfo")  # Linux only; other systems use `platform`
    models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def table_folder(device: str) -> Path:
    """Returns the folder of the table for this machine and these versions."""
    facts = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")[:40]
    return folder() / f"{name}-{_digest(facts)[:16]}"


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def use(device: str, choices: Mapping[tuple[str, str, Key], str]) -> None:
    """Adds choices to the table of this process."""
    global generation
    if device not in _tables:
        _tables[device] = _first(device)
    _tables[device].update(choices)
    generation += 1


def save(device: str, choices: Mapping[tuple[str, str, Key], str]) -> Path:
    """Stores choices for later processes, in addition to earlier ones, and adds them to the table of this process.

    Returns:
        The path of the file. Its name depends only on the calls that the choices are for.

    Raises:
        OSError: the file cannot be written. This process uses the choices nevertheless.
    """
    use(device, choices)
    entries = [[op, part, _to_json(key), name] for (op, part, key), name in choices.items()]
    called = _digest(sorted(entry[:3] for entry in map(_text, entries)))[:16]
    content = {"format": FORMAT, "machine": machine(device), "choices": entries}
    path = table_folder(device) / f"{called}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        try:
            json.dump(content | {"sha256": _digest(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def _text(entry: list[Any]) -> list[str]:
    return [json.dumps(part) for part in entry]


def read(device: str) -> Table:
    """Reads all files of this machine's table. If several have the same call, the newest counts.

    Never raises because of a file's content; logs a warning (logger "sgmim_fast") for each file that is ignored.
    """
    found: Table = {}
    try:
        files = sorted(table_folder(device).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    except OSError as error:
        _warn(folder(), error.strerror or str(error))
        return {}
    for path in files:
        try:
            found |= _checked(json.loads(path.read_text()), device)
        except (OSError, ValueError, RecursionError) as error:
            _warn(path, str(error))
    return found


def describe(device: str) -> str:
    """Returns a description of this machine's table, for display."""
    if not enabled():
        return "not used, SGMIM_FAST_TUNED is 0"
    count = len(read(device))
    return f"{count} choices in {table_folder(device)}" if count else "nothing (sgmim-fast tune)"


def _warn(path: Path, why: str) -> None:
    logging.getLogger("sgmim_fast").warning(
        "ignored a tuning file; run `sgmim-fast tune` to replace it: %s: %s", path, why
    )


def _checked(content: Any, device: str) -> Table:
    """Returns the choices in the content of a file.

    Raises:
        ValueError: the content is not exactly what `save` wrote on this machine.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    checksum = content.pop("sha256", None)
    if checksum != _digest(content):
        raise ValueError("its checksum is wrong")
    if content["machine"] != machine(device):
        raise ValueError("it was measured on another machine or with other versions")
    return {(op, part, _from_json(key)): name for op, part, key, name in content["choices"]}


def _to_json(value: Any) -> Any:
    """Converts a key to JSON types: shapes and groups become lists, dtypes become their names."""
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, torch.dtype) else value


def _from_json(value: Any) -> Any:
    """Converts a key from JSON types, the inverse of `_to_json`."""
    if isinstance(value, list):
        return tuple(_from_json(entry) for entry in value)
    return getattr(torch, value.removeprefix("torch.")) if isinstance(value, str) else value
