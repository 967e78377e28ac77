"""Runs everything that needs a GPU, in ten minutes at most: build, sanitizer, speed, tests, launches, gates.

    python benchmarks/gpu_suite.py [--out benchmarks/results]

Steps run one after the other, each with its own time limit. If a step fails, this is printed and the next one runs.
First, in parallel, the CUDA kernels run under compute-sanitizer, which shows whether their later results can be
trusted, and everything that compiles is run once, so that later timings find their kernels in the compilers' caches.
Next the published shapes are timed, and then come the tests and all other steps. Each result is written to disk as soon
as it is known, and files are replaced atomically:

gpu-NAME-step-ENCODER.json, gpu-NAME-step-compiled.json  `bench_step.py`: host time; captured, eager and compiled steps
gpu-NAME.json, gpu-NAME.png                              `bench_guidance.py`, batch 128
gpu-NAME-ops.json, gpu-NAME-windows.json                 `op_table.py`; window attention alone, also of SwinV2
gpu-NAME-tuned.json, gpu-NAME-model.json                 results of `sgmim_fast.tune`; predictions of `cost_model.py`
gpu-NAME-suite.json                                      steps, launches and gates; written after every step
gpu-NAME-failures.txt, gpu-NAME-*.log                    failed tests with tracebacks; output of each step

A result that is out of tolerance still has its speed, and is flagged. Nothing is downloaded: torch, triton, numpy,
timm, pytest and hypothesis must be installed. The exit code is 0 if every step passed, whether or not the gates hold.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools.written import write_json

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 590.0  # time limit of the whole suite
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
    """Evaluates each gate for each encoder in bfloat16: it holds (True), does not hold (False), or cannot be evaluated
    (None).

    Args:
        rows: rows of `bench_guidance.py --json`, or for STEP_GATES of `bench_step.py --json`. The fastest of several
            fused columns counts.
        launches: (encoder, dtype) -> number of launches of forward and backward.
        gates: name -> function of milliseconds by column, MiB by column, and launches.
    """
    found = []
    for encoder in dict.fromkeys(row["encoder"] for row in rows if row["dtype"] == "bfloat16"):
        mine = {r["name"]: r for r in rows if (r["encoder"], r["dtype"]) == (encoder, "bfloat16")}
        fused = [row for name, row in mine.items() if name.startswith("fused-") and not name.endswith("-captured")]
        if fused:
            mine["fused"] = min(fused, key=lambda row: row["median_ms"])
        ms = {name: row["median_ms"] for name, row in mine.items()}
        for name in ("accelerated", "fused-triton"):  # the captured column replaces the eager one if it was measured
            if f"{name}-captured" in ms:
                ms["fused" if name == "fused-triton" else name] = ms[f"{name}-captured"]
        mib = {name: row["peak_mib"] for name, row in mine.items()}
        for gate, holds in gates.items():
            try:
                verdict = bool(holds(ms, mib, launches.get((encoder, "bfloat16"))))
            except (KeyError, TypeError, ZeroDivisionError):  # a column did not run, or has no peak memory
                verdict = None
            found.append({"encoder": encoder, "gate": gate, "holds": verdict})
    return found


def sorting_gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluates for each encoder the gate that `standardize_structure` is 10 times as fast as sorting, from the rows of
    `op_table.py`."""
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
    """Counts the kernels, fills and copies that the device runs in forward and backward, from the encoder's features
    on."""
    from tools.branch import build
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


def tune(encoder: str, batch: int, path: Path) -> None:
    """Tunes the ops of an encoder's step, and prints and writes the fastest implementations."""
    from tools.measure import machine
    from tools.shapes import ENCODERS, SHAPES

    import sgmim_fast

    name, arguments = ENCODERS[encoder]
    model = sgmim_fast.SGMIM(sgmim_fast.create_encoder(name, **arguments), SHAPES[encoder].stride).to("cuda")
    found = sgmim_fast.tune(model, batch, torch.bfloat16, seconds=45)
    rows = [{"op": w.op, "part": w.part, "shape": list(w.key[0]), **w._asdict()} for w in found]
    for row in rows:
        row["key"] = str(row["key"])
    write_json(path, {"machine": machine("cuda"), "rows": rows})


