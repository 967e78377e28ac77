"""Model and reference implementation reproduce the numbers of the published code: losses, features, all gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from golden import assert_statistics, cases, images, mask, parameters, structure

import sgmim_fast
from sgmim_fast import reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# For float32 with an accelerated encoder. The error of oneDNN's gemms with 2048 terms is 5.7e-7 of their norm, that of
# MKL's 2.5e-7. The largest error seen is 1.1e-5, of a sum, with one thread and a single fused patch merging; norms
# differ by 8e-8.
ACCELERATED = 2e-5


def published_model(case: dict[str, Any], dtype: torch.dtype, accelerate: bool = False) -> sgmim_fast.SGMIM:
    encoder = sgmim_fast.create_encoder(
        "swin_base_patch4_window7_224", img_size=192, window_size=6, depths=case["depths"], drop_path_rate=0.0
    )
    model = sgmim_fast.SGMIM(encoder, accelerate=accelerate).to(dtype)
    shapes = sgmim_fast.checkpoints.published_state_dict(model)
    sgmim_fast.checkpoints.load_published(model, parameters(case["salt"], shapes))
    return model


def published_gradients(model: sgmim_fast.SGMIM) -> dict[str, torch.Tensor]:
    """Returns the gradients under their published names, as a state dict whose values are the gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return sgmim_fast.checkpoints.published_state_dict(model)


@pytest.mark.parametrize("route", ["accelerated", "model", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", cases("swin"), ids=lambda case: case["salt"])
def test_losses_and_gradients(case: dict[str, Any], dtype: torch.dtype, route: str) -> None:
    tolerance = ACCELERATED if dtype == torch.float32 and route == "accelerated" else TOLERANCE[dtype]
    model = published_model(case, dtype, route == "accelerated")
    x = images(case).to(dtype).requires_grad_()
    batch = x, structure(case).to(dtype), mask(case)
    compute = partial(reference.sgmim_losses, model) if route == "reference" else partial(model, return_losses=True)
    losses = compute(*batch)
    for actual, name in zip(losses, ("loss", "image_loss", "structure_loss"), strict=True):
        torch.testing.assert_close(actual.double().item(), case[name], rtol=TOLERANCE[dtype], atol=0)
    assert_statistics(reference.to_tokens(model.encoder(*batch[::2])), case["features"], tolerance, "features")
    losses.total.backward()
    assert_statistics(x.grad, case["image_grad"], tolerance, "image_grad")
    gradients = published_gradients(model)
    assert gradients.keys() == case["grads"].keys()
    for name, expected in case["grads"].items():
        assert_statistics(gradients[name], expected, tolerance, name)
