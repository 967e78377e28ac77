"""Structure maps from a depth model: a tiny random one of the default's class, saved to a folder."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from pairs import encoded, photograph, write
from PIL import Image

from sgmim_fast import data
from sgmim_fast.data import depth_maps as structure

transformers = pytest.importorskip("transformers", reason="runs depth models; pip install 'sgmim_fast[structure]'")

NAMES = ["a/1.jpg", "a/2.png", "b/c/3.jpg", "4.jpg", "5.jpg"]
SIZES = [(40, 60), (40, 60), (60, 40), (44, 44), (40, 60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8,
        head_hidden_size=4,
    )  # fmt: skip
    network = transformers.DepthAnythingForDepthEstimation(config)
    torch.nn.init.constant_(network.head.conv3.bias, 1.0)  # the output passes through a ReLU
    network.save_pretrained(folder)
    transformers.DPTImageProcessor(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    for number, (name, (height, width)) in enumerate(zip(NAMES, SIZES, strict=True)):
        picture = np.roll(np.array(photograph(height, width)), 9 * number, 1)
        write(tmp_path / "images" / name, encoded(picture, "PNG" if name.endswith("png") else "JPEG"))
    return tmp_path / "images"


def predict_one(model, path):
    """Predicts with transformers' own pipeline."""
    estimate = transformers.pipeline("depth-estimation", model=str(model), device="cpu")
    return estimate(Image.open(path).convert("RGB"))["predicted_depth"].numpy()


def test_maps_are_the_models_predictions(model, images, tmp_path):
    out = tmp_path / "maps"
    result = structure.generate(images, out, model, batch=2)
    assert (result.written, result.kept, result.broken) == (5, 0, {})
    for name, size in zip(NAMES, SIZES, strict=True):
        with Image.open((out / name).with_suffix(".png")) as image:
            stored, limits = np.array(image), list(map(float, image.text["range"].split()))
        assert stored.dtype == np.uint16 and stored.shape == size
        assert stored.min() == 1 and stored.max() == 2**16 - 1  # 0 would mean a missing value
        expected = predict_one(model, images / name)
        assert np.ptp(expected) > 0
        found = limits[0] + (stored - 1.0) / (2**16 - 2) * (limits[1] - limits[0])
        # Half a step of storage, and differences between two decoders, passed through a random network.
        assert np.abs(found - expected).max() < 0.02 * np.ptp(expected)
    note = json.loads((out / "structure.json").read_text())
    assert note["model"] == str(model) and note["maps"] == 5 and note["broken"] == {}
    assert note["values"] == "relative inverse depth, larger is nearer" and note["class"].startswith("DepthAnything")
    assert note["versions"]["transformers"] == transformers.__version__
    assert not [path for path in out.rglob("*") if path.suffix not in (".png", ".json") and path.is_file()]

    dataset = data.FolderPairs(images, out, data.PairTransform(16))
    assert len(dataset) == 5 and all(item["structure"].isfinite().all() for item in dataset)


def test_goes_on_where_it_stopped(model, images, tmp_path, monkeypatch):
    out = tmp_path / "maps"
    write, written = structure._write, []

    def stop_at_the_third(path, content):
        if path.suffix == ".png":
            if len(written) == 2:
                path.with_name(f".{path.name}.0.tmp").write_bytes(content[:50])  # as a killed process leaves it
                raise KeyboardInterrupt
            written.append(path)
        write(path, content)

    monkeypatch.setattr(structure, "_write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        structure.generate(images, out, model, batch=2)
    before = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.undo()
    result = structure.generate(images, out, model, batch=2)
    assert (result.written, result.kept) == (3, 2)
    assert before == {path: path.stat().st_mtime_ns for path in written}
    assert len(data.FolderPairs(images, out)) == 5
    assert structure.generate(images, out, model).summary() == "0 maps written, 5 kept, 0 broken images"


def test_broken_images_are_named(model, images, tmp_path):
    write(images / "a" / "broken.jpg", b"\xff\xd8 no image")
    write(images / "4.png", encoded(photograph(8, 8), "PNG"))  # in addition to 4.jpg
    result = structure.generate(images, tmp_path / "maps", model, workers=1)
    assert result.written == 5 and set(result.broken) == {"a/broken.jpg", "4.png"}
    assert json.loads((tmp_path / "maps" / "structure.json").read_text())["broken"] == result.broken
    assert "2 broken images: 4.png (its map would be that of 4.jpg), a/broken.jpg" in result.summary()


def test_a_prediction_that_is_not_finite_is_named(model, images, tmp_path, monkeypatch):
    predict = structure._predict
    monkeypatch.setattr(structure, "_predict", lambda *args: [map * torch.nan for map in predict(*args)])
    result = structure.generate(images, tmp_path / "maps", model)
    assert result.written == 0 and set(result.broken.values()) == {"the model's prediction is not finite"}


def test_what_is_wrong_is_said_in_one_line(model, images, tmp_path):
    (tmp_path / "empty").mkdir()
    structure.generate(images, tmp_path / "others", model)
    note = tmp_path / "others" / "structure.json"
    note.write_text(note.read_text().replace(str(model), "another/model"))
    for arguments, message in (
        ((tmp_path / "empty", tmp_path / "out", model), "images: no file in .* found no files"),
        ((images, images / "maps", model), "inside images"),
        ((images, tmp_path / "others", model), "has maps of model another/model"),
        ((images, tmp_path / "out", tmp_path / "empty"), "has no depth-estimation model .* expected config.json"),
        ((images, tmp_path / "out", str(tmp_path / "not here")), "no weights of .* download config.json, .* folder"),
        ((images, tmp_path / "out", model, 0), "batch is 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            structure.generate(*arguments)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_as_a_command(model, images, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    structure.add_arguments(parser)
    args = parser.parse_args([str(images), str(tmp_path / "maps"), "--model", str(model), "--compression", "6"])
    structure.run(args)
    assert capsys.readouterr().out.startswith("5 maps written, 0 kept, 0 broken images; see ")
    assert parser.get_default("model") == "depth-anything/Depth-Anything-V2-Small-hf"
