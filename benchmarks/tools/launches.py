"""Finds every launch of a training step on a GPU without a GPU: PyTorch's operators and the Triton kernels' launches.

Plain columns run on fake tensors. In fused columns every Triton launch is recorded instead of executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from tools.branch import build
from tools.shapes import DECODER_DEPTH, ENCODERS, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import sgmim_fast
from sgmim_fast import SGMIM, Rows, SelectiveMask, backends
from sgmim_fast.fused.swin_blocks import Swin
from sgmim_fast.kernels import compile as ahead
from sgmim_fast.kernels import gemm as kernel_gemm
from sgmim_fast.ops import gemm
from sgmim_fast.ops.target import Target
from sgmim_fast.ops.target import caught as launches_caught
from sgmim_fast.visible import MIN_TOKENS

# Allocations, views and queries launch nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
FREE |= {"device", "promote_types", "scalar_tensor"}
ATTENTION = ("window_attention.", "large_windows.")  # files of its Triton kernels
# Functions that autocast computes in float32 on CUDA but not on a CPU, as far as they occur here (PyTorch's list).
FLOAT32_ON_CUDA = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.normalize, F.l1_loss, Tensor.norm}


def launches_nothing(func: Any, args: Any, result: Any) -> bool:
    """Returns whether a call of an ATen operator is a view, an allocation or a query. Operators that may return views
    count as copies if the result has a new storage."""
    if func._opname in FREE or func._opname.startswith("_unsafe_view"):
        return True
    return func.is_view and sizes(result).keys() <= sizes(args).keys()


def through_triton(func: Any, args: tuple) -> Any:
    """Calls the Triton implementation of an operator of sgmim_fast, on whatever device the tensors are."""
    op, backward, _ = func._opname.partition("_backward")
    return backends.implementation(op, "backward" if backward else "forward", "triton")(*args)


@dataclass
class Launch:
    """One launch.

    Args:
        name: name of the ATen operator, or file and name of the Triton kernel.
        moved: storage -> bytes read or written. A tensor of which rows are gathered counts with these rows only.
        operations: multiplications and additions of its gemms.
        dtype: dtype of the operations.
        gemms: (rows, columns, depth) of each gemm.
        tiles: for window attention, the number of tiles, and the number of successive gemms in each.
        compiled: for window attention, the description from which the kernel can be compiled.
    """

    name: str
    moved: dict[int, float]
    operations: float
    dtype: torch.dtype
    gemms: tuple[tuple[int, int, int], ...] = ()
    tiles: tuple[int, int] | None = None
    compiled: ahead.Launch | None = None

    @property
    def bytes(self) -> float:
        return sum(self.moved.values())


class Trace(TorchDispatchMode):
    """Records every launch in its block: those of PyTorch's operators, and those of Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = list[Launch]()

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors(values))
        if "DTYPE" in values:
            half = values["DTYPE"].primitive_bitwidth == 16
        dtype = torch.bfloat16 if half else torch.float32
        found = Launch(name, moved_by(name, values), operations_of(name, values), dtype)
        if name == "gemm._gemm_kernel":
            found.gemms = tuple(zip(values["rows"], values["outs"], values["ins"], strict=True))
        elif name.startswith(ATTENTION) and found.operations:
            # Do not keep a tensor here: autograd copies a gradient to which there is another reference.
            found.tiles, found.compiled = attention_tiles(name, values), ahead.describe(kernel, args, options)
        self.launches.append(found)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sgmim_fast":
            with self:
                return through_triton(func, args)
        result = func(*args, **kwargs)
        name = func._opname
        if launches_nothing(func, (args, kwargs), result):
            return result
        operands, results = list(tensors((args, kwargs))), list(tensors(result))
        count = flop_registry.get(func.overloadpacket)
        operations = count(*args, **kwargs, out_val=result) if count else 0
        if name.startswith("_scaled_dot_product"):  # two gemms in the forward, five in the backward
            backward, (q, k) = "backward" in name, operands[1:3] if "backward" in name else operands[:2]
            operations = (5 if backward else 2) * 2 * q.numel() * k.shape[-2]
        if name in ("linear", "matmul"):  # not decomposed inside our ops
            operations = 2 * result.numel() * operands[0].shape[-1]
        touched = [*operands, *results]
        if name in ("zero_", "fill_", "zeros", "new_zeros", "zeros_like"):  # written only
            touched = results or operands
        dtype = next((t.dtype for t in [*results, *operands] if t.is_floating_point()), torch.float32)
        gemms = gemms_of(name, operands, results)
        self.launches.append(Launch(f"aten.{name}", sizes(touched), operations, dtype, gemms))
        return result


