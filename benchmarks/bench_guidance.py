"""Times the guidance branch, from the encoder's features to the loss, forward and backward.

    python benchmarks/bench_guidance.py

takes about a minute on two cores. With `--all` (also ViT-B and the compiled columns, full batches, longer timing) it
takes many minutes. The columns are

dense             sgmim_fast.reference: every token, plain PyTorch
dense-compiled    the same through torch.compile
visible           visible cells only, in plain PyTorch as a careful user would write it
visible-compiled  the same through torch.compile
fused-BACKEND     sgmim_fast.SGMIM on one of its backends
...-captured      on a GPU: the same as a CUDA graph, which excludes the host's time
gemm-floor        only the gemms of `visible`, each through the best library call

All columns are first checked against each other. If they disagree, the exit code is 1 and no speed is printed; with
`--anyway` speeds are printed, and those of wrong columns are flagged. The columns are timed in turn in one process, so
that their ratios hold even on a noisy machine. MiB is the peak memory without parameters and their gradients. On a CPU,
a profiled step shows by class of kernel how far the fused column is above the floor.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tools.agree import relative_errors
from tools.branch import CAPTURED, FUSED, Case, build
from tools.floor import branch_gemms, gemms_floor, multiply_accumulates
from tools.kernel_classes import above_gemms, class_times, sentence
from tools.measure import (
    Progress,
    can_plot,
    interleaved,
    machine,
    output_file,
    peak_mib,
    plot_file,
    summary,
    synchronize,
)
from tools.shapes import SHAPES, Shape
from tools.written import write_json
from torch import Tensor

from sgmim_fast import backends, keep_freed_memory
from sgmim_fast.ops import gemm

NAMES = ("dense", "dense-compiled", "visible", "visible-compiled", *FUSED, *CAPTURED, "gemm-floor")
AGAIN = 8  # number of further evaluations of the dense column if a column exceeds the bound from its first error
SLOW = 10.0  # seconds of a dense step above which the compiled columns are left out and the batch is reduced
SHORT = 3.0  # seconds of a dense step after the batch is reduced; --all keeps the batch
TITLES = {
    "dense": "the dense reference",
    "dense-compiled": "the same compiled",
    "visible": "plain PyTorch on visible cells only",
    "visible-compiled": "the same compiled",
}


def dense_seconds(shape: Shape, dtype: torch.dtype, device: str) -> float:
    """Measures the seconds of a dense step per image."""
    step = build(shape, dtype, 1, device).step("dense")
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
        if times[-1] > 1:
            break
    return min(times)


def check(case: Case, anyway: bool = False) -> tuple[list[str], dict[str, float]]:
    """Compares each column's loss and gradients with those of the dense reference in float32.

    In float32 the relative error may be at most 1e-4 (rounding; one wrong sign among 10^5 differences exceeds it). In
    lower precision it may be at most twice the error of the dense column, plus 1e-3. The error of a small gradient
    varies by chance from one evaluation to the next. If a column exceeds the bound, the dense column's error is
    therefore its largest over several evaluations, with features and parameters perturbed by rounding errors.

    anyway: a column that raises is dropped from the case. Otherwise the error is raised.

    Returns the disagreements, each "COLUMN: what", and each column's peak memory in the step that was checked.
    """
    parameters = list(case.model.parameters())

    def gradients(case: Case, name: str) -> tuple[dict[str, Tensor], float]:
        losses, step = [], case.step(name)
        if name.endswith("-compiled"):
            step()  # compiles, so that the peak excludes compilation
        peak = peak_mib(lambda: losses.append(step().detach()), parameters, case.device)
        found = {"loss": losses[0], "features": case.features.grad}
        found |= {key: p.grad for key, p in case.model.named_parameters()}
        return {key: grad.double() for key, grad in found.items()}, peak  # copies, since later steps reuse gradients

    exact = build(case.shape, torch.float32, case.batch, case.device) if case.dtype != torch.float32 else case
    exact.model.load_state_dict(case.model.state_dict())
    truth, _ = gradients(exact, "dense")
    errors, peaks, raised = {}, {}, list[str]()
    for name in list(case.columns):
        try:
            found, peaks[name] = gradients(case, name)
        except Exception as error:
            if not anyway:
                raise
            traceback.print_exc()
            raised.append(f"{name}: raised {type(error).__name__}: {str(error)[:300]}")
            del case.columns[name]
            continue
        errors[name] = relative_errors(found, truth)
    lower = case.dtype != torch.float32

    def disagreements(dense: dict[str, float]) -> list[str]:
        wrong = []
        for name, column in errors.items():
            for key, error in column.items():
                bound = 2 * dense[key] + 1e-3 if lower else 1e-4
                if not error <= bound:
                    wrong.append(f"{name}: {key} is off by {error:.1e} of its norm, allowed {bound:.1e}")
        return wrong

    wrong = disagreements(errors["dense"])
    if wrong and lower:
        largest = errors["dense"]
        for _ in range(AGAIN):
            with perturbed([case.features, *parameters], case.dtype):
                again = relative_errors(gradients(case, "dense")[0], truth)
            largest = {key: max(error, again[key]) for key, error in largest.items()}
        wrong = disagreements(largest)
    return raised + wrong, peaks


@contextlib.contextmanager
def perturbed(tensors: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the numbers of the tensors have random relative errors below the dtype's eps."""
    before = [t.detach().clone() for t in tensors]
    for t in tensors:
        t.detach().mul_(1 + torch.finfo(dtype).eps * (2 * torch.rand_like(t) - 1))
    try:
        yield
    finally:
        for t, value in zip(tensors, before, strict=True):
            t.detach().copy_(value)


