"""Relative log amplitudes: exact for maps with a known spectrum, for every kind of encoder, and by the command."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sgmim_fast.data", reason="the analysis needs the extra [downstream]")
pytest.importorskip("accelerate", reason="the analysis needs the extra [downstream]")
from PIL import Image
from pretraining import arguments, fresh_accelerate
from tiny import FAMILIES, family
from torch import nn

from sgmim_fast import checkpoints, cli
from sgmim_fast.fourier import block_spectra, relative_log_amplitude
from sgmim_fast.fourier.blocks import to_maps


def wave(length: int, number: int, phase: float = 0.0) -> torch.Tensor:
    """Returns a (length, length) float64 cosine with `number` periods over the map, along rows and columns alike."""
    along = torch.arange(length, dtype=torch.float64) * 2 * math.pi * number / length
    return torch.cos(along[:, None] + along[None, :] + phase)


@given(length=st.integers(3, 17), mean=st.floats(0.5, 20), data=st.data())
def test_waves_have_their_amplitudes(length, mean, data):
    """A mean m and waves of amplitude a at k: half of a is at k and half at -k, which coincide at π."""
    points = length // 2 + 1
    amplitudes = data.draw(st.lists(st.floats(0.1, 5), min_size=points - 1, max_size=points - 1))
    shares = [1 if 2 * k == length else 0.5 for k in range(1, points)]
    maps = mean + sum(a * wave(length, k) for k, a in enumerate(amplitudes, 1))
    found = relative_log_amplitude(maps[None, None])
    expected = [0.0] + [math.log(a * share / mean) for a, share in zip(amplitudes, shares, strict=True)]
    # 1e-6 is added to amplitudes of at least 0.05 * 9, which changes the logarithm by 2.2e-6.
    torch.testing.assert_close(found.value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-6)
    assert found.frequency.tolist() == [2 * k / length for k in range(points)]


def test_constant_maps_have_nothing_but_frequency_0():
    found = relative_log_amplitude(torch.full((1, 2, 8, 8), 3.0, dtype=torch.float64))
    assert found.value[0] == 0
    torch.testing.assert_close(found.value[1:], torch.full((4,), math.log(1e-6 / (3 * 64))).double(), rtol=1e-6, atol=0)


def test_white_noise():
    """The mean of log|z| is (log(var) - γ) / 2 for a complex normal number, and less by log(2) / 2 for a real one."""
    maps = torch.randn(400, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    found = relative_log_amplitude(maps)
    expected = torch.tensor([0, *[math.log(2) / 2] * 5, 0], dtype=torch.float64)
    # Standard deviation of log|z|: π / sqrt(8) if real, π / sqrt(24) if complex; of the difference of two means of
    # 6400: 0.02.
    assert (found.value - expected).abs().max() < 4 * math.pi * math.sqrt(1 / 8 + 1 / 8) / math.sqrt(6400)


def test_means_are_over_logarithms_of_images_and_channels():
    maps = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    single = [relative_log_amplitude(maps[i : i + 1, j : j + 1]).value for i in range(3) for j in range(4)]
    torch.testing.assert_close(relative_log_amplitude(maps).value, torch.stack(single).mean(0))


def test_blurring_takes_high_frequencies_away():
    maps = torch.randn(8, 4, 16, 16)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(maps, (1, 1, 1, 1), mode="circular"), 3, 1)
    difference = relative_log_amplitude(blurred).value - relative_log_amplitude(maps).value
    # The Fourier transform of a circular box of 3 is ((1 + 2 cos w) / 3) ** 2.
    w = torch.arange(9, dtype=torch.float64) * 2 * math.pi / 16
    torch.testing.assert_close(difference, ((1 + 2 * w.cos()) / 3).square().log(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(1, 2, 4, 5), "square"),
        (torch.zeros(2, 4, 4), "square"),
        (torch.zeros(0, 2, 4, 4), "square"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int64), "floating-point"),
        (np.zeros((1, 2, 4, 4)), "floating-point"),
    ],
    ids=["oblong", "3-dimensional", "empty", "int", "array"],
)
def test_wrong_maps(maps, message):
    with pytest.raises((TypeError, ValueError), match=message):
        relative_log_amplitude(maps)


@pytest.mark.parametrize("name", [name for name, (_, _, size, _) in FAMILIES.items() if size[0] == size[1]])
def test_every_block_of_every_family(name):
    model, size = family(name)
    timm_model = model.encoder.model.eval()
    images = torch.randn(3, 3, *size)
    found = block_spectra(timm_model, iter(images.split(2)))

    stem, stride = model.patch_size, model.encoder_stride
    stages = int(math.log2(stride / stem)) + 1
    lengths = [size[0] // stem // 2**i for i in range(stages)] if hasattr(timm_model, "layers") else [size[0] // stem]
    assert [len(s.value) for s in found] == [length // 2 + 1 for length in lengths]
    # The last spectrum is that of the features before the norm.
    timm_model.norm = nn.Identity()
    features = to_maps(timm_model.forward_features(images), getattr(timm_model, "num_prefix_tokens", 0))
    assert features.shape == (3, model.encoder.num_features, lengths[-1], lengths[-1])
    torch.testing.assert_close(found[-1].value, relative_log_amplitude(features).value, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in timm_model.modules())


def test_maps_of_tokens():
    grid = torch.arange(2 * 9 * 3).reshape(2, 3, 3, 3)  # (B, h, w, C)
    tokens = torch.cat([torch.full((2, 1, 3), -1), grid.flatten(1, 2)], 1)
    assert torch.equal(to_maps(tokens, 1), to_maps(grid, 0))
    assert torch.equal(to_maps(grid, 0)[1, :, 2, 0], grid[1, 2, 0])


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="expected a timm Swin"):
        block_spectra(nn.Linear(1, 1), [])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of one step and its exported encoder."""
    run = tmp_path_factory.mktemp("fourier") / "mine"
    with fresh_accelerate():
        steps = arguments(optim__epochs=1, data__scenes=4)
        assert cli.main(["pretrain", f"--out={run}", *steps]) == 0
    return run


