"""Every head with every family, their errors, and the details of the deconvolution head."""

from __future__ import annotations

import pytest
import torch
from downstream import FAMILIES, features
from torch.nn import functional as F

from sgmim_fast.errors import UserError
from sgmim_fast.finetune.encoder import create_features
from sgmim_fast.finetune.heads import Deconvolutions, create_model, to_depth

HEADS = ("deconv", "upernet", "dpt")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", [*FAMILIES, "resnet"])
def test_every_head_on_every_encoder(kind: str, head: str) -> None:
    """The result has one number per pixel and output. Every parameter has a gradient, for distributed training."""
    model = create_model(features(kind, (64, 96)), head, 5, channels=16)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 5, 64, 96) and out.dtype == torch.float32
    out.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["swin", "beit-shared"])
def test_bfloat16_autocast(kind: str, head: str) -> None:
    model = create_model(features(kind), head, 2, channels=16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 2, 64, 64)
    out.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_patches_of_14() -> None:
    """Maps of 1/14, 2/14, ... of the resolution are resized to that of the images."""
    for head in HEADS:
        model = create_model(features("vit", (56, 84), patch_size=14), head, 1, channels=16)
        assert model.multiple == (14 if head == "deconv" else 28)
        assert model(torch.randn(2, 3, 56, 84)).shape == (2, 1, 56, 84)


@pytest.mark.parametrize("kind", ["swin", "swinv2-3-stages", "vit"])
def test_resolution_before_the_last_resizing(kind: str) -> None:
    """UPerNet classifies at a quarter of the images' resolution, DPT and the deconvolution head at all of it."""
    for head, size in (("upernet", (16, 24)), ("dpt", (64, 96)), ("deconv", (64, 96))):
        model = create_model(features(kind, (64, 96)), head, 1, channels=16).eval()
        assert model.head(model.features(torch.randn(1, 3, 64, 96))).shape == (1, 1, *size), head


def test_widths() -> None:
    """The defaults are those of mmsegmentation's UPerNet and of DPT."""
    made = features("swin")
    upernet, dpt, deconv = (create_model(made, head, 7) for head in ("upernet", "dpt", "deconv"))
    assert upernet.head.classify[1][0].weight.shape == (7, 512, 1, 1)
    assert dpt.head.classify.head[0].weight.shape == (256, 256, 3, 3)
    assert deconv.head.last[2].weight.shape == (7, 24, 3, 3)


def test_deconvolutions_of_the_published_protocol() -> None:
    """For SwinV2-B: shapes of the published head's parameters, and the order of its layers."""
    torch.manual_seed(0)
    head = Deconvolutions(1024, 32, 1, 128)
    convolutions = [tuple(p.shape) for p in head.parameters() if p.ndim == 4]
    assert convolutions == [
        *((1024, 32, 2, 2), (32, 32, 2, 2), (32, 32, 2, 2)),
        *((128, 32, 3, 3), (128, 128, 3, 3), (1, 128, 3, 3)),
    ]
    assert head.last[0].weight.std().item() == pytest.approx(1e-3, rel=0.05)
    head = Deconvolutions(16, 32, 1, 8).eval()
    x = torch.randn(2, 16, 2, 3)
    y = F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)
    for deconvolution, norm in ((1, 2), (4, 5), (7, 8), (10, 11)):
        layer = head.decoder[deconvolution]
        y = F.relu(head.decoder[norm](layer(y)))
    for _ in range(2):
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
    y = head.last[2](F.relu(head.last[0](y)))
    assert y.shape == (2, 1, 64, 96)
    torch.testing.assert_close(head([x * 0, x]), y)


def test_depth() -> None:
    raw = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.bfloat16)
    torch.testing.assert_close(to_depth(raw, 0.0, 10.0), torch.tensor([0.0, 5.0, 10.0]))
    found = to_depth(raw, 0.001, 10.0)
    assert found.dtype == torch.float32 and found[0] == pytest.approx(0.001) and found[2] == pytest.approx(10)


def test_frozen_encoder() -> None:
    """It has no gradient and no stochastic depth, also in training mode."""
    model = create_model(features("swin", drop_path_rate=0.5), "deconv", 1)
    model.freeze()
    model.train()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.features(x)[-1], model.features(x)[-1], rtol=0, atol=0)
    model(x).sum().backward()
    assert all(parameter.grad is None for parameter in model.features.parameters())
    assert model.head.training and all(parameter.grad is not None for parameter in model.head.parameters())


def test_no_weight_decay_names_parameters() -> None:
    for kind in FAMILIES:
        model = create_model(features(kind), "deconv", 1)
        names = {name for name, _ in model.named_parameters()}
        assert model.no_weight_decay() & names, kind


@pytest.mark.parametrize(
    ("kind", "arguments", "head", "words"),
    [
        ("swin", {}, "unet", "head is 'unet'; expected dpt, upernet, deconv"),
        (
            "vit",
            {"depth": 3},
            "dpt",
            r"dpt cannot use vit_base_patch16_224: its maps have strides 16, 16, 16; expected",
        ),
        ("resnet", {"output_stride": 16}, "upernet", r"upernet cannot use resnet18: .* 4, 8, 16, 16; expected .* 4, 8"),
        ("resnet", {"indices": (0, 1)}, "deconv", "deconv cannot use resnet18: its last map has stride 4"),
        ("swin", {"img_size": (64, 80)}, "dpt", "img_size is 64x80; expected multiples of 32 for swin_tiny"),
        ("vit", {"img_size": 80}, "upernet", "img_size is 80x80; expected multiples of 32 for vit_base"),
    ],
)
def test_what_does_not_go_together(kind: str, arguments: dict, head: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_model(features(kind, **arguments), head, 1)


def test_images_that_do_not_fit() -> None:
    model = create_model(features("swin"), "deconv", 1)
    with pytest.raises(ValueError, match="multiples of 32 pixels, got 64x70"):
        model(torch.randn(1, 3, 64, 70))
    model = create_model(features("beit"), "deconv", 1)
    with pytest.raises(ValueError, match="images must be 64x64 pixels for beit_base_patch16_224, got 64x96"):
        model(torch.randn(1, 3, 64, 96))
    model = create_model(features("swin"), "upernet", 1, channels=16)
    with pytest.raises(ValueError, match="at least 2 in each process"):
        model(torch.randn(1, 3, 64, 64))
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_it_learns() -> None:
    """A few steps on one batch lower the loss, with fused blocks and checkpointing."""
    from sgmim_fast.finetune.build import param_groups
    from sgmim_fast.finetune.losses import silog

    torch.manual_seed(0)
    made = create_features(
        "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(1, 2)
    )
    model = create_model(made, "deconv", 1)
    model.set_grad_checkpointing()
    groups = param_groups(model, 0.05, 0.9)
    optimizer = torch.optim.AdamW([{**group, "lr": 3e-3 * group["lr_scale"]} for group in groups])
    images = torch.randn(4, 3, 64, 64)
    depth = 1 + 4 * torch.sigmoid(4 * F.avg_pool2d(images.mean(1, keepdim=True), 17, 1, 8))
    losses = []
    for _ in range(12):
        loss = silog(to_depth(model(images), 0.1, 10), depth, min_depth=0.1, max_depth=10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
