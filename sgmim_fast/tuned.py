"""What `sgmim_fast.tune` has found fastest on this machine: the files that keep it, and the look-up in every call.

A table is a folder of the user's cache, named after all that its times depend on: the device and its architecture, the
number of threads, the versions of this package, torch, Triton and CUDA, the compiled libraries. Another version is
another folder, so what an older one has measured is not looked at. In it, each measurement of a model is a file of its
own that is replaced as a whole: several processes may tune and read at once, without locks. A file counts only where
its format, its machine and its checksum are right; anything else is as if it were not there, and is said once.

Environment: `SGMIM_FAST_TUNED=0` leaves the tables alone; `SGMIM_FAST_CACHE=folder` is where they are, else
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
SETTINGS = ("SGMIM_FAST_PRODUCTS", "SGMIM_FAST_TRITON_PRODUCTS", "SGMIM_FAST_LIBRARY")  # that change what is fast

# What the time of an op depends on: two tensors, whose shapes count (of a list its length), and the dtype of the first;
# then arguments, if there are any, that count by value. The backward of a composition has the same key as its forward.
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
            "norm_attention": ("x", "bias", "heads", "post_norm", "dtype"),
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
Table = dict[tuple[str, str, Key], str]  # op, part, key -> the backend, as `backends.implementation` takes it

_tables: dict[str, Table] = {}  # device type -> what was read; empty where nothing is known


@functools.cache
def _places(op: str, part: str) -> tuple[int, int, Callable[[Sequence[Any]], Any]]:
    """Where the arguments are that make a key."""
    overload = getattr(torch.ops.sgmim_fast, op if part == "forward" else f"{op}_backward").default
    names = [argument.name for argument in overload._schema.arguments]
    first, second, *rest = (names.index(name) for name in SHAPED_BY[op, part])
    return first, second, operator.itemgetter(*rest) if rest else lambda args: ()


def key(op: str, part: str, args: Sequence[Any]) -> Key:
    """What a table knows a call by."""
    first, second, rest = _places(op, part)
    x, y = args[first], args[second]
    shape = y.shape if isinstance(y, torch.Tensor) else y if y is None else len(y)
    return x.shape, x.dtype, shape, rest(args)


def lookup(op: str, part: str, device: str, args: Sequence[Any]) -> str | None:
    """The backend that was the fastest for such a call, or None where nobody has measured it."""
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _first(device)
    return table.get((op, part, key(op, part, args))) if table else None


def _first(device: str) -> Table:
    there = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    return read(device) if there and enabled() else {}


def enabled() -> bool:
    """Whether SGMIM_FAST_TUNED leaves the tables in use.

    Raises:
        ValueError: it is set to what is neither 0 nor 1.
    """
    wanted = os.environ.get("SGMIM_FAST_TUNED", "1").strip() or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"SGMIM_FAST_TUNED is {wanted!r}; expected 0 or 1")
    return wanted == "1"


def forget() -> None:
    """Lets the next call read the tables again: those of this process stay as they were first read."""
    _tables.clear()


def folder() -> Path:
    """Of all tables."""
    own = os.environ.get("SGMIM_FAST_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgmim_fast"
    return (Path(own) if own else cache) / "tuned"


def machine(device: str) -> dict[str, str]:
    """All that the times on a device of this type depend on."""
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
    """Of an installed package; "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _built() -> str:
    """Tells one build of the compiled libraries from another."""
    found = sorted(Path(_native.__file__).parent.glob("_C*.so"))
    return " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in found)


def cpu_model() -> str:
    """As the system names it."""
    info = Path("/proc/cpuinfo")  # Linux; elsewhere platform knows
    models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return models[0] if models else platform.processor() or platform.machine()


def table_folder(device: str) -> Path:
    """Of the table of this machine and its versions."""
    facts = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")[:40]
    return folder() / f"{name}-{_digest(facts)[:16]}"


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def use(device: str, choices: Mapping[tuple[str, str, Key], str]) -> None:
    """Uses choices in this process from now on, beside what its table holds."""
    if device not in _tables:
        _tables[device] = _first(device)
    _tables[device].update(choices)


def save(device: str, choices: Mapping[tuple[str, str, Key], str]) -> Path:
    """Keeps choices for later processes, beside what was kept before, and uses them from now on.

    Returns:
        the file. Choices for the same calls, in whatever process, have the same file.

    Raises:
        OSError: it cannot be written; the choices hold for this process all the same.
    """
    use(device, choices)
    entries = [[op, part, _plain(key), name] for (op, part, key), name in choices.items()]
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
    """What is known of this machine: all files of its table, of several for one call the newest.

    Never raises for what the files hold; logs a warning (logger "sgmim_fast") for each that is not used.
    """
    found: Table = {}
    try:
        files = sorted(table_folder(device).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    except OSError as error:
        _say(folder(), error.strerror or str(error))
        return {}
    for path in files:
        try:
            found |= _checked(json.loads(path.read_text()), device)
        except (OSError, ValueError, RecursionError) as error:
            _say(path, str(error))
    return found


def describe(device: str) -> str:
    """How much is known of this machine, and where."""
    if not enabled():
        return "not used, SGMIM_FAST_TUNED is 0"
    count = len(read(device))
    return f"{count} choices in {table_folder(device)}" if count else "nothing (sgmim-fast tune)"


def _say(path: Path, why: str) -> None:
    logging.getLogger("sgmim_fast").warning(
        "what was tuned is not used, `sgmim-fast tune` makes it anew: %s: %s", path, why
    )


def _checked(content: Any, device: str) -> Table:
    """The choices of a file's content.

    Raises:
        ValueError: it is not exactly what `save` has written on this machine.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    checksum = content.pop("sha256", None)
    if checksum != _digest(content):
        raise ValueError("its checksum is wrong")
    if content["machine"] != machine(device):
        raise ValueError("it was measured on another machine or with other versions")
    return {(op, part, _read(key)): name for op, part, key, name in content["choices"]}


def _plain(value: Any) -> Any:
    """A key as JSON has it: shapes and groups are lists, dtypes their names."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, torch.dtype) else value


def _read(value: Any) -> Any:
    """And back."""
    if isinstance(value, list):
        return tuple(_read(entry) for entry in value)
    return getattr(torch, value.removeprefix("torch.")) if isinstance(value, str) else value
