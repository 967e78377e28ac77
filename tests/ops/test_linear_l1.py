"""`linear_l1` and `linear_l2` against plain PyTorch on the unfolded map, on every backend."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from checks import assert_close_to_truth, gradcheck64, gradients, in_dtype, layouts, opcheck
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
    on,
    rows_of,
)
from tiny import away_from_zero
from torch import Tensor
from torch.nn import functional as F

from sgmim_fast import backends, ops
from sgmim_fast.ops import gemm
from sgmim_fast.ops.linear_l1 import _op

NAMES = ("x", "weight", "bias", "target")


class Case(NamedTuple):
    counts: tuple[int, ...]  # wanted cells of each image
    grid: tuple[int, int] = (2, 3)
    channels: int = 1
    cell: int = 4
    width: int = 16
    packed: bool = True
    valid: bool = False
    scale: float = 1.0
    squared: bool = False
    normalized: bool = False

    def inputs(self) -> list[Tensor | None]:
        """x, weight, bias, target (float64), valid, rows."""
        cells, outputs = self.grid[0] * self.grid[1], self.channels * self.cell**2
        rows = rows_of(chosen(self.counts, cells)).index
        tokens = rows.shape[0] if self.packed else len(self.counts) * cells
        x = torch.randn(tokens, self.width, dtype=torch.float64)
        shape = len(self.counts), self.channels, self.grid[0] * self.cell, self.grid[1] * self.cell
        target = torch.randn(shape, dtype=torch.float64)
        valid = torch.rand(shape) < 0.7 if self.valid else None
        return [x, matrix(outputs, self.width) / 2, bias(outputs), target, valid, rows]

    def decided(self) -> list[Tensor | None]:
        """Inputs of which no sign hangs on a rounding error."""
        inputs = self.inputs()
        inputs[3] = away_from_zero(inputs[3])
        if self.normalized:  # pixels of deviation 1: the prediction is what goes farther
            inputs[1], inputs[2] = inputs[1] / 100, away_from_zero(inputs[2])
        return inputs

    def op(self, x, weight, bias, target, valid, rows):
        options = {"cell": self.cell, "packed": self.packed, "valid": valid, "scale": self.scale}
        op = ops.linear_l2 if self.squared else ops.linear_l1
        return op(x, weight, bias, target, rows, normalized=self.normalized, **options)

    def plain(self, x, weight, bias, target, valid, rows):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32

        def cells(pixels: Tensor) -> Tensor:
            return F.unfold(pixels.to(wide), self.cell, stride=self.cell).transpose(1, 2).flatten(0, 1)[rows]

        pixels = cells(target)
        if self.normalized:  # as MAE does
            mean = pixels.mean(dim=-1, keepdim=True)
            var = pixels.var(dim=-1, keepdim=True) if len(rows) else 0  # which warns of nothing
            pixels = (pixels - mean) / (var + 1.0e-6) ** 0.5
        difference = F.linear(x if self.packed else x[rows], weight, bias).to(wide) - pixels
        distance = difference**2 if self.squared else difference.abs()
        return (distance * (1 if valid is None else cells(valid))).sum() * self.scale


CASES = {
    "ragged": Case((3, 1, 6)),
    "nothing-in-an-image": Case((4, 0, 2)),
    "nothing-at-all": Case((0, 0)),
    "everything": Case((6, 6)),
    "one-token-per-cell": Case((3, 0, 6), packed=False),
    "one-token-per-cell-nothing": Case((0, 0), packed=False),
    "colour": Case((2, 4), channels=3, cell=8, width=24),
    "colour-one-token-per-cell": Case((2, 4), channels=3, cell=8, width=24, packed=False, scale=1 / 1152),
    "valid": Case((3, 5), channels=2, cell=8, valid=True, scale=0.3),
    "valid-one-token-per-cell": Case((3, 5), channels=2, cell=16, valid=True, packed=False),
    "patch-14": Case((3, 5), cell=14, width=40),
    "odd": Case((2, 3), grid=(3, 1), channels=2, cell=5, width=7, valid=True),
    "a-pixel": Case((2, 3), channels=3, cell=1, width=5),
    "stride-32": Case((9, 5), grid=(3, 3), cell=32, width=64),
    "squares": Case((3, 1, 6), squared=True),
    "squares-nothing-at-all": Case((0, 0), squared=True, normalized=True),
    "squares-one-token-per-cell": Case((3, 0, 6), channels=3, packed=False, squared=True, scale=1 / 432),
    "squares-valid": Case((3, 5), channels=2, cell=5, width=7, valid=True, squared=True),
    "normalized": Case((3, 1, 6), channels=3, cell=8, normalized=True),
    "normalized-squares": Case((3, 1, 6), channels=3, cell=16, width=40, squared=True, normalized=True, scale=1 / 768),
    "normalized-odd": Case(
        (2, 3), grid=(3, 1), channels=2, cell=5, width=7, packed=False, squared=True, normalized=True
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])
COTANGENT = torch.tensor(0.37).double()  # a float32 number, so that every precision scales by the same


@every_case
@every_precision
def test_value(backend, device, precision, case):
    def draw():
        inputs = on(device, in_dtype(case.inputs(), precision.dtype))
        with gemm.compute_bfloat16_in(precision.compute):
            result = case.op(*inputs)
        assert result.dtype == torch.float32 and result.shape == ()
        return [result], [case.plain(*inputs)], [case.plain(*in_dtype(inputs, torch.float64))]

    assert_draws_close_to_truth(draw, ["result"])


@every_case
@every_precision
def test_gradients(backend, device, precision, case):
    def draw():
        inputs = on(device, in_dtype(case.decided(), precision.dtype))
        with gemm.compute_bfloat16_in(precision.compute):
            _, actual = gradients(case.op, inputs, COTANGENT.to(device))
        assert [grad.dtype for grad in actual] == [precision.dtype] * 4
        _, plain = gradients(case.plain, inputs, COTANGENT.to(device))
        _, truth = gradients(case.plain, in_dtype(inputs, torch.float64), COTANGENT.to(device))
        return actual, plain, truth

    assert_draws_close_to_truth(draw, NAMES)


@every_case
def test_float64(case):
    """The torch backend, here with signs on both sides of zero."""
    inputs = case.inputs()
    actual, expected = (gradients(function, inputs, COTANGENT) for function in (case.op, case.plain))
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    channels=st.integers(1, 3),
    cell=st.integers(1, 19),
    width=st.integers(1, 70),
    packed=st.booleans(),
    pixels=st.sampled_from(["all", "valid", "normalized"]),
    squared=st.booleans(),
)
def test_any_shape(backend, device, counts, channels, cell, width, packed, pixels, squared):
    """Right in every element; how exact, the fixed cases say."""
    torch.manual_seed(0)
    normalized = pixels == "normalized" and channels * cell**2 > 1
    options = {"valid": pixels == "valid", "squared": squared, "normalized": normalized}
    case = Case(tuple(counts), (2, 2), channels, cell, width, packed, **options)
    inputs = on(device, in_dtype(case.decided(), torch.float32))
    actual = gradients(case.op, inputs, COTANGENT.to(device))
    expected = gradients(case.plain, in_dtype(inputs, torch.float64), COTANGENT.to(device))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


@every_precision
def test_exact_hits_have_no_gradient(backend, device, precision):
    """|0| has gradient 0; +-1 elsewhere. The numbers are small integers, exact in every precision."""
    case = Case((2, 3), channels=2)
    x, weight, bias, target, _, rows = case.inputs()
    weight, bias = weight.zero_(), bias.copy_(torch.arange(32) % 5)
    offset = torch.randint(-1, 2, target.shape)
    target = (F.fold(bias.expand(12, 32).unflatten(0, (2, 6)).mT, target.shape[2:], 4, stride=4) + offset).double()
    with gemm.compute_bfloat16_in(precision.compute):
        inputs = on(device, in_dtype([x, weight, bias, target], precision.dtype))
        result, actual = gradients(
            lambda *leaves: case.op(*leaves, None, rows.to(device)), inputs, torch.tensor(1.0, device=device)
        )
    counted = torch.zeros(12).index_fill_(0, rows, 1).view(2, 1, 2, 3)
    expected = offset * F.interpolate(counted, scale_factor=4)
    assert torch.equal(actual[3].cpu().double(), expected.double())
    assert result.item() == expected.abs().sum().item()


def test_nothing_is_read_where_the_target_is_not_valid(backend, device):
    case = Case((3, 5), channels=2, cell=8, valid=True)
    inputs = on(device, in_dtype(case.inputs(), torch.float32))
    expected = gradients(case.op, inputs, COTANGENT.to(device))
    inputs[3] = torch.where(inputs[4], inputs[3], torch.nan)
    actual = gradients(case.op, inputs, COTANGENT.to(device))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
@pytest.mark.parametrize("name", ["target", "valid"])
def test_layouts(backend, device, name, layout):
    case = Case((2, 4), channels=3, cell=8, valid=True)
    inputs = on(device, in_dtype(case.inputs(), torch.float32))
    at = 3 if name == "target" else 4
    strided = layouts(inputs[at])[layout]
    expected = gradients(case.op, [*inputs[:at], strided.contiguous(), *inputs[at + 1 :]], COTANGENT.to(device))
    actual = gradients(case.op, [*inputs[:at], strided, *inputs[at + 1 :]], COTANGENT.to(device))
    # on a GPU another layout is another kernel, whose threads add up other numbers
    torch.testing.assert_close(actual, expected, rtol=1e-6 if device.type == "cuda" else 0, atol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_weight_and_rows_that_are_not_contiguous(backend, device, packed):
    case = Case((3, 5), packed=packed)
    x, weight, bias, target, _, rows = on(device, in_dtype(case.inputs(), torch.float32))
    expected = gradients(case.op, [x, weight, bias, target, None, rows], COTANGENT.to(device))
    x, weight = x.mT.contiguous().mT, weight.mT.contiguous().mT
    rows = rows.repeat_interleave(2)[::2]
    assert not any(t.is_contiguous() for t in (x, weight, rows))
    actual = gradients(case.op, [x, weight, bias, target, None, rows], COTANGENT.to(device))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # a gemm may take another path


@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(range(4), n)], ids=str)
def test_partial_gradients(backend, device, wanted):
    case = Case((2, 4), channels=2, packed=False)
    inputs = on(device, in_dtype(case.inputs(), torch.float32))
    _, full = gradients(case.op, inputs, COTANGENT.to(device))
    leaves = [t.detach().requires_grad_(i in wanted) if i < 4 else t for i, t in enumerate(inputs)]
    case.op(*leaves).backward(COTANGENT.float().to(device))
    for i, leaf in enumerate(leaves[:4]):
        assert torch.equal(leaf.grad, full[i]) if i in wanted else leaf.grad is None, NAMES[i]


def test_no_gradient_is_asked_for(backend, device):
    case = Case((2, 4))
    assert not case.op(*on(device, in_dtype(case.inputs(), torch.float32))).requires_grad
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in case.inputs()]
    with torch.no_grad():
        assert not case.op(*on(device, in_dtype(inputs, torch.float32))).requires_grad


def test_expanded_gradient(backend, device):
    case = Case((2, 4))
    inputs = on(device, in_dtype(case.inputs(), torch.float32))
    _, expected = gradients(case.op, inputs, torch.tensor(3.0, device=device))
    _, actual = gradients(lambda *leaves: case.op(*leaves).expand(3), inputs, torch.ones((), device=device).expand(3))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_precision
@pytest.mark.parametrize("packed", [True, False])
def test_autocast(backend, device, precision, packed):
    """float32 weights, gemms as asked for: as a call in that dtype, but gradients keep the weights' dtype."""
    case = Case((3, 6), channels=2, cell=8, width=40, packed=packed)
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)

    def draw():
        inputs = case.inputs()
        inputs[3] = away_from_zero(inputs[3])
        inputs = on(device, in_dtype(inputs, torch.float32))
        with gemm.compute_bfloat16_in(precision.compute), autocast:
            result, actual = gradients(case.op, inputs, COTANGENT.to(device))
            value, plain = gradients(case.plain, inputs, COTANGENT.to(device))
        assert result.dtype == torch.float32 and {grad.dtype for grad in actual} == {torch.float32}
        exact, truth = gradients(case.plain, in_dtype(inputs, torch.float64), COTANGENT.to(device))
        return [result, *actual], [value, *plain], [exact, *truth]

    assert_draws_close_to_truth(draw, ["result", *NAMES])


