"""Times every op on every backend that runs on a device against plain PyTorch, and checks that the results agree.

    python benchmarks/op_table.py [--device cuda] [--dtype bfloat16] [--batch 128] [--json FILE]

For window attention, compiled FlexAttention is one more backend (flex). Before it is timed, each backend's results are
compared with plain PyTorch's, bitwise for ops that only move or count, and bitwise with those of a second run for every
op. A wrong backend is timed and flagged, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tools import flex
from tools.agree import assert_agree
from tools.measure import interleaved, machine, summary
from tools.op_bench import forward_backward
from tools.shapes import SHAPES, Shape
from tools.written import write_json
from torch import Tensor

from sgmim_fast import backends, selective_mask
from sgmim_fast.guidance import embedding_patch
from sgmim_fast.ops import cases

EXACT = ("selective_mask", "gather_patches")  # ops whose results are bitwise equal on all backends
ATOL = 1e-6  # tolerance of standardised maps and salience, which plain PyTorch sums in another order


def arguments(shape: Shape, batch: int, device: torch.device) -> dict[str, Any]:
    """Returns op -> its arguments in a step of an encoder: in a Swin's first stage, or in a ViT, whose tokens are one
    window."""
    torch.manual_seed(0)
    side, width, across, c = shape.image // shape.stride, shape.width, shape.image // shape.patch, shape.stem
    grid, make, patch, mergings = (side, side), cases.Make(device=device), *embedding_patch(shape.stride)
    with backends.use("torch"):
        drawn = selective_mask(batch, shape.grid, shape.ratio, device=device)
    cells, masked, visible = drawn.on(grid), [shape.masked] * batch, [shape.visible] * batch
    shown, stem = cells.shown.index, drawn.visible.on(tuple(drawn.mask.shape[1:]), (across, across)).index
    rows, heads, window, by = (batch, across, across), max(1, c // 32), (shape.grid,) * 2, (shape.grid // 2,) * 2
    if shape.prefix:
        rows, heads, window, by = (batch, 1, across**2 + 1), c // 64, (1, across**2 + 1), (0, 0)
    bias = "dense" if shape.prefix else "table"
    hottest = 2.3 if shape.name == "swinv2_base" else None
    if hottest is not None:
        window, by = (12, 12), (6, 6)
    makes: dict[str, Callable[[], Any]] = {
        "gather_patches": lambda: cases.gather_patches(masked, grid, 1, shape.stride, patch, rows=shown, make=make),
        "linear_l1": lambda: cases.linear_l1(
            masked, grid, 3, shape.stride, width, decided=True, rows=cells.masked.index, make=make
        ),
        "masked_patch_embed": lambda: cases.masked_patch_embed(
            batch, (across, across), 3, shape.patch, c, norm=not shape.prefix, visible=stem, make=make
        ),
        "norm_attention": lambda: cases.norm_attention(rows, c, heads, window, by, bias=bias, make=make),
        "norm_linear": lambda: cases.norm_linear(rows, c, 3 * c, make=make),
        "norm_mlp": lambda: cases.norm_mlp(rows, c, 4 * c, make=make),
        "position_bias": lambda: cases.position_bias(window, heads, 512, make=make),
        "relational_guidance": lambda: cases.relational_guidance(
            visible, None, shape.cells, width, shape.heads, 4 * width, rows=(cells.visible, cells.shown), make=make
        ),
        "selective_mask": lambda: cases.selective_mask(
            [math.ceil(shape.ratio * shape.grid**2)] * batch, (shape.grid,) * 2, 1, make=make
        ),
        "standardize_structure": lambda: cases.standardize_structure((batch, 1, shape.image, shape.image), make=make),
        "structure_embed": lambda: cases.structure_embed(
            masked, grid, 1, patch, mergings, width >> mergings, rows=shown, make=make
        ),
        "token_salience": lambda: cases.token_salience((batch, across**2, c), length=c**0.5, make=make),
        "window_attention": lambda: cases.window_attention(
            rows, heads, c // heads, window, by, bias=bias, hottest=hottest, pad=False, make=make
        ),
    }
    found = {}
    for op, make_arguments in makes.items():
        torch.manual_seed(0)  # the numbers of an op do not depend on those before it
        found[op] = make_arguments()
    return found


def disagreement(op: str, run: Callable[..., list[Tensor]], backend: str, dtype: torch.dtype) -> str:
    """Returns a message about what is wrong with a backend's results, or "" if they are right."""
    first, second, plain = run(backend), run(backend), run("torch")
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        return "two runs differ"
    if op in ("standardize_structure", "token_salience"):
        error = max((a - b).abs().max().item() for a, b in zip(first, plain, strict=True))
        return f"off by {error:.1e}" if error > ATOL * max(1, plain[0].abs().max().item()) else ""
    if op in EXACT:
        return "" if all(torch.equal(a, b) for a, b in zip(first, plain, strict=True)) else "not the same bits"
    try:
        assert_agree(*([t.float() for t in r] for r in (first, plain, run("torch", torch.float32))), dtype)
    except AssertionError as error:
        return str(error)
    return ""


