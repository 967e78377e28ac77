"""Times the host's part of a step: forward and backward at an encoder's full depth, on tiny tensors.

    python benchmarks/bench_host.py

eager        timm's blocks and the dense branch (sgmim_fast.reference), PyTorch in eager mode
sgmim        sgmim_fast.SGMIM around timm's blocks, the branch through the Triton kernels
accelerated  sgmim_fast.SGMIM with its blocks through the Triton kernels, too
compiled     the same through torch.compile (--compile: minutes), which generates C++ loops beside our Triton launches

Runs without a GPU, in bfloat16 autocast. A launch goes through Triton up to the driver's call. That call (about 5 us)
is not included, nor are the launches within ATen; the library's gemms run on the CPU instead. Times are milliseconds of
CPU time of the process, on one thread. The launches counted are Triton's, and the ATen operators that would launch a
kernel. The line below a table splits an accelerated step's time by class, from samples. --ops lists the accelerated
ops.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tools.host import shares, triton_without_device
from tools.launches import Trace, wgrad
from tools.measure import machine
from tools.shapes import BEIT
from tools.written import write_json
from torch import Tensor

import sgmim_fast
from sgmim_fast import SGMIM, backends, reference, selective_mask
from sgmim_fast.kernels import gemm as kernel_gemm
from sgmim_fast.kernels import launch
from sgmim_fast.ops import gemm, target

SWIN = {"img_size": 96, "window_size": 3, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (2, 2, 18, 2)}
ENCODERS: dict[str, tuple[str, dict[str, Any], int]] = {  # with the published depths
    "swin_base": ("swin_base_patch4_window7_224", SWIN, 32),
    "swinv2_base": ("swinv2_base_window12_192", SWIN, 32),
    "vit_base": ("beit_base_patch16_224", {**BEIT, "img_size": 96, "embed_dim": 16, "num_heads": 1}, 16),
}


@contextlib.contextmanager
def on_triton(listener: Callable[..., None]) -> Iterator[None]:
    """Within the block, ops run their Triton implementations on CPU tensors up to the launch, and compute nothing."""
    usable = {name: (name in ("triton", "torch"), "") for name in backends.NAMES}
    with (
        target.caught(listener, target.Target("sm_90", 132)),
        gemm.compute_bfloat16_in(torch.bfloat16),
        mock.patch.object(kernel_gemm, "_wgrad", wgrad),
        mock.patch.object(backends, "available", lambda: usable),
        mock.patch.object(backends, "triton_interpreted", lambda: True),
        triton_without_device(),
        backends.use("triton"),
    ):
        yield


def columns(encoder: str, compiled: bool = False) -> dict[str, Callable[[], Tensor]]:
    """Returns column -> function that runs forward and backward."""
    name, arguments, stride = ENCODERS[encoder]

    def build(accelerate: bool) -> SGMIM:
        return SGMIM(sgmim_fast.create_encoder(name, **arguments), stride, accelerate=accelerate)

    plain, fast = build(False), build(True)
    images, structure = torch.randn(2, 3, 96, 96), torch.randn(2, 1, 96, 96)
    drawn = selective_mask(2, 3)

    def step(model: SGMIM, losses: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses()
            loss.backward()
            return loss

        return run

    found = {
        "eager": step(plain, lambda: reference.sgmim_losses(plain, images, structure, drawn).total),
        "sgmim": step(plain, lambda: plain(images, structure, drawn)),
        "accelerated": step(fast, lambda: fast(images, structure, drawn)),
    }
    if compiled:
        faster = torch.compile(fast)
        found["compiled"] = step(fast, lambda: faster(images, structure, drawn))
    return found


def measure(encoder: str, rounds: int, compiled: bool = False) -> list[dict[str, Any]]:
    """Times all columns, counts their launches, and returns one row for each."""
    steps = columns(encoder, compiled)
    places = {n: contextlib.nullcontext if n == "eager" else (lambda: on_triton(launch.run)) for n in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():  # in turn, so that a slow phase of the machine affects all steps alike
            with places[name]():
                start = time.process_time()
                step()
                seconds = time.process_time() - start
            if number > 1:
                times[name].append(seconds)
    rows = []
    for name, step in steps.items():
        row = {"encoder": encoder, "name": name, "median_ms": 1e3 * statistics.median(times[name])}
        if name != "compiled":  # the dispatch mode that counts would trigger a recompilation
            trace = Trace()
            with contextlib.nullcontext() if name == "eager" else on_triton(trace.launch), trace:
                step()
            row |= {"launches": len(trace.launches), "counts": Counter(each.name for each in trace.launches)}
        if name == "accelerated":
            with places[name]():
                row["ms_by_class"] = {k: v * row["median_ms"] for k, v in shares(step).items()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    eager = rows[0]["median_ms"]
    lines = [f"{rows[0]['encoder']:14}{'ms':>8}{'/ eager':>9}{'launches':>10}"]
    lines += [
        f"  {row['name']:12}{row['median_ms']:8.1f}{row['median_ms'] / eager:8.2f}x{row.get('launches', ''):>10}"
        for row in rows
    ]
    parts = next(row["ms_by_class"] for row in rows if "ms_by_class" in row)
    lines.append(f"  accelerated, ms: {', '.join(f'{name} {ms:.1f}' for name, ms in parts.items())}")
    return "\n".join(lines)


def ops(encoder: str) -> str:
    """Formats the time within each op and part of an accelerated step, including launchers, minimum of five steps."""
    step, best = columns(encoder)["accelerated"], dict[tuple[str, str], tuple[float, int]]()
    for _ in range(5):
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        choose = backends.choose

        def timed(
            op: str, part: str, *rest: Any, choose: Callable[..., Any] = choose, found: dict[Any, Any] = found
        ) -> Callable[..., Any]:
            function = choose(op, part, *rest)

            def run(*args: Any) -> Any:
                start = time.process_time()
                result = function(*args)
                found[op, part].append(time.process_time() - start)
                return result

            return run

        choose_anew = mock.patch.object(backends, "state", lambda: None)  # a remembered choice would not be timed
        with on_triton(launch.run), choose_anew, mock.patch.object(backends, "choose", timed):
            step()
        for key, values in found.items():
            best[key] = min(best.get(key, (float("inf"), 0)), (sum(values), len(values)))
    lines = [f"{'op':38}{'calls':>6}{'us each':>9}"]
    lines += [f"{f'{op} {part}':38}{n:6}{1e6 * total / n:9.1f}" for (op, part), (total, n) in sorted(best.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", default=",".join(ENCODERS), help=f"comma-separated: {','.join(ENCODERS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps per column (default: %(default)s)")
    parser.add_argument("--ops", action="store_true", help="also measure the time within each op")
    parser.add_argument("--compile", action="store_true", help="add the compiled column (takes minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for encoder in args.encoder.split(","):
        if encoder not in ENCODERS:
            parser.error(f"unknown encoder: {encoder}")
        rows += (new := measure(encoder, args.rounds, args.compile))
        print(table(new), flush=True)
        if args.ops:
            print(ops(encoder), flush=True)
        if args.json:
            write_json(args.json, {"machine": machine("cpu"), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
