"""Does structure guidance help? Short pre-training of small encoders on procedural scenes, in minutes on two cores.

    python benchmarks/evidence.py --json evidence.json --plot evidence.png

Encoders without pre-training, with SimMIM and with SG-MIM have the same scenes, masks, flips and number of steps. Then
frozen features are probed, and encoders are fine-tuned, for depth and shape class with few labelled scenes. Controls
separate possible causes of the guidance's effect. `--real` does the same in miniature on a stereo photograph.
`--compare visible-only` compares encoders of visible patches alone, at equal steps and at equal CPU time. `--compare
reasons` varies the structure loss. EVIDENCE.md has results, and what they do not show. The output is Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tools import measure

from evidence.pretrain import CONTROLS, EVERY, MAIN, METHODS, REASONS, VISIBLE_ONLY, Settings, pretrain, step_seconds
from evidence.probe import finetune, probe
from evidence.real import crops, probe_crops
from evidence.report import differences, plot, table
from evidence.scenes import Split, make_scenes

SCENES = {"pretrain": 6144, "labelled": 1024, "validation": 512, "test": 1024}
LABELLED = (64, 256, 1024)


class Plan(NamedTuple):
    """The encoders to train, and how to measure them."""

    settings: Settings = Settings()
    methods: tuple[str, ...] = tuple(METHODS)
    scenes: dict[str, int] = SCENES
    labelled: tuple[int, ...] = LABELLED
    seeds: int = 3
    control_seeds: int = 2
    finetune_steps: int = 80  # 0: no fine-tuning
    real: bool = False
    finetuned: tuple[str, ...] = tuple(MAIN)
    steps: tuple[tuple[str, int], ...] = ()  # (method, steps) of methods whose number of steps is not the settings'


COMPARISONS = {"published": CONTROLS, "visible-only": VISIBLE_ONLY, "reasons": REASONS}
QUICK = Plan(
    Settings(size=32, width=32, depth=1, steps=3, batch=8),
    tuple(METHODS),
    {"pretrain": 48, "labelled": 16, "validation": 8, "test": 8},
    (8, 16),
    seeds=2,
    control_seeds=1,
    finetune_steps=2,
)


class Job(NamedTuple):
    """One encoder to train."""

    method: str
    seed: int


def jobs(plan: Plan) -> list[Job]:
    """Lists the encoders to train: first the main comparison, its longest jobs before the others, then the controls,
    seed by seed."""
    seeds = {name: range(plan.control_seeds if name in CONTROLS else plan.seeds) for name in plan.methods}
    found = [Job(name, seed) for name in plan.methods for seed in seeds[name]]
    return sorted(found, key=lambda job: (job.seed + 1 if job.method in CONTROLS else 0, not EVERY[job.method].steps))


def equal_times(plan: Plan, unlabelled: Split) -> Plan:
    """Returns the plan with the number of steps of each method of equal time, which fit into SG-MIM's time."""
    wanted = [name for name in plan.methods if EVERY[name].equal_time]
    data = plan.settings, unlabelled.images, unlabelled.depth
    whole = plan.settings.steps * step_seconds(MAIN["SG-MIM"], *data) if wanted else 0
    return plan._replace(steps=tuple((name, round(whole / step_seconds(EVERY[name], *data))) for name in wanted))


def do(job: Job, plan: Plan, sets: dict[str, Split]) -> list[dict[str, Any]]:
    """Pre-trains and measures one encoder. Returns rows of the table."""
    start = time.process_time()
    unlabelled = sets["pretrain"]
    data = plan.settings, unlabelled.images, unlabelled.depth
    encoder = pretrain(EVERY[job.method], *data, job.seed, dict(plan.steps).get(job.method))
    trained = time.process_time() - start
    if plan.real:
        found = {("frozen", len(sets["train"].images)): probe_crops(encoder, sets)}
    else:
        found = {("frozen", size): metrics for size, metrics in probe(encoder, sets, plan.labelled).items()}
    if plan.finetune_steps and job.method in plan.finetuned:
        for size in plan.labelled:
            tuned = finetune(encoder, sets, size, job.seed, plan.settings, plan.finetune_steps)
            found["fine-tuned", size] = tuned
    seconds = {"pretrain_cpu_s": round(trained, 1), "cpu_s": round(time.process_time() - start, 1)}
    return [
        {"method": job.method, "seed": job.seed, "how": how, "labelled": size, **metrics, **seconds}
        for (how, size), metrics in found.items()
    ]


