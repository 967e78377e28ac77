"""`structure_embed` against plain PyTorch over the whole map, on every backend."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from checks import gradcheck64, gradients, in_dtype, layouts, opcheck
from hypothesis import given
from hypothesis import strategies as st
from packed import (
    HALF,
    PRECISIONS,
    assert_draws_close_to_truth,
    assert_same_bits,
    bias,
    chosen,
    library_products_on_one_thread,
    matrix,
    norm_weight,
    on,
    rows_of,
)
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends, ops
from sgmim_fast.guidance import embedding_patch
from sgmim_fast.ops import StructureParameters, gemm
from sgmim_fast.ops.structure_embed import _op


class Case(NamedTuple):
    shown: tuple[int, ...]  # number of shown cells in each image
    grid: tuple[int, int] = (2, 3)
    channels: int = 1
    cell: int = 16
    width: int = 6  # of an embedded patch; a merging doubles it
    flat: bool = False  # a map with flat places, as where depth is missing

    @property
    def mergings(self) -> int:
        return embedding_patch(self.cell)[1]

    @property
    def names(self) -> list[str]:
        lists = ("merge_norm_weights", "merge_norm_biases", "merge_weights")
        numbered = [f"{name}[{i}]" for name in lists for i in range(self.mergings)]
        return ["structure", *StructureParameters._fields[:4], *numbered]

    def rows(self) -> Tensor:
        return rows_of(chosen(self.shown, self.grid[0] * self.grid[1])).index

    def leaves(self) -> list[Tensor]:
        """structure and the parameters, float64."""
        shape = len(self.shown), self.channels, self.grid[0] * self.cell, self.grid[1] * self.cell
        structure = torch.randn(shape, dtype=torch.float64)
        if self.flat:
            coarse = F.interpolate(torch.randn(shape[:2] + self.grid, dtype=torch.float64), shape[2:])
            structure = torch.where(torch.rand_like(coarse).lt(0.01), structure, coarse.clamp(min=0))
        widths = [self.width << i for i in range(self.mergings)]
        w = StructureParameters(
            matrix(self.width, self.channels, *2 * [embedding_patch(self.cell)[0]]),
            bias(self.width),
            norm_weight(self.width),
            bias(self.width),
            [norm_weight(4 * d) for d in widths],
            [bias(4 * d) for d in widths],
            [matrix(2 * d, 4 * d) for d in widths],
        )
        return [structure, *w.flat()]

    def op(self, rows: Tensor):
        def call(structure: Tensor, *parameters: Tensor) -> Tensor:
            return ops.structure_embed(structure, rows, StructureParameters.nested(list(parameters)), cell=self.cell)

        return call

    def plain(self, rows: Tensor):
        def call(structure: Tensor, *parameters: Tensor) -> Tensor:
            w = StructureParameters.nested(list(parameters))
            images = structure.shape[0]
            # one more image, all hidden: where every cell is shown, h is still wanted
            structure = torch.cat([structure, torch.ones_like(structure[:1])])
            shown = torch.zeros((images + 1) * self.grid[0] * self.grid[1], device=rows.device).index_fill_(0, rows, 1)
            shown = F.interpolate(shown.view(-1, 1, *self.grid), scale_factor=2**self.mergings).permute(0, 2, 3, 1)
            x = F.conv2d(structure, w.embed_weight, w.embed_bias, w.embed_weight.shape[2:]).permute(0, 2, 3, 1)
            x = F.layer_norm(x, x.shape[3:], w.norm_weight, w.norm_bias) * shown.to(x.dtype)
            for gain, shift, weight in zip(*w[4:], strict=True):
                x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], 3)
                x = F.linear(F.layer_norm(x, x.shape[3:], gain, shift), weight)
            x = x.flatten(0, 2)
            return torch.cat([x[rows], x[-1:]])

        return call


CASES = {
    "ragged": Case((3, 1, 6)),
    "nothing-in-an-image": Case((4, 0, 2), channels=2),
    "nothing": Case((0, 0)),
    "everything": Case((6, 6)),
    "stride-32": Case((2, 4), cell=32, width=8),
    "stride-8": Case((2, 4), cell=8, width=20),
    "patch-14": Case((2, 5), cell=14, width=20),
    "stride-40": Case((2, 1), (1, 2), cell=40, width=5, channels=3),
    "stride-4": Case((2, 4), cell=4, width=16),
    "many-wide-cells": Case((9, 4), (3, 3), width=48),
    "many-wide-cells-stride-32": Case((9, 9), (3, 3), cell=32, width=32),
    "many-wide-cells-patch-14": Case((9, 9), (3, 3), cell=14, width=80),
    "flat": Case((4, 5), width=24, flat=True),
    "many-wide-cells-flat": Case((9, 9), (3, 3), cell=32, width=32, flat=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])


def skip_if_the_kernels_need_a_merging(case: Case) -> None:
    if backends.forced() in ("cpu", "triton") and case.mergings == 0:
        pytest.skip("an encoder stride without patch mergings runs on the torch backend")


def cotangent_of(case: Case, leaves: list[Tensor]) -> Tensor:
    """Upstream gradient, a number of the leaves' precision."""
    values = torch.linspace(-9, 7, (sum(case.shown) + 1) * (case.width << case.mergings)).sin()
    return values.view(sum(case.shown) + 1, -1).to(leaves[0].device, leaves[0].dtype).double()


