"""Times the whole training step, from the batch on the device to the gradients of all parameters.

    python benchmarks/bench_step.py

dense                 sgmim_fast.reference around plain timm: every token of the branch, plain PyTorch
dense-compiled        the same through torch.compile
dense-max-autotune    dense through torch.compile(mode="max-autotune"), which tunes its kernels and captures them
sgmim                 sgmim_fast.SGMIM around plain timm
accelerated           sgmim_fast.SGMIM(..., accelerate=True)
accelerated-compiled  the same through torch.compile
accelerated-captured  accelerated through sgmim_fast.capture: a CUDA graph, which excludes the host's time
simmim-accelerated    accelerated without guidance; the difference is the structure branch's share
simmim-captured       the same as a CUDA graph
gemm-floor            only the gemms of all linear layers, each through the best library call

vit_plain, timm's ViT-B with learned positions, also has encoders of visible patches alone, with a decoder of depth 2:

visible-only          sgmim_fast.SGMIM(..., decoder=...), at the published ratio of 0.6
visible-only-75       the same at a ratio of 0.75
mae-plain             MAE with guidance as a careful PyTorch user would write it (tools/mae.py), at 0.6
...-captured          these three as CUDA graphs

Columns that compute the same loss are first checked against each other: those of the first list but the simmim ones,
and visible-only against mae-plain. A column that disagrees is flagged, and the exit code is 1. The columns are timed in
turn in one process, so that their ratios hold even on a noisy machine; on a GPU in 5 successive calls, so that the host
runs ahead as in a training loop. host is the time until a step's call returns, which on a GPU is before its work is
done. MiB is the peak memory without parameters and their gradients; a captured step's is in its graph's pool, and not
measured. On a CPU, a profiled step shows by class of kernel how far the accelerated column is above the floor. --update
adds gradient clipping and AdamW to every column but the floor.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tools.agree import relative_errors
from tools.floor import attention_gemms, branch_gemms, encoder_gemms, gemms_floor
from tools.kernel_classes import CLASSES, REST, above_gemms, class_times, sentence
from tools.mae import mae_losses
from tools.measure import autocast, interleaved, machine, peak_mib, summary
from tools.shapes import DECODER_DEPTH, ENCODERS, SHAPES, Shape
from tools.written import write_json
from torch import Tensor, nn

import sgmim_fast
from sgmim_fast import SGMIM, reference, selective_mask, standardize_structure

NAMES = (
    *("dense", "dense-compiled", "dense-max-autotune", "sgmim"),
    *("accelerated", "accelerated-compiled", "accelerated-captured"),
    *("simmim-accelerated", "simmim-captured", "gemm-floor"),
    *("mae-plain", "visible-only", "visible-only-75"),
    *("mae-plain-captured", "visible-only-captured", "visible-only-75-captured"),
)
VISIBLE_ONLY = NAMES[-6:]
CALLS = 5  # steps on a GPU between two synchronisations, since a training loop does not synchronise after every step
STEP_SHAPES = SHAPES | {"vit_plain": replace(SHAPES["vit_base"], name="vit_plain")}


@dataclass
class Case:
    """One encoder, dtype and batch, and the columns that compute it."""

    shape: Shape
    dtype: torch.dtype
    batch: int
    device: str
    models: dict[str, nn.Module]  # column -> model; a compiled column shares the model of its eager column
    columns: dict[str, Callable[[], Tensor]]  # column -> function returning the loss
    optimizers: dict[str, torch.optim.Optimizer]  # column -> optimizer of its model, with --update

    def step(self, name: str) -> Callable[[], Tensor]:
        if name.endswith("-captured"):
            return captured(self.models[name], self.columns[name])

        def run() -> Tensor:
            model = self.models[name]
            model.zero_grad()
            loss = self.columns[name]()
            loss.backward()
            if name in self.optimizers:
                nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
                self.optimizers[name].step()
            return loss

        return run


def build(shape: Shape, dtype: torch.dtype, batch: int, device: str, update: bool) -> Case:
    """Creates all columns on the same data, mask and initial weights."""
    torch.manual_seed(0)
    name, arguments = ENCODERS[shape.name]
    with torch.device(device):  # a GPU draws the weights in a tenth of the time
        plain = SGMIM(sgmim_fast.create_encoder(name, **arguments), shape.stride, accelerate=False)
        with torch.no_grad():  # SwinV2's norms start with weight 0, which would make the gradients before them 0
            for parameter in plain.encoder.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        fast = SGMIM(copy.deepcopy(plain.encoder), shape.stride, accelerate=True)
        simmim = SGMIM(copy.deepcopy(plain.encoder), shape.stride, guidance=False, accelerate=True)
    fast.load_state_dict(plain.state_dict())
    simmim.load_state_dict(plain.state_dict(), strict=False)
    images = away_from_zero(torch.randn(batch, 3, shape.image, shape.image, device=device))
    structure = standardize_structure(torch.rand(batch, 1, shape.image, shape.image, device=device))
    structure = away_from_zero(structure)
    drawn = selective_mask(batch, shape.grid, shape.ratio, device=device)

    in_dtype = functools.partial(autocast, device, dtype)
    dense = in_dtype(lambda: reference.sgmim_losses(plain, images, structure, drawn).total)
    autotuned = torch.compile(dense, mode="max-autotune")

    def dense_autotuned() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return autotuned()

    accelerated = in_dtype(fast, images, structure, drawn)
    columns = {
        "dense": dense,
        "dense-compiled": torch.compile(dense),
        "dense-max-autotune": dense_autotuned,
        "sgmim": in_dtype(plain, images, structure, drawn),
    }
    columns |= {"accelerated": accelerated, "accelerated-compiled": torch.compile(accelerated)}
    columns["simmim-accelerated"] = in_dtype(simmim, images, None, drawn)
    models = {name: fast if name.startswith("accelerated") else plain for name in columns}
    models["simmim-accelerated"] = simmim
    if device == "cuda":
        models["accelerated-captured"] = copy.deepcopy(fast)
        columns["accelerated-captured"] = in_dtype(models["accelerated-captured"], images, structure, drawn)
        models["simmim-captured"] = copy.deepcopy(simmim)
        columns["simmim-captured"] = in_dtype(models["simmim-captured"], images, None, drawn)
    if shape.name == "vit_plain":
        add_visible_only(shape, device, (images, structure), plain, in_dtype, models, columns)
    optimizers = {n: torch.optim.AdamW(m.parameters(), 1e-5, fused=True) for n, m in models.items()} if update else {}
    return Case(shape, dtype, batch, device, models, columns, optimizers)


def add_visible_only(
    shape: Shape,
    device: str,
    inputs: tuple[Tensor, Tensor],
    symmetric: SGMIM,
    in_dtype: Callable[..., Callable[[], Tensor]],
    models: dict[str, nn.Module],
    columns: dict[str, Callable[[], Tensor]],
) -> None:
    """Adds the columns of visible patches alone, with the weights of the encoder of `symmetric`."""
    name, arguments = ENCODERS[shape.name]
    with torch.device(device):
        encoder = sgmim_fast.create_encoder(name, visible_only=True, **arguments)
        encoder.model.load_state_dict(symmetric.encoder.model.state_dict())
        decoder = sgmim_fast.Decoder(encoder, depth=DECODER_DEPTH)
        plain = SGMIM(encoder, shape.stride, decoder=decoder, accelerate=False)
    fast = copy.deepcopy(plain)
    sgmim_fast.accelerate(fast.encoder)
    sgmim_fast.accelerate(fast.decoder)
    batch, side = len(inputs[0]), shape.image // shape.stride
    drawn, fewer = (
        selective_mask(batch, shape.grid, ratio, device=device).on((side, side)) for ratio in (shape.ratio, 0.75)
    )
    models |= {"mae-plain": plain, "visible-only": fast, "visible-only-75": fast}
    first = torch.arange(batch, device=device)[:, None] * shape.cells
    rows = [part.index.view(batch, -1) - first for part in (drawn.visible, drawn.masked)]
    columns["mae-plain"] = in_dtype(lambda: mae_losses(plain, *inputs, *rows).total)
    columns |= {"visible-only": in_dtype(fast, *inputs, drawn), "visible-only-75": in_dtype(fast, *inputs, fewer)}
    if device == "cuda":
        copies = {f"{name}-captured": copy.deepcopy(models[name]) for name in VISIBLE_ONLY[:3]}
        models |= copies
        columns |= {
            "mae-plain-captured": in_dtype(lambda: mae_losses(copies["mae-plain-captured"], *inputs, *rows).total),
            "visible-only-captured": in_dtype(copies["visible-only-captured"], *inputs, drawn),
            "visible-only-75-captured": in_dtype(copies["visible-only-75-captured"], *inputs, fewer),
        }


def captured(model: nn.Module, losses: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures forward and backward with `sgmim_fast.capture`, after the first calls, which run eagerly."""
    step = sgmim_fast.capture(model, loss=lambda _: losses())

    def run() -> Tensor:
        model.zero_grad()
        return step()

    for _ in range(3):
        run()
    if not step.captures:
        raise RuntimeError(f"nothing was captured: {'; '.join(step.reasons)}")
    return run


