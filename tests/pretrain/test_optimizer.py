"""Parameter groups and learning rates, compared with numbers computed by hand and with timm's schedulers."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

pytest.importorskip("accelerate", reason="pre-training needs the extra [train]")
from tiny import family

from sgmim_fast.pretrain.build import create_optimizer, learning_rate
from sgmim_fast.pretrain.config import preset


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # 1000 steps an epoch, 1024 images a step: twice the base rates, 4e-4, 2e-6 and 2e-5; 10000 steps of warm-up
        (0, 2e-6),
        (5000, 2.01e-4),  # half of the way from 2e-6 to 4e-4
        (9999, 3.999602e-4),  # 2e-6 + 0.9999 * 3.98e-4
        (10000, 3.907007382e-4),  # 2e-5 + 1.9e-4 * (1 + cos 18 degrees), 0.9510565163
        (50000, 2.1e-4),  # half of the way
        (100000, 2e-5),
    ],
)
def test_cosine_by_hand(step, expected):
    assert learning_rate(preset("swin_base_100ep").optim, step, 1000, 1024) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"),
    # 100 steps an epoch, 2048 images a step: four times the base rates
    [(0, 2e-6), (250, 1.015e-4), (1000, 4e-4), (69999, 4e-4), (70000, 4e-5), (79999, 4e-5)],
)
@pytest.mark.parametrize("name", ["swin_base_800ep", "swin_large_800ep", "swinv2_base", "vit_base_800ep"])
def test_multistep_by_hand(name, step, expected):
    assert learning_rate(preset(name).optim, step, 100, 2048) == pytest.approx(expected, rel=1e-9)


def test_cosine_is_that_of_timm():
    optim = preset("swin_base_100ep").optim
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], optim.lr)
    arguments = {"lr_min": optim.min_lr, "warmup_t": 70, "warmup_lr_init": optim.warmup_lr, "t_in_epochs": False}
    theirs = CosineLRScheduler(optimizer, 700, **arguments)
    for step in range(0, 700, 13):
        assert learning_rate(optim, step, 7, 512) == pytest.approx(theirs._get_lr(step)[0], rel=1e-12)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit"])
def test_weight_decay_groups(name):
    model, _ = family(name, position_embedding=True)
    optimizer = create_optimizer(model, preset("swin_base_800ep").optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert set(groups) == {0.0, 0.05} and sum(map(len, groups.values())) == len(names)
    keys = ("mask_token", "cls_token", "pos_embed", "relative_position_bias_table", "logit_scale", "cpb_mlp")
    without = {
        name
        for name, p in model.named_parameters()
        if p.ndim <= 1 or name.endswith(".bias") or any(key in name for key in keys)
    }
    assert groups[0.0] == without
    assert {"encoder.mask_token", "guidance.pos_embed", "image_head.bias"} <= without
    assert {"image_head.weight", "structure_head.weight"} <= groups[0.05]


def test_optimizer_is_the_published_one():
    model, _ = family("vit")
    settings = create_optimizer(model, preset("vit_base_800ep").optim).defaults
    assert (settings["betas"], settings["eps"], settings["fused"]) == ((0.9, 0.999), 1e-8, True)