def test_autocast_of_mixed_dtypes():
    """bfloat16 tokens from an autocast encoder meet float32 weights."""
    case = Case((3, 6))
    x, *rest = in_dtype(case.inputs(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = gradients(case.op, [x.bfloat16(), *rest], COTANGENT)
    assert result.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 3]
    with torch.autocast("cpu", torch.bfloat16), backends.use("torch"):
        assert case.op(*case.inputs()).dtype == torch.float64  # as in PyTorch, float64 is left alone


def test_float16_runs_on_the_torch_backend():
    case = Case((3, 6))
    inputs = in_dtype(case.inputs(), torch.float16)
    assert_close_to_truth(case.op(*inputs), case.plain(*inputs), case.plain(*in_dtype(inputs, torch.float64)))


@every_precision
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision):
    case = Case((9, 0, 7), grid=(3, 3), cell=32, channels=2, width=64)
    inputs = on(device, in_dtype(case.inputs(), precision.dtype))
    results = []
    with gemm.compute_bfloat16_in(precision.compute):
        for number in (1, 2):
            with threads(number):
                assert_same_bits([gradients(case.op, inputs, COTANGENT.to(device)) for _ in range(3)])
        with library_products_on_one_thread(monkeypatch):
            for number in (1, 2, 3):
                with threads(number):
                    results.append(gradients(case.op, inputs, COTANGENT.to(device)))
    if backend == "cpu":  # elsewhere only the library's gemms know of these threads
        assert_same_bits(results)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_opcheck(backend, device, packed, valid, squared):
    case = Case((2, 4), packed=packed, valid=valid)
    x, weight, bias, target, valid, rows = on(device, in_dtype(case.inputs(), torch.float32))
    inputs, options = [t.detach() for t in (x, weight, bias, target)], [case.cell, packed, 0.5, squared, valid is None]
    for dtype, needs in ((None, [True] * 4), (torch.bfloat16, [False, True, False, True])):
        with gemm.compute_bfloat16_in(torch.bfloat16):
            opcheck(_op.overload, [*inputs, valid, rows, *options, dtype])
            opcheck(_op.overload, [*(t.clone().requires_grad_() for t in inputs), valid, rows, *options, dtype])
            _, saved = _op.overload(*inputs, valid, rows, *options, dtype)
            grad = COTANGENT.float().to(device)
            needed = [*needs, False, False]  # nor valid and rows
            opcheck(_op.backward_overload, [grad, *inputs, valid, rows, *options, dtype, saved, needed])