class Suite:
    """Runs the steps, and records their results."""

    def __init__(self, out: Path, name: str, seconds: float):
        self.out, self.name, self.seconds, self.end = out, name, seconds, time.monotonic() + seconds
        self.steps: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}

    def path(self, suffix: str) -> Path:
        return self.out / f"gpu-{self.name}{suffix}"

    def run(self, step: str, command: list[Any], limit: float, **variables: str) -> str:
        """Runs a command, and returns its output, or "" if it failed. The command is killed at its limit, or when the
        suite's time ends.

        limit: in seconds for a suite of `SECONDS`; scaled in proportion if the suite has another limit.
        """
        return self.run_in_parallel({step: command}, limit, **variables)[step]

    def run_in_parallel(self, commands: dict[str, list[Any]], limit: float, **variables: str) -> dict[str, str]:
        """Runs several commands in parallel within one limit, as `run` does."""
        start = time.monotonic()
        limit = min(limit * self.seconds / SECONDS, self.end - start)
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
        try:
            return self._finished(running, start, limit)
        finally:  # also ends the processes if a signal ends the suite
            for process in running.values():
                _kill(process)

    def _finished(self, running: dict[str, subprocess.Popen], start: float, limit: float) -> dict[str, str]:
        outputs = {}
        for step, process in running.items():
            try:
                code = process.wait(max(0.1, limit - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                code = None
                _kill(process)
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
        """Writes the results so far, with `more` added to them."""
        self.more |= more
        write_json(self.path("-suite.json"), {"steps": self.steps, **self.more})

    def passed(self, step: str) -> bool:
        return any((entry["step"], entry["result"]) == (step, "passed") for entry in self.steps)


def _kill(process: subprocess.Popen) -> None:
    """Kills a process and its children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="output folder")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time budget of the whole suite (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="batch size (default: %(default)s)")
    parser.add_argument(
        "--no-build", action="store_true", help="measure the installed package without building it first"
    )
    parser.add_argument(
        "--count-launches", action="store_true", help="only count kernel launches, and print them as JSON"
    )
    parser.add_argument("--tune", type=Path, metavar="JSON", help="only tune Swin-B, and write the result to this file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: the suite has nothing to measure", file=sys.stderr)
        return 2
    cases = [(encoder, dtype) for dtype in ("bfloat16", "float32") for encoder in ("swin_base", "vit_base")]
    if args.count_launches:
        print(json.dumps([[*case, count_launches(*case, args.batch)] for case in cases]))
        return 0
    if args.tune:
        tune("swin_base", args.batch, args.tune)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    suite = Suite(args.out, name, args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    here, python = Path(__file__).parent, sys.executable
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    # All processes share the compilers' caches, and the user's tuning tables are ignored.
    caches = Path(tempfile.gettempdir()) / "sgmim_fast-gpu-suite"
    for variable, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(variable, str(caches / folder))
    os.environ["SGMIM_FAST_TUNED"] = "0"
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]

    def step(encoder: str, columns: str, seconds: float, *more: Any) -> list[Any]:
        command = [python, here / "bench_step.py", "--device", "cuda", "--batch", args.batch, "--dtype", "bfloat16"]
        return [*command, "--encoder", encoder, "--columns", columns, "--seconds", seconds, *more]

    plot = ["--plot", suite.path(".png")] if importlib.util.find_spec("matplotlib") else []

    def guidance(*more: Any) -> list[Any]:
        command = [python, here / "bench_guidance.py", "--device", "cuda", "--batch", args.batch, "--anyway", "--all"]
        return [*command, "--dtype", "bfloat16", *plot, *more]

    if not args.no_build:
        build = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        suite.run("build", build, 240, TORCH_CUDA_ARCH_LIST=capability)
    suite.run("env", [python, "-m", "sgmim_fast.env"], 30)
    encoders = ("swin_base", "vit_base", "swinv2_base")
    first = {f"warm-{encoder}": step(encoder, "accelerated", 1) for encoder in encoders}
    first["warm-compiled"] = step("swin_base", "dense-compiled", 1)
    first["warm-guidance"] = guidance("--seconds", 1)
    if tool := shutil.which("compute-sanitizer"):
        # A test takes about 5 s: one of each op, and window attention in tiles of 48 and 144 tokens with all arguments.
        short = [*pytest, "tests/ops/test_every_op.py", "tests/ops/test_cuda_window_attention.py", "--maxfail", "3"]
        short += ["-k", "cuda-cuda and ((same_bits and everything) or (on_a_gpu and (dtype1 or dtype5) and True))"]
        first |= {k: [tool, "--tool", k, "--error-exitcode", "9", *short] for k in ("memcheck", "racecheck")}
    suite.run_in_parallel(first, 120, SGMIM_FAST_EXAMPLES="2")
    suite.write({"CUDA kernels trusted": bool(tool) and suite.passed("memcheck") and suite.passed("racecheck")})

    found: list[dict[str, Any]] = []
    captured = "dense,accelerated,accelerated-captured,simmim-captured,gemm-floor"

    def measured(encoder: str, suffix: str, columns: str, limit: float, *more: Any) -> None:
        results = suite.path(f"-step-{suffix}.json")
        results.unlink(missing_ok=True)
        suite.run(f"step-{suffix}", step(encoder, columns, 4, *more, "--json", results), limit)
        print("\n".join(suite.path(f"-step-{suffix}.log").read_text().splitlines()[-45:]))
        found.extend(verdicts(json.loads(results.read_text())["rows"] if results.exists() else [], {}, STEP_GATES))
        suite.write({"gates": found})

    for encoder in encoders:
        measured(encoder, encoder, captured, 60, "--kernels", "accelerated-captured")
    measured("swin_base", "compiled", "dense,dense-compiled,accelerated-compiled,accelerated-captured", 75)
    results = suite.path(".json")
    results.unlink(missing_ok=True)
    print(suite.run("guidance", guidance("--seconds", 4, "--json", results), 100))
    counted = suite.run("launches", [python, here / "gpu_suite.py", "--count-launches"], 60)
    launches = {(e, d): n for e, d, n in json.loads(counted.strip().splitlines()[-1])} if counted else {}
    found += verdicts(json.loads(results.read_text())["rows"] if results.exists() else [], launches)
    suite.write({"gates": found, "launches": [[*case, n] for case, n in launches.items()]})
    failures = suite.path("-failures.txt")
    failures.unlink(missing_ok=True)
    workers = ["-n", os.cpu_count() or 1] if importlib.util.find_spec("xdist") else []
    tests = [*pytest, *workers, "-m", "gpu and not slow", "--maxfail", "80"]
    suite.run("tests", tests, 150, SGMIM_FAST_EXAMPLES="2", SGMIM_FAST_FAILURES=str(failures.resolve()))
    times = suite.path("-ops.json")
    times.unlink(missing_ok=True)
    suite.run("ops", [python, here / "op_table.py", "--json", times, "--seconds", "0.5", "--dtype", "bfloat16"], 90)
    windows = [
        python,
        here / "op_table.py",
        "--json",
        suite.path("-windows.json"),
        "--encoder",
        "swinv2_base,swin_base",
    ]
    suite.run("windows", [*windows, "--op", "window_attention", "--seconds", "1", "--dtype", "bfloat16"], 60)
    found += sorting_gates(json.loads(times.read_text())["rows"] if times.exists() else [])
    suite.write({"gates": found})
    suite.run("host", [python, here / "bench_host.py", "--json", suite.path("-host.json")], 60)
    tuned = [python, here / "gpu_suite.py", "--batch", args.batch, "--tune", suite.path("-tuned.json")]
    print(suite.run("tune", tuned, 120, SGMIM_FAST_TUNED="1", SGMIM_FAST_CACHE=str(caches)))
    suite.run("model", [python, here / "cost_model.py", "--step", "--json", suite.path("-model.json")], 90)
    measured("swin_base", "max-autotune", "dense,dense-max-autotune,accelerated-captured", 150)
    for verdict in found:
        word = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[verdict["holds"]]
        print(f"{verdict['encoder']:10} {verdict['gate']:42} {word}")
    return int(any(step["result"] != "passed" for step in suite.steps))


if __name__ == "__main__":
    sys.exit(main())