def away_from_zero(x: Tensor) -> Tensor:
    """Moves targets beyond the predictions of a fresh head, so that no sign of an L1 loss depends on rounding."""
    return x + torch.where(x < 0, -4, 4)


def check(case: Case) -> tuple[dict[str, list[str]], dict[str, float | None]]:
    """Compares each column's loss and gradients with those of the dense reference in float32. mae-plain and
    visible-only are compared with mae-plain in float32 instead; columns of other losses are not compared.

    In float32 the relative error may be at most 1e-4. In lower precision it may be at most twice the error of the dense
    (or mae-plain) column, plus 1e-3. A column that raises is dropped from the case.

    Returns each column's disagreements, and its peak memory in the step that was checked.
    """
    exact = case if case.dtype == torch.float32 else in_float32(case)
    truth = gradients(exact, "dense")[0]
    truths = {"mae-plain": truth if "mae-plain" not in exact.columns else gradients(exact, "mae-plain")[0]}
    errors: dict[str, dict[str, float]] = {}
    wrong: dict[str, list[str]] = {}
    peaks = {}
    for name in list(case.columns):
        try:
            found, peaks[name] = gradients(case, name)
        except Exception as error:
            traceback.print_exc()
            wrong[name] = [f"raised {type(error).__name__}: {str(error)[:300]}"]
            del case.columns[name]
            continue
        if name.removesuffix("-captured") in ("mae-plain", "visible-only"):
            errors[name] = relative_errors(found, truths["mae-plain"])
        elif not name.startswith("simmim") and name not in VISIBLE_ONLY:
            errors[name] = relative_errors(found, truth)
    for name, column in errors.items():
        worst = max(column, key=lambda key: column[key])
        print(f"{name}: worst gradient off by {column[worst]:.1e} of its norm ({worst})", flush=True)
        for key, error in column.items():
            plain = errors["mae-plain" if name in VISIBLE_ONLY else "dense"]
            bound = 1e-4 if case.dtype == torch.float32 else 2 * plain[key] + 1e-3
            if not error <= bound:
                wrong.setdefault(name, []).append(f"{key} is off by {error:.1e} of its norm, allowed {bound:.1e}")
    return wrong, peaks


