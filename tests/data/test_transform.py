"""Image and map remain aligned through crop, flip and resize, also if the image is still an encoded file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs import encoded, photograph, ramp
from torchvision import tv_tensors
from torchvision.transforms import v2

from sgmim_fast import data
from sgmim_fast.data.seeds import seeded


def coordinates(height: int, width: int) -> torch.Tensor:
    """Returns (2, H, W): row and column of each pixel's centre, as a share of height and width."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def position_transform(size, **arguments):
    """Returns a PairTransform that does not normalise colours between 0 and 1."""
    return data.PairTransform(size, mean=(0, 0, 0), std=(1, 1, 1), **arguments)


@given(
    image=st.tuples(st.integers(8, 70), st.integers(8, 70)),
    factor=st.sampled_from([0.5, 1, 2]),
    size=st.integers(1, 40),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_image_and_map_show_the_same_place(image, factor, size, flip, seed):
    """Image and map contain their own coordinates. The map may have another resolution."""
    height, width = image
    here = coordinates(height, width)
    there = coordinates(max(int(height * factor), 1), max(int(width * factor), 1))
    with seeded(seed):
        out, structure = position_transform(size, flip=flip)(
            tv_tensors.Image(torch.cat([here, here[:1]])), data.Structure(there[:1])
        )
    assert out.shape == (3, size, size) and structure.shape == (1, size, size)
    assert type(out) is tv_tensors.Image and type(structure) is data.Structure
    # Antialiasing bends the ramp at the crop's edge by less than a new pixel; nearest moves it by half an old one.
    slack = 1 / size + 1.01 / height + 1 / there.shape[1]
    assert (out[0] - structure[0]).abs().max() <= slack
    if size > 2:
        inner = (slice(1, -1),) * 2
        assert (out[0] - structure[0])[inner].abs().max() <= 0.51 / height + 0.51 / there.shape[1] + 0.25 / size


def test_flip_mirrors_both():
    left = tv_tensors.Image(photograph(32, 32))
    structure = data.Structure(torch.from_numpy(ramp(32, 32).astype(np.float32))[None])
    plain, mirrored = (
        position_transform(32, scale=(1, 1), ratio=(1, 1), flip=flip)(left, structure) for flip in (0.0, 1.0)
    )
    for a, b in zip(plain, mirrored, strict=True):
        torch.testing.assert_close(a.flip(-1), b)
    assert torch.equal(plain[1], structure)
    torch.testing.assert_close(plain[0].as_subclass(torch.Tensor), left.as_subclass(torch.Tensor) / 255)


@given(seed=st.integers(0, 1000), missing=st.floats(0, 1))
def test_missing_values_do_not_spread(seed, missing):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(1, 50, 41, generator=generator) + 1
    values[torch.rand(1, 50, 41, generator=generator) < missing] = torch.nan
    with seeded(seed):
        _, structure = data.PairTransform(24)(tv_tensors.Image(photograph(50, 41)), data.Structure(values))
    kept = structure[structure.isfinite()]
    assert torch.isin(kept, values).all()  # there are no new values
    assert abs(structure.isnan().float().mean() - missing) < 0.2


def test_crops_have_the_published_shares_of_area():
    """SPEC "Published recipes": crop scale 0.67-1, ratio 3/4-4/3, for a square image in which most of the crops fit."""
    here = coordinates(400, 400)
    areas, ratios = [], []
    with seeded(0):
        for _ in range(200):
            _, structure = data.PairTransform(64, flip=0)(
                tv_tensors.Image(torch.zeros(3, 400, 400)), data.Structure(here)
            )
            height, width = ((t.max() - t.min()) * 64 / 63 for t in structure)
            areas.append(float(height * width))
            ratios.append(float(width / height))
    assert 0.64 < min(areas) < 0.7 and 0.95 < max(areas) <= 1.03
    assert 0.72 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.38


@pytest.mark.parametrize("size", [(400, 400), (300, 500), (500, 300), (90, 500), (500, 90), (3, 2), (1, 1)])
def test_crops_are_distributed_as_torchvisions(size):
    """Compares mean and spread of top, left, height and width, also where few or no drawn shapes fit."""
    ours, theirs = data.PairTransform(8), v2.RandomResizedCrop(8, (0.67, 1.0))
    whole = torch.empty(()).expand(size)
    with seeded(0):
        drawn = torch.tensor([ours._draw(*size)[0] for _ in range(600)]).double()
        params = [theirs.make_params([whole]) for _ in range(600)]
    expected = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).double()
    drawn[:, 2:] -= drawn[:, :2]
    error = (drawn.mean(0) - expected.mean(0)).abs()
    # Four standard errors of the difference of two means, and the rounding of a centre.
    assert (error <= 4 * expected.std(0) * (2 / 600) ** 0.5 + 0.5).all()
    assert (drawn.std(0) - expected.std(0)).abs().max() <= 0.15 * expected.std(0).max() + 0.5
    assert (drawn.min(0).values >= torch.tensor([0, 0, 1, 1])).all()
    assert ((drawn[:, :2] + drawn[:, 2:]).max(0).values <= torch.tensor(size)).all()