@every_case
@every_precision
def test_value_and_gradients(backend, device, precision, case):
    skip_if_the_kernels_need_a_merging(case)

    def draw():
        rows = case.rows().to(device)
        leaves = on(device, in_dtype(case.leaves(), precision.dtype))
        cotangent = cotangent_of(case, leaves)
        with gemm.compute_bfloat16_in(precision.compute):
            result, actual = gradients(case.op(rows), leaves, cotangent)
        assert {t.dtype for t in (result, *actual)} == {precision.dtype}
        value, plain = gradients(case.plain(rows), leaves, cotangent)
        exact, truth = gradients(case.plain(rows), in_dtype(leaves, torch.float64), cotangent)
        return [result, *actual], [value, *plain], [exact, *truth]

    assert_draws_close_to_truth(draw, ["result", *case.names])


def single(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """Rows, float32 leaves and a cotangent on the device."""
    leaves = on(device, in_dtype(case.leaves(), torch.float32))
    return case.rows().to(device), leaves, cotangent_of(case, leaves)


@given(
    shown=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    cell=st.sampled_from([8, 10, 12, 14, 16, 18, 20, 32]),
    width=st.integers(2, 40),
)
def test_any_shape(backend, device, shown, channels, cell, width):
    """Right in every element; how exact, the fixed cases say."""
    torch.manual_seed(0)
    case = Case(tuple(shown), (2, 2), channels, cell, width)
    rows, leaves, cotangent = single(case, device)
    actual = gradients(case.op(rows), leaves, cotangent)
    expected = gradients(case.plain(rows), in_dtype(leaves, torch.float64), cotangent)
    names = ["result", *case.names]
    for name, a, e in zip(names, [actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert a.shape == e.shape and ((a - e).abs() <= 1e-3 * (1 + e.abs())).all(), name


@every_case
def test_float64(case):
    """The torch backend to many digits."""
    rows, leaves = case.rows(), case.leaves()
    actual, expected = (
        gradients(function(rows), leaves, cotangent_of(case, leaves)) for function in (case.op, case.plain)
    )
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_hidden_cells_are_not_read(backend, device):
    case = Case((3, 1, 6), channels=2)
    rows, leaves, cotangent = single(case, device)
    expected = gradients(case.op(rows), leaves, cotangent)
    shown = torch.zeros(18, device=device).index_fill_(0, rows, 1).view(3, 1, 2, 3)
    leaves[0] = torch.where(F.interpolate(shown, scale_factor=16).bool(), leaves[0], torch.nan)
    torch.testing.assert_close(gradients(case.op(rows), leaves, cotangent), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_layouts_of_the_map(backend, device, layout):
    case = Case((3, 5), channels=3)
    rows, leaves, cotangent = single(case, device)
    strided = layouts(leaves[0])[layout]
    expected = gradients(case.op(rows), [strided.contiguous(), *leaves[1:]], cotangent)
    actual = gradients(case.op(rows), [strided, *leaves[1:]], cotangent)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_parameters_and_rows_that_are_not_contiguous(backend, device):
    case = Case((3, 5), channels=2)
    rows, leaves, cotangent = single(case, device)
    expected = gradients(case.op(rows), leaves, cotangent)
    leaves[1:] = [
        t.movedim(0, -1).contiguous().movedim(-1, 0) if t.ndim > 1 else t.repeat_interleave(3)[::3] for t in leaves[1:]
    ]
    rows = rows.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in (*leaves[1:], rows))
    torch.testing.assert_close(gradients(case.op(rows), leaves, cotangent), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every other"])
def test_gradients_that_are_not_contiguous(backend, device, layout):
    case = Case((3, 5))
    rows, leaves, cotangent = single(case, device)
    if layout == "expanded":
        strided = cotangent[:1, :1].expand_as(cotangent)
    elif layout == "transposed":
        strided = cotangent.mT.contiguous().mT
    else:
        strided = cotangent.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous()
    _, expected = gradients(case.op(rows), leaves, strided.contiguous())
    leaves = [t.detach().requires_grad_() for t in leaves]
    actual = torch.autograd.grad(case.op(rows)(*leaves), leaves, strided.float())
    torch.testing.assert_close(list(actual), expected, rtol=1e-5, atol=1e-5)  # sums may run in another order


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
        set(Case(()).names[1:]),
    ],
    ids=lambda wanted: "-".join(sorted(wanted)) if len(wanted) < 4 else "parameters",
)
@pytest.mark.parametrize("case", [Case((3, 1, 6)), CASES["many-wide-cells"]], ids=["few", "many-wide-cells"])
def test_partial_gradients(backend, device, case, wanted):
    rows, leaves, cotangent = single(case, device)
    _, full = gradients(case.op(rows), leaves, cotangent)
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(case.names, leaves, strict=True)]
    case.op(rows)(*leaves).backward(cotangent.float())
    for name, leaf, expected in zip(case.names, leaves, full, strict=True):
        assert torch.equal(leaf.grad, expected) if name in wanted else leaf.grad is None, name


def test_no_gradient_is_asked_for(backend, device):
    case = Case((3, 5))
    rows, leaves, _ = single(case, device)
    assert not case.op(rows)(*leaves).requires_grad
    with torch.no_grad():
        assert not case.op(rows)(*[t.requires_grad_() for t in leaves]).requires_grad


@every_precision
@pytest.mark.parametrize("case", [Case((3, 5), width=20), CASES["many-wide-cells"]], ids=["few", "many-wide-cells"])
def test_autocast(backend, device, precision, case):
    """float32 weights, gemms as asked for: the result in that dtype, the gradients in the weights' own."""
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)

    def draw():
        rows, leaves, _ = single(case, device)
        cotangent = cotangent_of(case, in_dtype(leaves, precision.dtype))
        with gemm.compute_bfloat16_in(precision.compute), autocast:
            result, actual = gradients(case.op(rows), leaves, cotangent)
            value, plain = gradients(case.plain(rows), leaves, cotangent)
        assert result.dtype == precision.dtype and {grad.dtype for grad in actual} == {torch.float32}
        exact, truth = gradients(case.plain(rows), in_dtype(leaves, torch.float64), cotangent)
        return [result, *actual], [value.to(result.dtype), *plain], [exact, *truth]

    assert_draws_close_to_truth(draw, ["result", *case.names])


