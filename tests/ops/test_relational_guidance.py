"""`relational_guidance` against plain PyTorch, image by image with every hidden cell a key of its own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from checks import AGAIN, assert_close_to_truth, gradcheck64, gradients, in_dtype, moved, opcheck
from hypothesis import given
from hypothesis import strategies as st
from packed import (
    HALF,
    PRECISIONS,
    Precision,
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgmim_fast import Rows, backends, ops
from sgmim_fast.ops import GuidanceParameters, gemm
from sgmim_fast.ops.relational_guidance import _op

NAMES = ("features", "structure", *GuidanceParameters._fields)


def parameters(width: int, hidden: int) -> GuidanceParameters:
    """Weights of the block, float64."""
    norms = [norm_weight(width), bias(width)]
    return GuidanceParameters(
        *norms, *(t + 0.1 for t in norms), *(matrix(width, width) for _ in range(4)), bias(width),
        *(t - 0.1 for t in norms), matrix(hidden, width), bias(hidden), matrix(width, hidden), bias(width),
    )  # fmt: skip


class Case(NamedTuple):
    visible: tuple[int, ...]  # number of visible cells in each image
    shown: tuple[int, ...] | None = None  # of cells whose structure is shown; None: all that are not visible
    cells: int = 6
    width: int = 16
    heads: int = 8
    hidden: int = 24
    context: str = "keep"
    packed: bool = False  # features of the visible cells alone

    def rows(self) -> tuple[Rows, Rows]:
        visible = chosen(self.visible, self.cells)
        return rows_of(visible), rows_of(~visible if self.shown is None else chosen(self.shown, self.cells))

    def leaves(self, shown: Rows) -> list[Tensor]:
        """features, structure and the parameters, float64."""
        count = sum(self.visible) if self.packed else len(self.visible) * self.cells
        features = torch.randn(count, self.width, dtype=torch.float64)
        structure = torch.randn(shown.index.shape[0] + 1, self.width, dtype=torch.float64)
        return [features, structure, *parameters(self.width, self.hidden)]

    def op(self, visible: Rows, shown: Rows):
        def call(features: Tensor, structure: Tensor, *w: Tensor) -> Tensor:
            return ops.relational_guidance(
                features,
                structure,
                visible,
                shown,
                GuidanceParameters(*w),
                heads=self.heads,
                hidden_context=self.context,
                cells=self.cells if self.packed else None,
            )

        return call

    def plain(self, visible: Rows, shown: Rows, fused: bool = False):
        """fused: through PyTorch's own fused attention, which keeps no softmax for its backward."""

        def call(features: Tensor, structure: Tensor, *parameters: Tensor) -> Tensor:
            w, width = GuidanceParameters(*parameters), (self.width,)

            def heads(x: Tensor) -> Tensor:
                return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)

            guided = []
            for image in range(len(self.visible)):
                own = slice(visible.offsets[image], visible.offsets[image + 1])
                x = features[own if self.packed else visible.index[own]]
                keys = structure[shown.offsets[image] : shown.offsets[image + 1]]
                if self.context == "keep":
                    keys = torch.cat([keys, structure[-1:].expand(self.cells - keys.shape[0], -1)])
                query = F.layer_norm(x, width, w.query_norm_weight, w.query_norm_bias)
                keys = F.layer_norm(keys, width, w.context_norm_weight, w.context_norm_bias)
                q, k, v = (
                    heads(F.linear(*pair)) for pair in ((query, w.q_weight), (keys, w.k_weight), (keys, w.v_weight))
                )
                if fused and q.numel() and k.numel():
                    attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
                else:
                    attended = (q @ k.mT * (self.width // self.heads) ** -0.5).softmax(-1).to(v.dtype) @ v
                t = x + F.linear(attended.transpose(0, 1).flatten(1), w.proj_weight, w.proj_bias)
                y = F.layer_norm(t, width, w.out_norm_weight, w.out_norm_bias)
                guided.append(t + F.linear(F.gelu(F.linear(y, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias))
            return torch.cat(guided)

        return call


CASES = {
    "ragged": Case((2, 5, 1)),
    "ragged-drop": Case((2, 5, 1), context="drop"),
    "nothing-visible-in-an-image": Case((0, 4), width=40),
    "nothing-masked-in-an-image": Case((6, 3)),
    "nothing-masked-in-an-image-drop": Case((6, 3), context="drop"),
    "nothing-visible": Case((0, 0)),
    "nothing-masked": Case((6, 6)),
    "nothing-masked-drop": Case((6, 6), context="drop"),
    "shown-where-visible": Case((2, 5), (2, 5)),
    "everything-shown": Case((2, 5), (6, 6)),
    "everything-shown-drop": Case((2, 5), (6, 6), context="drop"),
    "nothing-shown": Case((2, 5), (0, 0)),
    "nothing-shown-drop": Case((2, 5), (0, 3), context="drop"),
    "independent": Case((2, 5), (3, 0)),
    "head-of-5": Case((3, 4), width=40, hidden=160),
    "head-of-5-drop": Case((3, 4), width=40, hidden=100, context="drop"),
    "one-head": Case((3, 4), width=33, heads=1, hidden=7),
    "head-of-72": Case((0, 9), cells=12, width=144, heads=2, hidden=64),
    "packed": Case((2, 0, 5), width=40, packed=True),
    "packed-everything": Case((6, 6), packed=True, context="drop"),
    "packed-nothing": Case((0, 0), packed=True),
    "many-cells": Case((19, 33), cells=49, width=64, hidden=256),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])


def on_rows(device: torch.device, rows: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    return tuple(Rows(*on(device, r)) for r in rows)


def cotangent_of(case: Case, leaves: list[Tensor]) -> Tensor:
    """Upstream gradient, a number of the leaves' precision."""
    values = torch.linspace(-9, 7, sum(case.visible) * case.width).sin().view(-1, case.width)
    return values.to(leaves[0].device, leaves[0].dtype).double()


def assert_right(case: Case, device: torch.device, precision: Precision) -> None:
    def draw():
        rows = case.rows()
        leaves = on(device, in_dtype(case.leaves(rows[1]), precision.dtype))
        rows, cotangent = on_rows(device, rows), cotangent_of(case, leaves)
        with gemm.compute_bfloat16_in(precision.compute):
            result, actual = gradients(case.op(*rows), leaves, cotangent)
        assert {t.dtype for t in (result, *actual)} == {precision.dtype}
        value, plain = gradients(case.plain(*rows), leaves, cotangent)
        exact, truth = gradients(case.plain(*rows), in_dtype(leaves, torch.float64), cotangent)
        return [result, *actual], [value, *plain], [exact, *truth]

    assert_draws_close_to_truth(draw, ["result", *NAMES])


def assert_right_of(case: Case, rows: tuple[Rows, Rows], leaves: list[Tensor], cotangent: Tensor) -> None:
    """In float32, whatever the conditioning: by the error of plain PyTorch and of PyTorch's fused attention, for inputs
    moved by a rounding."""

    def computed(function, inputs):
        result, grads = gradients(function(*rows), inputs, cotangent)
        return [result, *grads]

    def again(i):
        for fused in [False, True] * (AGAIN // 2):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield computed(partial(case.plain, fused=fused), moved(leaves))[i]

    results = computed(case.op, leaves), computed(case.plain, leaves)
    truth = computed(case.plain, in_dtype(leaves, torch.float64))
    for i, (name, *three) in enumerate(zip(["result", *NAMES], *results, truth, strict=True)):
        assert_close_to_truth(*three, name, partial(again, i))


@every_case
@every_precision
def test_value_and_gradients(backend, device, precision, case):
    assert_right(case, device, precision)


@st.composite
def cases(draw):
    heads, cells = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    images = draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, cells), min_size=images, max_size=images).map(tuple)
    return Case(
        draw(counts),
        draw(st.none() | counts),
        cells,
        heads * draw(st.integers(1, 40)),
        heads,
        draw(st.integers(1, 70)),
        draw(st.sampled_from(["keep", "drop"])),
    )


@given(case=cases())
def test_any_shape(backend, device, case):
    assert_right_of(case, *single(case, device))


@every_case
def test_float64(case):
    """The torch backend to many digits."""
    rows = case.rows()
    leaves = case.leaves(rows[1])
    actual, expected = (
        gradients(function(*rows), leaves, cotangent_of(case, leaves)) for function in (case.op, case.plain)
    )
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_large_logits(backend, device):
    """A softmax that is not shifted by its largest logit overflows here."""
    case = Case((2, 4), width=32, heads=2)
    rows, leaves, cotangent = single(case, device)
    leaves[NAMES.index("q_weight")] *= 60
    assert_right_of(case, rows, leaves, cotangent)


def single(case: Case, device: torch.device) -> tuple[tuple[Rows, Rows], list[Tensor], Tensor]:
    """Rows, float32 leaves and a cotangent on the device."""
    rows = case.rows()
    leaves = on(device, in_dtype(case.leaves(rows[1]), torch.float32))
    return on_rows(device, rows), leaves, cotangent_of(case, leaves)


@pytest.mark.parametrize(
    "wanted",
    [
        {"features"},
        {"structure"},
        {"features", "structure"},
        {"q_weight"},
        {"k_weight"},
        {"v_weight", "context_norm_bias"},
        {"query_norm_weight"},
        {"proj_weight", "proj_bias"},
        {"out_norm_weight", "out_norm_bias"},
        {"fc1_weight"},
        {"fc1_bias", "fc2_bias"},
        {"fc2_weight", "features"},
        set(NAMES) - {"features", "structure"},
    ],
    ids=lambda wanted: "-".join(sorted(wanted)) if len(wanted) < 4 else "parameters",
)
def test_partial_gradients(backend, device, wanted):
    case = Case((2, 5, 1))
    rows, leaves, cotangent = single(case, device)
    _, full = gradients(case.op(*rows), leaves, cotangent)
    leaves = [t.detach().requires_grad_(name in wanted) for name, t in zip(NAMES, leaves, strict=True)]
    case.op(*rows)(*leaves).backward(cotangent.float())
    for name, leaf, expected in zip(NAMES, leaves, full, strict=True):
        assert torch.equal(leaf.grad, expected) if name in wanted else leaf.grad is None, name


def test_no_gradient_is_asked_for(backend, device):
    case = Case((2, 4))
    rows, leaves, _ = single(case, device)
    assert not case.op(*rows)(*leaves).requires_grad
    with torch.no_grad():
        assert not case.op(*rows)(*[t.requires_grad_() for t in leaves]).requires_grad


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every other"])
def test_gradients_that_are_not_contiguous(backend, device, layout):
    case = Case((2, 5, 1))
    rows, leaves, cotangent = single(case, device)
    if layout == "expanded":
        strided = cotangent[:1, :1].expand_as(cotangent)
    elif layout == "transposed":
        strided = cotangent.mT.contiguous().mT
    else:
        strided = cotangent.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous()
    _, expected = gradients(case.op(*rows), leaves, strided.contiguous())
    leaves = [t.detach().requires_grad_() for t in leaves]
    actual = torch.autograd.grad(case.op(*rows)(*leaves), leaves, strided.float())
    torch.testing.assert_close(list(actual), expected, rtol=1e-5, atol=1e-5)  # sums may run in another order


def test_inputs_that_are_not_contiguous(backend, device):
    case = Case((2, 5, 1))
    rows, leaves, cotangent = single(case, device)
    expected = gradients(case.op(*rows), leaves, cotangent)
    leaves = [t.mT.contiguous().mT if t.ndim == 2 else t.repeat_interleave(3)[::3] for t in leaves]
    rows = tuple(Rows(*(t.repeat_interleave(2)[::2] for t in r)) for r in rows)
    assert not any(t.is_contiguous() for t in leaves)
    torch.testing.assert_close(gradients(case.op(*rows), leaves, cotangent), expected, rtol=1e-5, atol=1e-5)


@every_precision
@pytest.mark.parametrize("context", ["keep", "drop"])
def test_autocast(backend, device, precision, context):
    """float32 weights, gemms as asked for: the result in that dtype, the gradients in the weights' own."""
    case = Case((2, 5, 1), width=40, context=context)
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)

    def draw():
        rows, leaves, _ = single(case, device)
        cotangent = cotangent_of(case, in_dtype(leaves, precision.dtype))
        with gemm.compute_bfloat16_in(precision.compute), autocast:
            result, actual = gradients(case.op(*rows), leaves, cotangent)
            value, plain = gradients(case.plain(*rows), leaves, cotangent)
        assert result.dtype == precision.dtype and {grad.dtype for grad in actual} == {torch.float32}
        exact, truth = gradients(case.plain(*rows), in_dtype(leaves, torch.float64), cotangent)
        return [result, *actual], [value.to(result.dtype), *plain], [exact, *truth]

    assert_draws_close_to_truth(draw, ["result", *NAMES])


def test_autocast_of_mixed_dtypes():
    """bfloat16 features from an autocast encoder meet float32 weights."""
    case = Case((2, 5))
    rows, leaves, cotangent = single(case, torch.device("cpu"))
    leaves[0] = leaves[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = gradients(case.op(*rows), leaves, cotangent)
    assert result.dtype == grads[0].dtype == torch.bfloat16
    assert {grad.dtype for grad in grads[1:]} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), backends.use("torch"):
        assert case.op(*rows)(*case.leaves(rows[1])).dtype == torch.float64  # as in PyTorch, float64 is left alone


@every_precision
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision):
    case = Case((19, 0, 33), cells=49, width=64, hidden=256)
    rows, leaves, cotangent = single(case, device)
    leaves, results = in_dtype(leaves, precision.dtype), []
    with gemm.compute_bfloat16_in(precision.compute):
        for number in (1, 2):
            with threads(number):
                assert_same_bits([gradients(case.op(*rows), leaves, cotangent) for _ in range(3)])
        with library_products_on_one_thread(monkeypatch):
            for number in (1, 2, 3):
                with threads(number):
                    results.append(gradients(case.op(*rows), leaves, cotangent))
    if backend == "cpu":  # elsewhere only the library's gemms know of these threads
        assert_same_bits(results)


@pytest.mark.parametrize("context", ["keep", "drop"])
def test_opcheck(backend, device, context):
    case = Case((2, 5), context=context)
    (visible, shown), (features, structure, *w), _ = single(case, device)
    rows, options = [*visible, *shown], [case.cells, case.heads, context == "keep", False]
    opcheck(_op.overload, [features, structure, w, rows, *options, 1e-5, None])
    leaves = [t.detach().requires_grad_() for t in (features, structure, *w)]
    opcheck(_op.overload, [*leaves[:2], leaves[2:], rows, *options, 1e-5, None])
    result, saved = _op.overload(features, structure, w, rows, *options, 1e-5, None)
    for needs in ([True] * 17, [True, False] * 8 + [True]):
        needed = [*needs, *[False] * 4]  # nor rows
        inputs = [features, structure, w, rows, *options, 1e-5, None]
        opcheck(_op.backward_overload, [result, *inputs, saved, needed])
    with gemm.compute_bfloat16_in(torch.bfloat16):
        opcheck(_op.overload, [features, structure, w, rows, *options, 1e-5, torch.bfloat16])


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 2), cells=3, width=4, heads=2, hidden=3),
        Case((0, 3), (2, 0), cells=3, width=4, heads=1, hidden=3, context="drop"),
    ],
    ids=["keep", "drop"],
)
def test_gradcheck(case):
    rows = case.rows()
    gradcheck64(case.op(*rows), case.leaves(rows[1]))


