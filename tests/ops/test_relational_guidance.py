"""`relational_guidance`, compared with plain PyTorch, image by image and with one key per hidden cell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from calls import Call
from checks import AGAIN, assert_close_to_truth, gradients, moved
from hypothesis import given
from hypothesis import strategies as st
from packed import HALF, PRECISIONS, assert_draws_close_to_truth, assert_same_bits_on_any_threads, computed
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgmim_fast import Rows, ops
from sgmim_fast.ops import GuidanceParameters
from sgmim_fast.ops.cases import FLOAT64
from sgmim_fast.ops.cases import relational_guidance as case

NAMES = ("features", "structure", *GuidanceParameters._fields)


def ours(a):
    visible, shown = Rows(*a.rows[:2]), Rows(*a.rows[2:])
    return ops.relational_guidance(
        a.features, a.structure, visible, shown, a.parameters, heads=a.heads,
        hidden_context="keep" if a.keep_hidden else "drop", cells=a.cells if a.visible_only else None,
    )  # fmt: skip


def plain(a, fused: bool = False):
    """The op in plain PyTorch. `fused` uses PyTorch's fused attention, which saves no softmax for its backward."""
    w, width, guided = a.parameters, (a.features.shape[1],), []
    visible, shown = Rows(*a.rows[:2]), Rows(*a.rows[2:])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (a.heads, -1)).transpose(0, 1)

    for image in range(len(visible.offsets) - 1):
        own = slice(visible.offsets[image], visible.offsets[image + 1])
        x = a.features[own if a.visible_only else visible.index[own]]
        keys = a.structure[shown.offsets[image] : shown.offsets[image + 1]]
        if a.keep_hidden:
            keys = torch.cat([keys, a.structure[-1:].expand(a.cells - keys.shape[0], -1)])
        query = F.layer_norm(x, width, w.query_norm_weight, w.query_norm_bias)
        keys = F.layer_norm(keys, width, w.context_norm_weight, w.context_norm_bias)
        q, k, v = (heads(F.linear(*pair)) for pair in ((query, w.q_weight), (keys, w.k_weight), (keys, w.v_weight)))
        if fused and q.numel() and k.numel():
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        else:
            attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        t = x + F.linear(attended.transpose(0, 1).flatten(1), w.proj_weight, w.proj_bias)
        y = F.layer_norm(t, width, w.out_norm_weight, w.out_norm_bias)
        guided.append(t + F.linear(F.gelu(F.linear(y, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias))
    return torch.cat(guided)


CASES = {
    "ragged": partial(case, (2, 5, 1)),
    "ragged-drop": partial(case, (2, 5, 1), keep=False),
    "nothing-visible-in-an-image": partial(case, (0, 4), width=40),
    "nothing-masked-in-an-image": partial(case, (6, 3)),
    "nothing-masked-in-an-image-drop": partial(case, (6, 3), keep=False),
    "nothing-visible": partial(case, (0, 0)),
    "nothing-masked": partial(case, (6, 6)),
    "nothing-masked-drop": partial(case, (6, 6), keep=False),
    "shown-where-visible": partial(case, (2, 5), (2, 5)),
    "everything-shown": partial(case, (2, 5), (6, 6)),
    "everything-shown-drop": partial(case, (2, 5), (6, 6), keep=False),
    "nothing-shown": partial(case, (2, 5), (0, 0)),
    "nothing-shown-drop": partial(case, (2, 5), (0, 3), keep=False),
    "independent": partial(case, (2, 5), (3, 0)),
    "head-of-5": partial(case, (3, 4), width=40, hidden=160),
    "head-of-5-drop": partial(case, (3, 4), width=40, hidden=100, keep=False),
    "one-head": partial(case, (3, 4), width=33, heads=1, hidden=7),
    "head-of-72": partial(case, (0, 9), cells=12, width=144, heads=2, hidden=64),
    "packed": partial(case, (2, 0, 5), width=40, packed=True),
    "packed-everything": partial(case, (6, 6), packed=True, keep=False),
    "packed-nothing": partial(case, (0, 0), packed=True),
    "many-cells": partial(case, (19, 33), cells=49, width=64, hidden=256),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_precision = pytest.mark.parametrize("precision", [*PRECISIONS, HALF])


def call_of(case: Callable[..., Any], device: Any = "cpu", dtype: Any = None) -> Call:
    return Call("relational_guidance", case(make=FLOAT64), device, dtype)


def cotangent_of(call: Call, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the upstream gradient, rounded to the precision of the tensors."""
    features, rows = call.tensors[0], call.arguments().rows.visible.shape[0]
    values = torch.linspace(-9, 7, rows * features.shape[1]).sin().view(rows, features.shape[1])
    return values.to(features.device, dtype or features.dtype).double()


def assert_right_of(call: Call) -> None:
    """Checks float32 for any conditioning, by the errors of plain PyTorch and of PyTorch's fused attention for inputs
    moved by a rounding error."""
    cotangent = cotangent_of(call)

    def again(i):
        for fused in [False, True] * (AGAIN // 2):
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                result, grads = gradients(call.by(partial(plain, fused=fused)), moved(call.tensors), cotangent)
            yield [result, *grads][i]

    results = (computed(function, call, cotangent) for function in (ours, plain))
    truth = computed(plain, call, cotangent, torch.float64)
    for i, (name, *three) in enumerate(zip(["result", *NAMES], *results, truth, strict=True)):
        assert_close_to_truth(*three, name, partial(again, i))


@every_case
@every_precision
def test_value_and_gradients(backend, device, precision, case):
    draw = partial(call_of, case, device, precision.dtype)
    assert_draws_close_to_truth(draw, ours, plain, cotangent_of, precision)


@st.composite
def cases(draw):
    heads, cells = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    images = draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, cells), min_size=images, max_size=images).map(tuple)
    sizes = draw(counts), draw(st.none() | counts), cells, heads * draw(st.integers(1, 40)), heads
    return partial(case, *sizes, draw(st.integers(1, 70)), keep=draw(st.booleans()))


@given(case=cases())
def test_any_shape(backend, device, case):
    assert_right_of(call_of(case, device, torch.float32))


@every_case
def test_float64(case):
    """Tests the torch backend to many digits."""
    call = call_of(case)
    actual, expected = (computed(function, call, cotangent_of(call)) for function in (ours, plain))
    assert actual[0].dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_large_logits(backend, device):
    """A softmax that does not subtract the largest logit would overflow."""
    call = call_of(partial(case, (2, 4), width=32, heads=2), device, torch.float32)
    call.tensors[NAMES.index("q_weight")] *= 60
    assert_right_of(call)


@every_precision
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "drop"])
def test_autocast(backend, device, precision, keep):
    """float32 weights with low-precision gemms: the result has that dtype, gradients have the dtype of the weights."""
    autocast = torch.autocast(device.type, precision.dtype, enabled=precision.dtype != torch.float32)
    draw = partial(call_of, partial(case, (2, 5, 1), width=40, keep=keep), device, torch.float32)
    cotangent = partial(cotangent_of, dtype=precision.dtype)
    assert_draws_close_to_truth(draw, ours, plain, cotangent, precision, autocast=autocast)


def test_autocast_of_mixed_dtypes():
    """bfloat16 features of an autocast encoder are combined with float32 weights."""
    call = call_of(partial(case, (2, 5)), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = gradients(call, [call.tensors[0].bfloat16(), *call.tensors[1:]], cotangent_of(call))
    assert result.dtype == grads[0].dtype == torch.bfloat16
    assert {grad.dtype for grad in grads[1:]} == {torch.float32}


@pytest.mark.parametrize(("place", "dtype"), [(0, torch.float16), (1, torch.float16), (1, torch.float64)])
def test_autocast_of_dtypes_without_kernels(place, dtype):
    call = call_of(partial(case, (2, 5)), dtype=torch.float32)
    tensors = [t.to(dtype) if i == place else t for i, t in enumerate(call.tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        result, grads = gradients(call, tensors, cotangent_of(call))
    assert result.isfinite().all() and [grad.dtype for grad in grads] == [t.dtype for t in tensors]


@every_precision
def test_same_bits_again_and_on_any_number_of_threads(backend, device, threads, monkeypatch, precision):
    many = partial(case, (19, 0, 33), cells=49, width=64, hidden=256)
    call = call_of(many, device, precision.dtype)
    assert_same_bits_on_any_threads(call, cotangent_of(call), precision, backend, threads, monkeypatch)


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
            "features has 11 rows for 2 images; expected the same number for each image",
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
    a = case((2, 5))
    arguments = {
        "features": a.features,
        "structure": a.structure,
        "visible": Rows(*a.rows[:2]),
        "shown": Rows(*a.rows[2:]),
        "parameters": a.parameters,
        "heads": 8,
        "hidden_context": "keep",
    }
    with pytest.raises(error, match=message):
        ops.relational_guidance(**{name: changes.get(name, lambda x: x)(value) for name, value in arguments.items()})
