"""`python -m sgmim_fast.kernels.compile [--all]`: compiles the Triton kernels ahead of time, without a GPU.

Forward and backward of every op run on CPU tensors with all launches intercepted. Each launch is compiled for each
architecture as a GPU would compile it: at the sizes of Swin-B, SwinV2-B and ViT-B with a batch of 128 in bfloat16
autocast, or with `--all` at batches of 1 to 128 in every dtype. A line per launch reports registers, spilled bytes
(stack), shared memory, how many of its blocks a multiprocessor holds, and how many instructions it has for tensor cores
(mma; wgmma, of compute capability 9.0; tcgen05, of 10.0) and for bulk copies; a table at the end has the minimum and
maximum of each kernel. The exit code is 1 if a kernel fails to compile, spills more than `configs.STACK` allows (with
the Triton version for which that was recorded, or a newer one) or needs more shared memory than the architecture has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgmim_fast import backends
from sgmim_fast.guidance import embedding_patch
from sgmim_fast.kernels import configs, gemm
from sgmim_fast.kernels import launch as launching
from sgmim_fast.ops import cases
from sgmim_fast.ops.gemm import compute_bfloat16_in
from sgmim_fast.ops.target import Target, caught
from sgmim_fast.ops.window_attention import most_tokens_on_a_gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Launch(NamedTuple):
    """A kernel, and everything that its compiled code depends on."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Any, Any], ...]
    aligned: tuple[tuple[int, ...], ...]  # arguments that are divisible by 16
    options: tuple[tuple[str, int], ...]


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Returns a call as Triton specialises it: pointers, sizes that are 1 or divisible by 16, absent arguments."""
    names = kernel.arg_names
    options = dict(options)
    launch_options = {key: options.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in options}
    values = dict(zip(names, args, strict=False)) | options
    constants: dict[Any, Any] = {}
    aligned: list[tuple[int, ...]] = []
    declared = {param.name for param in kernel.params if param.is_constexpr}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(entry, (*path, i)) for i, entry in enumerate(value))
        if isinstance(value, Tensor):
            aligned.append(path)
            return "*" + triton.runtime.jit.type_canonicalisation_dict.get(str(value.dtype)[6:], "i1")
        if value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for i, name in enumerate(names):
        if name in declared:
            signature[name], constants[i,] = "constexpr", getattr(values[name], "value", values[name])
        else:
            signature[name] = kind(values[name], (i,))
    return Launch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(launch_options.items()),
    )


@dataclass(frozen=True)
class Shape:
    """A model and batch whose launches are compiled."""

    width: int
    stride: int
    grid: int  # cells along an image
    batch: int

    @property
    def masked(self) -> int:
        """Number of masked cells of an image."""
        return math.ceil(0.6 * self.grid**2)


# Swin-B/192 and ViT-B/16; the batches make gemms of every shape class.
SHAPES = [Shape(*model, batch) for model in ((1024, 32, 6), (768, 16, 14)) for batch in (1, 8, 128)]


# Window attention of Swin-B, SwinV2-B and ViT-B, at 192 and other numbers of pixels: map, window, shift and options. A
# map has two by two windows, or one of all its tokens.
WINDOWS: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int], dict[str, Any]]] = [
    ((12, 12), (6, 6), (0, 0), {}),
    ((12, 12), (6, 6), (3, 3), {}),
    ((13, 13), (7, 7), (3, 3), {"pad": True}),
    *(((2 * n, 2 * n), (n, n), (n // 2, n // 2), {"hottest": 1.0}) for n in (8, 10, 12)),
    ((31, 31), (16, 16), (8, 8), {"hottest": 1.0, "pad": True}),
    *(((1, 197), (1, 197), (0, 0), {"heads": 12, "width": 64, "bias": bias}) for bias in ("dense", None)),
]
LAYERS = [(128, 384), (512, 2048), (768, 3072)]  # input and output widths of layers in those models


def forward(op: str, a: Any) -> Any:
    return backends.implementation(op, "forward", "triton")(*a)


def both(op: str, a: Any, *unwanted: str) -> None:
    """Runs forward and backward of a composition. unwanted: names of tensors that need no gradient."""
    result = forward(op, a)
    result, saved = result if isinstance(result, tuple) else (result, [])
    if op == "norm_linear":  # its residual is not saved for the backward
        a = a._replace(residual=None)
    declared = cases.registered(op).declared
    wanted = {name for name, t in declared.tensors(a) if t.is_floating_point() and name not in unwanted}
    layout = declared.layout(declared.lengths(a))
    needs = [layout.names[i] in wanted for i in layout.places]
    backends.implementation(op, "backward", "triton")(result, *a, saved, needs)


def encoder(batch: int, mixed: bool, dtype: torch.dtype) -> None:
    """Runs forward and backward of the ops of accelerated encoders."""
    make = cases.Make(torch.float32 if mixed else dtype, numbers=torch.zeros)
    for grid, window, shift, options in WINDOWS:
        if math.prod(window) <= most_tokens_on_a_gpu(dtype):
            options = {"heads": 4, "width": 32, "pad": False, "make": make} | options
            a = cases.window_attention((batch, *grid), window=window, shift=shift, **options)
            both("window_attention", a._replace(qkv=a.qkv.to(dtype)))

    cast = dtype if mixed else None
    for width, hidden in LAYERS:
        rows = (128 * batch,)
        if dtype != torch.float16:  # which the op does not take with a layer scale
            a = cases.norm_linear(rows, width, hidden, layer_scale=True, residual=True, make=make)
            both("norm_linear", a._replace(dtype=cast))
        for norm, residual in itertools.product((True, False), (False, True)):
            a = cases.norm_linear(rows, width, hidden, norm=norm, residual=residual, make=make)
            both("norm_linear", a._replace(dtype=cast))
            for post_norm in (False, True):
                a = cases.norm_mlp(rows, width, hidden, norm=norm, residual=residual, post_norm=post_norm, make=make)
                both("norm_mlp", a._replace(dtype=cast))


def branch(shape: Shape, mixed: bool, dtype: torch.dtype) -> None:
    """Runs forward and backward of the branch's ops. mixed: whether parameters are float32, as under autocast."""
    width, stride, batch, side = shape.width, shape.stride, shape.batch, shape.grid
    cells, grid, cast = side * side, (side, side), dtype if mixed else None
    make = cases.Make(torch.float32 if mixed else dtype, numbers=torch.zeros)
    patch, mergings = embedding_patch(stride)
    mask = cases.chosen([shape.masked] * batch, cells)
    visible, masked = make.rows(~mask), make.rows(mask)
    seen, shown = [cells - shape.masked] * batch, [shape.masked] * batch

    for keep in (True, False):
        options = {"keep": keep, "rows": (visible, masked), "make": make}
        a = cases.relational_guidance(seen, shown, cells, width, 8, 4 * width, **options)
        both("relational_guidance", a._replace(dtype=cast))

    a = cases.structure_embed(shown, grid, 1, patch, mergings, width >> mergings, rows=masked.index, make=make)
    for unwanted in {("structure",), ("structure",) if batch > 1 else ()}:
        both("structure_embed", a._replace(dtype=cast), *unwanted)

    for packed, channels, valid in ((True, 1, True), (True, 1, False), (False, 3, False)):
        for squared in (False, True):
            options = {"packed": packed, "valid": valid, "squared": squared, "normalized": not valid, "scale": 0.5}
            a = cases.linear_l1(seen, grid, channels, stride, width, **options, rows=visible.index, make=make)
            both("linear_l1", a._replace(x=a.x.to(dtype), dtype=cast), "target")

    patches = (side * stride // 4,) * 2
    for norm in (True, False):
        a = cases.masked_patch_embed(
            batch, patches, 3, 4, width >> mergings, norm=norm, visible=visible.index, make=make
        )
        both("masked_patch_embed", a._replace(dtype=cast), "x")

    for zorder in (False, True):
        a = cases.gather_patches(seen, grid, 3, stride, patch, zorder=zorder, rows=visible.index, make=make)
        gradient = backends.implementation("gather_patches", "backward", "triton")
        gradient(forward("gather_patches", a), a.rows, list(a.pixels.shape), stride, patch, zorder)
    maps = batch, 1, side * stride, side * stride
    forward("standardize_structure", cases.standardize_structure(maps, ignore=True, make=make))
    both("position_bias", cases.position_bias((8, 8), 4, 512, make=make), "coordinates")
    a = cases.token_salience((batch, cells, width), make=make)
    forward("token_salience", [a.x.to(dtype)])
    for counts in (shown, [i % cells for i in range(batch)]):
        forward("selective_mask", cases.selective_mask(counts, grid))


def launches(dtypes: list[str], architecture: int, everything: bool = True) -> list[Launch]:
    """Returns every distinct launch of the ops, with both implementations of gemms.

    everything: whether to include smaller batches, and parameters in the dtype itself.
    """
    found: dict[Launch, None] = {}

    def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.setdefault(describe(kernel, args, options))

    with ExitStack() as stack:
        stack.enter_context(caught(note, Target(f"sm_{architecture}", 132)))
        # Keeps bfloat16 calls in bfloat16 on a CPU without bfloat16 gemms, as on a GPU.
        stack.enter_context(compute_bfloat16_in(torch.bfloat16))
        for name in dtypes:
            dtype, mixed = DTYPES[name], name != "float32"
            with mock.patch.object(gemm, "_wanted", lambda: "triton"):
                for shape, parameters in itertools.product(SHAPES, {mixed, False} if everything else {mixed}):
                    if everything or shape.batch == 128:
                        branch(shape, parameters, dtype)
                encoder(128, mixed, dtype)
            with mock.patch.object(gemm, "_wanted", lambda: "library"):
                branch(SHAPES[0] if everything else SHAPES[2], mixed and not everything, dtype)
                encoder(1 if everything else 128, mixed and not everything, dtype)
    return list(found)


# Name in the report -> instruction in PTX.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05": r"\btcgen05\.mma\.",
    "mma": r"(?<![.\w])mma\.sync\.",
    "bulk": r"\bcp\.(?:async|reduce\.async)\.bulk\.tensor\.",
}
REGISTERS, THREADS, BLOCKS = 1 << 16, {80: 2048, 90: 2048, 100: 2048}, 32  # maxima of a multiprocessor


