"""What the guidance branch should take on a GPU, from bytes, operations and launches: to be compared with a real run.

    python benchmarks/model.py [--step]

--step: the encoder too, forward and backward, as timm has it and accelerated; with the branch that makes a training
step without the optimizer, as `bench_step.py` times it.

Runs anywhere. The fused branch runs with every Triton launch caught in place of being made, and the dense and the plain
visible one on tensors without data; each launch, ours or PyTorch's, is one line of

    time = max(bytes / bandwidth, operations / rate, shortest launch)

bytes: every tensor read or written once, of gathered ones the rows that are wanted; nothing is taken to stay in a
cache. The constants are the data sheet's times a usual share of it, and print beside the result. PyTorch's launches are
counted as it runs on a CPU under autocast, where softmax and LayerNorm stay in bfloat16: on a GPU the dense branch
moves more bytes than this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_guidance import build
from bench_step import ENCODERS
from measure import machine
from shapes import SHAPES, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import sgmim_fast
from sgmim_fast import backends
from sgmim_fast.kernels import launch as launching
from sgmim_fast.ops import products


@dataclass(frozen=True)
class Device:
    """Rates of a GPU."""

    name: str
    architecture: str
    multiprocessors: int
    bandwidth: float  # bytes / s of its memory
    half: float  # operations / s of its tensor cores, bfloat16 or float16
    single: float  # operations / s in float32, tf32 off
    shortest: float  # seconds of a launch that does next to nothing, with the gap to the next


# NVIDIA's data sheet: 4.8 TB/s, 989 and 67 TFLOP/s. Assumed to be reached: 75 %, 60 % and 75 % of it.
H200 = Device("H200", "sm_90", 132, 0.75 * 4.8e12, 0.60 * 989e12, 0.75 * 67e12, 2.5e-6)

# Allocations, views and questions launch nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias", "device", "promote_types"}


def launches_nothing(func: Any) -> bool:
    """Whether an ATen operator is a view, an allocation or a question."""
    return func.is_view or func._opname in FREE or func._opname.startswith("_unsafe_view")


def on_triton(func: Any, args: tuple) -> Any:
    """What an operator of sgmim_fast gives through its Triton implementation, wherever the tensors are."""
    op, backward, _ = func._opname.partition("_backward")
    return backends.implementation(op, "backward" if backward else "forward", "triton")(*args)


@dataclass
class Line:
    """One launch."""

    name: str
    bytes: float
    operations: float
    seconds: float


class Trace(TorchDispatchMode):
    """Notes every launch in its block: PyTorch's, and those caught from the kernels."""

    def __init__(self, device: Device):
        super().__init__()
        self.device, self.lines = device, list[Line]()

    def note(self, name: str, moved: float, operations: float, dtype: torch.dtype) -> None:
        rate = self.device.single if dtype == torch.float32 else self.device.half
        seconds = max(moved / self.device.bandwidth, operations / rate, self.device.shortest)
        self.lines.append(Line(name, moved, operations, seconds))

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors(values))
        if "DTYPE" in values:
            half = values["DTYPE"].primitive_bitwidth == 16
        dtype = torch.bfloat16 if half else torch.float32
        self.note(name, moved_by(name, values), operations_of(name, values), dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sgmim_fast":
            with self:
                return on_triton(func, args)
        result = func(*args, **kwargs)
        name = func._opname
        if launches_nothing(func):
            return result
        operands, results = list(tensors((args, kwargs))), list(tensors(result))
        count = flop_registry.get(func.overloadpacket)
        operations = count(*args, **kwargs, out_val=result) if count else 0
        if name in ("linear", "matmul"):  # inside our ops these are not taken apart
            operations = 2 * result.numel() * operands[0].shape[-1]
        written = {t.untyped_storage()._cdata: t for t in [*operands, *results]}
        if name.endswith("_") or name in ("zero_", "fill_", "zeros", "new_zeros", "zeros_like"):
            written = {t.untyped_storage()._cdata: t for t in (results or operands)}
        moved = sum(t.numel() * t.itemsize for t in written.values())
        dtype = next((t.dtype for t in [*results, *operands] if t.is_floating_point()), torch.float32)
        self.note(f"aten.{name}", moved, operations, dtype)
        return result


def tensors(tree: Any) -> Iterator[Tensor]:
    """Those in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def size(t: Tensor | None) -> int:
    return 0 if t is None else t.numel() * t.itemsize


def moved_by(name: str, a: dict[str, Any]) -> float:
    """Bytes of a launch of ours: each tensor once, less the rows of a gathered one that are not wanted."""
    total = sum(map(size, tensors(a)))
    if name == "layer_norm._layer_norm_forward_kernel":
        pairs = zip(a["xs"], a["counts"], strict=True)
        return total - sum(size(x) - count * a["width"] * x.itemsize for x, count in pairs)
    if name == "layer_norm._layer_norm_backward_kernel":
        for x, count in [*zip(a["xs"], a["counts"], strict=True), *zip(a["dxs"], a["counts"], strict=True)]:
            total -= size(x) - count * a["width"] * x.itemsize
    elif name == "linear_l1._linear_l1_forward_kernel":
        pixels = a["count"] * a["outs"]
        for t, wanted in (("x", a["count"] * a["width"]), ("target", pixels), ("valid", pixels)):
            if a[t] is not None:
                total -= size(a[t]) - wanted * a[t].itemsize
    elif name == "products._product_kernel" and a["index"] is not None:
        rows, gathered = a["rows"][0], a["residual"]
        if gathered is None:
            gathered = a["b"][0] if a["KIND"].value == 2 else a["c"][0]
        total -= size(gathered) - rows * gathered.shape[1] * gathered.itemsize
    elif (
        name in ("window_attention._window_attention_backward_kernel", "window_attention._window_attention_keys_kernel")
        and a["softmaxes"] is not None
    ):
        total -= size(a["dqkv"]) * (2 if "dbias" in a else 1) / 3  # the other kernel writes the rest
    elif name.startswith("structure_embed."):
        pixels = a["count"] * a["CHANNELS"] * a["PATCH"] ** 2
        total -= size(a["structure"]) - pixels * a["structure"].itemsize
    return total


def operations_of(name: str, a: dict[str, Any]) -> float:
    """Multiplications and additions of a launch's matrix products."""
    if name == "products._product_kernel":
        return 2 * sum(r * i * o for r, i, o in zip(a["rows"], a["ins"], a["outs"], strict=True))
    if name == "linear_l1._linear_l1_forward_kernel":
        return 2 * a["count"] * a["width"] * a["outs"]
    if name.startswith("relational_guidance."):
        products = 2 if "_forward" in name else 7  # the backward takes two of five twice
        return 2 * products * a["q"].numel() * a["cells"]
    if name.startswith("window_attention.") and "KEYS" in a:  # of whole tiles
        products = {"forward": 2, "backward": 3, "keys": 4}[name.split("_")[-2]]
        if name.endswith("_backward_kernel") and a["softmaxes"] is None:
            products = 5
        tiles = -(-a["WINDOW_H"] * a["WINDOW_W"] // min(a["QUERIES"], a["KEYS"]))
        return 2 * products * a["windows"] * a["heads"] * tiles * a["QUERIES"] * a["KEYS"] * a["BLOCK_D"]
    if name.startswith("structure_embed."):
        pixels = a["CHANNELS"] * a["PATCH"] ** 2
        return 2 * (1 if "_forward" in name else 2) * a["count"] * pixels * a["width"]
    return 0


@contextmanager
def fused(trace: Trace) -> Iterator[None]:
    """The Triton backend as on the device, its launches caught."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "can_run", lambda *args, **options: (True, "")))
        stack.enter_context(products.compute_bfloat16_in(torch.bfloat16))
        target = launching.Target(trace.device.architecture, trace.device.multiprocessors)
        stack.enter_context(launching.caught(trace.launch, target))
        stack.enter_context(trace)
        yield


def predict(shape: Shape, dtype: torch.dtype, batch: int, column: str, device: Device) -> list[Line]:
    """Every launch of forward and backward of the branch, from the encoder's features on."""
    trace = Trace(device)
    with ExitStack() as stack:
        if column != "fused":
            stack.enter_context(FakeTensorMode())
        case = build(shape, dtype, batch, "cpu")
        case.model.encoder.register_forward_hook(lambda *_: trace.lines.clear())  # what came before is no part of it
        step = case.columns["fused-cpu" if column == "fused" else column]
        with fused(trace) if column == "fused" else trace:
            step().backward()
    return trace.lines


def predict_encoder(shape: Shape, dtype: torch.dtype, batch: int, accelerated: bool, device: Device) -> list[Line]:
    """Every launch of forward and backward of the encoder, its stem included, on tensors without data."""
    trace = Trace(device)
    name, arguments = ENCODERS[shape.name]
    encoder = sgmim_fast.create_encoder(name, **arguments)
    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode())
        tensors = {key: fake.from_tensor(t) for key, t in (*encoder.named_parameters(), *encoder.named_buffers())}
        side = shape.image // shape.patch
        images, mask = torch.empty(batch, 3, shape.image, shape.image), torch.empty(batch, side, side, dtype=torch.bool)
        visible = torch.empty(batch * shape.visible * (shape.stride // shape.patch) ** 2, dtype=torch.int64)
        stack.enter_context(fused(trace))
        if accelerated:
            sgmim_fast.accelerate(encoder)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = torch.func.functional_call(encoder, tensors, (images, mask, visible))
        features.backward(torch.empty_like(features))
    return trace.lines


def total(lines: list[Line]) -> dict[str, float]:
    return {
        "launches": len(lines),
        "MB": sum(line.bytes for line in lines) / 1e6,
        "GFLOP": sum(line.operations for line in lines) / 1e9,
        "us": sum(line.seconds for line in lines) * 1e6,
    }


def table(lines: list[Line]) -> str:
    """Launches of one kernel together, the longest first."""
    groups = defaultdict(list)
    for line in lines:
        groups[line.name].append(line)
    rows = sorted(((name, total(group)) for name, group in groups.items()), key=lambda row: -row[1]["us"])
    head = f"{'':46}" + "".join(f"{title:>10}" for title in ("launches", "MB", "GFLOP", "us"))
    body = [
        f"  {name:44}" + "".join(f"{value:>10.{0 if key == 'launches' else 1}f}" for key, value in row.items())
        for name, row in [*rows, ("all", total(lines))]
    ]
    return "\n".join([head, *body])


def step(
    shape: Shape, dtype: torch.dtype, batch: int, device: Device, branch: dict[str, list[Line]]
) -> dict[str, dict[str, float]]:
    """Prints and returns what a step takes: eager (timm's encoder, dense branch) and accelerated (fused branch)."""
    sums = {}
    for name, column in (("eager", "dense"), ("accelerated", "fused")):
        lines = predict_encoder(shape, dtype, batch, name == "accelerated", device)
        encoder, whole = total(lines), total(lines + branch[column])
        print(f"{name} step: {whole['us']:.0f} us, {whole['launches']} launches, encoder {encoder['us']:.0f} us")
        print(table(lines))
        sums |= {f"{name} encoder": encoder, f"{name} step": whole}
    print(f"eager / accelerated: {sums['eager step']['us'] / sums['accelerated step']['us']:.2f}")
    return sums


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="swin_base,vit_base", help=f"of {','.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16,float32", help="bfloat16 is autocast over float32 parameters")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step", action="store_true", help="the encoder too")
    parser.add_argument("--all", action="store_true", help="every kernel of the plain columns too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device, found = H200, []
    for encoder in args.encoder.split(","):
        for dtype in args.dtype.split(","):
            print(f"\n{encoder}, {dtype}, batch {args.batch}, {device.name}: predicted, not measured", flush=True)
            lines = {
                column: predict(SHAPES[encoder], getattr(torch, dtype), args.batch, column, device)
                for column in ("dense", "visible", "fused")
            }
            sums = {column: total(those) for column, those in lines.items()}
            for column, those in lines.items():
                ratio = sums[column]["us"] / sums["fused"]["us"]
                print(f"{column}: {sums[column]['us']:.0f} us, {len(those)} launches, {ratio:.2f} x fused")
                if column == "fused" or args.all:
                    print(table(those))
            row = {"encoder": encoder, "dtype": dtype, "batch": args.batch, "device": asdict(device), **sums}
            if args.step:
                row |= step(SHAPES[encoder], getattr(torch, dtype), args.batch, device, lines)
            found.append(row)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine("cpu"), "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
