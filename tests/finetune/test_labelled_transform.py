"""Image and labels remain aligned through scale, crop and flip. Colours, strips and padding are as documented."""

from __future__ import annotations

import colorsys
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors

from sgmim_fast.data.pair import Structure
from sgmim_fast.data.seeds import seeded
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.data import DenseEvaluation, DenseTransform, DepthColors, SegmentationColors
from sgmim_fast.finetune.data.colors import GREY, add_value, saturate
from sgmim_fast.finetune.data.transform import scaled

SIZES = st.tuples(st.integers(4, 60), st.integers(4, 60))
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "colors": False}  # keeps colours from 0 to 1


def coordinates(height, width):
    """Returns (2, height, width): row and column of each pixel's centre, as a share of height and width."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


@given(
    size=SIZES,
    crop=SIZES,
    factor=st.floats(0.3, 2.5),
    fit=st.sampled_from([False, (80, 40), (30, 30)]),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_image_and_depth_show_the_same_place(size, crop, factor, fit, flip, seed):
    """Image and depth contain their own coordinates; depth is row + 10 column + 1."""
    here = coordinates(*size)
    transform = DenseTransform(crop, "depth", fit=fit, scale=(factor, factor), flip=flip, cut_depth=0, **PLAIN)
    with seeded(seed):
        image, depth = transform(tv_tensors.Image(torch.cat([here, here[:1]])), Structure(here[:1] + 10 * here[1:] + 1))
    assert image.shape == (3, *crop) and depth.shape == (1, *crop)
    assert type(image) is tv_tensors.Image and type(depth) is Structure
    height, width = (min(have, want) for have, want in zip(scaled(size, fit, factor), crop, strict=True))
    shown = depth[0, :height, :width]
    assert not shown.isnan().any() and depth[0, height:].isnan().all() and depth[0, :, width:].isnan().all()
    assert not image[:, height:].any() and not image[:, :, width:].any()
    expected = (image[0] + 10 * image[1] + 1)[:height, :width]
    # Nearest moves the ramp by at most half an old pixel, interpolation at an edge by less than a new one.
    new = scaled(size, fit, factor)
    slack = 0.51 / size[0] + 5.1 / size[1] + 0.51 / new[0] + 5.1 / new[1]
    assert (shown - expected).abs().max() <= slack
    order = image[1, 0, :width].diff()
    assert (order <= 0).all() if flip else (order >= 0).all()


@given(size=SIZES, crop=SIZES, flip=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 99))
def test_image_and_labels_are_equal_where_nothing_is_scaled(size, crop, flip, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 255, size, generator=generator)
    transform = DenseTransform(crop, "segmentation", fit=False, scale=(1, 1), flip=flip, **PLAIN)
    with seeded(seed):
        image, out = transform(tv_tensors.Image(labels.to(torch.uint8).expand(3, -1, -1)), tv_tensors.Mask(labels))
    assert out.shape == crop and out.dtype == torch.int64 and type(out) is tv_tensors.Mask
    height, width = (min(have, want) for have, want in zip(size, crop, strict=True))
    part = (slice(height), slice(width))
    assert all(torch.equal((channel[part] * 255).round().long(), out[part]) for channel in image)
    assert (out[height:] == 255).all() and (out[:, width:] == 255).all()


@given(missing=st.floats(0, 1), factor=st.floats(0.4, 3), seed=st.integers(0, 99))
def test_no_depth_is_new(missing, factor, seed):
    """Neither interpolation, with or without missing values, nor the scale creates new depths."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(1, 30, 41, generator=generator) + 1
    depth[torch.rand(depth.shape, generator=generator) < missing] = torch.nan
    transform = DenseTransform((24, 20), "depth", scale=(factor, factor), max_depth=10)
    with seeded(seed):
        _, out = transform(torch.zeros(3, 30, 41, dtype=torch.uint8), depth)
    assert torch.isin(out[out.isfinite()], depth).all()