_sets: dict[str, Split] = {}  # data of a worker process, loaded by `_start`


def _start(path: str) -> None:
    torch.set_num_threads(1)
    _sets.update({name: Split(*tensors) for name, tensors in torch.load(path, mmap=True).items()})


def _work(job: Job, plan: Plan) -> list[dict[str, Any]]:
    return do(job, plan, _sets)


def run(plan: Plan, workers: int, minutes: float = math.inf) -> list[dict[str, Any]]:
    """Runs all jobs and returns their rows, which do not depend on the number of processes.

    After `minutes` no new job is started, and the jobs that are left out are printed.
    """
    start = time.perf_counter()
    sets = crops(plan.settings.size) if plan.real else make_scenes(plan.scenes, plan.settings.size, workers)
    print(f"{sum(len(s.images) for s in sets.values())} images in {time.perf_counter() - start:.0f} s", flush=True)
    plan = equal_times(plan, sets["pretrain"])
    for name, steps in plan.steps:
        print(f"{name}: {steps} steps in the time of {plan.settings.steps}", flush=True)
    todo = jobs(plan)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scenes.pt")
        torch.save({name: tuple(split) for name, split in sets.items()}, path)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start, (path,)) as pool:
            futures = {pool.submit(_work, job, plan): job for job in todo}
            done = {}
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                job, rows = futures[future], future.result()
                done[job] = rows
                seconds = time.perf_counter() - start
                found = " ".join(f"{row['rmse']:.3f}" for row in rows)
                note = f"{len(done)}/{len(todo)} {job.method}, seed {job.seed}: {rows[0]['cpu_s']:.0f} s CPU"
                print(f"{note}, RMSE {found} ({seconds:.0f} s)", flush=True)
                if seconds > 60 * minutes:
                    for other in futures:
                        other.cancel()
    left = [f"{job.method} {job.seed}" for job in todo if job not in done]
    if left:
        print(f"left out after {minutes:g} minutes: {', '.join(left)}", flush=True)
    order = {name: number for number, name in enumerate(EVERY)}
    rows = [row for job in done for row in done[job]]
    return sorted(rows, key=lambda row: (row["how"] != "frozen", order[row["method"]], row["seed"], row["labelled"]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--real", action="store_true", help="use crops of a stereo photograph instead of procedural scenes"
    )
    parser.add_argument(
        "--compare", choices=COMPARISONS, default="published", help="methods to compare (default: %(default)s)"
    )
    parser.add_argument("--methods", metavar="NAMES", help="comma-separated subset of the comparison's methods")
    parser.add_argument("--quick", action="store_true", help="run in miniature, to check that everything works")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds per method (default: 3; 2 per control)")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="number of processes"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.8, metavar="M", help="start no further run after M minutes (default: 8.8)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=measure.plot_file, metavar="FILE", help="figure to write")
    args = parser.parse_args(arguments)
    for name in ("seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected at least 1")
    plan = QUICK if args.quick else Plan()
    if args.compare != "published":
        methods = (*MAIN, *COMPARISONS[args.compare])
        plan = plan._replace(methods=methods, finetuned=methods, control_seeds=plan.seeds)
    if args.real:
        methods = tuple(MAIN) if args.compare == "published" else plan.methods
        plan = plan._replace(real=True, methods=methods, scenes={}, labelled=(), finetune_steps=0)
    if args.methods:
        wanted = tuple(args.methods.split(","))
        if unknown := [name for name in wanted if name not in plan.methods]:
            parser.error(f"--methods has {', '.join(unknown)}; expected some of {', '.join(plan.methods)}")
        plan = plan._replace(methods=wanted)
    if args.seeds:
        plan = plan._replace(seeds=args.seeds, control_seeds=args.seeds)
    torch.set_num_threads(1)  # as in the worker processes
    start = time.perf_counter()
    rows = run(plan, args.workers, args.minutes)
    seconds = time.perf_counter() - start
    print("", table(rows), differences(rows, "SimMIM"), differences(rows, "SG-MIM"), sep="\n\n")
    print(f"\n{seconds:.0f} s with {args.workers} processes")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"machine": measure.machine("cpu"), "seconds": round(seconds), "workers": args.workers}
        plan_facts = {**plan._asdict(), "settings": plan.settings._asdict()}
        args.json.write_text(json.dumps({**facts, "plan": plan_facts, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
