"""Configurations: the published recipes, the origin of settings, and error messages."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from pretraining import tiny

from sgmim_fast.engine import settings
from sgmim_fast.engine.settings import (
    differences,
    flat,
    from_mapping,
    read_assignments,
    read_yaml,
    to_yaml,
    with_changes,
)
from sgmim_fast.errors import UserError
from sgmim_fast.pretrain.config import PRESETS, Config, preset

# docs/SPEC.md "Published recipes": epochs, base lr, warm-up lr, min lr, schedule, drop path; image size and window
RECIPES = {
    "swin_base_100ep": (100, 2e-4, 1e-6, 1e-5, "cosine", 0, 192, 6),
    "swin_base_800ep": (800, 1e-4, 5e-7, None, "multistep", 0, 192, 6),
    "swin_large_800ep": (800, 1e-4, 5e-7, None, "multistep", 0, 192, 12),
    "vit_base_800ep": (800, 1e-4, 5e-7, None, "multistep", 0.1, 224, None),
}


def resolve(name, file, changes):
    return settings.resolve(Config(), PRESETS, name, file, changes)


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_published_recipes(name):
    config = preset(name)
    epochs, lr, warmup_lr, min_lr, schedule, drop_path, size, window = RECIPES[name]
    optim = config.optim
    assert (optim.epochs, optim.lr, optim.warmup_lr, optim.schedule) == (epochs, lr, warmup_lr, schedule)
    assert min_lr is None or optim.min_lr == min_lr
    assert schedule == "cosine" or (optim.milestones, optim.gamma) == ((700,), 0.1)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ((0.9, 0.999), 1e-8, 0.05, 5.0)
    assert (optim.warmup_epochs, optim.batch) == (10, 128)
    assert config.model.arguments.get("drop_path_rate", 0) == drop_path
    assert config.model.arguments.get("window_size") == window
    assert (config.data.size, config.data.scale, config.data.flip) == (size, (0.67, 1.0), True)
    assert config.data.ratio == (3 / 4, 4 / 3)
    assert (config.mask.unit, config.mask.ratio) == (32, 0.6)


def test_all_presets_resolve():
    assert set(RECIPES) < set(PRESETS) and {"swinv2_base", "tiny_demo"} < set(PRESETS)
    for name in PRESETS:
        assert preset(name).preset == name


def test_file_over_preset_and_changes_over_both(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("preset: swin_base_800ep\noptim: {lr: 3e-4, batch: 64}\nmodel: {arguments: {window_size: 3}}\n")
    changes = read_assignments(["optim.batch=32", "data.scale=[0.2, 1]", "model.arguments.drop_path_rate=1e-1"])
    config = resolve(None, file, changes)
    assert (config.preset, config.optim.epochs) == ("swin_base_800ep", 800)
    assert (config.optim.lr, config.optim.batch, config.data.scale) == (3e-4, 32, (0.2, 1.0))
    assert config.model.arguments == {"window_size": 3, "drop_path_rate": 0.1}
    file.write_text("model: {arguments: {drop_path_rate: 1e-1, init_values: '1e-1', depths: [1E2, .5e+1, 2e]}}\n")
    given = {"drop_path_rate": 0.1, "init_values": "1e-1", "depths": [100.0, 5.0, "2e"]}
    assert resolve(None, file, {}).model.arguments == given
    assert resolve(None, None, {"model.encoder": "x", "model.arguments": str(given)}).model.arguments == given
    assert resolve("swinv2_base", file, {}).model.encoder == "swinv2_base_window12_192"


@pytest.mark.parametrize("config", [Config(), tiny(), *map(preset, PRESETS)], ids=lambda c: c.preset or c.model.encoder)
def test_yaml_gives_the_same_back(tmp_path, config):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    again = with_changes(Config(preset=config.preset), read_yaml(file), "file")
    assert again == config and differences(config, again) == []


def test_differences_leave_out_what_changes_no_step():
    old = tiny()
    new = with_changes(old, {"optim.lr": 0.2, "run.log_every": 7, "data.workers": 2, "run.seed": 1}, "test")
    assert differences(old, new) == ["optim.lr: 0.1 -> 0.2", "run.seed: 0 -> 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.lrr": "1"}, r"unknown setting 'optim.lrr'; did you mean optim.lr"),
        ({"optimizer.lr": "1"}, r"unknown setting 'optimizer.lr'; did you mean optim.lr"),
        ({"lr": "1"}, r"unknown setting 'lr'"),
        ({"optim.lr": "fast"}, r"optim.lr is 'fast'; expected a number"),
        ({"optim.lr": "true"}, r"optim.lr is 'true'; expected a number"),
        ({"optim.batch": "1.5"}, r"optim.batch is '1.5'; expected a whole number"),
        ({"data.flip": "2"}, r"data.flip is '2'; expected true or false"),
        ({"data.scale": "[0.5]"}, r"data.scale is '\[0.5\]'; expected 2 numbers"),
        ({"optim.schedule": "cosin"}, r"expected one of cosine, multistep; did you mean cosine\?"),
        ({"model.arguments": "3"}, r"model.arguments is '3'; expected settings"),
        ({"preset": "swin_base_100ep"}, r"--set: preset is 'swin_base_100ep'; expected the option --preset instead"),
    ],
)
def test_wrong_changes(change, message):
    with pytest.raises(UserError, match=message):
        with_changes(Config(), change, "--set")


def test_values_are_read_as_their_fields_want_them():
    config = with_changes(
        Config(),
        {"optim.lr": "1e-3", "optim.epochs": "5", "optim.batch": "8.0", "data.workers": "null", "data.images": "12"},
        "--set",
    )
    assert flat(config)["optim.lr"] == 1e-3 and isinstance(config.optim.epochs, float)
    assert config.optim.batch == 8 and config.data.workers is None and config.data.images == "12"


def test_unknown_preset_and_missing_one(tmp_path):
    with pytest.raises(UserError, match=r"unknown preset 'swin_base_100'; .*did you mean swin_base_100ep"):
        preset("swin_base_100")
    with pytest.raises(UserError, match=r"give --preset, one of swin_base_100ep"):
        resolve(None, None, {})
    for text, message in (
        ("optim: 3", "optim is 3"),
        ("[1, 2]", "is not a configuration"),
        ("a: [", "is not valid YAML"),
    ):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            resolve(None, file, {})
    with pytest.raises(UserError, match="cannot read the configuration"):
        resolve(None, tmp_path / "nowhere.yaml", {})
    with pytest.raises(UserError, match=r"expected SECTION.SETTING=VALUE"):
        read_assignments(["optim.lr"])


def test_sections_are_mappings():
    assert from_mapping(None, "empty") == {}
    assert from_mapping({"preset": "a", "run": {"seed": 1}}, "file") == {"preset": "a", "run.seed": 1}
