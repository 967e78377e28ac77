"""What a training step should take on a GPU, by a model of each launch: to be compared with a real run.

    python benchmarks/cost_model.py [--gpu h200] [--step]
    python benchmarks/cost_model.py --measured benchmarks/results/gpu-nvidia-h200-kernels.json

--step: the encoder too, forward and backward, as timm has it and accelerated; with the branch that makes a training
step without the optimizer, as `bench_step.py` times it; of vit_plain also the step on visible patches alone. --host:
what the host needs for it, measured on this machine as `bench_host.py` does. --measured: the model beside what the
kernels took on a GPU.

Runs anywhere (`launches.py` finds the launches). One launch takes `Gpu.launch` seconds and the longest of

- its bytes through the memory, those of tensors that one of the launches before has left in L2 through that;
- its gemms, in tiles that fill the multiprocessors in whole waves, by the best of the library's tiles and splits of K;
- for window attention the chain of small gemms of each tile, so many tiles at a time as registers and shared memory of
  the compiled kernel let a multiprocessor hold.

Data sheets give the rates, and measurements the shares of them that are reached; a line of the output that is over its
roofline says by how much (bytes and operations at the data sheet's rates, and no launch takes time).
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
    """A GPU by its data sheet, dense rates without sparsity, and the shares of them that are reached."""

    name: str
    architecture: int  # compute capability, times ten
    multiprocessors: int
    bandwidth: float  # bytes / s of its memory
    l2: float  # bytes
    l2_bandwidth: float  # bytes / s; in no data sheet: what microbenchmarks of the architecture report
    half: float  # operations / s of its tensor cores in bfloat16 and float16
    single: float  # operations / s in float32 without tf32
    # Fitted to 48 gemms and 20 elementwise kernels on an H200, results/gpu-nvidia-h200-kernels.json, and taken for all:
    memory_share: float = 0.75
    gemm_share: float = 0.76  # of a gemm's main loop
    launch: float = 2e-6  # seconds, with the gap to the next
    tile: float = 1.5e-6  # seconds of a tile's prologue and epilogue
    chained: float = 1.5e-6  # seconds of one small gemm of an attention's tile, which waits for the one before

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

# A library's tiles, and the share of the rate that the smaller ones reach; how often it splits K.
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9, (64, 256): 0.8, (256, 64): 0.8, (128, 192): 0.95}
TILES |= {(64, 128): 0.7, (128, 64): 0.7}
SPLITS = (1, 2, 4, 8, 16, 32, 64)

# Share of the memory's rate, of what other elementwise kernels reach, measured as above.
SLOWER = {"layer_norm._layer_norm_backward_kernel": 0.75, "sums._column_sums_kernel": 0.85}


def gemm_seconds(m: int, n: int, k: int, half: bool, gpu: Gpu) -> float:
    """Of the operations of an (m, k) by (k, n) gemm."""
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
    """How many programs of a Triton launch a multiprocessor holds, by what the kernel compiles to."""
    return max(1, ahead.compile_for(launch, architecture)["blocks"])


class Cost:
    """Seconds of one launch after the other; remembers which tensors the last of them have left in L2."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.resident: OrderedDict[int, float] = OrderedDict()

    def memory_seconds(self, launch: Launch) -> float:
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
    """Seconds that no implementation of this launch can go below."""
    half = launch.dtype in (torch.bfloat16, torch.float16)
    return max(launch.bytes / gpu.bandwidth, launch.operations / (gpu.half if half else gpu.single))


def total(found: list[Launch], gpu: Gpu) -> dict[str, Any]:
    """Sums over launches, and the same by kernel."""
    cost, kernels = Cost(gpu), defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    for launch in found:
        row = {"launches": 1, "MB": launch.bytes / 1e6, "GFLOP": launch.operations / 1e9}
        row |= {"us": 1e6 * cost.seconds(launch), "roofline us": 1e6 * roofline(launch, gpu)}
        for sums in (kernels[launch.name], kernels["all"]):
            for key, value in row.items():
                sums[key] += value
    return {**kernels["all"], "kernels": {name: dict(row) for name, row in kernels.items() if name != "all"}}


def table(sums: dict[str, Any]) -> str:
    """Launches of one kernel together, the longest first."""
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
    """Prints and returns what a step takes: eager (timm's encoder, dense branch) and accelerated (fused branch)."""
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
    """Prints the library's gemms of a file of measured kernels beside what the model says; returns the usual factor
    between both."""
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
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    parser.add_argument("--encoder", default="swin_base,vit_base", help=f"of {','.join(STEP_SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16,float32", help="bfloat16 is autocast over float32 parameters")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step", action="store_true", help="the encoder too")
    parser.add_argument("--host", action="store_true", help="the host's time, too")
    parser.add_argument("--all", action="store_true", help="every kernel of the plain columns too")
    parser.add_argument("--measured", type=Path, help="compare with this file of kernels, and do nothing else")
    parser.add_argument("--json", type=Path)
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
    """Prints and returns the host's part of a step at the encoder's depth, as `bench_host.py` measures it."""
    import bench_host  # it builds models

    torch.set_num_threads(1)
    rows = bench_host.measure(encoder, rounds=5)
    print(bench_host.table(rows))
    return rows


if __name__ == "__main__":
    sys.exit(main())