def test_evaluation_takes_the_middle():
    here = coordinates(40, 60)
    image, structure = data.PairTransform.evaluation(20)(tv_tensors.Image(photograph(40, 60)), data.Structure(here))
    expected = coordinates(20, 20)
    assert (structure[0] - expected[0]).abs().max() <= 0.5 / 40 + 1e-6
    assert (structure[1] - (expected[1] * 40 + 10) / 60).abs().max() <= 0.5 / 60 + 1e-6
    again, _ = data.PairTransform.evaluation(20)(tv_tensors.Image(photograph(40, 60)), data.Structure(here))
    assert torch.equal(image, again)


def test_normalises_as_imagenet():
    white = tv_tensors.Image(torch.full((3, 8, 8), 255, dtype=torch.uint8))
    image, _ = data.PairTransform.evaluation(8)(white, data.Structure(torch.zeros(1, 8, 8)))
    torch.testing.assert_close(
        image[:, 0, 0].as_subclass(torch.Tensor), torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [24, 96])
def test_a_file_gives_what_its_pixels_give(kind, size):
    """Holds at a reduced scale, too: the crop of the large image is 4 to 16 times as large as the result."""
    image = photograph(720, 960)
    content = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    structure = data.Structure(coordinates(720, 960))
    with seeded(3):
        from_file = position_transform(size)(data.ImageFile("x", content), structure)
    with seeded(3):
        from_pixels = position_transform(size)(data.ImageFile("x", content).decode(), structure)
    assert (from_file[0] - from_pixels[0]).abs().mean() < 0.01
    # Red and green are the position of a pixel, and so is the map: they agree within 1.5 of 720 pixels on average.
    assert (from_file[0][[1, 0]] - from_file[1]).mean((1, 2)).abs().max() < 0.002


def test_a_file_is_decoded_no_smaller_than_the_result():
    file = data.ImageFile("x", encoded(photograph(300, 400), "JPEG"))
    for shrink in (1.0, 0.51, 0.5, 0.3, 0.25, 0.2, 0.1):
        _, height, width = file.decode(shrink).shape
        assert height >= 300 * shrink and width >= 400 * shrink
    assert height < 300 / 4


def test_the_smaller_scale_loses_no_quality():
    """The difference to full decoding is the error of JPEG itself, far below what the eye or an encoder notices."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = data.ImageFile("x", encoded(photograph(600, 800), "PNG")).decode().permute(1, 2, 0).numpy()
    mixed = (0.5 * image + 0.5 * np.kron(rough, np.ones((20, 20, 1)))).astype(np.uint8)
    content = encoded(mixed, "JPEG", quality=90)
    structure = data.Structure(torch.zeros(1, 600, 800))
    small, _ = position_transform(192, scale=(1, 1), flip=0)(data.ImageFile("x", content), structure)
    full, _ = position_transform(192, scale=(1, 1), flip=0)(data.ImageFile("x", content).decode(), structure)
    psnr = -10 * (small - full).square().mean().log10()
    assert psnr > 33


def test_v2_transforms_treat_a_structure_as_a_mask():
    structure = data.Structure(torch.tensor([[[1.0, torch.nan], [3.0, 4.0]]]))
    image = tv_tensors.Image(torch.zeros(3, 2, 2))
    _, out = v2.Compose([v2.Resize((4, 4)), v2.RandomHorizontalFlip(1), v2.Normalize([0.5] * 3, [0.5] * 3)])(
        image, structure
    )
    assert type(out) is data.Structure
    expected = structure.repeat_interleave(2, 1).repeat_interleave(2, 2).flip(2)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor), equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (3, 3)}, "size is (3, 3)"),
        ({"size": 8, "scale": (0.9, 0.5)}, "scale is (0.9, 0.5)"),
        ({"size": 8, "ratio": (0, 1)}, "ratio is (0, 1)"),
        ({"size": 8, "flip": 2}, "flip is 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        data.PairTransform(**arguments)
    assert message in str(error.value)
