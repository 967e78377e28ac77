"""`--init`: weights of a file, of timm and of a run, fitted to the model."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
import timm
from pretraining import fresh_accelerate, tiny
from safetensors.torch import save_file
from test_pretrain import pretrain

from sgmim_fast.checkpoints import export_timm, published_state_dict
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain import build, initial

SWIN = {
    "model__encoder": "swin_tiny_patch4_window7_224",
    "model__arguments": {"embed_dim": 24, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
    **{"model__stride": 8, "mask__unit": 8},
}
BEIT = {
    "model__encoder": "beit_base_patch16_224",
    "model__arguments": {"depth": 2, "embed_dim": 48, "num_heads": 3, "init_values": 0.1},
}
EVA = {
    "model__encoder": "vit_small_patch16_dinov3",
    "model__arguments": {"depth": 2, "embed_dim": 64, "num_heads": 4},
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with fresh_accelerate():
        yield


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    model = build.create_model(tiny(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def of_channels(channels):
    """Returns settings for images with this number of channels."""
    numbers = {"data__mean": [0.5] * channels, "data__std": [0.25] * channels}
    return numbers | {"data__image_channels": channels, "data__images": "i", "data__structure": "s", "data__scenes": 0}


def start(path, seed=1, **changes):
    """Returns a model with these initial weights, and the lines that are reported."""
    config = tiny(**changes, model__init=str(path))
    torch.manual_seed(seed)
    model = build.create_model(config)
    return model, initial.load(model, config)


def assert_equal(actual, expected, but=()):
    other = expected.state_dict()
    for name, value in actual.state_dict().items():
        if not name.startswith(but):
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("changes", [{}, SWIN, BEIT, EVA], ids=["vit", "swin", "beit", "eva"])
def test_an_exported_file(changes, tmp_path):
    old = model_of(**changes)
    export_timm(old, tmp_path / "encoder.safetensors")
    new, lines = start(tmp_path / "encoder.safetensors", **changes)
    assert_equal(new.encoder.model, old.encoder.model)
    assert len(lines) == 1 and "at random: 1 of encoder" in lines[0] and "of guidance" in lines[0]


@pytest.mark.parametrize("changes", [{}, SWIN, BEIT], ids=["vit", "swin", "beit"])
@pytest.mark.parametrize("guidance", [True, False])
def test_a_checkpoint_of_the_published_code(changes, guidance, tmp_path):
    old = model_of(**changes, model__guidance=guidance)
    torch.save({"model": published_state_dict(old)}, tmp_path / "old.pth")
    new, lines = start(tmp_path / "old.pth", **changes, model__guidance=guidance)
    assert_equal(new, old)
    assert "at random" not in lines[-1]
    if not guidance:  # of SimMIM, as a start for SG-MIM
        new, lines = start(tmp_path / "old.pth", **changes)
        assert_equal(new.encoder, old.encoder)
        assert torch.equal(new.image_head.weight, old.image_head.weight)
        assert "of guidance" in lines[-1]


def test_another_size_is_resized_with_a_line(tmp_path):
    for name, changes, said in (
        ("vit", {}, "absolute positions resized for a grid of tokens: 4x4 -> 6x6"),
        ("swin", SWIN, "relative position bias tables resized for windows of tokens: 4x4 -> 6x6"),
        ("beit", BEIT, "relative position bias tables resized for windows of tokens: 4x4 -> 6x6"),
    ):
        old, path = model_of(**changes), tmp_path / f"{name}.safetensors"
        export_timm(old, path)
        larger = {**changes, "data__size": 96}
        if name == "swin":
            larger["model__arguments"] = {**changes["model__arguments"], "window_size": 6}
        new, lines = start(path, **larger)
        assert any(said in line for line in lines), lines
        block, other = (
            next(m for m in model.modules() if hasattr(m, "attn") and hasattr(m, "mlp")) for model in (old, new)
        )
        assert torch.equal(block.mlp.fc1.weight, other.mlp.fc1.weight)


def test_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    assert pretrain(run) == 0
    new, lines = start(run)
    assert_equal(new, build.load(build.find(run)))
    assert lines == [f"{run}: {len(new.state_dict())} of {len(new.state_dict())} tensors loaded"]
    capsys.readouterr()
    words = [f"--init={run}", "--set=optim.layer_decay=0.5"]
    assert pretrain(tmp_path / "next", *words, optim__epochs=0.25) == 0
    assert f"{run}: {len(new.state_dict())} of" in capsys.readouterr().out
    # The new run continues without the run that it started from.
    (run / "checkpoints").rename(tmp_path / "gone")
    assert pretrain(tmp_path / "next", f"--resume={tmp_path / 'next'}", *words, optim__epochs=0.25) == 0


def in_the_cache(home, name, state):
    """Writes weights as huggingface_hub caches them."""
    cfg = timm.get_pretrained_cfg(name)
    folder = home / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"architecture": name.split(".")[0]}))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


TINY_VIT = {"model__encoder": "vit_tiny_patch16_224", "model__arguments": {}}


def test_weights_of_timm_from_the_cache(cache):
    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.manual_seed(0)
    source = timm.create_model(name, pretrained=False)
    in_the_cache(cache, name, source.state_dict())
    for channels in (3, 1, 5):
        changes = {**TINY_VIT, **({} if channels == 3 else of_channels(channels))}
        new, lines = start(f"timm:{name}", **changes)
        assert any("absolute positions resized for a grid of tokens: 14x14 -> 4x4" in line for line in lines)
        assert torch.equal(new.encoder.model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
        stem, old = new.encoder.model.patch_embed.proj.weight, source.patch_embed.proj.weight
        if channels == 1:
            torch.testing.assert_close(stem, old.sum(1, keepdim=True))
        elif channels == 5:
            torch.testing.assert_close(stem, old[:, [0, 1, 2, 0, 1]] * 3 / 5)
        assert any("3 channels adapted to" in line for line in lines) == (channels != 3)


def test_what_is_not_there_is_one_line(cache, tmp_path, capsys):
    for init, message in (
        ("timm:vit_tiny_patch16_224", "cannot get the weights"),
        ("timm:vit_tny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nobody", "timm has no weights of that name; it has vit_tiny_patch16_224.augreg"),
        (str(tmp_path / "nothing.pth"), "there is no file"),
        (str(tmp_path), "has no checkpoint"),
    ):
        assert pretrain(tmp_path / "run", f"--init={init}", **TINY_VIT) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_what_does_not_fit_is_listed_and_stops_unless_accepted(tmp_path):
    old, path = model_of(), tmp_path / "encoder.safetensors"
    state = old.encoder.model.state_dict()
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"][:, :40].contiguous()
    del state["blocks.1.norm1.bias"]
    save_file({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        start(path)
    for part in ("1 missing: encoder.model.blocks.1.norm1.bias", "1 unexpected: encoder.model.extra.weight"):
        assert part in str(error.value)
    assert "blocks.0.mlp.fc1.weight (192, 40) instead of (192, 48)" in str(error.value)
    assert str(error.value).endswith("--set model.init_partial=true loads the rest")
    new, lines = start(path, model__init_partial=True)
    assert "left out: 1 missing" in lines[0]
    assert_equal(new.encoder.model, old.encoder.model, ("blocks.0.mlp.fc1.weight", "blocks.1.norm1.bias"))


def test_other_channels_than_the_weights(tmp_path):
    old, path = model_of(model__arguments={"depth": 1}, **of_channels(5)), tmp_path / "encoder.safetensors"
    save_file(old.encoder.model.state_dict(), path)
    with pytest.raises(UserError, match="a stem of 5 channels, images have 4; expected weights of 4 or of 3"):
        start(path, model__arguments={"depth": 1}, **of_channels(4))


def test_weights_of_something_else(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"has no weights of a vit_tiny_patch16_224; \d+ missing"):
        start(tmp_path / "other.pth", model__init_partial=True)


def test_layers_learn_more_slowly_towards_the_stem():
    config = tiny(optim__layer_decay=0.5)
    model = build.create_model(config)
    optimizer = build.create_optimizer(model, config.optim)
    scale = {id(p): g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    encoder = model.encoder.model
    assert scale[id(model.image_head.weight)] == scale[id(model.encoder.mask_token)] == 1
    scales = [scale[id(encoder.blocks[i].attn.qkv.weight)] for i in range(3)]
    assert scales[0] / scales[1] == scales[1] / scales[2] == 0.5 and math.isclose(scales[2], 0.5, rel_tol=0.51)
    assert scale[id(encoder.patch_embed.proj.weight)] < scales[0]
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    plain = build.create_optimizer(model, tiny().optim)
    assert decays == {id(p): g["weight_decay"] for g in plain.param_groups for p in g["params"]}


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_decay_that_is_none(tmp_path, capsys, value):
    assert pretrain(tmp_path / "run", optim__layer_decay=value) == 2
    assert "optim.layer_decay is" in capsys.readouterr().err