def gemms_of(name: str, operands: list[Tensor], results: list[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Returns (rows, columns, depth) of an ATen operator's gemm. A batched gemm counts as one with more rows."""
    if name in ("mm", "bmm", "linear", "matmul"):
        a = operands[0]
    elif name in ("addmm", "baddbmm"):
        a = operands[1]
    else:
        return ()
    out = results[0]
    return ((out.numel() // out.shape[-1], out.shape[-1], a.shape[-1]),)


class CudaAutocast(TorchFunctionMode):
    """Makes autocast on a CPU compute in float32 the functions that autocast on CUDA does."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args)
        return func(*args, **(kwargs or {}))


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors(value)


def sizes(touched: Any) -> dict[int, float]:
    """Returns storage -> bytes of the tensors."""
    return {t.untyped_storage()._cdata: t.numel() * t.itemsize for t in tensors(touched)}


def moved_by(name: str, a: dict[str, Any]) -> dict[int, float]:
    """Returns storage -> bytes that a launch of our kernels moves: each tensor once, without the rows of a gathered
    tensor that are not read."""
    found = sizes(a)

    def only(t: Tensor | None, numbers: float) -> None:
        if t is not None:
            found[t.untyped_storage()._cdata] = numbers * t.itemsize

    if name.startswith("layer_norm."):
        for rows in filter(a.__contains__, ("xs", "dxs")):
            for x, count in zip(a[rows], a["counts"], strict=True):
                only(x, count * a["width"])
    elif name == "linear_l1._linear_l1_forward_kernel":
        pixels = a["count"] * a["outs"]
        for t, wanted in (("x", a["count"] * a["width"]), ("target", pixels), ("valid", pixels)):
            only(a[t], wanted)
    elif name == "gemm._gemm_kernel" and a["index"] is not None:
        gathered = a["residual"]
        if gathered is None:
            gathered = a["b"][0] if a["KIND"].value == 2 else a["c"][0]
        only(gathered, a["rows"][0] * gathered.shape[1])
    elif name in ("large_windows._large_windows_queries_kernel", "large_windows._large_windows_keys_kernel"):
        only(a["dqkv"], a["dqkv"].numel() * (1 if "dscale" in a else 2) / 3)  # the other kernel writes the other thirds
    elif name.startswith("structure_embed."):
        only(a["image"][0], a["count"] * a["CHANNELS"] * a["PATCH"] ** 2)
    return found


def attention_tiles(name: str, a: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of tiles of a window attention's launch, and the number of successive gemms in each."""
    gemms = {"forward": 2, "backward": 5, "queries": 5, "keys": 4, "bias": 2}[name.split("_")[-2]]
    tokens = a["WINDOW_H"] * a["WINDOW_W"]
    tiles = math.prod(-(-tokens // side) for side in sides(a))
    return a["windows"] * a["heads"] * tiles, gemms


def sides(a: dict[str, Any]) -> tuple[int, int]:
    """Returns the queries and the keys of a window attention's tile."""
    return (a["BLOCK"], a["BLOCK"]) if "BLOCK" in a else (a["QUERIES"], a["KEYS"])


def operations_of(name: str, a: dict[str, Any]) -> float:
    """Returns the multiplications and additions of a launch's gemms."""
    if name == "gemm._gemm_kernel":
        return 2 * sum(r * i * o for r, i, o in zip(a["rows"], a["ins"], a["outs"], strict=True))
    if name == "linear_l1._linear_l1_forward_kernel":
        return 2 * a["count"] * a["width"] * a["outs"]
    if name.startswith("relational_guidance."):
        gemms = 2 if "_forward" in name else 7  # the backward computes two of its five gemms twice
        return 2 * gemms * a["q"].numel() * a["cells"]
    if name.startswith(ATTENTION) and "WINDOW_H" in a:  # tiles at the border are computed in full
        tiles, gemms = attention_tiles(name, a)
        return 2 * gemms * tiles * math.prod(sides(a)) * a["BLOCK_D"]
    if name.startswith("structure_embed."):
        pixels = a["CHANNELS"] * a["PATCH"] ** 2
        return 2 * (1 if "_forward" in name else 2) * a["count"] * pixels * a["width"]
    return 0


def wgrad(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces `kernels.gemm._wgrad` by one launch, as on a GPU, where the library's gemm can write any dtype."""
    product = dy.t() @ x
    return product if product.dtype == dtype else torch.empty_like(product, dtype=dtype)


@contextmanager
def caught(trace: Trace, target: Target) -> Iterator[None]:
    """Within the block, ops run on the Triton backend as on the target, and their launches are recorded."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "can_run", lambda *args, **options: (True, "")))
        stack.enter_context(gemm.compute_bfloat16_in(torch.bfloat16))
        stack.enter_context(launches_caught(trace.launch, target))
        stack.enter_context(mock.patch.object(kernel_gemm, "_wgrad", wgrad))
        stack.enter_context(trace)
        yield


def branch(shape: Shape, dtype: torch.dtype, batch: int, column: str, target: Target) -> list[Launch]:
    """Returns every launch of forward and backward of the branch, from the encoder's features on.

    Args:
        column: "dense", "visible" or "fused".
    """
    trace = Trace()
    with ExitStack() as stack:
        if column != "fused":
            stack.enter_context(FakeTensorMode())
            stack.enter_context(CudaAutocast())
        case = build(shape, dtype, batch, "cpu")
        features = case.model.encoder.forward

        def after_the_mask(*args: Any) -> Tensor:
            trace.launches.clear()  # launches before the features do not belong to the branch
            return features(*args)

        case.model.encoder.forward = after_the_mask  # a hook would prevent weights from being cast together
        step = case.columns["fused-cpu" if column == "fused" else column]
        with caught(trace, target) if column == "fused" else trace:
            step().backward()
    return trace.launches


def encoder(shape: Shape, dtype: torch.dtype, batch: int, accelerated: bool, target: Target) -> list[Launch]:
    """Returns every launch of forward and backward of the encoder, including its stem."""
    trace = Trace()
    name, arguments = ENCODERS[shape.name]
    model = sgmim_fast.create_encoder(name, **arguments)
    if accelerated:
        sgmim_fast.accelerate(model)
    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode())
        held = {key: fake.from_tensor(t) for key, t in (*model.named_parameters(), *model.named_buffers())}
        side = shape.image // shape.patch
        images, mask = torch.empty(batch, 3, shape.image, shape.image), torch.empty(batch, side, side, dtype=torch.bool)
        visible = torch.empty(batch * shape.visible * (shape.stride // shape.patch) ** 2, dtype=torch.int64)
        stack.enter_context(CudaAutocast())
        # Fake tensors have no values, so the check that a block's mask has timm's values is skipped.
        stack.enter_context(mock.patch.object(Swin, "_mask_reason", lambda block: ""))
        stack.enter_context(caught(trace, target))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = torch.func.functional_call(model, held, (images, mask, visible))
        features.backward(torch.empty_like(features))
    return trace.launches


def visible_only(shape: Shape, dtype: torch.dtype, batch: int, target: Target) -> list[Launch]:
    """Returns every launch of forward and backward of the whole step on visible patches alone, accelerated."""
    trace = Trace()
    name, arguments = ENCODERS[shape.name]
    encoder = sgmim_fast.create_encoder(name, visible_only=True, **arguments)
    model = SGMIM(encoder, shape.stride, decoder=sgmim_fast.Decoder(encoder, depth=DECODER_DEPTH))
    side = shape.image // shape.stride
    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode())
        held = {key: fake.from_tensor(t) for key, t in (*model.named_parameters(), *model.named_buffers())}
        images, structure = (torch.empty(batch, channels, shape.image, shape.image) for channels in (3, 1))
        masked, visible = (
            Rows(torch.empty(batch * each, dtype=torch.int64), torch.empty(batch + 1, dtype=torch.int64))
            for each in (shape.masked, shape.visible)
        )
        cells = torch.empty(batch, side, side, dtype=torch.bool)
        mask = SelectiveMask(cells, cells, visible, masked, masked, (shape.visible,) * batch)
        # A GPU decodes larger pieces of a batch than the CPU on which the tensors are.
        stack.enter_context(mock.patch.dict(MIN_TOKENS, cpu=MIN_TOKENS["cuda"]))
        stack.enter_context(CudaAutocast())
        stack.enter_context(caught(trace, target))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = torch.func.functional_call(model, held, (images, structure, mask))
        loss.backward()
    return trace.launches
