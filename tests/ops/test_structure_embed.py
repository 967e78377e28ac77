"""`structure_embed`, compared with plain PyTorch on the whole map, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import Call
from checks import gradients, in_dtype, layouts
from hypothesis import given
from hypothesis import strategies as st
from packed import HALF, PRECISIONS, assert_draws_close_to_truth, assert_same_bits_on_any_threads, computed
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import ops
from sgmim_fast.guidance import embedding_patch
from sgmim_fast.ops import StructureParameters
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import structure_embed as case


def plain(a):
    w, (images, _, *pixels) = StructureParameters.nested(a.parameters), a.structure.shape
    grid = [side // a.cell for side in pixels]
    # Add an image with all cells hidden: h is needed even if every cell is shown.
    structure = torch.cat([a.structure, torch.ones_like(a.structure[:1])])
    shown = torch.zeros((images + 1) * grid[0] * grid[1], device=a.rows.device).index_fill_(0, a.rows, 1)
    shown = F.interpolate(shown.view(-1, 1, *grid), scale_factor=2 ** len(w.merge_weights)).permute(0, 2, 3, 1)
    x = F.conv2d(structure, w.embed_weight, w.embed_bias, w.embed_weight.shape[2:]).permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[3:], w.norm_weight, w.norm_bias) * shown.to(x.dtype)
    for norm_weight, norm_bias, weight in zip(*w[4:], strict=True):
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], 3)
        x = F.linear(F.layer_norm(x, x.shape[3:], norm_weight, norm_bias), weight)
    x = x.flatten(0, 2)
    return torch.cat([x[a.rows], x[-1:]])


def ours(a):
    return ops.structure_embed(a.structure, a.rows, StructureParameters.nested(a.parameters), cell=a.cell)


def flat_places(*sizes: Any, **options: Any) -> Any:
    """Returns a case whose maps have flat regions, as where depth is missing."""
    a = case(*sizes, **options)
    coarse = torch.randn(*(s // a.cell if i > 1 else s for i, s in enumerate(a.structure.shape)), dtype=torch.float64)
    coarse = F.interpolate(coarse, a.structure.shape[2:])
    return a._replace(structure=torch.where(torch.rand_like(coarse) < 0.01, a.structure, coarse.clamp(min=0)))


def call_of(case: Callable[..., Any], device: Any = "cpu", dtype: Any = None) -> Call:
    return Call("structure_embed", case(make=FLOAT64), device, dtype)


def cotangent_of(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the upstream gradient, rounded to the precision of the tensors."""
    structure, *_, last = call.tensors
    rows = call.arguments().rows.shape[0] + 1
    values = torch.linspace(-9, 7, rows * last.shape[0]).sin().view(rows, -1)
    return values.to(structure.device, dtype or structure.dtype).double()


CASES = {
    "ragged": partial(case, (3, 1, 6)),
    "nothing-in-an-image": partial(case, (4, 0, 2), channels=2),
    "nothing": partial(case, (0, 0)),
    "everything": partial(case, (6, 6)),
    "stride-32": partial(case, (2, 4), mergings=3, width=8),
    "stride-8": partial(case, (2, 4), mergings=1, width=20),
    "patch-14": partial(case, (2, 5), patch=7, mergings=1, width=20),
    "stride-40": partial(case, (2, 1), (1, 2), patch=5, mergings=3, width=5, channels=3),
    "stride-4": partial(case, (2, 4), mergings=0, width=16),
    "many-wide-cells": partial(case, (9, 4), (3, 3), width=48),
    "many-wide-cells-stride-32": partial(case, (9, 9), (3, 3), mergings=3, width=32),
    "many-wide-cells-patch-14": partial(case, (9, 9), (3, 3), patch=7, mergings=1, width=80),
    "flat": partial(flat_places, (4, 5), width=24),
    "many-wide-cells-flat": partial(flat_places, (9, 9), (3, 3), mergings=3, width=32),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])


@every_case
@every_precision
def test_value_and_gradients(backend, device, precision, case):
    draw = partial(call_of, case, device, precision.dtype)
    if backend == "cpu" and not draw().arguments().parameters[4:]:
        pytest.skip("an encoder stride without patch mergings runs on the torch backend")
    assert_draws_close_to_truth(draw, ours, plain, cotangent_of, precision)


@given(
    shown=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    cell=st.sampled_from([8, 10, 12, 14, 16, 18, 20, 32]),
    width=st.integers(2, 40),
)
def test_any_shape(backend, device, shown, channels, cell, width):
    """Every element is right. The tests of fixed cases check the accuracy."""
    torch.manual_seed(0)
    call = call_of(partial(case, shown, (2, 2), channels, *embedding_patch(cell), width), device, torch.float32)
    actual = computed(ours, call, cotangent_of(call))
    expected = computed(plain, call, cotangent_of(call), torch.float64)
    for name, a, e in zip(["result", *call.names], actual, expected, strict=True):
        assert a.shape == e.shape and ((a - e).abs() <= 1e-3 * (1 + e.abs())).all(), name