def measure(
    case: Case,
    seconds: float,
    peaks: dict[str, float],
    progress: Callable[[str], None] = lambda detail: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Times all columns, and returns one row for each. `keep` is called with the rows so far after each round."""
    steps: dict[str, Callable[[], Any]] = {name: case.step(name) for name in case.columns}
    steps["gemm-floor"] = gemms_floor(branch_gemms(case.shape, case.batch), case.dtype, case.device)

    def rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
        of_all = {"encoder": case.shape.name, "dtype": str(case.dtype).split(".")[1], "batch": case.batch}
        of_all |= {"device": case.device}
        return [
            of_all | {"name": name, "rounds": len(values), **summary(values), "peak_mib": peaks.get(name)}
            for name, values in times.items()
        ]

    callbacks = {"progress": progress, "on_round": lambda times: keep(rows(times))}
    found = rows(interleaved(steps, case.device, seconds=seconds, **callbacks))
    for row in found:
        name = row["name"]
        if name in case.columns and name not in CAPTURED and row["median_ms"] < 1e3 * SLOW:
            row |= split(case, name, max(1, min(5, int(seconds / 10 / row["median_ms"] * 1e3))))
    for row in found if case.device == "cpu" else []:
        if row["name"] in FUSED:
            times = class_times(steps[row["name"]])
            row["above_gemms"] = above_gemms(times, row["median_ms"], found[-1]["median_ms"])
    return found


def split(case: Case, name: str, repeats: int) -> dict[str, float]:
    """Measures the medians of forward and backward separately."""
    forward, backward = [], []
    with backends.use(FUSED[name]) if name in FUSED else contextlib.nullcontext():
        for _ in range(repeats):
            case.model.zero_grad()
            case.features.grad = None
            stamps = []
            loss = None
            for part in (None, lambda: case.columns[name](), lambda: loss.backward()):  # noqa: B023 - called at once
                result = part() if part else None
                loss = result if loss is None else loss
                synchronize(case.device)
                stamps.append(time.perf_counter())
            forward.append(stamps[1] - stamps[0])
            backward.append(stamps[2] - stamps[1])
    return {"forward_ms": summary(forward)["median_ms"], "backward_ms": summary(backward)["median_ms"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of one case, with ratios to the dense reference, the plain visible branch and the floor."""
    by_name = {row["name"]: row for row in rows}
    titles = ["ms", "p10", "p90", "fwd", "bwd", "MiB", "dense /", "visible /", "/ floor"]
    head = " " * 18 + "".join(f"{title:>{11 if title == 'visible /' else 9}}" for title in titles)
    lines = [head]
    for name in (n for n in NAMES if n in by_name):
        row = by_name[name]
        ms = row["median_ms"]
        cells = [ms, row["p10_ms"], row["p90_ms"], row.get("forward_ms"), row.get("backward_ms"), row["peak_mib"]]
        ratios = [by_name[base]["median_ms"] / ms for base in ("dense", "visible")]
        line = f"{name:18}" + "".join(f"{'' if c is None else f'{c:.1f}':>9}" for c in cells)
        lines.append(line + f"{ratios[0]:8.2f}x{ratios[1]:10.2f}x{ms / by_name['gemm-floor']['median_ms']:8.2f}x")
    lines += [sentence(name, row["above_gemms"]) for name, row in by_name.items() if "above_gemms" in row]
    return "\n".join(lines)


def conclusion(rows: list[dict[str, Any]]) -> str:
    """Summarises the rows of one case in a sentence."""
    ms = {row["name"]: row["median_ms"] for row in rows}
    fused = [name for name in ms if name in FUSED]
    case, floor = f"{rows[0]['encoder']} in {rows[0]['dtype']}, batch {rows[0]['batch']}", ms["gemm-floor"]
    if not fused:
        return f"{case}: none of sgmim_fast's kernels can run here; python -m sgmim_fast.env says why."
    best = min(fused, key=ms.__getitem__)
    others = ", ".join(f"{ms[name] / ms[best]:.1f} times as fast as {TITLES[name]}" for name in TITLES if name in ms)
    return (
        f"{case}: forward and backward of the branch take {ms[best]:.0f} ms with sgmim_fast ({FUSED[best]}), {others}. "
        f"The gemms of the visible cells alone take {floor:.0f} ms in the best library calls: they bound "
        "what is left to gain."
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws one panel per case, with one bar per column and a line at the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row["encoder"], row["dtype"], row["batch"], row["device"]) for row in rows))
    figure, axes = plt.subplots(1, len(cases), figsize=(3.4 * len(cases), 3.2), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        mine = {r["name"]: r for r in rows if (r["encoder"], r["dtype"], r["batch"], r["device"]) == case}
        names = [name for name in NAMES if name in mine and name != "gemm-floor"]
        medians = [mine[name]["median_ms"] for name in names]
        spread = [[m - mine[n]["p10_ms"] for n, m in zip(names, medians, strict=True)]]
        spread.append([mine[n]["p90_ms"] - m for n, m in zip(names, medians, strict=True)])
        colours = ["tab:blue" if name in FUSED else "0.72" for name in names]
        bars = axis.bar(names, medians, yerr=[[max(0, v) for v in s] for s in spread], color=colours, capsize=2)
        axis.bar_label(bars, [f"{mine['dense']['median_ms'] / m:.1f}x" for m in medians], fontsize=7, padding=2)
        axis.axhline(mine["gemm-floor"]["median_ms"], color="tab:red", linewidth=1, linestyle="--", label="gemm floor")
        axis.set_title(f"{case[0]}, {case[1]}, batch {case[2]}, {case[3]}", fontsize=8)
        axis.tick_params(axis="x", labelrotation=35, labelsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.15)
    axes[0][0].set_ylabel("ms, forward + backward", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--all", action="store_true", help="add ViT-B and the compiled columns, with full batches and longer timing"
    )
    parser.add_argument(
        "--encoder", help=f"comma-separated: {','.join(SHAPES)} (default: swin_base; also vit_base with --all)"
    )
    parser.add_argument(
        "--dtype",
        default="float32,bfloat16",
        help="comma-separated: float32, bfloat16 (autocast over float32 parameters)",
    )
    parser.add_argument("--batch", type=int, help="batch size (default: 16 on a CPU, 128 on a GPU)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if available")
    parser.add_argument(
        "--columns",
        help=f"comma-separated: {','.join(NAMES)} (default: all that can run here; compiled ones only with --all and "
        f"if a step of the dense column takes less than {SLOW:.0f} s)",
    )
    parser.add_argument("--seconds", type=float, help="time budget per encoder and dtype (default: 10; 60 with --all)")
    parser.add_argument("--anyway", action="store_true", help="also time columns whose results disagree, and flag them")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--plot", type=plot_file, help="figure to write (default: guidance.png if matplotlib is installed)"
    )
    args = parser.parse_args(argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    keep_freed_memory()  # as in training on a CPU; applies to all columns
    asked = args.batch or (128 if device == "cuda" else 16)
    seconds = args.seconds or (60 if args.all else 10)
    encoders = (args.encoder or ("swin_base,vit_base" if args.all else "swin_base")).split(",")
    dtypes = args.dtype.split(",")
    for name, known in [*((e, SHAPES) for e in encoders), *((d, ("float32", "bfloat16", "float16")) for d in dtypes)]:
        if name not in known:
            parser.error(f"there is no {name!r}, only {', '.join(known)}")
    progress = Progress()
    rows: list[dict[str, Any]] = []
    said, failed, facts = [], False, machine(device)
    for shape, dtype in ((SHAPES[encoder], dtype) for encoder in encoders for dtype in dtypes):
        title, batch, kind = f"{shape.name}, {dtype}", asked, getattr(torch, dtype)
        progress(f"{title}: building")
        dense = dense_seconds(shape, kind, device)
        slow = dense * asked > SLOW
        if slow and not (args.all or args.batch or args.columns):
            batch = max(1, int(SHORT / dense))
        case = build(shape, kind, batch, device)
        note = ""
        if args.columns:
            wanted = {"dense", "visible", *args.columns.split(",")}  # ratios need dense and visible
            case.columns = {name: column for name, column in case.columns.items() if name in wanted}
        elif slow or not args.all:
            case.columns = {name: column for name, column in case.columns.items() if not name.endswith("-compiled")}
        if slow:
            note = f" (a dense step of {asked} would take {dense * asked:.0f} s here)"
        progress(f"{title}: checking that all columns agree")
        wrong, peaks = check(case, args.anyway)
        failed |= bool(wrong)
        if wrong:
            progress.clear()
            what = "speeds are given all the same" if args.anyway else "no speed is given"
            print(f"The columns disagree; {what}.", *wrong, sep="\n  ", flush=True)
        if wrong and not args.anyway:
            return 1
        progress(f"{title}: timing")

        def keep(
            new: list[dict[str, Any]], wrong: list[str] = wrong, before: Sequence[dict[str, Any]] = tuple(rows)
        ) -> None:
            for row in new:
                row["wrong"] = [line for line in wrong if line.startswith(f"{row['name']}: ")]
            if args.json:  # after each round, so that results survive if a time limit ends the run
                write_json(args.json, {"machine": facts, "rows": [*before, *new]})

        keep(new := measure(case, seconds, peaks, functools.partial(progress, f"{title}: timing"), keep))
        rows += new
        floor = next(row for row in new if row["name"] == "gemm-floor")["median_ms"]
        rate = 2 * 3 * multiply_accumulates(shape, batch) / floor / 1e6
        progress.clear()
        print(f"\n{title}, batch {batch}, {device}{note}", table(new), sep="\n")
        print(f"the floor's gemms run at {rate:.0f} GFLOP/s", flush=True)
        said.append(conclusion(new))
        if gemm.compute_dtype(kind, torch.device(device)) != kind:
            said[-1] += " This CPU has no instructions for bfloat16, so sgmim_fast computes it in float32."
        torch.compiler.reset()
    print("", *said, sep="\n")
    if not args.all:
        print("--all has the columns of torch.compile and ViT-B too.")
    if picture := args.plot or (Path("guidance.png") if can_plot() else None):
        plot(rows, picture)
        print(f"drawn in {picture}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
