"""Masks drawn by salience (SPEC, "Salience-based masking"), from encoders and from given values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_masking import assert_cells, generator
from tiny import FAMILIES, ConvEncoder, family
from torch import Tensor

import sgmim_fast
from sgmim_fast import SGMIM, reference, selective_mask
from sgmim_fast.ops import token_salience


def draw(salience: Tensor, grid: tuple[int, int], **options: object) -> sgmim_fast.SelectiveMask:
    return selective_mask(len(salience), grid, masking="salience", salience=salience, **options)


def by_hand(salience: Tensor, grid: tuple[int, int], noise: Tensor, adaptive: str) -> Tensor:
    """Computes the masks image by image and unit by unit, with r = 0.75, v = 0.10, delta = 0.5."""
    (rows, columns), ratios, mask = grid, [], torch.zeros(len(salience), *grid, dtype=torch.bool)
    for image in salience:
        salient = sum(float(s) > 0.5 for s in image.flatten()) / image.numel()
        ratios.append({"none": 0.75}.get(adaptive, 0.75 - 0.10 + 2 * 0.10 * salient))
    if adaptive == "batch":
        ratios = [sum(ratios) / len(ratios)] * len(ratios)
    for image, ratio, drawn, numbers in zip(salience, ratios, mask, noise, strict=True):
        scores = []
        for i, unit in enumerate(part for row in image.chunk(rows, 0) for part in row.chunk(columns, 1)):
            scores.append(float(unit.mean()) + float(numbers[i]) / 2)
        for i in sorted(range(len(scores)), key=lambda i: -scores[i])[: math.ceil(round(ratio * len(scores), 9))]:
            drawn.view(-1)[i] = True
    return mask


@pytest.mark.parametrize("adaptive", ["image", "batch", "none"])
@given(
    images=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    patches=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    number=st.integers(0, 2**31),
)
def test_masks_against_the_definition(adaptive, images, grid, patches, number):
    seeded = generator(number)
    share = torch.rand(images, 1, 1, generator=seeded)  # the salient share differs between images
    salience = torch.rand(images, grid[0] * patches[0], grid[1] * patches[1], generator=seeded) ** (2 * share)
    noise = torch.rand(images, grid[0] * grid[1], generator=seeded)
    drawn = draw(salience, grid, noise=noise, adaptive=adaptive)
    expected = by_hand(salience.double(), grid, noise.double(), adaptive)
    assert_cells(drawn, expected, expected)


def test_the_ratio_stays_in_its_range():
    salience = torch.stack([torch.zeros(10, 10), torch.full((10, 10), 0.5), torch.ones(10, 10)])
    salience[1, :5] = 1.0  # half of the values exceed the threshold
    assert draw(salience, (10, 10)).mask.flatten(1).sum(1).tolist() == [65, 75, 85]
    assert draw(salience, (10, 10), adaptive="batch").mask.flatten(1).sum(1).tolist() == [75, 75, 75]
    drawn = draw(salience, (10, 10), ratio=0.6, spread=0.3, threshold=0.2)
    assert drawn.mask.flatten(1).sum(1).tolist() == [30, 90, 90]
    assert draw(salience, (10, 10), ratio=0.6, adaptive="none", spread=0.9).mask.flatten(1).sum(1).tolist() == [60] * 3


def test_salient_units_are_masked_more_often():
    salience = torch.linspace(0, 1, 36).view(1, 6, 6).expand(400, 6, 6)
    often = draw(salience, (6, 6), generator=generator(), ratio=0.5, adaptive="none").mask.float().mean(0).flatten()
    assert often[:6].mean() < 0.05 and often[-6:].mean() > 0.95  # the noise U / 2 outweighs at most half of the range
    assert 0.3 < often[15:21].mean() < 0.7


def test_reproducible_and_shown_and_scaled():
    salience = torch.rand(5, 8, 8)
    first, again = (draw(salience, (4, 4), generator=generator(3), scale=2) for _ in range(2))
    assert torch.equal(first.mask, again.mask) and first.mask.shape == (5, 8, 8)
    assert not torch.equal(first.mask, draw(salience, (4, 4), generator=generator(4), scale=2).mask)
    for shown in ("visible", "all", 0.25):
        drawn = draw(salience, (4, 4), generator=generator(3), scale=2, shown=shown)
        assert_cells(drawn, first.mask, drawn.structure)
        assert (
            drawn.structure.flatten(1).sum(1).tolist()
            == {
                "visible": (~first.mask).flatten(1).sum(1).tolist(),
                "all": [64] * 5,
                0.25: [48] * 5,
            }[shown]
        )


def test_an_image_draws_alike_wherever_it_is():
    salience, noise = torch.rand(6, 4, 4), torch.rand(6, 16)
    whole = draw(salience, (4, 4), noise=noise)
    for first in range(0, 6, 2):
        part = draw(salience[first : first + 2], (4, 4), noise=noise[first : first + 2])
        assert torch.equal(part.mask, whole.mask[first : first + 2])


# Encoders


def positions(encoder: sgmim_fast.encoders.MaskedEncoder, x: Tensor) -> Tensor:
    """Returns the input of the first block without class tokens, caught by a hook, with nothing masked."""
    caught = []
    model = encoder.model
    block = (model.layers[0] if hasattr(model, "layers") else model).blocks[0]
    handle = block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    encoder(x)
    handle.remove()
    return caught[0].flatten(1, -2)[:, getattr(model, "num_prefix_tokens", 0) :]


@pytest.mark.parametrize("name", FAMILIES)
def test_salience_is_of_what_enters_the_blocks(name):
    model, size = family(name)
    encoder = model.encoder
    x = torch.randn(2, 3, *size)
    found = encoder.salience(x)
    p = encoder.patch_size
    assert found.shape == (2, size[0] // p, size[1] // p) and not found.requires_grad
    tokens = positions(encoder, x)
    torch.testing.assert_close(found.flatten(1), token_salience(tokens.detach()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "vit", "beit", "vit-patch-14"])
@pytest.mark.parametrize("adaptive", ["image", "batch"])
def test_losses_and_gradients_are_the_dense_ones(name, adaptive):
    """Images of a batch with different numbers of masked units are processed as packed rows."""
    model, size = family(name)
    model.double()
    stride = model.encoder_stride
    images = torch.randn(4, 3, *size, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10.0]).view(4, 1, 1, 1)
    images[3, :, : size[0] // 2] = 0
    structure = torch.randn(4, 1, *size, dtype=torch.float64)
    grid = size[0] // stride, size[1] // stride
    mask = model.draw_mask(images, grid, masking="salience", ratio=0.5, spread=0.4, adaptive=adaptive)
    counts = mask.mask.flatten(1).sum(1)
    assert len(set(counts.tolist())) > 1 or adaptive == "batch"
    loss = model(images, structure, mask)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    truth = reference.sgmim_losses(model, images, structure, mask).total
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-10)
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, rtol=1e-8, atol=1e-10)


def test_draw_mask_is_selective_mask():
    model, size = family("swin")
    images = torch.randn(3, 3, *size)
    drawn = model.draw_mask(images, 3, masking="salience", generator=generator(1), scale=1)
    expected = draw(model.encoder.salience(images), (3, 3), generator=generator(1))
    assert torch.equal(drawn.mask, expected.mask)
    drawn = model.draw_mask(images, 3, ratio=0.4, generator=generator(1))
    assert torch.equal(drawn.mask, selective_mask(3, 3, 0.4, generator(1)).mask)
    assert model.draw_mask(images, 3).mask.flatten(1).sum(1).tolist() == [6] * 3


def test_under_autocast_and_compiled_around():
    model, size = family("vit")
    images = torch.randn(2, 3, *size)
    with torch.autocast("cpu", torch.bfloat16):
        mask = model.draw_mask(images, 4, masking="salience")
        loss = model(images, torch.randn(2, 1, *size), mask)
    loss.backward()
    assert loss.isfinite() and model.encoder.mask_token.grad.isfinite().all()


def test_an_encoder_of_ones_own():
    class Salient(ConvEncoder):
        def salience(self, x: Tensor) -> Tensor:
            return torch.linspace(0, 1, 16).view(1, 4, 4).expand(len(x), 4, 4)

    images = torch.randn(2, 3, 64, 64)
    drawn = SGMIM(Salient(), 16).draw_mask(images, 4, masking="salience", ratio=0.5, adaptive="none")
    assert drawn.mask.flatten(1).sum(1).tolist() == [8, 8]
    with pytest.raises(TypeError, match="a ConvEncoder, which has no method salience; expected one of"):
        SGMIM(ConvEncoder(), 16).draw_mask(images, 4, masking="salience")


@pytest.mark.parametrize("adaptive", ["image", "none"])
def test_images_that_are_not_finite(adaptive):
    model, size = family("vit")
    images = torch.randn(4, 3, *size)
    images[1, 0, 3, 3], images[3, 2, 60, 60] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="salience is NaN in image 1, 3; expected numbers from 0 to 1"):
        model.draw_mask(images, 4, masking="salience", adaptive=adaptive)


SALIENCE = torch.rand(2, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masking": "saliency"}, ValueError, "masking is 'saliency'; expected one of random, salience"),
        ({"salience": None}, TypeError, "salience is missing; expected"),
        ({"salience": SALIENCE[0]}, ValueError, "salience has 4 images; expected 2"),
        ({"salience": SALIENCE.flatten(1)}, ValueError, r"salience has shape \(2, 16\); expected \(B, h, w\)"),
        ({"salience": SALIENCE.int()}, TypeError, "salience is of dtype torch.int32; expected a floating-point"),
        ({"salience": SALIENCE[:, :3]}, ValueError, r"multiples of the grid \(4, 4\)"),
        ({"adaptive": None}, ValueError, "adaptive is None; expected one of image, batch, none"),
        ({"ratio": [0.5, 0.6]}, TypeError, "ratio is .*; expected one number with masking='salience'"),
        ({"ratio": 0.95}, ValueError, "ratio is 0.95 and spread 0.1; expected 0 <= ratio - spread"),
        ({"spread": -0.1}, ValueError, "spread -0.1; expected"),
        ({"threshold": 1.5}, ValueError, "threshold is 1.5"),
        ({"noise": torch.rand(2, 4, 4)}, ValueError, r"noise has shape \(2, 4, 4\) .* expected \(2, 16\)"),
        ({"noise": torch.ones(2, 16).int()}, TypeError, "noise has dtype torch.int32; expected a floating-point"),
        ({"noise": torch.full((2, 16), torch.nan)}, ValueError, "noise has NaN; expected numbers from 0 to 1"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "seed is given with masking='salience'; expected a generator"),
        ({"masking": "random"}, ValueError, "salience is given with masking='random'"),
        (
            {"masking": "random", "salience": None, "noise": torch.rand(2, 16)},
            ValueError,
            "noise is given with masking",
        ),
        ({"shown": "some"}, ValueError, "shown is 'some'"),
        ({"device": "meta"}, ValueError, "salience is on cpu; expected meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        selective_mask(2, 4, **{"masking": "salience", "salience": SALIENCE, **options})
