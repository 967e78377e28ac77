"""Padding, windows and mirrored images, with models whose result is known for every pixel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from downstream import features
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.heads import create_model, to_depth
from sgmim_fast.finetune.inference import predict, starts_and_ends


class Known:
    """Replaces a model: returns the mean over channels plus `slope` times the column, and records input sizes."""

    def __init__(self, multiple: int = 8, fixed_size: tuple[int, int] | None = None, slope: float = 0.0) -> None:
        self.multiple, self.fixed_size, self.slope = multiple, fixed_size, slope
        self.features = SimpleNamespace(name="known")
        self.seen: list[tuple[int, int]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape[2:]))
        assert all(side % self.multiple == 0 for side in images.shape[2:])
        return images.mean(1, keepdim=True) + self.slope * torch.arange(images.shape[3])


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    fixed=st.booleans(),
    flip=st.booleans(),
)
def test_every_pixel_is_its_own(size: tuple[int, int], window: tuple[int, int] | None, fixed: bool, flip: bool) -> None:
    """A model that processes each pixel alone is not affected by sizes, windows and padding."""
    model = Known(1 if fixed else 8, window if fixed else None)
    x = images(*size)
    found = predict(model, x, window=window, flip=flip)
    torch.testing.assert_close(found, x.mean(1, keepdim=True))
    if fixed and window is not None:
        assert set(model.seen) == {window}


@given(length=st.integers(1, 200), window=st.integers(1, 60), data=st.data())
def test_positions_are_mmsegmentations(length: int, window: int, data: st.DataObject) -> None:
    """Its formulas: max(length - window + stride - 1, 0) // stride + 1 windows, with the last one inside the image."""
    stride = data.draw(st.integers(1, window))
    found = list(starts_and_ends(length, window, stride))
    assert len(found) == max(length - window + stride - 1, 0) // stride + 1
    for index, (start, end) in enumerate(found):
        assert end == min(index * stride + window, length) and start == max(end - window, 0)
    covered = {pixel for start, end in found for pixel in range(start, end)}
    assert covered == set(range(length))


def test_windows_of_the_protocols() -> None:
    assert list(starts_and_ends(640, 480, 160)) == [(0, 480), (160, 640)]
    kitti = list(starts_and_ends(1216, 352, 58))
    assert len(kitti) == 16 and kitti[1] == (58, 410) and kitti[-1] == (864, 1216)


def test_windows_are_averaged_where_they_overlap() -> None:
    """Two windows of 4 columns over 6, each with 0 to 3: the middle two columns average 2 and 0, 3 and 1."""
    found = predict(Known(1, slope=1.0), torch.zeros(1, 3, 1, 6), window=(1, 4), stride=(1, 2))
    assert found.flatten().tolist() == [0, 1, 1, 2, 2, 3]


def test_mirror_images_are_averaged() -> None:
    found = predict(Known(1, slope=1.0), torch.zeros(1, 3, 2, 4), flip=True)
    assert found.flatten().tolist() == [1.5] * 8


def test_transform_comes_before_averages() -> None:
    model = Known(1, slope=1.0)
    found = predict(model, torch.zeros(1, 3, 1, 4), flip=True, transform=torch.square)
    assert found.flatten().tolist() == [(0 + 9) / 2, (1 + 4) / 2, (4 + 1) / 2, (9 + 0) / 2]


def test_default_stride_is_two_thirds() -> None:
    model = Known(1)
    predict(model, images(9, 15, 1), window=9)
    assert len(model.seen) == 2  # at 0 and 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 16, "stride": 17}, "stride is 17x17; expected 1 to the window's 16x16"),
        ({"window": 16, "stride": 0}, "stride is 0x0"),
    ],
)
def test_bad_windows(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        predict(Known(), images(32, 32), **arguments)
    with pytest.raises(UserError, match="window is 16x16; known takes 32x32 only"):
        predict(Known(fixed_size=(32, 32)), images(32, 32), window=16)


@pytest.mark.parametrize("kind", ["swin", "swinv2-3-stages", "vit", "beit-shared"])
def test_models_take_any_image(kind: str) -> None:
    """A model for 64 x 64 is applied to 50 x 150, whole and in windows. Afterwards it is unchanged."""
    model = create_model(features(kind), "deconv", 1).eval()
    x = images(50, 150, 1)
    whole = predict(model, x, transform=lambda raw: to_depth(raw, 0.1, 10))
    windows = predict(model, x, window=64, stride=32, flip=True)
    assert whole.shape == windows.shape == (1, 1, 50, 150)
    assert whole.isfinite().all() and (whole > 0.1).all() and windows.isfinite().all()
    assert not whole.requires_grad


def test_an_image_of_the_models_size_is_just_predicted() -> None:
    model = create_model(features("swin"), "deconv", 2).eval()
    x = images(64, 64, 2)
    with torch.no_grad():
        torch.testing.assert_close(predict(model, x), model(x), rtol=0, atol=0)