def replaced(rows: Rows, **changes: Tensor) -> Rows:
    return rows._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"features": lambda t: t.long()},
            TypeError,
            "features has dtype torch.int64; expected a floating-point dtype",
        ),
        ({"features": lambda t: t[:, 1:]}, ValueError, r"features has shape \(12, 15\); expected .* = \(\*, 16\)"),
        (
            {"features": lambda t: t[None]},
            ValueError,
            r"features has shape \(1, 12, 16\); expected \(cells of the batch",
        ),
        (
            {"features": lambda t: t[1:]},
            ValueError,
            "features has 11 rows for 2 images; expected as many for each image",
        ),
        ({"features": lambda t: t.double()}, TypeError, "features has dtype torch.float64 and q_weight torch.float32"),
        ({"features": lambda t: t.to("meta")}, ValueError, "structure is on cpu; expected meta"),
        ({"structure": lambda t: t[1:]}, ValueError, r"structure has shape \(5, 16\); expected .* = \(6, 16\)"),
        ({"visible": lambda r: replaced(r, index=r.index.int())}, TypeError, "visible.index has dtype torch.int32"),
        ({"visible": lambda r: replaced(r, offsets=r.offsets[None])}, ValueError, "visible.offsets has shape"),
        (
            {"shown": lambda r: replaced(r, offsets=r.offsets[1:])},
            ValueError,
            r"shown.offsets has shape \(2,\); expected",
        ),
        ({"heads": lambda _: 5}, ValueError, "heads is 5; expected a divisor of the width 16"),
        ({"hidden_context": lambda _: "mask"}, ValueError, "hidden_context is 'mask'; expected 'keep' or 'drop'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(changes, error, message):
    case = Case((2, 5))
    (visible, shown), (features, structure, *w), _ = single(case, torch.device("cpu"))
    arguments = {
        "features": features,
        "structure": structure,
        "visible": visible,
        "shown": shown,
        "parameters": GuidanceParameters(*w),
        "heads": 8,
        "hidden_context": "keep",
    }
    with pytest.raises(error, match=message):
        ops.relational_guidance(**{name: changes.get(name, lambda x: x)(value) for name, value in arguments.items()})