def test_padding_is_the_mean_colour():
    transform = DenseTransform((6, 8), "segmentation", fit=False, scale=(1, 1), colors=False)
    image, _ = transform(torch.full((3, 4, 4), 255, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int64))
    assert not image[:, 4:].any() and not image[:, :, 4:].any()
    torch.testing.assert_close(
        image[:, 0, 0].as_subclass(torch.Tensor), torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4, rtol=0
    )


def test_published_defaults():
    depth, ade = DenseTransform((480, 480), "depth", max_depth=10), DenseTransform(512, "segmentation")
    assert (depth.size, depth.fit, depth.scale, depth.max_share, depth.cut_depth) == (
        (480, 480),
        False,
        (1, 1),
        1,
        0.25,
    )
    assert (ade.size, ade.fit, ade.scale, ade.max_share, ade.cut_depth) == ((512, 512), (2048, 512), (0.5, 2), 0.75, 0)
    assert isinstance(depth.colors, DepthColors) and isinstance(ade.colors, SegmentationColors)
    assert isinstance(DenseTransform(8, "segmentation", colors=True).colors, SegmentationColors)
    assert depth.flip == ade.flip == 0.5 and depth.cut_width == 0.75
    assert DenseTransform(640, "segmentation").fit == DenseTransform.evaluation("segmentation", 640).fit == (2560, 640)


@pytest.mark.parametrize(
    ("size", "fit", "factor", "expected"),
    [
        ((600, 800), (2048, 512), 1, (512, 683)),
        ((800, 600), (2048, 512), 1, (683, 512)),
        ((400, 2000), (2048, 512), 1, (410, 2048)),
        ((256, 256), (2048, 512), 0.5, (256, 256)),
        ((3, 900), False, 0.1, (1, 90)),
    ],
)
def test_fitting(size, fit, factor, expected):
    assert scaled(size, fit, factor) == expected


def test_scales_and_places_are_drawn_evenly():
    here = coordinates(64, 64)
    transform = DenseTransform(32, "depth", scale=(0.5, 2), cut_depth=0, **PLAIN)
    widths, lefts, flips = [], [], 0
    with seeded(0):
        for _ in range(400):
            _, depth = transform(torch.cat([here, here[:1]]), here[1:] + 1)
            columns = depth[0, 0][depth[0, 0].isfinite()] - 1
            flips += bool(columns[0] > columns[-1])
            widths.append(float(columns.max() - columns.min()))
            lefts.append(float(columns.min()))
    # A crop of 32 shows 31/32 of the width at scale 0.5 (less half a pixel), and a quarter at 2.
    assert min(widths) < 0.26 and max(widths) > 0.93 and min(lefts) < 0.02 and max(lefts) > 0.65
    assert 160 < flips < 240  # four standard deviations


def test_a_crop_filled_by_one_class_is_drawn_again():
    """The left 5/8 are class 0; the right part has four classes in rows."""
    labels = torch.zeros(40, 80, dtype=torch.int64)
    labels[:, 50:] = torch.arange(1, 5).repeat_interleave(10)[:, None]
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)

    def shares(**options):
        transform = DenseTransform((40, 20), "segmentation", fit=False, scale=(1, 1), colors=False, **options)
        with seeded(0):
            crops = [transform(image, labels)[1] for _ in range(150)]
        return torch.tensor([[(crop == k).float().mean() for k in range(5)] for crop in crops]).amax(1)

    assert (shares(max_share=1.0) >= 0.75).float().mean() > 0.4
    assert (shares() < 0.75).all()
    labels[:, :50] = 255  # ignored pixels are not a class
    found = shares()
    assert (found <= 0.25).all() and ((found > 0) & (found < 0.06)).any() and (found > 0).all()
    labels[:] = 3  # the last of ten tries is used
    assert (shares() == 1).all()


