"""Predicts the time of a training step on a GPU from a cost model of each launch, for comparison with a real run.

    python benchmarks/cost_model.py [--gpu h200] [--step]
    python benchmarks/cost_model.py --measured benchmarks/results/gpu-nvidia-h200-kernels.json

--step adds the encoder, forward and backward, as in timm and accelerated. With the branch it makes a training step
without the optimizer, as `bench_step.py` times it. For vit_plain it also adds the step on visible patches alone. --host
adds the host's time, measured on this machine as in `bench_host.py`. --measured compares the model with measured times
of kernels on a GPU.

Runs without a GPU (`tools/launches.py` finds the launches). A launch takes `Gpu.launch` seconds plus the longest of

- the transfer of its bytes: from L2 for tensors that an earlier launch has left there, otherwise from memory;
- its gemms, in tiles that occupy the multiprocessors in whole waves, with the best of the library's tiles and splits of
  K;
- for window attention, the chain of small gemms of each tile, with as many tiles at a time as registers and shared
  memory of the compiled kernel allow per multiprocessor.

Rates come from data sheets, and the fractions of them that are reached from measurements. "/ roofline" is the ratio to
the time of the bytes and operations at the data sheet's rates, without launch times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from bench_step import STEP_SHAPES
from tools import launches
from tools.launches import Launch
from tools.measure import machine
from tools.shapes import Shape
from tools.written import write_json

from sgmim_fast.kernels import compile as ahead
from sgmim_fast.ops.target import Target


@dataclass(frozen=True)
class Gpu:
    """A GPU: rates of its data sheet, without sparsity, and the fractions of them that are reached."""

    name: str
    architecture: int  # compute capability, times ten
    multiprocessors: int
    bandwidth: float  # bytes / s of its memory
    l2: float  # bytes
    l2_bandwidth: float  # bytes / s; not in data sheets, so from published microbenchmarks of the architecture
    half: float  # operations / s of its tensor cores in bfloat16 and float16
    single: float  # operations / s in float32 without tf32
    # Fitted to 48 gemms and 20 elementwise kernels on an H200, results/gpu-nvidia-h200-kernels.json; used for all GPUs:
    memory_share: float = 0.75  # fraction of `bandwidth`
    gemm_share: float = 0.76  # fraction of `half` or `single` in a gemm's main loop
    launch: float = 2e-6  # seconds of a launch, including the gap to the next one
    tile: float = 1.5e-6  # seconds of a tile's prologue and epilogue
    chained: float = 1.5e-6  # seconds of one small gemm in a tile of attention, which depends on the one before

    @property
    def target(self) -> Target:
        return Target(f"sm_{self.architecture}", self.multiprocessors)


# NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200 SXM, one GPU of HGX B200) and architecture white papers.
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", 80, 108, 2.04e12, 40e6, 4.5e12, 312e12, 19.5e12),
        Gpu("H100", 90, 132, 3.35e12, 50e6, 7e12, 989e12, 67e12),
        Gpu("H200", 90, 132, 4.8e12, 50e6, 7e12, 989e12, 67e12),
        Gpu("B200", 100, 148, 8.0e12, 126e6, 12e12, 2250e12, 75e12),
    )
}

# The library's tiles, with the fraction of the rate that each reaches, and its splits of K.
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9, (64, 256): 0.8, (256, 64): 0.8, (128, 192): 0.95}
TILES |= {(64, 128): 0.7, (128, 64): 0.7}
SPLITS = (1, 2, 4, 8, 16, 32, 64)

# Memory bandwidth of some kernels relative to that of the other elementwise kernels, measured as above.
SLOWER = {"layer_norm._layer_norm_backward_kernel": 0.75, "sums._column_sums_kernel": 0.85}


def gemm_seconds(m: int, n: int, k: int, half: bool, gpu: Gpu) -> float:
    """Predicts the seconds of the operations of an (m, k) by (k, n) gemm."""
    rate = gpu.gemm_share * (gpu.half if half else gpu.single) / gpu.multiprocessors
    best = inf
    for (rows, columns), share in TILES.items():
        for split in SPLITS:
            if split > 1 and k < 512 * split:
                break
            tiles = ceil(m / rows) * ceil(n / columns) * split
            one = 2 * rows * columns * 64 * ceil(k / split / 64) / (rate * share) + gpu.tile
            summed = 8 * m * n * split / (gpu.memory_share * gpu.bandwidth) if split > 1 else 0
            best = min(best, ceil(tiles / gpu.multiprocessors) * one + summed)
    return best


@cache
def blocks_per_multiprocessor(launch: ahead.Launch, architecture: int) -> int:
    """Returns how many programs of a Triton launch fit a multiprocessor, from the resources of the compiled kernel."""
    return max(1, ahead.compile_for(launch, architecture)["blocks"])


class Cost:
    """Predicts the seconds of successive launches, and tracks which tensors they leave in L2."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.resident: OrderedDict[int, float] = OrderedDict()

    def memory_seconds(self, launch: Launch) -> float:
        """Predicts the seconds of a launch's transfers, and marks its tensors as resident in L2."""
        gpu, seconds = self.gpu, 0.0
        share = gpu.memory_share * SLOWER.get(launch.name, 1.0)
        for storage, moved in launch.moved.items():
            near = self.resident.pop(storage, None) is not None
            seconds += moved / (gpu.l2_bandwidth if near else share * gpu.bandwidth)
            self.resident[storage] = moved
        while sum(self.resident.values()) > 0.6 * gpu.l2:
            self.resident.popitem(last=False)
        return seconds

    def seconds(self, launch: Launch) -> float:
        """Predicts the seconds of a launch, which is the next one of the step."""
        gpu, half = self.gpu, launch.dtype in (torch.bfloat16, torch.float16)
        bounds = [self.memory_seconds(launch)]
        if launch.gemms:
            bounds.append(sum(gemm_seconds(*gemm, half, gpu) for gemm in launch.gemms))
        elif launch.tiles:
            tiles, gemms = launch.tiles
            at_a_time = gpu.multiprocessors * blocks_per_multiprocessor(launch.compiled, gpu.architecture)
            bounds.append(gemms * tiles * gpu.chained / at_a_time)
        elif launch.operations:
            bounds.append(launch.operations / (gpu.gemm_share * (gpu.half if half else gpu.single)))
        return gpu.launch + max(bounds)


