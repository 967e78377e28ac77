"""Every argument of every op is changed in every way; each call raises an error that states what is expected, or is
right.

The arguments are derived from the ops' schemas, and the changes from the arguments, so a new op is tested once it has a
call in `calls.EXAMPLES`. The C++ launchers are tested in the same way, with their calls recorded while the ops run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calls import EXAMPLES, NOT_DIFFERENTIABLE, OPS, REGISTERED, example, overload, public
from checks import in_dtype
from torch import Tensor
from torch.utils import _pytree as pytree

from sgmim_fast import backends, ops
from sgmim_fast.ops import cases
from sgmim_fast.ops.cpu import gemm

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not usable, reason=reason or "runs here"))
    for name, (usable, reason) in backends.available().items()
    if name != "cuda"  # the tensors are on the CPU
]


def tensors(op: str) -> list[str]:
    """Returns the names of the op's tensors, in the order of the flat arguments."""
    return [name for name, _ in REGISTERED[op].declared.tensors(example(op))]


def replaced(args: list[Any], place: int, change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Returns the arguments with the place-th tensor changed."""
    flat, spec = pytree.tree_flatten(args)
    at = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)][place]
    flat[at] = change(flat[at])
    return pytree.tree_unflatten(flat, spec)


def shapes(tensor: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    for dim in range(tensor.ndim):
        yield f"one more along {dim}", lambda t, dim=dim: torch.cat([t, t.narrow(dim, 0, 1)], dim)
        yield f"one less along {dim}", lambda t, dim=dim: t.narrow(dim, 0, t.shape[dim] - 1)
        yield f"none along {dim}", lambda t, dim=dim: t.narrow(dim, 0, 0)
        yield f"long along {dim}", lambda t, dim=dim: torch.cat([t] * 100, dim)
    yield "one dimension more", lambda t: t[None]
    if tensor.ndim > 0:
        yield "one dimension less", lambda t: t[0]
        yield "no dimension", lambda t: t.flatten()[0]
        yield "transposed", lambda t: t.mT.contiguous() if t.ndim > 1 else t[:, None]


def dtypes(tensor: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64),
        *(torch.int64, torch.int32, torch.uint8, torch.bool),
    ):
        if dtype != tensor.dtype:
            yield str(dtype), lambda t, dtype=dtype: t.to(dtype)


def places(tensor: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "meta", lambda t: t.to("meta")
    yield "sparse", lambda t: t.to_sparse()


def strides(tensor: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields changes of the memory layout that keep the values."""

    def every_other(t: Tensor) -> Tensor:
        larger = torch.full([2 * size + 1 for size in t.shape], 77, dtype=t.dtype)
        larger[tuple(slice(1, None, 2) for _ in t.shape)] = t
        return larger[tuple(slice(1, None, 2) for _ in t.shape)]

    def turned(t: Tensor) -> Tensor:
        return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))

    if tensor.ndim == 0:
        return
    yield "every other", every_other
    yield "first dimension last", turned
    yield "not at the beginning", lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    yield "backwards", lambda t: torch.stack([t.flip(-1), t], -1)[..., 1]
    if tensor.is_floating_point():
        yield "negative bit", lambda t: torch._neg_view(-t)


