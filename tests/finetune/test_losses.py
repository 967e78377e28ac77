"""Losses of fine-tuning, compared with their formulas in NumPy, also without any valid pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgmim_fast.finetune.losses import cross_entropy, silog, valid_depth


def maps(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_silog_by_hand() -> None:
    """For d = log 2, -log 2, 0: mean of squares 2/3 log(2)^2, mean 0. For d = log 2 twice: sqrt(1 - lam) log 2."""
    target = maps(1.0, 4.0, 3.0)
    found = silog(maps(2.0, 2.0, 3.0), target, min_depth=0.1, max_depth=10)
    assert found.item() == pytest.approx((2 / 3) ** 0.5 * np.log(2), rel=1e-6)
    for lam in (0.0, 0.5, 0.85):
        found = silog(maps(2.0, 4.0), maps(1.0, 2.0), lam=lam, min_depth=0.1, max_depth=10)
        assert found.item() == pytest.approx((1 - lam) ** 0.5 * np.log(2), rel=1e-6)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    lam=st.floats(0, 1),
    missing=st.floats(0, 0.9),
)
def test_silog_is_its_formula(seed: int, shape: tuple[int, int, int], lam: float, missing: float) -> None:
    rng = np.random.default_rng(seed)
    prediction, target = (rng.uniform(0.5, 12, shape) for _ in range(2))
    target[rng.uniform(size=shape) < missing] = np.nan
    valid = (target > 1) & (target < 10)
    d = np.log(prediction[valid]) - np.log(target[valid])
    expected = np.sqrt(max(0.0, (d**2).mean() - lam * d.mean() ** 2)) if d.size else 0.0
    tensors = (torch.tensor(x, dtype=torch.float32).unsqueeze(1) for x in (prediction, target))
    found = silog(*tensors, lam=lam, min_depth=1, max_depth=10)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_silog_gradient() -> None:
    """Computed by hand: (d - lam mean d) / (n loss p) for valid pixels, 0 for the others."""
    p, t = torch.tensor([2.0, 3.0, 5.0, 7.0]), torch.tensor([1.0, 4.0, float("nan"), 6.0])
    prediction = p.clone().reshape(1, 1, 2, 2).requires_grad_()
    loss = silog(prediction, t.reshape(1, 1, 2, 2), min_depth=0.1, max_depth=10)
    loss.backward()
    d = (p / t).log()
    expected = (d - 0.5 * d.nanmean()) / (3 * loss.detach() * p)
    expected[2] = 0
    torch.testing.assert_close(prediction.grad.flatten(), expected)


@pytest.mark.parametrize(
    "target", [maps(float("nan"), float("nan")), maps(0.0, 20.0), maps(2.0, 3.0)], ids=["none", "out-of-range", "exact"]
)
def test_silog_without_error(target: torch.Tensor) -> None:
    prediction = maps(2.0, 3.0).requires_grad_()
    loss = silog(prediction, target, min_depth=0.1, max_depth=10)
    loss.backward()
    assert loss.item() == 0 and (prediction.grad == 0).all()


def test_silog_survives_zero_and_bfloat16() -> None:
    prediction = maps(0.0, 2.0).bfloat16().requires_grad_()
    loss = silog(prediction, maps(1.0, 2.0), min_depth=0.1, max_depth=10)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and prediction.grad.isfinite().all()


def test_valid_depth() -> None:
    found = valid_depth(maps(0.5, 1.0, 5.0, 10.0, float("nan"), float("inf")), 1, 10)
    assert found.flatten().tolist() == [False, False, True, False, False, False]


def test_cross_entropy_by_hand() -> None:
    """Two pixels with log(1 + e) - 1 and log(1 + e), and one that is ignored."""
    logits = torch.tensor([[1.0, 1.0, 5.0], [0.0, 0.0, 5.0]]).reshape(1, 2, 1, 3).requires_grad_()
    loss = cross_entropy(logits, torch.tensor([[[0, 1, 255]]]))
    assert loss.item() == pytest.approx(np.log(1 + np.e) - 0.5, rel=1e-6)
    loss.backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[..., :2] != 0).all()


def test_cross_entropy_without_labels() -> None:
    logits = torch.randn(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 2, 2), 7), ignore=7)
    loss.backward()
    assert loss.item() == 0 and loss.dtype == torch.float32 and (logits.grad == 0).all()