def table(
    shape: Shape,
    batch: int,
    device: str,
    dtype: torch.dtype,
    seconds: float,
    wanted: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measures each op of `wanted` on each backend, and calls `keep` with each row as soon as it is known."""
    found = arguments(shape, batch, torch.device(device))
    for op in wanted:
        torch.manual_seed(0)
        call, ours = forward_backward(op, found[op]), functools.partial(cases.call, op)
        # FlexAttention supports no cosine attention, and no backward on a CPU.
        fits = op == "window_attention" and found[op].logit_scale is None and device != "cpu"
        rivals = {"flex": flex.window_attention} if fits else {}

        def run(
            backend: str, dtype: torch.dtype = dtype, call: Any = call, ours: Any = ours, rivals: Any = rivals
        ) -> list[Tensor]:
            if backend in rivals:
                return call(rivals[backend], dtype)
            with backends.use(backend):
                return call(ours, dtype)

        names = [name for name in backends.ORDER[device] if backends.can_run(op, name)[0]] + list(rivals)
        wrong = dict.fromkeys(names, "")
        for name in names:
            try:
                wrong[name] = disagreement(op, run, name, dtype) if name != "torch" else ""
            except Exception as error:  # the other backends are still measured
                if "was forced but cannot run" in str(error):  # the backend does not support these arguments: no row
                    print(error)
                    del wrong[name]
                    continue
                wrong[name] = f"raised {type(error).__name__}: {str(error)[:300]}"
                traceback.print_exc()
        names = list(wrong)
        runnable = [name for name in names if not wrong[name].startswith("raised")]
        times = interleaved({name: lambda name=name: run(name) for name in runnable}, device, seconds=seconds)
        plain = summary(times["torch"])["median_ms"]
        for name in names:
            row = {"encoder": shape.name, "op": op, "backend": name, "wrong": wrong[name]}
            row |= {"dtype": str(dtype)[6:], "batch": batch}
            speed = ""
            if name in times:
                row |= summary(times[name])
                speed = f"{row['median_ms']:10.3f} ms{plain / row['median_ms']:8.1f} x"
            print(f"{op:24}{name:8}{speed}{'  WRONG: ' if wrong[name] else ''}{wrong[name]}", flush=True)
            keep(row)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument(
        "--encoder", default="swin_base,vit_base", help=f"comma-separated: {','.join(SHAPES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16,float32",
        help="comma-separated: float32, bfloat16 (autocast over float32 parameters)",
    )
    parser.add_argument("--op", default=",".join(backends.MODULES), help="comma-separated names of ops (default: all)")
    parser.add_argument("--batch", type=int, default=128, help="batch size (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="time budget per op (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    facts = machine(args.device)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.json:  # after each row, so that results survive if a time limit ends the run
            write_json(args.json, {"machine": facts, "rows": rows})

    for encoder in args.encoder.split(","):
        for dtype in args.dtype.split(","):
            print(f"\n{encoder}, {dtype}, batch {args.batch}: forward and backward, x plain PyTorch", flush=True)
            wanted = args.op.split(",")
            table(SHAPES[encoder], args.batch, args.device, getattr(torch, dtype), args.seconds, wanted, keep)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
