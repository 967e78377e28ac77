"""Everything that only a GPU can tell, in ten minutes at most: build, tests, speed, sanitizer, launches, gates.

    python benchmarks/gpu_suite.py [--out benchmarks/results]

Steps run one after the other, each with a limit of its own; one that fails is named and the next one runs. First,
beside each other, run the tests and everything that compiles, so that what is timed afterwards finds its kernels in the
compilers' caches. The published shapes come first. Whatever a step finds out is on disk as soon as it is known:
gpu-NAME-step-ENCODER.json and gpu-NAME-step-compiled.json (`bench_step.py`), gpu-NAME.json and .png
(`bench_guidance.py`, batch 128), gpu-NAME-ops.json (`op_table.py`), gpu-NAME-suite.json (steps, launches, gates; after
every step), gpu-NAME-model.json (what `cost_model.py` predicts), gpu-NAME-failures.txt (of the tests, with tracebacks)
and gpu-NAME-*.log. Nothing is downloaded: torch, triton, numpy, timm, pytest and hypothesis must be there. Exit code 0
where every step passed, whatever the gates say.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
GATES = {  # bfloat16, on an H200 or H100
    "dense / fused >= 3.5": lambda ms, mib, launches: ms["dense"] / ms["fused"] >= 3.5,
    "dense-compiled / fused >= 2.5": lambda ms, mib, launches: ms["dense-compiled"] / ms["fused"] >= 2.5,
    "visible-compiled / fused >= 1.15": lambda ms, mib, launches: ms["visible-compiled"] / ms["fused"] >= 1.15,
    "fused / gemm-floor <= 1.25": lambda ms, mib, launches: ms["fused"] / ms["gemm-floor"] <= 1.25,
    "memory of dense <= 0.4": lambda ms, mib, launches: mib["fused"] / mib["dense"] <= 0.4,
    "launches <= 48": lambda ms, mib, launches: launches <= 48,
}
STEP_GATES = {  # of the whole step
    "step: dense / accelerated >= 2.5": lambda ms, mib, _: ms["dense"] / ms["accelerated"] >= 2.5,
    "step: dense-compiled / accelerated >= 1.3": lambda ms, mib, _: ms["dense-compiled"] / ms["accelerated"] >= 1.3,
    "step: branch adds <= 3 %": lambda ms, mib, _: ms["accelerated"] / ms["simmim-captured"] <= 1.03,
    "step: memory of dense <= 0.55": lambda ms, mib, _: mib["accelerated"] / mib["dense"] <= 0.55,
}


def verdicts(
    rows: list[dict[str, Any]], launches: dict[tuple[str, str], int], gates: dict[str, Callable[..., bool]] = GATES
) -> list[dict[str, Any]]:
    """Each gate for each encoder in bfloat16: holds, does not hold (False), or could not be judged (None).

    Args:
        rows: of `bench_guidance.py --json`; of several fused columns the fastest counts. With STEP_GATES of
            `bench_step.py --json`.
        launches: (encoder, dtype) -> launches of a forward and backward.
        gates: name -> whether it holds, from milliseconds and MiB by column, and launches.
    """
    found = []
    for encoder in dict.fromkeys(row["encoder"] for row in rows if row["dtype"] == "bfloat16"):
        mine = {r["name"]: r for r in rows if (r["encoder"], r["dtype"]) == (encoder, "bfloat16")}
        fused = [row for name, row in mine.items() if name.startswith("fused-") and not name.endswith("-captured")]
        if fused:
            mine["fused"] = min(fused, key=lambda row: row["median_ms"])
        ms = {name: row["median_ms"] for name, row in mine.items()}
        for name in ("accelerated", "fused-triton"):  # as a CUDA graph, where that was measured
            if f"{name}-captured" in ms:
                ms["fused" if name == "fused-triton" else name] = ms[f"{name}-captured"]
        mib = {name: row["peak_mib"] for name, row in mine.items()}
        for gate, holds in gates.items():
            try:
                verdict = bool(holds(ms, mib, launches.get((encoder, "bfloat16"))))
            except (KeyError, TypeError):  # a column that could not run
                verdict = None
            found.append({"encoder": encoder, "gate": gate, "holds": verdict})
    return found


def sorting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gate of `standardize_structure`, 10 times as fast as sorting, for each encoder; rows of op_table.py."""
    mine = [row for row in rows if (row["op"], row["dtype"]) == ("standardize_structure", "float32")]
    ms = {(row["encoder"], row["backend"]): row["median_ms"] for row in mine}
    gate = "standardize_structure: sort / ours >= 10"
    return [
        {
            "encoder": encoder,
            "gate": gate,
            "holds": plain / ms[encoder, "cuda"] >= 10 if (encoder, "cuda") in ms else None,
        }
        for (encoder, backend), plain in ms.items()
        if backend == "torch"
    ]


