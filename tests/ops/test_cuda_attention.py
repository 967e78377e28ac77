"""The CUDA kernels' attention for `relational_guidance`, run on the host, compared with autograd in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from host_build import load_bodies
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def bodies():
    return load_bodies()


def truth(q, k, v, visible, shown, cells: int, heads: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns result and logsumexp, image by image, with the key of hidden cells repeated once per hidden cell."""
    outs, sums, first_query, first_key = [], [], 0, 0
    for queries, count in zip(visible, shown, strict=True):
        hidden = cells - count if keep else 0
        index = [*range(first_key, first_key + count), *[len(k) - 1] * hidden]
        query, key, value = (
            t.view(len(t), heads, t.shape[1] // heads).transpose(0, 1)
            for t in (q[first_query : first_query + queries], k[index], v[index])
        )
        logits = query @ key.mT * query.shape[-1] ** -0.5
        outs.append((logits.softmax(-1) @ value).transpose(0, 1).reshape(queries, q.shape[1]))
        sums.append(logits.logsumexp(-1).T if index else logits.new_zeros(queries, heads))
        first_query, first_key = first_query + queries, first_key + count
    return torch.cat(outs), torch.cat(sums)


def check(
    bodies, visible, shown, cells: int, heads: int, depth: int, keep: bool, threads: int, spread=1.0, blocks=1
) -> None:
    width, queries, keys = heads * depth, sum(visible), sum(shown) + 1
    wide = [spread * torch.randn(n, width) for n in (queries, keys, keys)]
    grad = torch.randn(queries, width)
    leaves = [t.double().requires_grad_() for t in wide]
    expected, lse = truth(*leaves, visible, shown, cells, heads, keep)
    (expected * grad.double()).sum().backward()

    q, k, v, dout = (t.numpy() for t in (*wide, grad))
    offsets = [np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) for counts in (visible, shown)]
    out, sums = np.full_like(q, np.nan), np.full((2, queries, heads), np.nan, np.float32)
    bodies.attend(q, k, v, *offsets, out, sums, cells, heads, keep, threads)
    dq, dk, dv = (np.full_like(t, np.nan) for t in (q, k, v))
    hidden = np.full((2, len(visible), width), np.nan, np.float32)
    results = dq, dk, dv, hidden
    bodies.attend_backward(dout, q, k, v, out, sums, *offsets, *results, cells, heads, keep, threads, blocks)
    pairs = {"out": (out, expected), "lse": (sums.sum(0), lse)}
    pairs |= {name: (a, leaf.grad) for name, a, leaf in zip(("dq", "dk", "dv"), (dq, dk, dv), leaves, strict=True)}
    # If one key has nearly all the weight, terms of this size cancel in dq and dk. The largest error seen is 0.3 of
    # their rounding error.
    most = [max(0, 0, *t.view(-1, depth).norm(dim=-1).tolist()) for t in wide]
    terms = grad.norm().item() * max(most[:2]) * most[2] * depth**-0.5
    for name, (actual, wanted) in pairs.items():
        wanted = wanted.detach().numpy()
        # Float32 sums: the largest error seen is 7e-7, and 5e-6 for logits up to 100.
        tolerance = 1e-5 * np.linalg.norm(wanted) + 1e-6 + (2**-23 * terms if name in ("dq", "dk") else 0)
        assert np.linalg.norm(actual - wanted) <= tolerance, name


def test_every_small_count(bodies):
    """Includes images without visible or shown cells, blocks with one row too many or too few, and no hidden cells."""
    for queries, shown, keep in itertools.product((0, 1, 31, 32, 33), (0, 1, 31, 32, 33), (False, True)):
        check(bodies, [queries], [shown], 33, 1, 16, keep, 1)


@pytest.mark.parametrize(("heads", "depth"), [(1, 64), (2, 96), (1, 128), (3, 5), (2, 24)])
@pytest.mark.parametrize("keep", [False, True])
def test_depths(bodies, heads, depth, keep):
    check(bodies, [14, 0, 40], [22, 36, 7], 40, heads, depth, keep, 1)


def test_large_logits(bodies):
    check(bodies, [20, 40], [40, 70], 80, 1, 32, True, 1, spread=5.0)


@given(
    counts=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=3),
    depth=st.integers(1, 40),
    heads=st.integers(1, 3),
    keep=st.booleans(),
    threads=st.sampled_from([1, 3]),
    blocks=st.sampled_from([1, 2, 5]),
)
def test_any_counts(bodies, counts, depth, heads, keep, threads, blocks):
    visible, shown = zip(*counts, strict=True)
    check(bodies, visible, shown, 70, heads, depth, keep, threads, blocks=blocks)


def test_the_number_of_blocks_changes_no_bit(bodies):
    """A GPU runs as many blocks as it can hold, and the order of summation does not depend on their number."""
    visible, shown, width = [40, 3, 9, 0], [20, 57, 51, 60], 32
    q, dout = (np.random.randn(sum(visible), width).astype(np.float32) for _ in range(2))
    k, v = (np.random.randn(sum(shown) + 1, width).astype(np.float32) for _ in range(2))
    offsets = [np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) for counts in (visible, shown)]
    out, lse = np.empty_like(q), np.empty((2, len(q), 2), np.float32)
    bodies.attend(q, k, v, *offsets, out, lse, 60, 2, True, 1)
    found = []
    for blocks in (1, 3, 40):
        grads = [np.full_like(t, np.nan) for t in (q, k, v)]
        hidden = np.full((2, 4, width), np.nan, np.float32)
        bodies.attend_backward(dout, q, k, v, out, lse, *offsets, *grads, hidden, 60, 2, True, 1, blocks)
        found.append(grads)
    for grads in found[1:]:
        for actual, expected in zip(grads, found[0], strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_many_threads(bodies):
    """Uses more than one thread per row, as on the GPU."""
    for threads in (64, 128):
        check(bodies, [40], [50], 60, 1, 16, True, threads)