def roofline(launch: Launch, gpu: Gpu) -> float:
    """Returns the seconds below which no implementation of this launch can go."""
    half = launch.dtype in (torch.bfloat16, torch.float16)
    return max(launch.bytes / gpu.bandwidth, launch.operations / (gpu.half if half else gpu.single))


def total(found: list[Launch], gpu: Gpu) -> dict[str, Any]:
    """Returns the sums over all launches, and over the launches of each kernel."""
    cost, kernels = Cost(gpu), defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    for launch in found:
        row = {"launches": 1, "MB": launch.bytes / 1e6, "GFLOP": launch.operations / 1e9}
        row |= {"us": 1e6 * cost.seconds(launch), "roofline us": 1e6 * roofline(launch, gpu)}
        for sums in (kernels[launch.name], kernels["all"]):
            for key, value in row.items():
                sums[key] += value
    return {**kernels["all"], "kernels": {name: dict(row) for name, row in kernels.items() if name != "all"}}


def table(sums: dict[str, Any]) -> str:
    """Formats the sums of each kernel, the longest first."""
    keys = [key for key in sums if key != "kernels"]
    rows = sorted(sums["kernels"].items(), key=lambda row: -row[1]["us"])
    head = f"{'':52}" + "".join(f"{title:>12}" for title in (*keys, "/ roofline"))
    lines = [
        f"  {name:50}"
        + "".join(f"{row[key]:12.{0 if key == 'launches' else 1}f}" for key in keys)
        + f"{row['us'] / max(row['roofline us'], 1e-9):12.2f}"
        for name, row in [*rows, ("all", sums)]
    ]
    return "\n".join([head, *lines])


def step(shape: Shape, dtype: torch.dtype, batch: int, gpu: Gpu, branch: dict[str, list[Launch]]) -> dict[str, Any]:
    """Prints and returns the predicted times of a step: eager (timm's encoder, dense branch) and accelerated (fused
    branch)."""
    found = {}
    for name, column in (("eager", "dense"), ("accelerated", "fused")):
        those = launches.encoder(shape, dtype, batch, name == "accelerated", gpu.target)
        encoder, whole = total(those, gpu), total(those + branch[column], gpu)
        print(f"{name} step: {whole['us']:.0f} us, {whole['launches']:.0f} launches, encoder {encoder['us']:.0f} us")
        print(table(encoder))
        found |= {f"{name} encoder": encoder, f"{name} step": whole}
    print(f"eager / accelerated: {found['eager step']['us'] / found['accelerated step']['us']:.2f}")
    if shape.name == "vit_plain":
        for ratio in (shape.ratio, 0.75):
            those = launches.visible_only(replace(shape, ratio=ratio), dtype, batch, gpu.target)
            found[f"visible-only step at {ratio}"] = sums = total(those, gpu)
            print(f"visible-only step at {ratio}: {sums['us']:.0f} us, {sums['launches']:.0f} launches")
            print(table(sums))
            print(f"accelerated / visible-only at {ratio}: {found['accelerated step']['us'] / sums['us']:.2f}")
    return found