@every_case
def test_float64(case):
    """Tests the torch backend to many digits."""
    call = call_of(case)
    actual, expected = (computed(function, call, cotangent_of(call)) for function in (ours, plain))
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_hidden_cells_are_not_read(backend, device):
    call = Call("structure_embed", case(channels=2), device)
    expected = computed(ours, call, cotangent_of(call))
    shown = torch.zeros(18, device=device).index_fill_(0, call.arguments().rows, 1).view(3, 1, 2, 3)
    shown = F.interpolate(shown, scale_factor=16).bool()
    call.tensors[0] = torch.where(shown, call.tensors[0], torch.nan)
    torch.testing.assert_close(computed(ours, call, cotangent_of(call)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_layouts_of_the_map(backend, device, layout):
    call = Call("structure_embed", case((3, 5), channels=3), device)
    strided, *w = layouts(call.tensors[0])[layout], *call.tensors[1:]
    expected, actual = (gradients(call, [t, *w], cotangent_of(call)) for t in (strided.contiguous(), strided))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wanted",
    [
        {"structure"},
        {"embed_weight"},
        {"embed_bias", "norm_weight"},
        {"norm_bias"},
        {"merge_weights[0]"},
        {"merge_weights[1]", "structure"},
        {"merge_norm_weights[0]", "merge_norm_biases[1]"},
    ],
    ids=lambda wanted: "-".join(sorted(wanted)),
)
def test_partial_gradients_of_many_wide_cells(backend, device, wanted):
    """Their mergings are collapsed."""
    call = call_of(CASES["many-wide-cells"], device, torch.float32)
    _, *full = computed(ours, call, cotangent_of(call))
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(call.names, call.tensors, strict=True)]
    call(*leaves).backward(cotangent_of(call).float())
    for name, leaf, expected in zip(call.names, leaves, full, strict=True):
        assert torch.equal(leaf.grad, expected) if name in wanted else leaf.grad is None, name


@every_precision
@pytest.mark.parametrize("case", [partial(case, (3, 5), width=20), CASES["many-wide-cells"]], ids=["few", "many"])
def test_autocast(backend, device, precision, case):
    """float32 weights with low-precision gemms: the result has that dtype, gradients have the dtype of the weights."""
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)
    draw = partial(call_of, case, device, torch.float32)
    cotangent = partial(cotangent_of, dtype=precision.dtype)
    assert_draws_close_to_truth(draw, ours, plain, cotangent, precision, autocast=autocast)


@every_precision
@pytest.mark.parametrize(
    "case", [partial(case, (3, 5)), CASES["many-wide-cells-stride-32"]], ids=["few", "many-wide-cells"]
)
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision, case):
    call = call_of(case, device, precision.dtype)
    assert_same_bits_on_any_threads(call, cotangent_of(call), precision, backend, threads, monkeypatch)


def test_float16_runs_on_the_torch_backend():
    call = call_of(partial(case, (3, 5)), dtype=torch.float16)
    result = ours(call.arguments())
    assert result.dtype == torch.float16
    exact = call.by(plain)(*in_dtype(call.tensors, torch.float32))
    torch.testing.assert_close(result.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"structure": lambda t: t.long()}, TypeError, "structure has dtype torch.int64; expected a floating"),
        ({"structure": lambda t: t[0]}, ValueError, r"structure has shape \(1, 32, 48\); expected \(B, C, H, W\)"),
        ({"structure": lambda t: t[:, :, 1:]}, ValueError, "structure has 31x48 pixels; expected multiples"),
        ({"structure": lambda t: t.double()}, TypeError, "structure has dtype torch.float64 and embed_weight"),
        ({"structure": lambda t: t.to("meta")}, ValueError, "rows is on cpu; expected meta"),
        ({"structure": lambda t: t.repeat(1, 2, 1, 1)}, ValueError, r"embed_weight has shape .* \(D, 2, e, e\)"),
        ({"rows": lambda r: r.int()}, TypeError, "rows has dtype torch.int32; expected torch.int64"),
        ({"rows": lambda r: r[None]}, ValueError, r"rows has shape \(1, 8\); expected one dimension"),
        ({"cell": lambda _: 8}, ValueError, "embed_weight has patches of 4 pixels and there are 2 mergings; expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    structure, rows, w, *_ = case((3, 5))
    arguments = {"structure": structure, "rows": rows, "parameters": StructureParameters.nested(w), "cell": 16}
    with pytest.raises(error, match=message):
        ops.structure_embed(**{name: changes.get(name, lambda x: x)(value) for name, value in arguments.items()})
