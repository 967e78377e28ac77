"""200 steps of the stereo example: accelerated training follows plain timm as closely as another plain run does."""

from __future__ import annotations

import functools

import pytest
import torch
from test_examples import example  # noqa: F401 - a fixture
from torch.utils.data import DataLoader

import sgmim_fast
from sgmim_fast import SGMIM
from sgmim_fast.fused.accelerate import FAST

STEPS, SMOOTH = 200, 20


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["swin", "vit"])
def test_losses_stay_within_the_noise(example, monkeypatch, encoder):  # noqa: F811
    """The noise is measured with parameters that differ in the last bits, as they would on another machine."""

    def curve(accelerate: bool, disturbance: float = 0.0) -> torch.Tensor:
        monkeypatch.setattr(sgmim_fast, "SGMIM", functools.partial(SGMIM, accelerate=accelerate))
        torch.manual_seed(0)
        model = example.create_model(encoder, 32)
        assert any(isinstance(m, tuple(FAST.values())) for m in model.modules()) == accelerate
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + disturbance * torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(2)
        history = example.train(model, DataLoader(example.RandomCrops(32, 8 * STEPS), 8), 1e-3)
        return torch.tensor(history)

    plain, other, fast = curve(False), curve(False, 1e-6), curve(True)
    assert fast.shape == (STEPS, 2)
    torch.testing.assert_close(fast[:5], plain[:5], rtol=1e-4, atol=1e-4)
    mean = [x.unfold(0, SMOOTH, 1).mean(-1) for x in (plain, other, fast)]
    noise, difference = ((x - mean[0]).abs().amax(0) for x in mean[1:])
    print(f"{encoder}: smoothed curves differ by {difference.tolist()}, plain ones by {noise.tolist()}")
    assert (difference <= 3 * noise + 1e-3).all()
    assert (mean[2][-1] < 0.95 * mean[2][0]).all()