def count_launches(encoder: str, dtype: str, batch: int) -> int:
    """Kernels, fills and copies that the device runs in a forward and backward, from the encoder's features on."""
    from bench_guidance import build
    from tools.shapes import SHAPES
    from torch.profiler import ProfilerActivity, profile, record_function

    case = build(SHAPES[encoder], getattr(torch, dtype), batch, "cuda")
    model = case.model
    step = case.step("fused-triton")
    for _ in range(3):
        step()
    masks = model.encoder.register_forward_hook(lambda *_: torch.cuda.synchronize())
    marks: list[Any] = []
    model.encoder.register_forward_hook(lambda *_: marks.append(record_function("branch").__enter__()))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
        marks[-1].__exit__(None, None, None)
    masks.remove()
    events = trace.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == "branch" and "CPU" in str(event.device_type()))
    device = [event for event in events if "CUDA" in str(event.device_type()) and event.name() != "branch"]
    return sum(event.start_ns() >= start for event in device)


class Suite:
    """Runs the steps and keeps what they said."""

    def __init__(self, out: Path, name: str, seconds: float):
        self.out, self.name, self.end = out, name, time.monotonic() + seconds
        self.steps: list[dict[str, Any]] = []

    def path(self, suffix: str) -> Path:
        return self.out / f"gpu-{self.name}{suffix}"

    def run(self, step: str, command: list[Any], limit: float, **variables: str) -> str:
        """Output of a command, "" where it failed; it ends with the suite's time at the latest."""
        return self.together({step: command}, limit, **variables)[step]

    def together(self, commands: dict[str, list[Any]], limit: float, **variables: str) -> dict[str, str]:
        """The same for several commands beside each other, within one limit."""
        start = time.monotonic()
        limit = min(limit, self.end - start)
        if limit < 5:
            for step in commands:
                self._note({"step": step, "result": "no time left"})
            return dict.fromkeys(commands, "")
        running = {}
        for step, command in commands.items():
            log = self.path(f"-{step}.log").open("w")
            running[step] = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        outputs = {}
        for step, process in running.items():
            try:
                code = process.wait(max(0.1, limit - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                code = None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()
            output = self.path(f"-{step}.log").read_text(errors="replace")
            result = "passed" if code == 0 else f"ran past {limit:.0f} s" if code is None else f"exit code {code}"
            last = (output.strip().splitlines() or [""])[-1]
            self._note(
                {"step": step, "result": result, "seconds": round(time.monotonic() - start, 1), "last": last[:200]}
            )
            outputs[step] = output if code == 0 else ""
        return outputs

    def _note(self, entry: dict[str, Any]) -> None:
        self.steps.append(entry)
        print("{step}: {result}, {seconds} s: {last}".format_map({"seconds": 0, "last": ""} | entry), flush=True)
        self.write({})

    def write(self, more: dict[str, Any]) -> None:
        self.path("-suite.json").write_text(json.dumps({"steps": self.steps, **more}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=590, help="for everything")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--no-build", action="store_true", help="what is installed is to be measured as it is")
    parser.add_argument("--count-launches", action="store_true", help="only that, as JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: the suite has nothing to measure", file=sys.stderr)
        return 2
    cases = [(encoder, dtype) for dtype in ("bfloat16", "float32") for encoder in ("swin_base", "vit_base")]
    if args.count_launches:
        print(json.dumps([[*case, count_launches(*case, args.batch)] for case in cases]))
        return 0
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    suite = Suite(args.out, name, args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    here, python = Path(__file__).parent, sys.executable
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", max(1, (os.cpu_count() or 1) - 6)]

    def step(encoder: str, columns: str, seconds: float, *more: Any) -> list[Any]:
        command = [python, here / "bench_step.py", "--device", "cuda", "--batch", args.batch, "--dtype", "bfloat16"]
        return [*command, "--encoder", encoder, "--columns", columns, "--seconds", seconds, *more]

    def guidance(*more: Any) -> list[Any]:
        return [python, here / "bench_guidance.py", "--device", "cuda", "--batch", args.batch, *more]

    if not args.no_build:
        build = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        suite.run("build", build, 240, TORCH_CUDA_ARCH_LIST=capability)
    suite.run("env", [python, "-m", "sgmim_fast.env"], 30)
    encoders = ("swin_base", "vit_base", "swinv2_base")
    failures = suite.path("-failures.txt")
    failures.unlink(missing_ok=True)
    warm = {f"warm-{encoder}": step(encoder, "accelerated", 1) for encoder in encoders}
    warm["warm-compiled"] = step("swin_base", "dense-compiled", 1)
    warm["warm-guidance"] = guidance("--dtype", "bfloat16", "--seconds", 1, "--all")
    warm["tests"] = [*pytest, "-m", "gpu and not slow", "--maxfail", "80"]
    suite.together(warm, 0.3 * args.seconds, SGMIM_FAST_EXAMPLES="2", SGMIM_FAST_FAILURES=str(failures.resolve()))
    found: list[dict[str, Any]] = []
    captured = "dense,accelerated,accelerated-captured,simmim-captured,gemm-floor"
    for encoder, suffix, columns in (
        *((encoder, encoder, captured) for encoder in encoders),
        ("swin_base", "compiled", "dense,dense-compiled,accelerated-captured"),
    ):
        results = suite.path(f"-step-{suffix}.json")
        results.unlink(missing_ok=True)
        more = ("--kernels", "accelerated-captured") if suffix == encoder else ()
        suite.run(f"step-{suffix}", step(encoder, columns, 4, *more, "--json", results), 90)
        print("\n".join(suite.path(f"-step-{suffix}.log").read_text().splitlines()[-45:]))
        found += verdicts(json.loads(results.read_text())["rows"] if results.exists() else [], {}, STEP_GATES)
        suite.write({"gates": found})
    results = suite.path(".json")
    results.unlink(missing_ok=True)
    plot = ["--plot", suite.path(".png")] if importlib.util.find_spec("matplotlib") else []
    bench = guidance("--seconds", 4, "--dtype", "bfloat16", "--all", "--json", results, *plot)
    print(suite.run("guidance", bench, 120))
    counted = suite.run("launches", [python, here / "gpu_suite.py", "--count-launches"], 60)
    launches = {(e, d): n for e, d, n in json.loads(counted.strip().splitlines()[-1])} if counted else {}
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    found += verdicts(rows, launches)
    suite.write({"gates": found, "launches": [[*case, n] for case, n in launches.items()]})
    times = suite.path("-ops.json")
    times.unlink(missing_ok=True)
    suite.run("ops", [python, here / "op_table.py", "--json", times, "--seconds", "0.5", "--dtype", "bfloat16"], 90)
    found += sorting(json.loads(times.read_text())["rows"] if times.exists() else [])
    suite.run("host", [python, here / "bench_host.py", "--json", suite.path("-host.json")], 60)
    suite.run("model", [python, here / "cost_model.py", "--step", "--json", suite.path("-model.json")], 90)
    native = ("gather_patches", "selective_mask", "masked_patch_embed", "relational_guidance")
    short = [*pytest, *(f"tests/ops/test_{op}.py" for op in native)]
    if tool := shutil.which("compute-sanitizer"):
        for kind in ("memcheck", "racecheck"):
            picked = ["-k", "cuda-cuda or (triton-cuda and ragged)", "--maxfail", "3"]
            suite.run(kind, [tool, "--tool", kind, "--error-exitcode", "9", *short, *picked], 90)
    for verdict in found:
        word = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[verdict["holds"]]
        print(f"{verdict['encoder']:10} {verdict['gate']:42} {word}")
    suite.write({"gates": found, "launches": [[*case, n] for case, n in launches.items()]})
    return int(any(step["result"] != "passed" for step in suite.steps))


if __name__ == "__main__":
    sys.exit(main())
