"""Images with several channels: reading, statistics and training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
from PIL import Image
from pretraining import fresh_accelerate, tiny, weights
from safetensors import safe_open
from safetensors.torch import save_file

from sgmim_fast import cli, data
from sgmim_fast.data.channel_image import ChannelImage
from sgmim_fast.data.report import BrokenFile
from sgmim_fast.data.stats import measure
from sgmim_fast.engine import log
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import build, initial

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 2**16, (4, 5, 7), dtype=np.uint16)
FLOATS = RNG.normal(50, 20, (4, 5, 7)).astype(np.float32)


def write(path, pixels):
    """Writes pixels (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif path.suffix == ".tif":
        first, *rest = (Image.fromarray(page) for page in pixels)
        first.save(path, save_all=True, append_images=rest)
    else:
        Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)).save(path)


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("deep.npy", DEEP, DEEP / 65535),
        ("last.npy", np.moveaxis(DEEP, 0, 2), DEEP / 65535),
        ("floats.npy", FLOATS, FLOATS),
        ("doubles.npy", FLOATS.astype(np.float64), FLOATS),
        ("bytes.npy", (DEEP // 256).astype(np.uint8), DEEP // 256 / 255),
        ("pages.tif", DEEP, DEEP / 65535),
        ("floats.tif", FLOATS, FLOATS),
        ("rgba.png", (DEEP // 256).astype(np.uint8), DEEP // 256 / 255),
        ("grey.png", DEEP[:1], DEEP[:1] / 65535),
        ("grey8.png", (DEEP[:1] // 256).astype(np.uint8), DEEP[:1] // 256 / 255),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(tmp_path, name, pixels, expected):
    write(tmp_path / name, pixels)
    image = ChannelImage(tmp_path / name, channels=len(expected))
    assert image.size == (5, 7)
    found = image.decode()
    assert found.dtype == (torch.uint8 if pixels.dtype == np.uint8 else torch.float32)
    found = found.double() / (255 if found.dtype == torch.uint8 else 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("three.npy", DEEP[:3], r"image has shape \(3, 5, 7\); expected 4 channels"),
        ("signed.npy", DEEP.astype(np.int16), "image has dtype int16; expected uint8, uint16 or floating-point"),
        ("wide.npy", DEEP.astype(np.int64), "image has dtype int64"),
        ("complex.npy", DEEP.astype(np.complex64), "image has dtype complex64"),
        ("rgb.png", (DEEP[:3] // 256).astype(np.uint8), "expected 4 channels"),
        ("nan.npy", np.where(FLOATS > 60, np.nan, FLOATS), "image has NaN or infinities; expected finite values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_ones(tmp_path, name, pixels, message):
    write(tmp_path / name, pixels)
    with pytest.raises(BrokenFile, match=message):
        ChannelImage(tmp_path / name, channels=4)


def folder(path, count=12, channels=5, size=(70, 90)):
    """Writes images of several channels, each with its own unit, and maps."""
    scale = np.arange(1, channels + 1)[:, None, None]
    for i in range(count):
        write(path / "images" / f"{i}.npy", (RNG.normal(3, 0.5, (channels, *size)) * scale).astype(np.float32))
        write(path / "maps" / f"{i}.png", RNG.integers(1, 2**16, (1, *size), dtype=np.uint16))
    return path


def test_stats(tmp_path, capsys):
    files = [RNG.normal(2, 3, (2, 6, 8)).astype(np.float32), RNG.normal(1, 1, (2, 3, 5)).astype(np.float32)]
    for i, pixels in enumerate(files):
        write(tmp_path / "images" / f"{i}.npy", pixels)
    together = np.concatenate([pixels.reshape(2, -1).astype(np.float64) for pixels in files], 1)
    found = measure(tmp_path / "images", 2)
    np.testing.assert_allclose(found.mean, together.mean(1), rtol=1e-10)
    np.testing.assert_allclose(found.std, together.std(1), rtol=1e-10)
    write(tmp_path / "images" / "3.npy", files[0][:1])
    assert cli.main(["data", "stats", str(tmp_path / "images"), "--channels=2", "--workers=0"]) == 1
    out = capsys.readouterr().out
    assert "2 images of 2 channels; 1 cannot be read" in out and "3.npy: image has shape" in out
    assert f"--set data.image_channels=2 --set data.mean=[{together.mean(1)[0]:.6g}," in out
    assert cli.main(["data", "stats", str(tmp_path / "images"), "--channels=0"]) == 2


def test_stats_of_photographs(tmp_path, capsys):
    pixels = RNG.integers(0, 256, (3, 9, 11), dtype=np.uint8)
    write(tmp_path / "one.png", pixels)
    found = measure(tmp_path)
    np.testing.assert_allclose(found.mean, (pixels / 255).reshape(3, -1).mean(1), rtol=1e-10)
    assert cli.main(["data", "stats", str(tmp_path), "--workers=0"]) == 0
    assert "image_channels" not in capsys.readouterr().out


def test_crops_are_those_of_the_maps(tmp_path):
    """Images of any number of channels get the same crop as their maps."""
    pixels = np.stack([np.add.outer(np.arange(64), np.arange(64))] * 2).astype(np.float32)
    write(tmp_path / "images" / "a.npy", pixels)
    write(tmp_path / "maps" / "a.npy", pixels[:1])
    transform = data.PairTransform(16, scale=(0.3, 0.5), mean=[0, 10], std=[1, 2])
    item = data.FolderPairs(tmp_path / "images", tmp_path / "maps", transform, channels=2)[0]
    assert item["image"].shape == (2, 16, 16)
    torch.testing.assert_close(item["image"][0], 2 * item["image"][1] + 10)
    assert (item["image"][0] - item["structure"][0]).abs().max() < 4  # a map has the pixel under each centre


SETTINGS = {"data__scenes": 0, "data__image_channels": 5, "data__mean": [3, 6, 9, 12, 15], "data__std": [0.5] * 5}


def arguments(path, **changes):
    from pretraining import arguments as options

    images = {"data__images": str(path / "images"), "data__structure": str(path / "maps")}
    return options(**{**SETTINGS, **images, **changes})


def test_a_run(tmp_path, capsys):
    folder(tmp_path)
    with fresh_accelerate():
        words = ["pretrain", f"--out={tmp_path / 'run'}", "--set=data.val=0.2", *arguments(tmp_path)]
        assert cli.main(words) == 0, capsys.readouterr().err
        line = log.read(tmp_path / "run")[-1]
        assert line["loss"] > 0 and line["skipped_steps"] == 0
        stem = weights(tmp_path / "run", line["step"])["encoder.model.patch_embed.proj.weight"]
        assert stem.shape[1] == 5
        out = tmp_path / "seen.png"
        assert cli.main(["reconstruct", str(tmp_path / "run"), str(out), "--count=2"]) == 0 and out.is_file()
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "encoder.safetensors")]) == 0
        with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
            assert json.loads(file.metadata()["mean"]) == SETTINGS["data__mean"]
        assert (tmp_path / "encoder.md").read_text().count("Images have 5 channels") == 1
        assert "the mean 3, 6, 9, 12, 15 and" in (tmp_path / "encoder.md").read_text()
        capsys.readouterr()
        assert cli.main(["fourier", str(tmp_path / "run"), "--scenes=1"]) == 2
        assert "takes images of 5 channels; expected an encoder of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mean": None, "data__std": None}, "--channels 5 measures it"),
        ({"data__std": None}, "data.std is missing with data.image_channels 5"),
        ({"data__mean": [1, 2, 3]}, "data.mean has 3 numbers; expected 5, one for each channel"),
        ({"data__std": [1, 1, 1, 1, 0]}, "expected numbers above 0"),
        ({"data__image_channels": 0}, "data.image_channels is 0; expected at least 1"),
        ({"data__image_channels": None}, "data.mean has 5 numbers; expected 3"),
        ({"data__image_channels": None, "data__mean": [0, 0, 0], "data__std": None}, "data.std is missing; expected"),
        ({"data__scenes": 8, "data__images": None, "data__structure": None}, "without data.images"),
        ({"model__arguments": {"depth": 1, "in_chans": 4}}, "model.arguments.in_chans is 4, images have 5 channels"),
        ({"data__image_channels": 4, "data__mean": [0] * 4, "data__std": [1] * 4}, "none of"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_input_is_one_line(tmp_path, capsys, changes, message):
    folder(tmp_path, 4)
    with fresh_accelerate():
        assert cli.main(["pretrain", f"--out={tmp_path / 'run'}", *arguments(tmp_path, **changes)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_weights_of_three_channels_are_adapted(tmp_path):
    torch.manual_seed(0)
    photographs = build.create_model(tiny())
    save_file(photographs.encoder.model.state_dict(), tmp_path / "rgb.safetensors")
    changes = {**SETTINGS, "data__images": "somewhere", "model__init": str(tmp_path / "rgb.safetensors")}
    config = tiny(**changes)
    model = build.create_model(config)
    lines = initial.load(model, config)
    assert any("the stem's 3 channels adapted to 5" in line for line in lines)
    old = photographs.encoder.model.patch_embed.proj.weight
    torch.testing.assert_close(model.encoder.model.patch_embed.proj.weight, old[:, [0, 1, 2, 0, 1]] * 3 / 5)
    other = tiny(**{**changes, "data__image_channels": 2, "data__mean": [0, 0], "data__std": [1, 1]})
    save_file(model.encoder.model.state_dict(), tmp_path / "rgb.safetensors")
    with pytest.raises(UserError, match="a stem of 5 channels, images have 2; expected weights of 2 or of 3"):
        initial.load(build.create_model(other), other)
    rgb = tiny(model__init=str(tmp_path / "rgb.safetensors"))
    with pytest.raises(UserError, match=r"a stem of 5 channels, images have 3; expected weights of 3$"):
        initial.load(build.create_model(rgb), rgb)