@pytest.mark.parametrize(
    "case",
    [
        *(Case((2, 0, 1), (1, 2), 2, 2, 3), Case((1, 2), (1, 2), 1, 3, 2, False, True)),
        *(Case((2, 1), (1, 2), 2, 2, 3, squared=squared, normalized=True) for squared in (False, True)),
    ],
    ids=str,
)
def test_gradcheck(case):
    *leaves, valid, rows = case.inputs()
    gradcheck64(lambda *inputs: case.op(*inputs, valid, rows), leaves)


def bad(**changes):
    """Arguments of a call with some of them changed."""
    x, weight, bias, target, _, rows = in_dtype(Case((2, 4)).inputs(), torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, "target": target, "rows": rows, "cell": 4}
    return {name: changes[name](value) if name in changes else value for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": lambda x: x.long()}, TypeError, "x has dtype torch.int64; expected a floating-point dtype"),
        ({"x": lambda x: x[:, :-1]}, ValueError, r"weight has shape \(16, 16\); expected .* = \(16, 15\)"),
        ({"x": lambda x: x[:-1]}, ValueError, r"x has shape \(5, 16\); expected \(rows, channels\) = \(6, \*\)"),
        ({"x": lambda x: x[None]}, ValueError, r"x has shape \(1, 6, 16\); expected \(rows, channels\)"),
        (
            {"x": lambda x: x.double()},
            TypeError,
            "x has dtype torch.float64 and weight torch.float32; expected the same",
        ),
        ({"x": lambda x: x.to("meta")}, ValueError, "weight is on cpu; expected meta, where the other arguments are"),
        ({"weight": lambda w: w[:-1]}, ValueError, r"weight has shape \(15, 16\); expected .* = \(16, 16\)"),
        ({"bias": lambda b: b[:-1]}, ValueError, r"bias has shape \(15,\); expected \(channels \* cell\^2,\) = \(16\)"),
        ({"target": lambda t: t[0]}, ValueError, r"target has shape \(1, 8, 12\); expected \(B, C, H, W\)"),
        (
            {"target": lambda t: t[:, :, 1:]},
            ValueError,
            "target has 7x12 pixels; expected multiples of the cell size 4",
        ),
        ({"rows": lambda r: r.int()}, TypeError, "rows has dtype torch.int32; expected torch.int64"),
        ({"rows": lambda r: r[None]}, ValueError, r"rows has shape \(1, 6\); expected one dimension"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        ops.linear_l1(**bad(**changes))


def test_bad_valid_and_normalized():
    target = bad()["target"]
    with pytest.raises(ValueError, match="normalized comes with valid; expected one of them"):
        ops.linear_l1(**bad(), valid=torch.ones_like(target) > 0, normalized=True)
    head = {"x": torch.ones(1, 3), "weight": torch.ones(1, 3), "bias": torch.ones(1), "cell": 1}
    with pytest.raises(ValueError, match="normalized cells have a single number; expected two at least"):
        ops.linear_l2(**head, target=torch.ones(1, 1, 1, 1), rows=torch.tensor([0]), normalized=True)
    with pytest.raises(TypeError, match=r"valid has dtype torch\.float32; expected torch\.bool"):
        ops.linear_l1(**bad(), valid=torch.ones_like(target))
    with pytest.raises(ValueError, match=r"valid has shape \(2, 1, 8, 4\); expected the target's shape"):
        ops.linear_l1(**bad(), valid=target[..., :4] > 0)
