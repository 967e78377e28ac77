"""Pre-training with visible patches only, by the command: presets, resuming, export."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
pytest.importorskip("sgmim_fast.data", reason="pre-training needs the extra [train]")
import timm
from pretraining import arguments, fresh_accelerate, same, weights
from safetensors import safe_open

from sgmim_fast import cli
from sgmim_fast.engine.settings import with_changes
from sgmim_fast.pretrain.build import create_model, find, load
from sgmim_fast.pretrain.config import preset

SMALL = {
    **{"model__visible_only": True, "model__decoder_depth": 1, "model__decoder_width": 32, "model__decoder_heads": 4},
    **{"model__encoder_positions": "sincos", "model__target": "normalized_patch", "model__loss": "l2"},
    "mask__ratio": 0.75,
}


def pretrain(run, *words, **changes):
    with fresh_accelerate():
        return cli.main(["pretrain", f"--out={run}", *words, *arguments(**SMALL, **changes)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain(run) == 0
    return run


def test_a_stopped_run_ends_with_the_same_bits(finished, tmp_path):
    run = tmp_path / "run"
    assert pretrain(run, optim__epochs=1) == 0
    with fresh_accelerate():
        assert cli.main(["pretrain", f"--resume={run}", "--accept-changes", "--set=optim.epochs=2"]) == 0
    assert same(weights(run, 16), weights(finished, 16))


def test_positions_stay_and_everything_else_learns(finished):
    torch.manual_seed(find(finished).config.run.seed)
    started, now = create_model(find(finished).config), load(find(finished))
    for (name, before), (_, after) in zip(started.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(before, after) == (name == "encoder.model.pos_embed"), name


def test_the_exported_encoder_is_timms(finished):
    with safe_open(finished / "encoder.safetensors", "pt") as file:
        meta, names = file.metadata(), list(file.keys())
    assert "visible_only" not in meta["timm_arguments"] and not any(name.startswith("decoder") for name in names)
    model = timm.create_model(
        meta["timm_name"], **json.loads(meta["timm_arguments"]), checkpoint_path=str(finished / "encoder.safetensors")
    ).eval()
    encoder, images = load(find(finished)).encoder.eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.forward_features(images)[:, 1:], encoder(images), rtol=1e-4, atol=1e-4)
    assert "on visible patches alone with a decoder" in (finished / "encoder.md").read_text()


def test_reconstructs(finished, tmp_path):
    assert cli.main(["reconstruct", str(finished), str(tmp_path / "picture.png"), "--count=2"]) == 0


@pytest.mark.parametrize(
    ("name", "width", "depth"), [("vit_small_mae", 384, 12), ("vit_base_mae", 768, 12), ("vit_large_mae", 1024, 24)]
)
def test_presets_are_maes(name, width, depth):
    config = preset(name)
    optim, model = config.optim, config.model
    assert (optim.lr, optim.betas, optim.weight_decay, optim.warmup_epochs) == (2 * 1.5e-4, (0.9, 0.95), 0.05, 40)
    assert (model.decoder_depth, model.decoder_width, model.decoder_heads) == (8, 512, 16)
    assert (config.mask.unit, config.mask.ratio, config.data.size, config.data.scale) == (16, 0.75, 224, (0.2, 1.0))
    with torch.device("meta"):
        made = create_model(config)
    assert (made.encoder.num_features, len(made.encoder.model.blocks), len(made.decoder.blocks)) == (width, depth, 8)
    assert (made.target, made.loss, made.encoder.model.pos_embed.requires_grad) == ("normalized_patch", "l2", False)
    without = create_model(with_changes(config, {"model.arguments.depth": 1, "model.guidance": False}, "test"))
    assert without.guidance is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__decoder_heads": 5}, "heads is 5 for a width of 32; expected a divisor"),
        ({"model__decoder_depth": 0}, "depth is 0; expected at least 1 block"),
        (
            {"model__visible_only": False},
            "model.decoder_depth is 1 without a decoder; expected model.visible_only=true",
        ),
        ({"model__encoder": "swin_tiny_patch4_window7_224", "model__arguments": {}}, "which has windows and stages"),
        ({"model__loss": "huber"}, "model.loss is 'huber'; expected one of l1, l2"),
    ],
)
def test_one_line_for_what_does_not_fit(tmp_path, capsys, changes, message):
    assert cli.main(["pretrain", f"--out={tmp_path / 'run'}", *arguments(**SMALL | changes)]) == 2
    assert message in capsys.readouterr().err