@given(seed=st.integers(0, 500))
def test_a_strip_shows_depth(seed):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(1, 6, 40, generator=generator) * 12 + 0.01
    depth[0, 2, ::3] = torch.nan
    with seeded(seed):
        image, _ = DenseTransform((6, 40), "depth", cut_depth=1, max_depth=10, flip=0, **PLAIN)(
            torch.ones(3, 6, 40), depth
        )
    changed = (image != 1).any(0).any(0).nonzero().flatten()
    start, end = int(changed[0]), int(changed[-1]) + 1
    assert len(changed) == end - start and 1 <= end - start <= max(0.75 * (40 - start), 1)
    expected = (depth[..., start:end] / 10).clamp(max=1).nan_to_num(0).expand(3, -1, -1)
    torch.testing.assert_close(image[..., start:end].as_subclass(torch.Tensor), expected)


def test_strips_are_drawn_before_the_crop_as_often_as_asked():
    transform = DenseTransform((6, 10), "depth", max_depth=10, **PLAIN)
    with seeded(0):
        images = [transform(torch.ones(3, 6, 40), torch.ones(1, 6, 40))[0] for _ in range(800)]
    cut = sum(bool((image != 1).any()) for image in images) / 800
    assert 0.02 < cut < 0.25  # a quarter of the images has a strip, and a crop shows a quarter of an image
    assert all((image[:, :1] == image).all() for image in images)  # from top to bottom


def test_a_crop_shows_its_part_of_the_strip():
    """The strip is drawn first, so it does not depend on the crop."""
    depth = (torch.arange(40) + 1).expand(1, 6, 40) / 10
    whole, part = (
        DenseTransform((6, width), "depth", cut_depth=1, max_depth=10, flip=0, **PLAIN) for width in (40, 15)
    )
    seen = 0
    for seed in range(40):
        with seeded(seed):
            strip = (whole(torch.ones(3, 6, 40), depth)[0] != 1)[0, 0]
        with seeded(seed):
            image, columns = part(torch.ones(3, 6, 40), depth)
        left = round(float(columns[0, 0, 0]) * 10) - 1
        assert torch.equal((image != 1)[0, 0], strip[left : left + 15])
        seen += bool((image != 1).any())
    assert 5 < seen < 40


def test_evaluation_leaves_the_map_alone():
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    labels, depth = torch.randint(0, 9, (60, 80)), torch.rand(1, 60, 80)
    for task, pixels in (("depth", depth), ("segmentation", labels)):
        transform = DenseTransform.evaluation(task)
        assert isinstance(transform, DenseEvaluation)
        out, same = transform(image, pixels)
        assert out.shape == (3, 60, 80) and same is pixels
        torch.testing.assert_close(out[0], ((image[0] / 255 - 0.485) / 0.229).as_subclass(type(out)))
    out, same = DenseTransform.evaluation("segmentation", 30)(image, labels)
    assert out.shape == (3, 30, 40) and same is labels
    assert DenseTransform.evaluation("depth", 30)(image, depth)[0].shape == (3, 60, 80)
    assert DenseTransform.evaluation("depth", fit=(40, 40))(image, depth)[0].shape == (3, 30, 40)


def test_random_numbers_are_torchs_alone():
    transform = DenseTransform(20, "segmentation")
    pair = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8), torch.randint(0, 9, (60, 80))
    outs, others = [], (random.getstate(), np.random.get_state()[1].tolist())
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(transform(*pair))
    assert all(map(torch.equal, *outs))
    assert others == (random.getstate(), np.random.get_state()[1].tolist())


COLORS = st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 1.0]) | st.floats(0, 1)] * 3)