def compare(path: Path, gpu: Gpu) -> float:
    """Prints measured and predicted times of the library's gemms in a file of measured kernels. Returns the median of
    the factors between them."""
    measured = {row["kernel"]: row["us"] for row in json.loads(path.read_text())["rows"]}
    factors = []
    for width, rows in ((128, 128 * 48**2), (256, 128 * 24**2), (512, 128 * 12**2), (1024, 128 * 6**2)):
        for layer, (out, inner) in {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}.items():
            o, i = out * width, inner * width
            for kind, (m, n, k) in {"fprop": (rows, o, i), "dgrad": (rows, i, o), "wgrad": (o, i, rows)}.items():
                shapes = ((m, k), (k, n), (m, n))
                moved = {number: 2.0 * a * b for number, (a, b) in enumerate(shapes)}
                launch = Launch("aten.mm", moved, 2.0 * m * n * k, torch.bfloat16, ((m, n, k),))
                predicted, took = 1e6 * Cost(gpu).seconds(launch), measured[f"{layer} {width} {kind} library"]
                factors.append(max(predicted / took, took / predicted))
                print(f"{layer:5}{width:5} {kind}{took:8.1f} us measured{predicted:8.1f} predicted")
    factors.sort()
    print(f"median factor between the two {factors[len(factors) // 2]:.2f}, largest {factors[-1]:.2f}")
    return factors[len(factors) // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", choices=GPUS, help="GPU to predict for (default: %(default)s)")
    parser.add_argument(
        "--encoder",
        default="swin_base,vit_base",
        help=f"comma-separated: {','.join(STEP_SHAPES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16,float32",
        help="comma-separated: float32, bfloat16 (autocast over float32 parameters)",
    )
    parser.add_argument("--batch", type=int, default=128, help="batch size (default: %(default)s)")
    parser.add_argument("--step", action="store_true", help="include the encoder")
    parser.add_argument("--host", action="store_true", help="include the host's time")
    parser.add_argument("--all", action="store_true", help="also list every kernel of the plain columns")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="only compare with the measured kernel times in this file"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args(argv)
    gpu, found = GPUS[args.gpu], []
    if args.measured:
        compare(args.measured, gpu)
        return 0
    for encoder in args.encoder.split(","):
        for dtype in args.dtype.split(","):
            print(f"\n{encoder}, {dtype}, batch {args.batch}, {gpu.name}: predicted, not measured", flush=True)
            lines = {
                column: launches.branch(STEP_SHAPES[encoder], getattr(torch, dtype), args.batch, column, gpu.target)
                for column in ("dense", "visible", "fused")
            }
            sums = {column: total(those, gpu) for column, those in lines.items()}
            for column, those in sums.items():
                ratio = those["us"] / sums["fused"]["us"]
                print(f"{column}: {those['us']:.0f} us, {those['launches']:.0f} launches, {ratio:.2f} x fused")
                if column == "fused" or args.all:
                    print(table(those))
            row = {"encoder": encoder, "dtype": dtype, "batch": args.batch, "gpu": asdict(gpu), **sums}
            if args.step:
                row |= step(STEP_SHAPES[encoder], getattr(torch, dtype), args.batch, gpu, lines)
            found.append(row)
        if args.host:
            found[-1]["host"] = host(encoder)
    if args.json:
        write_json(args.json, {"machine": machine("cpu"), "rows": found})
    return 0


def host(encoder: str) -> list[dict[str, Any]]:
    """Prints and returns the host's time for a step at the encoder's depth, as `bench_host.py` measures it."""
    import bench_host  # imported here, since it is needed with --host only

    torch.set_num_threads(1)
    rows = bench_host.measure(encoder, rounds=5)
    print(bench_host.table(rows))
    return rows


if __name__ == "__main__":
    sys.exit(main())
