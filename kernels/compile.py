"""`python -m sgmim_fast.kernels.compile [--arch 80,90,100]`: compiles the Triton kernels ahead of time, without a GPU.

The launchers of the ops run forward and backward on small CPU tensors with every launch caught. What a GPU would
compile for its arguments, at the widths of Swin-B and ViT-B, is compiled for each architecture and printed with
registers, spilled bytes (stack) and shared memory. Exit code 1 where a kernel fails to compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sgmim_fast import kernels, ops
from sgmim_fast.kernels import launch as launching
from sgmim_fast.ops import GuidanceParameters, StructureParameters

MODULES = (
    *("gather_patches", "layer_norm", "linear_l1", "masked_patch_embed", "products", "relational_guidance"),
    *("selective_mask", "standardize_structure", "structure_embed", "sums"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Launch(NamedTuple):
    """What a launch compiles to: the kernel and all that its code depends on."""

    kernel: Any
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Any, Any], ...]
    aligned: tuple[tuple[int, ...], ...]  # arguments divisible by 16
    options: tuple[tuple[str, int], ...]


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """As Triton specialises a call: pointers, sizes that are 1 or divisible by 16, absent arguments."""
    names = kernel.arg_names
    options = dict(options)
    launch_options = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
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
            signature[name], constants[i,] = "constexpr", values[name]
        else:
            signature[name] = kind(values[name], (i,))
    return Launch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        tuple(launch_options.items()),
    )


@contextmanager
def caught() -> Iterator[dict[Launch, None]]:
    """Collects launches in place of running them."""
    found: dict[Launch, None] = {}

    def catch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        found.setdefault(describe(kernel, args, options))

    with ExitStack() as stack:
        for name in MODULES:
            module = __import__(f"{kernels.__name__}.{name}", fromlist=["launch"])
            if hasattr(module, "launch"):
                stack.enter_context(mock.patch.object(module, "launch", catch))
        stack.enter_context(mock.patch.object(launching, "supported", lambda dtype, compute: (True, "")))
        # a CPU without bfloat16 products stands for a GPU that has them
        stack.enter_context(ops.products.compute_bfloat16_in(torch.bfloat16))
        stack.enter_context(mock.patch.object(kernels.products, "_wanted", lambda: "triton"))
        stack.enter_context(mock.patch.object(kernels.products, "architecture", lambda device: "any"))
        yield found


def branch(width: int, stride: int, heads: int, mixed: bool, dtype: torch.dtype) -> None:
    """Forward and backward of every op with a model's widths and a few rows; mixed: float32 parameters, as autocast."""
    parameters_dtype = torch.float32 if mixed else dtype
    backends = {name: __import__(f"{kernels.__name__}.{name}", fromlist=["forward"]) for name in MODULES}

    def tensor(*shape: int, dtype: torch.dtype = parameters_dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    from sgmim_fast.guidance import embedding_patch

    batch, cells, grid = 2, 4, 2
    patch, merges = embedding_patch(stride)
    rows = [torch.tensor([0, 5]), torch.tensor([0, 1, 2]), torch.tensor([1, 4]), torch.tensor([0, 1, 2])]
    images, maps = tensor(batch, 3, grid * stride, grid * stride), tensor(batch, 1, grid * stride, grid * stride)
    cast = dtype if mixed else None

    norm = [tensor(width), tensor(width)]
    w = GuidanceParameters(
        *norm, *norm, *(tensor(width, width) for _ in range(4)), tensor(width), *norm,
        tensor(4 * width, width), tensor(4 * width), tensor(width, 4 * width), tensor(width),
    )  # fmt: skip
    features, structure = tensor(batch * cells, width), tensor(3, width)
    op = backends["relational_guidance"]
    for keep in (True, False):
        out, saved = op.forward(features, structure, list(w), rows, cells, heads, keep, 1e-5, cast)
        flags = [True] * (2 + len(w))
        op.backward(out, features, structure, list(w), rows, saved, cells, heads, keep, flags, cast)

    first = width >> merges
    s = StructureParameters(
        tensor(first, 1, patch, patch), *(tensor(first) for _ in range(3)),
        *([tensor(4 * first << i) for i in range(merges)] for _ in range(2)),
        [tensor(2 * first << i, 4 * first << i) for i in range(merges)],
    ).flat()  # fmt: skip
    op = backends["structure_embed"]
    out, saved = op.forward(maps, rows[2], s, stride, 1e-5, cast)
    for needed in (False, True):
        op.backward(out, maps, rows[2], s, saved, stride, [needed] + [True] * len(s), cast)

    op = backends["linear_l1"]
    for packed, target, valid in ((True, maps, maps > 0), (True, maps, None), (False, images, None)):
        x = tensor(2 if packed else batch * cells, width, dtype=dtype)
        weight, bias = tensor(target.shape[1] * stride**2, width), tensor(target.shape[1] * stride**2)
        total, signs = op.forward(x, weight, bias, target, valid, rows[0], stride, packed, cast)
        op.backward(total, x, weight, bias, target, signs, rows[0], stride, packed, [True] * 3 + [False], cast)

    op = backends["masked_patch_embed"]
    vectors = [tensor(first) for _ in range(4)]
    weight = tensor(first, 3, 4, 4)
    for bias, token, *norm in (vectors, [*vectors[:2], None, None]):
        stem = images, weight, bias, token, rows[0], *norm
        out, saved = op.forward(*stem, 1e-5, cast)
        op.backward(out, *stem, saved, [False, True, *(t is not None for t in (bias, token, *norm))], cast)

    op = backends["gather_patches"]
    for zorder in (False, True):
        packed = op.forward(images, rows[0], stride, patch, zorder)
        op.backward(packed, rows[0], list(images.shape), stride, patch, zorder)
    backends["standardize_structure"].forward(maps, True)
    for masked in ([1, 1], [1, 2]):
        backends["selective_mask"].forward(torch.tensor([1, 2]), masked, 2, 2, 2)


def launches(dtypes: list[str]) -> dict[Launch, None]:
    """Every launch of the ops at the widths of Swin-B/192 and ViT-B/224, each once."""
    with caught() as found:
        for name in dtypes:
            for width, stride in ((1024, 32), (768, 16)):
                for mixed in {False, name != "float32"}:
                    branch(width, stride, 8, mixed, DTYPES[name])
    return found


def compile_for(launch: Launch, capability: int) -> dict[str, int]:
    """Registers and spilled bytes per thread, shared memory in bytes."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [["tt.divisibility", 16]] for path in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return {"shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    """As `cuobjdump` of Triton's own toolkit reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main(argv: list[str] | None = None, *, report: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities, times ten")
    parser.add_argument("--dtype", default=",".join(DTYPES))
    args = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    failed = 0
    found = launches(args.dtype.split(","))
    for capability in map(int, args.arch.split(",")):
        for launch in found:
            name = f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__}"
            options = " ".join(f"{key}={value}" for key, value in launch.options)
            try:
                facts = compile_for(launch, capability)
            except Exception as error:
                failed += 1
                report(f"sm_{capability} {name} {options}: FAILED {type(error).__name__}: {str(error)[-300:]}")
            else:
                report(f"sm_{capability} {name} {options}: " + ", ".join(f"{v} {k}" for k, v in facts.items()))
    report(f"{len(found)} launches, {failed} failed, Triton {triton.__version__}, {tl.__name__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