def fourier(capsys, code, *words):
    """Runs the command. Returns its standard output and the single line on standard error."""
    found = cli.main(["fourier", *map(str, words)])
    out, err = capsys.readouterr()
    assert found == code, err
    assert err.count("\n") == (0 if code == 0 else 1), err
    return out, err


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command(pretrained, tmp_path, capsys):
    figure = tmp_path / "made" / "spectra.png"
    exported = pretrained / "encoder.safetensors"
    words = [pretrained, exported, "vit_tiny_patch16_224", "--size=64", "--scenes=3", f"--out={figure}"]
    labels = [f"--label={label}" for label in ("run", "file", "random")]
    out, _ = fourier(capsys, 0, *words, *labels)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[-1] == f"wrote {figure} and {figure.with_suffix('.csv')}"
    lines = read(figure.with_suffix(".csv"))
    assert list(lines[0]) == ["encoder", "block", "frequency", "value"]
    curves = {}
    for line in lines:
        curves.setdefault((line["encoder"], int(line["block"])), []).append(
            (float(line["frequency"]), float(line["value"]))
        )
    assert list(curves) == [
        (e, b) for e, count in (("run", 3), ("file", 3), ("random", 12)) for b in range(1, count + 1)
    ]
    assert all([f for f, _ in curve] == [0, 0.5, 1] and curve[0][1] == 0 for curve in curves.values())
    for block in (1, 2, 3):  # both are the same encoder
        np.testing.assert_allclose(curves["run", block], curves["file", block], atol=1e-3)


def test_images_of_a_folder(pretrained, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(pixels).save(folder / name)
    (folder / "c.png").write_bytes(b"no picture")
    out, _ = fourier(capsys, 0, pretrained, "--images", tmp_path / "photos", "--out", tmp_path / "f.png")
    assert f"skipped {folder / 'c.png'}: it cannot be read" in out
    assert len(read(tmp_path / "f.csv")) == 9
    for name in ("a.png", "b.jpg"):
        (folder / name).unlink()
    assert "none of 1 images can be read" in fourier(capsys, 2, pretrained, "--images", tmp_path / "photos")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vit_tiny_patch16_224",), "either --images DIR or --scenes N"),
        (("vit_tiny_patch16_224", "--images=a", "--scenes=1"), "either --images DIR or --scenes N"),
        (("vit_tiny_patch16_224", "--scenes=0"), "--scenes is 0; expected at least 1"),
        (("vit_tiny_patch16_224", "--images=nowhere"), "--images is nowhere; expected a folder, found nothing"),
        (("vit_tiny_patch16_22", "--scenes=1"), "did you mean vit_tiny_patch16_224"),
        (("resnet18", "--scenes=1"), "resnet18: timm_name must name one of"),
        (("gone.safetensors", "--scenes=1"), "cannot read gone.safetensors"),
        ((".", "--scenes=1"), "has no checkpoint"),
        (("vit_tiny_patch16_224", "--scenes=1", "--size=30"), "--size is 30; expected a multiple of 16"),
        (("vit_tiny_patch16_224", "--scenes=1", "--label=a", "--label=b"), "--label is given 2 times"),
        (("vit_tiny_patch16_224", "--scenes=1", "--out=f.csv"), "expected the name of a figure"),
    ],
    ids=["nothing", "both", "none", "no-folder", "typo", "family", "no-file", "no-run", "size", "labels", "csv"],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fourier(capsys, 2, *words)[1]


def test_a_run_of_another_size(pretrained, capsys):
    assert "--size is 96; expected 64" in fourier(capsys, 2, pretrained, "--scenes=1", "--size=96")[1]


def test_a_file_of_another_kind(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "does not name its timm model" in fourier(capsys, 2, tmp_path / "other.safetensors", "--scenes=1")[1]


def test_swin_file_at_another_size(tmp_path, capsys):
    """timm resizes the position tables."""
    model, _ = family("swin")
    checkpoints.export_timm(model, tmp_path / "swin.safetensors")
    words = [tmp_path / "swin.safetensors", "--scenes=1", "--size=192", "--out", tmp_path / "f.png"]
    fourier(capsys, 0, *words)
    # 48, 24, 12 and 6 cells along a map
    assert len(read(tmp_path / "f.csv")) == 25 + 13 + 7 + 4
