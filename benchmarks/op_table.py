"""Every op by every backend that runs on a device, beside plain PyTorch: times, and whether all agree.

    python benchmarks/op_table.py [--device cuda] [--dtype bfloat16] [--batch 128] [--json FILE]

Window attention has FlexAttention, compiled, as one more (flex). Before it is timed, each backend's results are held
against plain PyTorch's, bit for bit where an op only moves or counts, and against its own in a second run, bit for bit
in every op. What is wrong is timed and flagged; exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tools import flex
from tools.agree import assert_agree
from tools.measure import interleaved, machine, summary
from tools.shapes import SHAPES, Shape
from tools.written import write_json
from torch import Tensor, nn

from sgmim_fast import backends, ops, selective_mask, standardize_structure
from sgmim_fast.guidance import RelationalGuidance, StructureEncoder

EXACT = ("selective_mask", "gather_patches")  # the same bits from every backend
ATOL = 1e-6  # of the standardised maps, whose plain version sums in another order


def cases(shape: Shape, batch: int, device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """Op -> a call of it, forward and backward, that returns results and gradients."""
    torch.manual_seed(0)
    side, width, stride = shape.image // shape.stride, shape.width, shape.stride
    with backends.use("torch"):
        drawn = selective_mask(batch, shape.grid, shape.ratio, device=device)
    cells = drawn.on((side, side))
    stem = drawn.visible.on(tuple(drawn.mask.shape[1:]), (shape.image // shape.patch,) * 2).index
    images, depth = (torch.randn(batch, c, shape.image, shape.image, device=device) for c in (3, 1))
    target = images + torch.where(images < 0, -4, 4)  # no sign hangs on a rounding error
    packed = torch.randn(cells.masked.index.shape[0], width, device=device, requires_grad=True)
    features = torch.randn(batch * shape.cells, width, device=device, requires_grad=True)
    structure = torch.randn(cells.shown.index.shape[0] + 1, width, device=device, requires_grad=True)
    head, embed = nn.Linear(width, 3 * stride**2).to(device), nn.Conv2d(3, shape.stem, shape.patch).to(device)
    token, norm_weight, norm_bias = (torch.randn(shape.stem, device=device, requires_grad=True) for _ in range(3))
    norm = {} if shape.prefix else {"norm_weight": norm_weight, "norm_bias": norm_bias}
    guidance, encoder = RelationalGuidance(width, shape.heads).to(device), StructureEncoder(1, width, stride).to(device)
    depth.requires_grad_()

    def both(
        function: Callable[[], Tensor], *leaves: Tensor, like: Callable[[], Tensor] | None = None
    ) -> Callable[[], list[Tensor]]:
        """`like`: has the same shape, where the function itself takes long at first, or raises."""
        generator = torch.Generator(device).manual_seed(0)
        cotangent = torch.randn((like or function)().shape, device=device, generator=generator)

        def run() -> list[Tensor]:
            result = function()
            return [result.detach(), *torch.autograd.grad(result, leaves, cotangent.to(result.dtype))]

        return run

    def draw() -> list[Tensor]:
        new = selective_mask(batch, shape.grid, shape.ratio, generator=torch.Generator(device).manual_seed(1))
        return [new.mask, new.visible.index, new.masked.index]

    # of the encoder's first stage, or of a ViT, whose tokens are one window
    across, c = shape.image // shape.patch, shape.stem
    grid, window, shift, heads = (across, across), (shape.grid,) * 2, shape.grid // 2, max(1, c // 32)
    if shape.prefix:
        grid, window, shift, heads = (1, across**2 + 1), (1, across**2 + 1), 0, c // 64
    scales: dict[str, Tensor] = {}
    if shape.name == "swinv2_base":
        window, shift, scales = (
            (12, 12),
            6,
            {"logit_scale": torch.full((heads,), 2.3, device=device, requires_grad=True)},
        )
    n, side = window[0] * window[1], window[1]
    index = None if shape.prefix else torch.randint((2 * side - 1) ** 2, (n, n), device=device)
    table_shape = (heads, n, n) if shape.prefix else ((2 * side - 1) ** 2, heads)
    qkv, biases = (torch.randn(s, device=device, requires_grad=True) for s in ((batch, *grid, 3 * c), table_shape))
    tokens, norm1 = torch.randn(batch, *grid, c, device=device, requires_grad=True), nn.LayerNorm(c).to(device)
    linear, proj, fc1, fc2 = (nn.Linear(i * c, o * c).to(device) for i, o in ((1, 3), (1, 1), (1, 4), (4, 1)))
    norms = {"norm_weight": norm1.weight, "norm_bias": norm1.bias}
    layers = {"qkv_weight": linear.weight, "qkv_bias": linear.bias, "proj_weight": proj.weight, "proj_bias": proj.bias}
    layers |= norms

    def attend(function: Callable[..., Tensor] = ops.window_attention) -> Tensor:
        x = qkv.to(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else qkv
        return function(x, heads, window, (shift, shift), bias=biases, index=index, **scales)

    shown = cells.shown.index
    with backends.use("torch"):  # the shapes of the results
        rivals = {}
        if not scales:  # FlexAttention's has no cosines
            rivals["window_attention flex"] = both(lambda: attend(flex.window_attention), qkv, biases, like=attend)
        return {
            "selective_mask": draw,
            "standardize_structure": lambda: [standardize_structure(depth.detach())],
            "token_salience": lambda: [ops.token_salience(tokens.detach().flatten(1, 2))],
            "gather_patches": both(lambda: ops.gather_patches(depth, shown, cell=stride, patch=4, order="z"), depth),
            "masked_patch_embed": both(
                lambda: ops.masked_patch_embed(images, embed.weight, embed.bias, token, stem, **norm),
                *embed.parameters(),
                token,
                *norm.values(),
            ),
            "structure_embed": both(lambda: encoder.visible(depth.detach(), cells.shown), *encoder.parameters()),
            "relational_guidance": both(
                lambda: guidance.visible(features, structure, cells.visible, cells.shown),
                features,
                structure,
                *guidance.parameters(),
            ),
            "linear_l1": both(
                lambda: ops.linear_l1(packed, head.weight, head.bias, target, cells.masked.index, cell=stride),
                packed,
                *head.parameters(),
            ),
            "window_attention": both(attend, qkv, biases, *scales.values()),
            **rivals,
            "norm_attention": both(
                lambda: ops.norm_attention(tokens, heads, window, (shift, shift), **layers, bias=biases, index=index),
                tokens,
                *layers.values(),
                biases,
            ),
            "norm_linear": both(
                lambda: ops.norm_linear(tokens, linear.weight, linear.bias, **norms),
                tokens,
                *linear.parameters(),
                *norms.values(),
            ),
            "norm_mlp": both(
                lambda: ops.norm_mlp(tokens, *fc1.parameters(), *fc2.parameters(), **norms),
                tokens,
                *(*fc1.parameters(), *fc2.parameters()),
                *norms.values(),
            ),
        }


def disagreement(op: str, run: Callable[..., list[Tensor]], backend: str, dtype: torch.dtype) -> str:
    """What is wrong with a backend's results, "" if nothing is."""
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
    """A row for each op that is wanted and backend, given to `keep` as soon as it is known."""
    found = cases(shape, batch, torch.device(device))
    for op in wanted:
        rivals = {name.partition(" ")[2]: call for name, call in found.items() if name.startswith(f"{op} ")}
        if device == "cpu":  # where FlexAttention has no backward
            rivals = {}

        def run(
            backend: str,
            dtype: torch.dtype = dtype,
            function: Callable[[], list[Tensor]] = found[op],
            rivals: dict[str, Callable[[], list[Tensor]]] = rivals,
        ) -> list[Tensor]:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                if backend in rivals:
                    return rivals[backend]()
                with backends.use(backend):
                    return function()

        names = [name for name in backends.ORDER[device] if backends.can_run(op, name)[0]] + list(rivals)
        wrong = dict.fromkeys(names, "")
        for name in names:
            try:
                wrong[name] = disagreement(op, run, name, dtype) if name != "torch" else ""
            except Exception as error:  # one backend that raises leaves the others' rows
                if "was forced but cannot run" in str(error):  # what is not for this backend has no row
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
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--encoder", default="swin_base,vit_base", help=f"of {','.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16,float32", help="bfloat16 is autocast over float32 parameters")
    parser.add_argument("--op", default=",".join(backends.MODULES), help="ops, all by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2, help="for each op")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    facts = machine(args.device)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.json:  # at once: what is known stays known if a limit ends the run
            write_json(args.json, {"machine": facts, "rows": rows})

    for encoder in args.encoder.split(","):
        for dtype in args.dtype.split(","):
            print(f"\n{encoder}, {dtype}, batch {args.batch}: forward and backward, x plain PyTorch", flush=True)
            wanted = args.op.split(",")
            table(SHAPES[encoder], args.batch, args.device, getattr(torch, dtype), args.seconds, wanted, keep)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
