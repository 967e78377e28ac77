"""The CUDA device functions for tokens of `masked_patch_embed` and gradients, on the host, compared with float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from host_build import load_bodies
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

EPS = 1e-5
PARTS = 512  # the maximum number of partial sums


@pytest.fixture(scope="module")
def bodies():
    return load_bodies()


def run(bodies, embedded, visible, token, norm, dout, shape, dtype=torch.float32, before=1) -> list[torch.Tensor]:
    """Returns out, dembedded and the gradients of token, norm (two) and bias. `norm` is weight and bias or empty;
    `before` fills `inverse`, whose previous contents do not matter."""
    rows, width = dout.shape
    name = "" if dtype == torch.float32 else "_bfloat16"

    def raw(t):
        return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()

    def create(*size, dtype=torch.float32):
        return torch.full(size, torch.nan, dtype=dtype)

    nothing = np.zeros(0, np.float32)
    weight, bias = (raw(t) for t in norm) if norm else (nothing, nothing)
    statistics = create(2, len(visible)) if norm else torch.zeros(0)
    out, dembedded = create(rows, width, dtype=dtype), create(len(visible), width, dtype=dtype)
    sums, parts = create(4, width), -(-rows // -(-rows // PARTS)) if rows else 0
    lists = visible.numpy(), np.full(rows, before)
    place, take = getattr(bodies, f"place_tokens{name}"), getattr(bodies, f"place_tokens_backward{name}")
    place(raw(embedded), *lists, raw(token), weight, bias, EPS, raw(out), raw(statistics), shape)
    lists = visible.numpy(), np.full(rows, before)
    partials = raw(create(parts, 4, width))
    take(raw(dout), raw(embedded), *lists, weight, raw(statistics), raw(dembedded), partials, raw(sums), shape)
    return [out, dembedded, *sums]


def truth(embedded, visible, token, norm, dout) -> list[torch.Tensor]:
    """Returns the same results in float64, by autograd."""
    embedded, token, *norm = (t.double().requires_grad_() for t in (embedded, token, *norm))
    normed = F.layer_norm(embedded, embedded.shape[1:], *norm, EPS) if norm else embedded
    out = token.repeat(len(dout), 1).index_copy(0, visible, normed)
    dembedded, dtoken, *dnorm = torch.autograd.grad(out, (embedded, token, *norm), dout.double())
    zeros = torch.zeros_like(token)
    return [out.detach(), dembedded, dtoken, *(dnorm or (zeros, zeros)), dembedded.sum(0)]


def case(rows: int, visible, width: int, norm: bool) -> tuple:
    vectors = [torch.randn(width) for _ in range(3)]
    return torch.randn(len(visible), width), torch.tensor(visible, dtype=torch.int64), vectors[0], (
        vectors[1:] if norm else []
    ), torch.randn(rows, width)  # fmt: skip


def check(bodies, rows: int, visible, width: int, norm: bool, shape=(1, 1, 1), before=1) -> None:
    tensors = case(rows, visible, width, norm)
    for i, (actual, wanted) in enumerate(
        zip(run(bodies, *tensors, shape, before=before), truth(*tensors), strict=True)
    ):
        # Float32: the largest error seen is 5e-7. A norm of two numbers cancels all but rounding errors.
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm() + (1e-2 if norm and width < 3 else 1e-5), i


def test_every_choice_of_few_rows(bodies):
    """Tests every order of the rows, with different previous contents of `inverse`."""
    for rows, norm in itertools.product(range(1, 5), (False, True)):
        for count in range(rows + 1):
            for visible in itertools.permutations(range(rows), count):
                check(bodies, rows, list(visible), 5, norm, before=(0, 2, -1, 2**60)[count % 4])


@pytest.mark.parametrize("width", [1, 3, 4, 8, 31, 32, 100, 768])
@pytest.mark.parametrize("norm", [False, True])
def test_widths(bodies, width, norm):
    check(bodies, 9, [8, 0, 3, 5], width, norm)
    check(bodies, 9, [8, 0, 3, 5], width, norm, (2, 2, 3))


@given(
    rows=st.integers(1, 40), width=st.integers(3, 70), norm=st.booleans(), data=st.data(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip
def test_any_launch(bodies, rows, width, norm, data, shape):
    visible = data.draw(st.lists(st.integers(0, rows - 1), unique=True))
    check(bodies, rows, visible, width, norm, shape)


def test_more_rows_than_parts(bodies):
    for rows in (PARTS, PARTS + 1, 3 * PARTS - 1):
        check(bodies, rows, torch.randperm(rows)[: rows // 3].tolist(), 8, True, (2, 3, 1))


def test_the_launch_changes_no_bit(bodies):
    """Except for the number of warps per block and lanes per warp, which are constants of the GPU kernel."""
    tensors = case(700, torch.randperm(700)[:300].tolist(), 24, True)
    one, *others = (run(bodies, *tensors, (blocks, 2, 2)) for blocks in (1, 2, 7))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, one, strict=True))


@pytest.mark.parametrize("width", [16, 21])
@pytest.mark.parametrize("norm", [False, True])
def test_bfloat16(bodies, width, norm):
    """Results are those of float32, rounded once."""
    embedded, visible, token, vectors, dout = case(11, [3, 10, 0, 7], width, norm)
    embedded, dout = embedded.bfloat16(), dout.bfloat16()
    actual = run(bodies, embedded, visible, token, vectors, dout, (1, 1, 1), torch.bfloat16)
    wide = run(bodies, embedded.float(), visible, token, vectors, dout.float(), (1, 1, 1))
    for a, w in zip(actual, wide, strict=True):
        assert torch.equal(a, w.to(a.dtype))