def in_float32(case: Case) -> Case:
    """Returns the case in float32, with the weights of its dense and mae-plain columns."""
    exact = build(case.shape, torch.float32, case.batch, case.device, False)
    for name in ("dense", "mae-plain"):
        if name in exact.models:
            exact.models[name].load_state_dict(case.models[name].state_dict())
    exact.columns = {name: column for name, column in exact.columns.items() if name in case.columns}
    return exact


def gradients(case: Case, name: str) -> tuple[dict[str, Tensor], float | None]:
    """Runs one step without the optimizer. Returns the loss and the gradients, and the peak memory in MiB (None for a
    captured step)."""
    optimizer, losses = case.optimizers.pop(name, None), []
    parameters = list(case.models[name].parameters())
    step = case.step(name)
    if name.endswith(("-compiled", "-autotune")):
        step()  # compiles, so that the peak excludes compilation
    peak = peak_mib(lambda: losses.append(step().detach()), parameters, case.device)
    if name.endswith("-captured"):
        peak = None
    found = {"loss": losses[0]} | {key: p.grad for key, p in case.models[name].named_parameters()}
    if optimizer is not None:
        case.optimizers[name] = optimizer
    return {key: grad.clone() for key, grad in found.items() if grad is not None}, peak


def measure(
    case: Case, seconds: float, peaks: dict[str, float | None], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Times all columns, and returns one row for each. `keep` is called with the rows so far after each round."""
    steps: dict[str, Callable[[], Any]] = {name: case.step(name) for name in case.columns}
    layers = branch_gemms(case.shape, case.batch) + encoder_gemms(case.shape, case.batch)
    steps["gemm-floor"] = gemms_floor(layers, case.dtype, case.device)
    host: dict[str, list[float]] = {}

    def rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
        found = []
        for name, values in times.items():
            row = {"encoder": case.shape.name, "dtype": str(case.dtype).split(".")[1], "batch": case.batch}
            row |= {"device": case.device, "name": name, "rounds": len(values), **summary(values)}
            row |= {"images_per_s": 1e3 * case.batch / row["median_ms"], "peak_mib": peaks.get(name)}
            found.append(row | {"host_ms": summary(host[name][-len(values) :])["median_ms"]})
        return found

    options = {"host": host, "on_round": lambda times: keep(rows(times))}
    calls = CALLS if case.device == "cuda" else 1
    measured = rows(interleaved(steps, case.device, seconds=seconds, calls=calls, **options))
    for row in measured if case.device == "cpu" else []:
        if row["name"] == "accelerated":
            times = class_times(steps["accelerated"])
            row["above_gemms"] = above_gemms(times, row["median_ms"], measured[-1]["median_ms"])
            row["attention_gemms"] = attention_gemms(case.shape, case.batch)
    return measured


def table(rows: list[dict[str, Any]]) -> str:
    by_name = {row["name"]: row for row in rows}
    lines = [
        " " * 21 + "".join(f"{t:>10}" for t in ("ms", "p10", "p90", "host", "images/s", "MiB", "dense /", "/ floor"))
    ]
    for name in (n for n in NAMES if n in by_name):
        row = by_name[name]
        ms = row["median_ms"]
        keys = ("median_ms", "p10_ms", "p90_ms", "host_ms", "images_per_s")
        line = f"{name:21}" + "".join(f"{row[key]:10.1f}" for key in keys)
        line += " " * 10 if row["peak_mib"] is None else f"{row['peak_mib']:10.0f}"
        lines.append(f"{line}{by_name['dense']['median_ms'] / ms:9.2f}x{ms / by_name['gemm-floor']['median_ms']:9.2f}x")
        lines[-1] += "  WRONG" if row.get("wrong") else ""
    for name, plain in (("accelerated", "simmim-accelerated"), ("accelerated-captured", "simmim-captured")):
        if {name, plain} <= by_name.keys():
            share = by_name[name]["median_ms"] / by_name[plain]["median_ms"] - 1
            lines.append(f"the structure branch adds {100 * share:.1f} % to the SimMIM step ({name})")
    for name in VISIBLE_ONLY:
        suffix = "-captured" if name.endswith("-captured") else ""
        for other in (f"accelerated{suffix}", f"mae-plain{suffix}"):
            if {name, other} <= by_name.keys() and name != other:
                first, second = by_name[other], by_name[name]
                line = f"{other} / {name}: {first['median_ms'] / second['median_ms']:.2f}"
                if first["peak_mib"] and second["peak_mib"]:
                    line += f", with {100 * second['peak_mib'] / first['peak_mib']:.0f} % of its memory"
                lines.append(line)
    for name, row in by_name.items():
        if "above_gemms" in row:
            own = f"the attention's own gemms would be {100 * row['attention_gemms']:.1f} % at the floor's rate"
            lines.append(f"{sentence(name, row['above_gemms'])}; {own}")
    return "\n".join(lines)


def kernels(step: Callable[[], Any]) -> list[dict[str, Any]]:
    """Returns name, launches and milliseconds of each kernel that one step runs on the GPU, the longest first."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    found = [
        {"kernel": event.key, "launches": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda entry: -entry["ms"])


def kernel_table(found: list[dict[str, Any]], most: int = 45) -> str:
    total, launches = sum(entry["ms"] for entry in found), sum(entry["launches"] for entry in found)
    lines = [f"{total:9.3f} ms {launches:5} launches"]
    lines += [f"{entry['ms']:9.3f} ms {entry['launches']:5} {entry['kernel'][:110]}" for entry in found[:most]]
    return "\n".join(lines)


def plot(cases: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draws one pair of bars per case, dense and accelerated, split by class of kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = 2.6 * len(cases) + 1.6, 3.6
    figure, axes = plt.subplots(1, len(cases), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, columns) in zip(axes[0], cases.items(), strict=True):
        bottom = dict.fromkeys(columns, 0.0)
        for kind in [*CLASSES, REST]:
            heights = [columns[name][kind] for name in columns]
            axis.bar(list(columns), heights, bottom=list(bottom.values()), label=kind)
            bottom = {name: bottom[name] + columns[name][kind] for name in columns}
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("ms of one step, profiled", fontsize=8)
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right center", fontsize=7, reverse=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", default=",".join(SHAPES), help=f"comma-separated: {','.join(ENCODERS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="float32", help="comma-separated: float32, bfloat16 (autocast over float32 parameters)"
    )
    parser.add_argument("--batch", type=int, help="batch size (default: 16 on a CPU, 128 on a GPU)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if available")
    parser.add_argument(
        "--columns", help=f"comma-separated: {','.join(NAMES)} (default: all; compiled ones on a GPU only)"
    )
    parser.add_argument(
        "--update", action="store_true", help="clip the gradient to norm 5 and update with fused AdamW in each step"
    )
    parser.add_argument("--seconds", type=float, default=120, help="time budget per encoder and dtype (default: 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--kernels", help="columns whose GPU time is listed per kernel, for example dense,accelerated")
    parser.add_argument(
        "--plot", type=Path, help="profile dense and accelerated on the CPU and draw the figure to this file"
    )
    args = parser.parse_args(argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    sgmim_fast.keep_freed_memory()  # as in training on a CPU; applies to all columns
    batch = args.batch or (128 if device == "cuda" else 16)
    everywhere = [n for n in NAMES if device == "cuda" or not n.startswith(("dense-", "accelerated-c"))]
    wanted = args.columns.split(",") if args.columns else everywhere
    rows: list[dict[str, Any]] = []
    facts = machine(device)
    failed = False
    profiles: dict[str, dict[str, dict[str, float]]] = {}
    for encoder in args.encoder.split(","):
        for dtype in args.dtype.split(","):
            if encoder not in ENCODERS or dtype not in ("float32", "bfloat16"):
                parser.error(f"unknown encoder or dtype: {encoder}, {dtype}")
            case = build(STEP_SHAPES[encoder], getattr(torch, dtype), batch, device, args.update)
            kept = {"dense", *wanted} | ({"mae-plain"} if set(wanted) & set(VISIBLE_ONLY) else set())
            case.columns = {n: column for n, column in case.columns.items() if n in kept}
            title = f"{encoder}, {dtype}, batch {batch}, {device}"
            print(f"\n{title}", flush=True)
            wrong, peaks = check(case)
            for name, lines in wrong.items():
                print(f"{name}: WRONG in {len(lines)}:", *lines[:12], sep="\n  ", flush=True)
                failed = True
            if "dense" not in case.columns:
                continue

            def write(
                new: list[dict[str, Any]],
                wrong: dict[str, list[str]] = wrong,
                before: Sequence[dict[str, Any]] = tuple(rows),
            ) -> list[dict[str, Any]]:
                flagged = [row | {"wrong": wrong.get(row["name"], [])} for row in new]
                if args.json:  # after each round, so that results survive if a time limit ends the run
                    write_json(args.json, {"machine": facts, "rows": [*before, *flagged]})
                return flagged

            new = write(measure(case, args.seconds, peaks, write))
            rows += new
            print(table(new), flush=True)
            if args.kernels:
                for row in rows[-len(new) :]:
                    if row["name"] in args.kernels.split(","):
                        row["kernels"] = kernels(case.step(row["name"]))
                        print(f"\n{row['name']}:\n{kernel_table(row['kernels'])}", flush=True)
                write(new)
            if args.plot and device == "cpu":
                profiles[title] = {name: class_times(case.step(name)) for name in ("dense", "accelerated")}
            torch.compiler.reset()
    if args.plot and profiles:
        plot(profiles, args.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
