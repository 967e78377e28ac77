"""The stem of an accelerated encoder embeds only visible patches, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import FEW_ULP

import sgmim_fast
from sgmim_fast import SGMIM, accelerate, backends, selective_mask

SWIN = {"img_size": 32, "window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
VIT = {"img_size": 64, "depth": 1, "embed_dim": 48, "num_heads": 3}
# timm name, arguments, stride, mask units along a side
ENCODERS = {
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 8, 2),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, 8, 4),
    "beit": ("beit_base_patch16_224", VIT, 16, 2),
    "vit": ("vit_base_patch16_224", VIT, 16, 4),
}


def pair(name: str) -> tuple[SGMIM, SGMIM, torch.Tensor, sgmim_fast.masking.SelectiveMask]:
    """Returns a plain model, the same model with only its stem accelerated, images, and their masks."""
    timm_name, arguments, stride, grid = ENCODERS[name]
    plain = SGMIM(sgmim_fast.create_encoder(timm_name, **arguments), stride, guidance=False)
    with torch.no_grad():
        for parameter in plain.encoder.model.patch_embed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fast = copy.deepcopy(plain)
    fast.encoder.visible_stem = True
    size = arguments["img_size"]
    return plain, fast, 4 + torch.randn(3, 3, size, size), selective_mask(3, grid, [0.6, 0.0, 1.0])


def step(model: SGMIM, images: torch.Tensor, mask) -> dict[str, torch.Tensor]:
    loss = model(images.to(next(model.parameters()).dtype), None, mask)
    loss.backward()
    return {"loss": loss.detach()} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ENCODERS)
def test_losses_and_gradients(name):
    plain, fast, images, mask = pair(name)
    truth = step(copy.deepcopy(plain).double(), images, mask)
    usual, actual = step(plain, images, mask), step(fast, images, mask)
    assert actual.keys() == truth.keys()
    for key, exact in truth.items():
        error, reference = ((x[key].double() - exact).norm() for x in (actual, usual))
        assert error <= 2 * reference + FEW_ULP * torch.finfo(torch.float32).eps * exact.norm(), key


@pytest.mark.parametrize("name", ENCODERS)
def test_in_float64(name):
    plain, fast, images, mask = pair(name)
    truth = step(plain.double(), images, mask)
    with backends.use("torch"):
        actual = step(fast.double(), images, mask)
    for key, exact in truth.items():
        torch.testing.assert_close(actual[key], exact, rtol=1e-9, atol=1e-12, msg=key)


def test_masked_pixels_are_not_read():
    """Masked pixels are not even multiplied by zero: NaN under the mask does not propagate."""
    _, fast, images, mask = pair("swin")
    hidden = sgmim_fast.masking.resize(mask.mask, *images.shape[2:])[:, None]
    patches = sgmim_fast.masking.resize(mask.mask, 8, 8)
    visible = (~patches).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        expected = fast.encoder(images, patches, visible)
        torch.testing.assert_close(fast.encoder(images.masked_fill(hidden, torch.nan), patches, visible), expected)


def test_what_is_not_timms_own_is_called():
    plain, fast, images, mask = pair("vit")
    before = fast(images, None, mask)
    for model in (plain, fast):
        model.encoder.model.patch_embed.proj.register_forward_hook(lambda module, args, result: result.sin())
    assert torch.equal(fast(images, None, mask), plain(images, None, mask))
    assert not torch.allclose(fast(images, None, mask), before)


def test_accelerate_switches_it_on():
    timm_name, arguments, _, _ = ENCODERS["vit"]
    encoder = sgmim_fast.create_encoder(timm_name, **arguments)
    assert not encoder.visible_stem and accelerate(encoder).visible_stem


def test_masks_that_are_not_aligned_embed_every_patch():
    plain, fast, images, _ = pair("swin")
    mask = torch.rand(3, 8, 8) < 0.5
    assert torch.equal(fast(images, None, mask), plain(images, None, mask))