def test_autocast_leaves_float64_alone():
    case = Case((3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert case.op(case.rows())(*case.leaves()).dtype == torch.float64


@every_precision
@pytest.mark.parametrize("case", [Case((3, 5)), CASES["many-wide-cells-stride-32"]], ids=["few", "many-wide-cells"])
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision, case):
    rows, leaves, cotangent = single(case, device)
    leaves, results = in_dtype(leaves, precision.dtype), []
    with gemm.compute_bfloat16_in(precision.compute):
        for number in (1, 2):
            with threads(number):
                assert_same_bits([gradients(case.op(rows), leaves, cotangent) for _ in range(3)])
        with library_products_on_one_thread(monkeypatch):
            for number in (1, 2, 3):
                with threads(number):
                    results.append(gradients(case.op(rows), leaves, cotangent))
    if backend == "cpu":  # elsewhere only the library's gemms know of these threads
        assert_same_bits(results)


@pytest.mark.parametrize("case", [Case((3, 1)), Case((1, 2), cell=14)], ids=["stride-16", "patch-14"])
def test_opcheck(backend, device, case):
    rows, (structure, *w), _ = single(case, device)
    opcheck(_op.overload, [structure, rows, w, case.cell, 1e-5, None])
    leaves = [t.detach().requires_grad_() for t in (structure, *w)]
    opcheck(_op.overload, [leaves[0], rows, leaves[1:], case.cell, 1e-5, None])
    result, saved = _op.overload(structure, rows, w, case.cell, 1e-5, None)
    for needs in ([True] * (len(w) + 1), [False, True] + [False] * (len(w) - 1)):
        needed = [needs[0], False, *needs[1:]]  # not rows
        opcheck(_op.backward_overload, [result, structure, rows, w, case.cell, 1e-5, None, saved, needed])
    with gemm.compute_bfloat16_in(torch.bfloat16):
        opcheck(_op.overload, [structure, rows, w, case.cell, 1e-5, torch.bfloat16])


@pytest.mark.parametrize(
    "case", [Case((1, 2), (1, 2), 2, 8, 3), Case((1, 0), (1, 2), 1, 16, 2), Case((1, 2), (1, 2), 1, 4, 4)], ids=str
)
def test_gradcheck(case):
    gradcheck64(case.op(case.rows()), case.leaves())


def test_float16_runs_on_the_torch_backend():
    case = Case((3, 5))
    rows, leaves, _ = single(case, torch.device("cpu"))
    result = case.op(rows)(*in_dtype(leaves, torch.float16))
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), case.plain(rows)(*leaves), rtol=0.02, atol=0.02)


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
    case = Case((3, 5))
    rows, (structure, *w), _ = single(case, torch.device("cpu"))
    arguments = {"structure": structure, "rows": rows, "parameters": StructureParameters.nested(w), "cell": 16}
    with pytest.raises(error, match=message):
        ops.structure_embed(**{name: changes.get(name, lambda x: x)(value) for name, value in arguments.items()})