def blocks_per_multiprocessor(facts: dict[str, int], launch: Launch, capability: int) -> int:
    """Returns how many blocks of a launch fit on a multiprocessor, by registers, shared memory and threads.

    The driver reserves 1 KiB of shared memory per block.
    """
    threads = 32 * dict(launch.options).get("num_warps", 4)
    registers = REGISTERS // (8 * math.ceil(facts["registers"] / 8) * threads)
    shared = (configs.SHARED.get(capability, 99 << 10) + (1 << 10)) // (facts["shared"] + (1 << 10))
    return min(registers, shared, THREADS.get(capability, 1536) // threads, BLOCKS)


def compile_for(launch: Launch, capability: int) -> dict[str, int]:
    """Returns registers and spilled bytes per thread, shared memory, blocks per multiprocessor, instructions."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    facts = {"shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}
    facts["blocks"] = blocks_per_multiprocessor(facts, launch, capability)
    return facts | {name: len(re.findall(what, compiled.asm["ptx"])) for name, what in INSTRUCTIONS.items()}


def _resources(cubin: bytes) -> dict[str, int]:
    """Returns registers and stack as reported by `cuobjdump` of Triton's own toolkit."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def _leaves(kinds: Any) -> Iterator[str]:
    """Returns the leaves of nested tuples."""
    for kind in kinds:
        yield from (kind,) if isinstance(kind, str) else _leaves(kind)


def report(launch: Launch, architecture: int) -> tuple[bool, str, str, dict[str, int]]:
    """Returns whether a launch compiles within its limits, its name, its line in the report, and its facts."""
    name = f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__}"
    kinds = {kind for kind in _leaves([kind for _, kind in launch.signature]) if kind.startswith("*")}
    options = " ".join(f"{key}={value}" for key, value in launch.options)
    blocks = {
        n: launch.kernel.arg_names.index(n)
        for n in ("QUERIES", "KEYS", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D", "BLOCK")
        if n in launch.kernel.arg_names
    }
    constants = dict(launch.constants)
    tile = "x".join(str(constants[i,]) for i in blocks.values())
    head = f"sm_{architecture} {name} {tile} {options} {','.join(sorted(kinds))}"
    try:
        facts = compile_for(launch, architecture)
    except Exception as error:  # the compiler may raise anything; the report shows it
        return False, head, f"{head}: FAILED {type(error).__name__}: {str(error)[-300:]}", {}
    half = not kinds.isdisjoint(("*bf16", "*fp16"))
    limits = {
        "stack": configs.STACK.get((name, 2 if half else 4), 0),
        "shared": configs.SHARED.get(architecture, 99 << 10),
    }
    over = {fact: limit for fact, limit in limits.items() if facts[fact] > limit}
    line = ", ".join([*(f"{v} {k}" for k, v in facts.items() if v), *(f"more than {v} {k}" for k, v in over.items())])
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    bound = {"shared", "stack"} if version >= configs.STACK_SINCE else {"shared"}
    return bound.isdisjoint(over), head, f"{head}: {line}", facts


def rows(found: Iterable[tuple[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Returns for each name the fewest blocks, the most spilled bytes, and the instructions that all its launches have.

    `tests/kernels/kernel_table.json` holds these rows.
    """
    table: dict[str, dict[str, int]] = {}
    for name, facts in found:
        row = {"blocks": facts["blocks"], "stack": facts["stack"]} | {k: int(facts[k] > 0) for k in INSTRUCTIONS}
        old = table.get(name, row)
        table[name] = {key: (max if key == "stack" else min)(value, old[key]) for key, value in row.items()}
    return table


def summary(found: Iterable[tuple[str, dict[str, int]]]) -> Iterator[str]:
    """Yields the lines of the table: minimum and maximum of each fact per kernel and architecture."""
    kernels: dict[str, list[dict[str, int]]] = {}
    for name, facts in found:
        kernels.setdefault(" ".join(name.split()[:2]), []).append(facts)
    names = ("blocks", "registers", "stack", *INSTRUCTIONS)
    yield f"{'':62}" + "".join(f"{name:>10}" for name in names)
    for kernel, all_facts in sorted(kernels.items()):
        cells = []
        for name in names:
            least, most = (pick(facts[name] for facts in all_facts) for pick in (min, max))
            cells.append(str(least) if least == most else f"{least}-{most}")
        yield f"{kernel:62}" + "".join(f"{cell:>10}" for cell in cells)


_found: list[Launch] = []  # inherited by the forked processes that compile


def _report(task: tuple[int, int]) -> tuple[bool, str, str, dict[str, int]]:
    return report(_found[task[0]], task[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        default="80,90,100",
        help="comma-separated compute capabilities without the point (default: %(default)s)",
    )
    parser.add_argument("--dtype", help=f"comma-separated: {','.join(DTYPES)} (default: bfloat16; all with --all)")
    parser.add_argument(
        "--all", action="store_true", help="also compile for smaller batches and every dtype (takes half an hour)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="number of compiling processes (default: one per core)"
    )
    parser.add_argument(
        "--json", type=Path, help="write the table of kernels to this file, as in tests/kernels/kernel_table.json"
    )
    args = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    dtypes = args.dtype.split(",") if args.dtype else list(DTYPES) if args.all else ["bfloat16"]
    failed, found = 0, []
    for architecture in map(int, args.arch.split(",")):
        _found[:] = launches(dtypes, architecture, args.all)
        tasks = [(i, architecture) for i in range(len(_found))]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for good, name, line, facts in pool.imap(_report, tasks):
                print(line, flush=True)
                failed += not good
                found.append((name, facts))
    count, compiled = len(found), [(name, facts) for name, facts in found if facts]
    print("\n".join(summary(compiled)))
    if args.json:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows(compiled).items()))
        args.json.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "rows": {{\n{lines}\n}}}}\n')
    print(f"{count} launches, {failed} failed or over their limits, Triton {triton.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
