"""`SGMIM.predict` returns the predictions whose distance to the inputs is the loss."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, drawn, family, foreign, stem_mask

from sgmim_fast import reference


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit-oblong", "vit-patch-14"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_predictions_give_the_losses(name, as_tensor):
    model, size = family(name)
    model.double().eval()
    images, structure = batch(model, size)
    mask = drawn(model, size)
    mask = stem_mask(model, size, mask) if as_tensor else mask
    valid = torch.rand(structure.shape) < 0.8
    structure = structure.where(valid, torch.nan)
    losses = model(images, structure, mask, return_losses=True, structure_valid=valid)

    image, guess = model.predict(images, structure, mask, structure_valid=valid)
    assert image.shape == images.shape and guess.shape == structure.shape
    assert not image.requires_grad and not guess.requires_grad
    hidden = reference.pixel_mask(reference.stem_masks(mask, images, model.patch_size)[0], images)
    counted = (1 - hidden) * valid
    torch.testing.assert_close(reference.masked_l1(image, images, hidden), losses.image)
    expected = reference.masked_l1(guess, structure.where(valid, 0), counted)
    torch.testing.assert_close(expected, losses.structure)


def test_without_guidance():
    model = foreign(guidance=False).double()
    images, _ = batch(model, (32, 48))
    image, structure = model.predict(images, mask=drawn(model, (32, 48)))
    assert image.shape == images.shape and structure is None


def test_mask_values():
    model = foreign().double()
    images, structure = batch(model, (32, 48))
    with pytest.raises(ValueError, match="mask has values other than 0 and 1"):
        model.predict(images, structure, torch.full((2, 8, 12), 0.5))