@given(color=COLORS, factor=st.floats(0, 2), add=st.floats(-0.5, 0.5))
def test_saturation_and_value_are_those_of_hsv(color, factor, add):
    image = torch.tensor(color)[:, None, None]
    hue, saturation, value = colorsys.rgb_to_hsv(*image.flatten().tolist())
    changed = 0 if saturation * value <= GREY else min(max(saturation * factor + add, 0), 1)
    expected = torch.tensor(colorsys.hsv_to_rgb(hue, changed, value), dtype=torch.float32)
    torch.testing.assert_close(saturate(image, factor, add).flatten(), expected, atol=2e-5, rtol=0)
    expected = torch.tensor(colorsys.hsv_to_rgb(hue, saturation, min(max(value + add, 0), 1)), dtype=torch.float32)
    torch.testing.assert_close(add_value(image, add).flatten(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("colors", [DepthColors(1), SegmentationColors(1)], ids=["depth", "segmentation"])
@given(seed=st.integers(0, 999))
def test_colors_stay_between_black_and_white(colors, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 5, 6, generator=generator)
    image[:, 0], image[:, 1], image[:, 2] = 0, 1, 0.3
    with seeded(seed):
        out = colors(image.clone())
    assert out.shape == image.shape and out.dtype == torch.float32
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 and not torch.equal(out, image)
    assert (out[:, :3] - out[:1, :3]).abs().max() < 1e-6  # grey remains grey


def test_each_color_changes_as_often_and_as_much_as_asked():
    grey = torch.full((3, 1, 1), 0.5)
    red = torch.tensor([0.6, 0.3, 0.3])[:, None, None]
    none = {"brightness": 0, "contrast": 0, "gamma": (1, 1), "hue": 0, "saturation": 0, "value": 0}
    flat = {"brightness": 0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0}
    with seeded(0):
        for make, image, read, least, most in (
            (DepthColors(**{**none, "brightness": 0.2}), grey, lambda x: x[0], 0.3, 0.7),
            (DepthColors(**{**none, "contrast": 0.2}), grey, lambda x: x[0], 0.4, 0.6),
            (DepthColors(**{**none, "gamma": (0.8, 1.2)}), grey, lambda x: x[0], 0.5**1.2, 0.5**0.8),
            (DepthColors(**{**none, "value": 20 / 255}), grey, lambda x: x[0], 0.5 - 20 / 255, 0.5 + 20 / 255),
            (DepthColors(**{**none, "saturation": 0.1}), red, lambda x: 1 - x[1] / x[0], 0.4, 0.6),
            (SegmentationColors(**{**flat, "brightness": 0.1}), grey, lambda x: x[0], 0.4, 0.6),
            (SegmentationColors(**{**flat, "contrast": (0.5, 1.5)}), grey, lambda x: x[0], 0.25, 0.75),
            (SegmentationColors(**{**flat, "saturation": (0.5, 1.5)}), red, lambda x: 1 - x[1] / x[0], 0.25, 0.75),
        ):
            values = torch.tensor([float(read(make(image))) for _ in range(300)])
            kept = (values - float(read(image))).abs() < 1e-6
            assert 0.38 < kept.float().mean() < 0.62  # four standard deviations
            width = most - least
            assert (
                least - 1e-5 <= values.min() < least + 0.1 * width and most - 0.1 * width < values.max() <= most + 1e-5
            )
        hues = torch.tensor(
            [
                colorsys.rgb_to_hsv(*DepthColors(1, **{**none, "hue": 1 / 9})(red).flatten().tolist())[0]
                for _ in range(200)
            ]
        )
    hues = (hues + 0.5) % 1 - 0.5
    assert -1 / 9 - 1e-4 < hues.min() < -0.09 and 0.09 < hues.max() < 1 / 9 + 1e-4
    nothing = torch.rand(3, 4, 4)
    assert torch.equal(DepthColors(0)(nothing), nothing) and torch.equal(SegmentationColors(0)(nothing), nothing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0; expected height and width"),
        ({"size": (4, 0.5)}, "size is (4, 0.5)"),
        ({"task": "depths"}, "task is 'depths'; expected depth or segmentation"),
        ({"scale": (2, 0.5)}, "scale is (2, 0.5); expected 0 < smallest <= largest"),
        ({"max_share": 1.5}, "max_share is 1.5; expected 0 to 1"),
        ({"flip": -1}, "flip is -1"),
        ({"fit": (512, 2048)}, "fit is (512, 2048); expected the longest and the shortest side"),
        ({"cut_depth": 0.5}, "cut_depth is 0.5; expected 0 with task 'segmentation'"),
        ({"task": "depth"}, "max_depth is None; expected the depth in metres that is white"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError) as error:
        DenseTransform(**{"size": 8, "task": "segmentation", **arguments})
    assert message in str(error.value)
