"""Layer-wise decay of the learning rate, and the parameters with weight decay."""

from __future__ import annotations

from typing import Any

import pytest
from downstream import FAMILIES, features

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.build import param_groups
from sgmim_fast.finetune.heads import DenseModel, create_model


def by_name(model: DenseModel, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Returns lr_scale and weight_decay by parameter name."""
    settings = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(settings) == sum(len(group["params"]) for group in groups)
    return {name: settings[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in settings}


@pytest.mark.parametrize("kind", [*FAMILIES, "resnet"])
def test_every_parameter_is_in_one_group(kind: str) -> None:
    model = create_model(features(kind), "deconv", 1)
    found = by_name(model, param_groups(model, 0.05, 0.8))
    assert set(found) == {name for name, _ in model.named_parameters()}
    undecayed = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        assert (found[name][1] == 0) == (parameter.ndim <= 1 or name in undecayed), name
        assert (found[name][0] == 1) == name.startswith("head."), name


def test_scales_of_swin() -> None:
    """Stem, five blocks, head: six steps of 0.5. A downsampling belongs to the block after it."""
    model = create_model(features("swin"), "deconv", 1)
    found = {name: scale for name, (scale, _) in by_name(model, param_groups(model, 0.05, 0.5)).items()}
    expected = {
        "patch_embed.proj.weight": 6,
        "layers.0.blocks.0.mlp.fc1.weight": 5,
        "layers.1.downsample.reduction.weight": 4,
        "layers.1.blocks.0.norm1.bias": 4,
        "layers.2.blocks.0.attn.relative_position_bias_table": 3,
        "layers.2.blocks.1.attn.qkv.weight": 2,
        "layers.3.downsample.norm.weight": 1,
        "layers.3.blocks.0.mlp.fc2.bias": 1,
    }
    assert {name: found[f"features.model.{name}"] for name in expected} == {k: 0.5**v for k, v in expected.items()}
    assert found["head.last.2.weight"] == 1


def test_scales_of_beit() -> None:
    """The shared position table belongs to the stem."""
    model = create_model(features("beit-shared"), "deconv", 1)
    found = {name: scale for name, (scale, _) in by_name(model, param_groups(model, 0.05, 0.5)).items()}
    for name in ("cls_token", "patch_embed.proj.bias", "rel_pos_bias.relative_position_bias_table"):
        assert found[f"features.model.{name}"] == 0.5**6, name
    for block in range(5):
        assert found[f"features.model.blocks.{block}.gamma_1"] == 0.5 ** (5 - block)


def test_without_decay_all_learn_alike() -> None:
    model = create_model(features("vit"), "deconv", 1)
    assert {group["lr_scale"] for group in param_groups(model, 0.05)} == {1.0}


def test_frozen_encoder() -> None:
    model = create_model(features("vit"), "deconv", 1)
    found = by_name(model, param_groups(model, 0.05, 0))
    assert set(found) == {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert model.frozen and not any(parameter.requires_grad for parameter in model.features.parameters())


@pytest.mark.parametrize("layer_decay", [-0.1, 1.5])
def test_bad_decay(layer_decay: float) -> None:
    with pytest.raises(UserError, match=r"layer_decay is .*; expected 0 .* to 1"):
        param_groups(create_model(features("vit"), "deconv", 1), 0.05, layer_decay)