def values(tensor: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yields changes of the values of indices."""
    if tensor.dtype == torch.int64:
        for value in (-1, -(2**40), 10**6, 2**40):
            for at in (0, -1):
                yield f"{value} at {at}", lambda t, value=value, at=at: _with(t, at, value)


def _with(t: Tensor, at: int, value: int) -> Tensor:
    t = t.clone()
    t.view(-1)[at] = value
    return t


def run(op: str, args: list[Any], backend: str | None) -> list[Tensor]:
    """Returns results that do not depend on the backend, and gradients of all floating-point tensors."""
    flat, spec = pytree.tree_flatten(args)
    differentiable = op not in NOT_DIFFERENTIABLE
    leaves = [
        leaf.detach().requires_grad_(differentiable) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        for leaf in flat
    ]
    with backends.use(backend):
        results = overload(op)(*pytree.tree_unflatten(leaves, spec))
        if not differentiable:
            return list(results) if isinstance(results, tuple) else [results]
        result = results[0] if isinstance(results, tuple) else results
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not wanted:
            return [result]
        torch.manual_seed(1)
        cotangent = torch.randn(result.shape, dtype=torch.float64)
        grads = torch.autograd.grad(result, wanted, cotangent.to(result.dtype), allow_unused=True)
    return [result.detach(), *(grad for grad in grads if grad is not None)]


def assert_same(actual: list[Tensor], truth: list[Tensor], what: str) -> None:
    """Compares to the precision of float32, or of a coarser dtype among the results. No example is ill-conditioned."""
    assert len(actual) == len(truth), what
    for i, (a, t) in enumerate(zip(actual, truth, strict=True)):
        assert a.shape == t.shape, f"{what}: result {i} has shape {tuple(a.shape)}, expected {tuple(t.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, t), f"{what}: result {i}"
            continue
        eps = max(torch.finfo(r.dtype).eps for r in actual if r.is_floating_point())
        error = (a.double() - t.double()).norm().item()
        assert error <= 100 * eps * max(t.double().norm().item(), 1), f"{what}: result {i} is off by {error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("changes", [shapes, dtypes, places, values], ids=lambda kind: kind.__name__)
def test_an_error_or_the_right_result(op, backend, changes):
    """Wrong arguments raise ValueError or TypeError with what is expected. Accepted ones give float64's results."""
    taken = raised = 0
    for place, name in enumerate(tensors(op)):
        tensor = [t for t in pytree.tree_leaves(example(op)) if isinstance(t, Tensor)][place]
        for label, change in changes(tensor):
            what = f"{op} on {backend}, {name} {label}"
            args = replaced(example(op), place, change)
            if changes is values and (backend == "triton" or op == "selective_mask"):
                continue  # indices are not checked on a GPU; a seed may be any number
            try:
                actual = run(op, args, backend)
            except (ValueError, TypeError) as error:
                assert "expected" in str(error), f"{what}: {error}"
                raised += 1
                continue
            except RuntimeError as error:  # C++ launchers check indices
                assert "; expected" in str(error) or "was forced but cannot run" in str(error), f"{what}: {error}"
                raised += 1
                continue
            if label == "meta" and len(tensors(op)) == 1:
                assert all(t.is_meta for t in actual), what
                continue
            assert changes not in (places, values), f"{what}: taken"
            assert_same(actual, run(op, in_double(args), "torch"), what)
            taken += 1
    assert raised or changes is values, "nothing raised"


def in_double(args: list[Any]) -> list[Any]:
    flat, spec = pytree.tree_flatten(args)
    return pytree.tree_unflatten(in_dtype(flat, torch.float64), spec)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_strides_do_not_matter(op, backend):
    expected = run(op, example(op), backend)
    for place, name in enumerate(tensors(op)):
        tensor = [t for t in pytree.tree_leaves(example(op)) if isinstance(t, Tensor)][place]
        for label, change in strides(tensor):
            args = replaced(example(op), place, change)
            assert_same(run(op, args, backend), expected, f"{op} on {backend}, {name} {label}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_optional_tensors_may_be_left_out_one_by_one(op, backend):
    for at, argument in enumerate(overload(op)._schema.arguments):
        if str(argument.type) != "Optional[Tensor]":
            continue
        args = example(op)
        args[at] = None
        try:
            actual = run(op, args, backend)
        except ValueError as error:
            assert "expected" in str(error)
        else:
            assert_same(actual, run(op, in_double(args), "torch"), f"{op} on {backend} without {argument.name}")


NATIVE = backends.available()["cpu"]
LAUNCHERS = sorted(
    name.partition("::")[2]
    for name in (torch._C._dispatch_get_all_op_names() if NATIVE[0] else [])
    if name.startswith("sgmim_fast_cpu::") and name != "sgmim_fast_cpu::isa"
)


@pytest.fixture(scope="module")
def recorded():
    """Maps each launcher to the arguments of one of its calls, recorded while the examples run."""
    calls: dict[str, list[Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHERS:
            packet = getattr(torch.ops.sgmim_fast_cpu, name)

            def record(*args: Any, name=name, packet=packet) -> Any:
                calls.setdefault(name, [a.clone() if isinstance(a, Tensor) else a for a in args])
                return packet(*args)

            patch.setattr(torch.ops.sgmim_fast_cpu, name, record)
        for op in OPS:
            run(op, example(op), "cpu")
        structure, rows, *rest = example("structure_embed")
        run("structure_embed", [structure, rows[:1], *rest], "cpu")  # too few rows for collapsed mergings
        run("structure_embed", list(cases.structure_embed((16,), (4, 4), 1, 1, 2, 32)), "cpu")  # enough rows for all
        for op in ("norm_linear", "norm_mlp"):  # bfloat16 gemms, if the CPU has them
            run(op, [*example(op)[:-1], torch.bfloat16], "cpu")
    return calls


# Tensors that define the dtype and size that a launcher expects of the others.
LEADING = {
    *(("centre", "centred"), ("coordinates_backward", "z")),
    *(("column_sum", "x"), ("embed_norm", "x"), ("embed_norm", "merge_statistics")),
    *(("embed_statistics_backward", "x"), ("expand_signs", "out"), ("distance", "prediction")),
    *(("layer_norm", "x"), ("layer_norm", "y"), ("layer_norm_backward", "x")),
    *(("linear", "x"), ("linear", "weight"), ("linear", "y"), ("linear_gelu", "x"), ("linear_gelu", "weight")),
    *(("dgrad_gelu", "dy"), ("dgrad_gelu", "weight")),
    *(("place_tokens", "embedded"), ("place_tokens", "out"), ("place_tokens_backward", "dout")),
    *(("row_statistics", "x"), ("standardize_structure", "input")),
}


@pytest.mark.skipif(not NATIVE[0], reason=NATIVE[1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_raises_for_every_tensor_that_does_not_fit(recorded, launcher):
    """Nothing outside of the tensors is read or written, whoever calls the launcher."""
    if (launcher in ("wgrad", "linear", "linear_gelu", "dgrad_gelu")) and not gemm.reads_float32_weights():
        pytest.skip("runs with AVX512-BF16 and without AMX")
    assert launcher in recorded, f"no example runs {launcher}"
    operator = getattr(torch.ops.sgmim_fast_cpu, launcher)
    schema = operator.default._schema

    def call(change: Callable[[Tensor], Tensor] | None = None, at: int = -1) -> list[Tensor]:
        args = [a.clone() if isinstance(a, Tensor) else a for a in recorded[launcher]]
        if change is not None:
            args[at] = change(args[at])
        operator(*args)
        return [a for a, x in zip(args, schema.arguments, strict=True) if isinstance(a, Tensor) and x.alias_info]

    expected = call()
    for at, argument in enumerate(schema.arguments):
        tensor = recorded[launcher][at]
        if not isinstance(tensor, Tensor):
            continue
        for label, change in (*shapes(tensor), *dtypes(tensor)):
            if tensor.numel() == 0 or (launcher, argument.name) in LEADING:
                continue
            try:
                call(change, at)
            except RuntimeError:
                continue
            assert change(tensor).numel() >= tensor.numel() and change(tensor).dtype == tensor.dtype, (
                f"{launcher}: {argument.name} {label} is taken"
            )
        for label, change in strides(tensor):
            try:
                actual = call(change, at)
            except RuntimeError:
                continue
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), (
                f"{launcher}: {argument.name} {label}"
            )


@pytest.mark.parametrize("op", OPS)
def test_types(op):
    """In plain eager mode no dispatcher checks types."""
    arguments, declared = EXAMPLES[op](), REGISTERED[op].declared
    for name, kind in zip(declared.fields, declared.types, strict=True):
        number = torch.tensor(2) if kind in ("SymInt", "float") else 7
        for wrong in ("text", [1.5], np.ones(3), object(), number, *([] if kind.endswith("?") else [None])):
            if name != "dtype":
                with pytest.raises(TypeError, match=f"{name} (is|has) .*; expected "):
                    cases.call(op, arguments._replace(**{name: wrong}))


@pytest.mark.parametrize("call", [ops.token_salience, ops.standardize_structure])
def test_arrays(call):
    with pytest.raises(TypeError, match=r"(x|structure) is a ndarray; expected a tensor"):
        call(np.ones((1, 1, 8, 8), np.float32))


@pytest.mark.parametrize("size", ["window", "shift"])
def test_pairs(size):
    a = EXAMPLES["norm_attention"]()
    with pytest.raises(TypeError, match=f"{size} is a int; expected two integers"):
        public("norm_attention")(a._replace(**{size: 3}))
