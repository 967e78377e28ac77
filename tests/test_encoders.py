"""Masked encoders: golden numbers, bitwise agreement with timm, masking, sizes, compile, autocast, errors."""

from __future__ import annotations

import copy
import math
import pickle

import golden
import pytest
import timm
import torch
from timm.models.eva import Eva
from tiny import nothing_searched
from torch import Tensor, nn

from sgmim_fast.checkpoints import load_published, published_state_dict
from sgmim_fast.encoders import MaskedEncoder, create_encoder
from sgmim_fast.masking import selective_mask

RECIPE = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}
STAGES = {"depths": (1, 1, 1, 1)}
TINY_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TINY_EVA = {"depth": 2, "embed_dim": 64, "num_heads": 4}
TINY_SWIN = {"embed_dim": 24, "num_heads": (1, 2, 4, 8), **STAGES}

# timm name, arguments, image size, patch size, stride
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 3, **TINY_SWIN}, (96, 96), 4, 32),
    "swin-shifted": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 128, "window_size": 4, **TINY_SWIN, "depths": (2, 1, 1, 1)},
        (128, 128),
        4,
        32,
    ),
    "swin-t": ("swin_tiny_patch4_window7_224", STAGES, (224, 224), 4, 32),
    "swin-oblong": ("swin_tiny_patch4_window7_224", {"img_size": (64, 128), **TINY_SWIN}, (64, 128), 4, 32),
    "swin-any-size": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 4, "strict_img_size": False, **TINY_SWIN, "depths": (2, 1, 1, 1)},
        (64, 96),
        4,
        32,
    ),
    "swin-three-stages": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
        (64, 64),
        4,
        16,
    ),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 128, "window_size": 4, **TINY_SWIN}, (128, 128), 4, 32),
    "swinv2-oblong": ("swinv2_tiny_window8_256", {"img_size": (64, 96), **TINY_SWIN}, (64, 96), 4, 32),
    "beit-recipe": ("beit_base_patch16_224", {"img_size": 64, **RECIPE, **TINY_VIT}, (64, 64), 16, 16),
    "beit-default": ("beit_base_patch16_224", {"img_size": (32, 64), **TINY_VIT}, (32, 64), 16, 16),
    "beit-absolute": (
        "beit_base_patch16_224",
        {"img_size": 64, "use_abs_pos_emb": True, "use_rel_pos_bias": False, "global_pool": "token", **TINY_VIT},
        (64, 64),
        16,
        16,
    ),
    "beitv2": ("beitv2_base_patch16_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "vit-s": ("vit_small_patch16_224", {"depth": 2}, (224, 224), 16, 16),
    "vit-oblong": ("vit_small_patch16_224", {"img_size": (48, 80), **TINY_VIT}, (48, 80), 16, 16),
    "vit-oblong-patch": (
        "vit_small_patch16_224",
        {"img_size": (48, 80), "patch_size": (16, 8), **TINY_VIT},
        (48, 80),
        (16, 8),
        (16, 8),
    ),
    "vit-any-size": ("vit_small_patch16_224", {"dynamic_img_size": True, **TINY_VIT}, (64, 96), 16, 16),
    "vit-padded": (
        "vit_small_patch16_224",
        {"dynamic_img_size": True, "dynamic_img_pad": True, **TINY_VIT},
        (60, 90),
        16,
        16,
    ),
    "vit-gray": ("vit_small_patch16_224", {"img_size": 64, "in_chans": 1, **TINY_VIT}, (64, 64), 16, 16),
    "vit-mean-pooled": ("vit_base_patch16_gap_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "vit-pre-norm": ("vit_base_patch16_clip_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "vit-attention-pooled": ("vit_base_patch16_siglip_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 70, **TINY_VIT}, (70, 70), 14, 14),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 84), **TINY_VIT}, (56, 84), 14, 14),
    "deit": ("deit_tiny_patch16_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "deit3": ("deit3_small_patch16_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "dinov3-biased": ("vit_small_patch16_dinov3_qkvb", {"img_size": (48, 80), **TINY_EVA}, (48, 80), 16, 16),
    "dinov3-swiglu": ("vit_huge_plus_patch16_dinov3", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "dinov3-any-size": ("vit_base_patch16_dinov3", {"dynamic_img_size": True, **TINY_EVA}, (64, 96), 16, 16),
    "eva": ("eva_giant_patch14_224", {"img_size": 56, **TINY_EVA}, (56, 56), 14, 14),
    "eva02": ("eva02_base_patch14_224", {"img_size": (56, 84), **TINY_EVA}, (56, 84), 14, 14),
    "eva02-post-norm": ("eva02_enormous_patch14_clip_224", {"img_size": 56, **TINY_EVA}, (56, 56), 14, 14),
    "rope": ("vit_small_patch16_rope_224", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "rope-mixed": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "rope-mean-pooled": ("vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "perception": ("vit_pe_core_base_patch16_224", {"img_size": 64, **TINY_EVA}, (64, 64), 16, 16),
    "qk-norm": ("vit_small_patch16_rope_224", {"img_size": 64, "qk_norm": True, **TINY_EVA}, (64, 64), 16, 16),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, **TINY_VIT}, (64, 64), 16, 16),
}
REPRESENTATIVES = ("swin-shifted", "swinv2", "beit-recipe", "dinov2-registers", "dinov3-swiglu", "rope-mixed")


def make(family: str) -> tuple[MaskedEncoder, Tensor, Tensor]:
    """Returns an encoder without parameters that are 0 or 1, two images, and a random mask on the grid of its stem."""
    name, arguments, size, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    encoder = create_encoder(name, **arguments)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(2, encoder.in_chans, *size)
    grid = encoder.model.patch_embed.dynamic_feat_size(size)
    return encoder, images, torch.rand(2, *grid) < 0.6


def norm_over_tokens(encoder: MaskedEncoder) -> dict[str, object]:
    """Returns timm arguments for the final norm over tokens, for models that by default pool before the norm."""
    name = encoder.timm_name
    if isinstance(encoder.model, Eva):
        return {"global_pool": "", "use_fc_norm": False, "use_post_transformer_norm": True}
    if name.startswith("beit") or "siglip" in name:
        return {"global_pool": ""}
    return {"fc_norm": False} if "_gap_" in name else {}


def plain_tokens(encoder: MaskedEncoder, images: Tensor, mask: Tensor | None = None, **arguments: object) -> Tensor:
    """Returns tokens of timm's model with the same parameters and mask tokens after the stem; no prefix tokens."""
    torch.manual_seed(1)
    model = timm.create_model(encoder.timm_name, **{**encoder.timm_arguments, "num_classes": 0, **arguments})
    model = model.to(images.dtype)
    model.load_state_dict(encoder.model.state_dict())
    if mask is not None:

        def put_in(stem: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
            weight = mask.to(tokens.dtype).reshape(*tokens.shape[:-1], 1)
            return tokens * (1 - weight) + encoder.mask_token * weight

        model.patch_embed.register_forward_hook(put_in)
    tokens = model.eval().forward_features(images)
    return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("family", FAMILIES)
def test_attributes_and_shape(family):
    encoder, images, mask = make(family)
    _, _, size, patch, stride = FAMILIES[family]
    assert (encoder.patch_size, encoder.stride) == (patch, stride)
    assert encoder.in_chans == images.shape[1]
    strides = (stride, stride) if isinstance(stride, int) else stride
    n = math.prod(math.ceil(s / p) for s, p in zip(size, strides, strict=True))
    assert encoder(images, mask).shape == (2, n, encoder.num_features)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_masked_is_timm_to_the_bit(family):
    encoder, images, mask = make(family)
    token_norm = norm_over_tokens(encoder)
    with torch.no_grad():
        expected = plain_tokens(encoder, images, **token_norm)
        encoder.eval()
        assert torch.equal(encoder(images, None), expected)
        assert torch.equal(encoder(images, torch.zeros_like(mask)), expected)
        # The norm is applied: without it the tokens differ.
        encoder.model.norm = nn.Identity()
        assert not torch.equal(encoder(images, None), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_timm_with_mask_tokens_put_in(family):
    encoder, images, mask = make(family)
    encoder.double()
    expected = plain_tokens(encoder, images.double(), mask, **norm_over_tokens(encoder))
    actual = encoder.eval()(images.double(), mask)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_under_the_mask_are_not_read(family):
    encoder, images, mask = make(family)
    height, width = encoder.model.patch_embed.patch_size
    hidden = mask.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]
    hidden = hidden[..., : images.shape[2], : images.shape[3]]
    with torch.no_grad():
        tokens = encoder(images, mask)
        # NaN of masked pixels must not propagate, so masked tokens are replaced, not multiplied by zero.
        assert torch.equal(encoder(images.masked_fill(hidden, math.nan), mask), tokens)
        assert not torch.equal(encoder(torch.where(hidden, images, images + 1), mask), tokens)
        assert not torch.equal(encoder(images, ~mask), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratios", [[0.6, 0.6], [0.0, 1.0], [0.2, 0.7]], ids=str)
def test_a_drawn_mask_is_its_tensor(family, ratios):
    """Holds for every grid that divides the stem's, and for either stem. No tensor is searched."""
    encoder, images, mask = make(family)
    down, across = mask.shape[1:]
    for side in (s for s in range(1, min(down, across) + 1) if down % s == across % s == 0):
        drawn = selective_mask(2, (down // side, across // side), ratios)
        encoder.visible_stem = False
        with torch.no_grad():
            expected = encoder(images, drawn.on((down, across)).mask)
            for encoder.visible_stem in (False, True):
                with nothing_searched():
                    actual = encoder(images, drawn)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch", "grid"), [(3, (4, 4)), (2, (3, 4)), (2, (16, 16)), (1, (8, 8))])
def test_drawn_masks_that_do_not_fit(batch, grid):
    encoder, images, mask = make("vit-gray")
    assert mask.shape == (2, 4, 4)
    with pytest.raises(ValueError, match=r"mask must have shape \(B, H/p, W/p\) = \(2, 4, 4\)"):
        encoder(images, selective_mask(batch, grid))


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_every_parameter_gets_a_gradient(family):
    encoder, images, mask = make(family)
    (encoder(images, mask) * torch.randn(encoder.num_features)).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_pooling_leaves_no_parameter_behind():
    for family in (
        "vit-attention-pooled",
        "vit-mean-pooled",
        "beit-default",
        "deit-distilled",
        "swin",
        "perception",
        "eva02",
    ):
        encoder, images, mask = make(family)
        encoder(images, mask).square().sum().backward()
        assert [name for name, p in encoder.named_parameters() if p.grad is None] == [], family


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.float64])
def test_mask_dtypes_are_equivalent(dtype):
    encoder, images, mask = make("swin")
    with torch.no_grad():
        assert torch.equal(encoder(images, mask.to(dtype)), encoder(images, mask))
        transposed = mask.mT.contiguous().mT.to(dtype)
        assert torch.equal(encoder(images, transposed), encoder(images, mask))


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_compiles_whole(family):
    encoder, images, mask = make(family)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    tokens = encoder(images, mask)
    cotangent = torch.randn_like(tokens)
    expected = torch.autograd.grad(tokens, encoder.parameters(), cotangent)
    actual = torch.autograd.grad(compiled(images, mask), encoder.parameters(), cotangent)
    torch.testing.assert_close(compiled(images, mask), tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_autocast_keeps_timm_dtype_and_mask_gradient(family):
    encoder, images, mask = make(family)
    with torch.autocast("cpu", torch.bfloat16):
        unmasked = encoder.model.forward_features(images)
        tokens = encoder(images, mask)
    assert tokens.dtype == unmasked.dtype
    tokens.float().square().sum().backward()
    assert encoder.mask_token.grad.dtype == torch.float32
    assert encoder.mask_token.grad.any()


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_copies_and_pickles(family):
    encoder, images, mask = make(family)
    with torch.no_grad():
        tokens = encoder(images, mask)
        for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert torch.equal(clone(images, mask), tokens)
            assert (clone.timm_name, clone.stride) == (encoder.timm_name, encoder.stride)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_gradient_checkpointing_changes_no_gradient(family):
    encoder, images, mask = make(family)
    weights = torch.randn(encoder.num_features)
    expected = torch.autograd.grad((encoder(images, mask) * weights).sum(), encoder.parameters())
    encoder.model.set_grad_checkpointing(True)
    actual = torch.autograd.grad((encoder(images, mask) * weights).sum(), encoder.parameters())
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_bfloat16_and_float64_models():
    encoder, images, mask = make("beit-recipe")
    for dtype in (torch.bfloat16, torch.float64):
        assert encoder.to(dtype)(images.to(dtype), mask).dtype == dtype


def test_mask_token_initialisation():
    torch.manual_seed(0)
    token = create_encoder("swin_base_patch4_window7_224", **STAGES).mask_token
    assert token.shape == (1, 1, 128)
    assert 0.016 < token.std() < 0.024  # 128 draws with standard deviation 0.02, ± 3 standard errors
    assert abs(token.mean()) < 0.006


def test_stochastic_depth_is_off_unless_asked_for():
    name, arguments, *_ = FAMILIES["swin-shifted"]
    encoder, images, mask = make("swin-shifted")
    assert encoder.training
    assert torch.equal(encoder(images, mask), encoder(images, mask))
    encoder = create_encoder(name, **arguments, drop_path_rate=0.5)
    assert not torch.equal(encoder(images, mask), encoder(images, mask))


def test_no_weight_decay_names_exist():
    for family, expected in (
        ("swin", "model.layers.0.blocks.0.attn.relative_position_bias_table"),
        ("beit-recipe", "model.rel_pos_bias.relative_position_bias_table"),
        ("dinov2-registers", "model.pos_embed"),
        ("rope-mixed", "model.rope.freqs"),
    ):
        encoder, _, _ = make(family)
        assert {"mask_token", expected} <= encoder.no_weight_decay()


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", golden.cases("vit_encoder"), ids=lambda case: case["salt"])
def test_golden_vit(case, dtype, rtol):
    sizes = {key: case[key] for key in ("depth", "embed_dim", "num_heads")}
    encoder = create_encoder("beit_base_patch16_224", **RECIPE, **sizes).to(dtype)
    load_published(encoder, golden.parameters(case["salt"], published_state_dict(encoder)))
    tokens = encoder(golden.images(case).to(dtype), golden.mask(case))
    features = tokens.transpose(1, 2).unflatten(2, (14, 14))
    golden.assert_statistics(features, case["features"], rtol, "features")

    cotangent = golden.normal(f"{case['salt']}/cotangent", features.shape).to(dtype)
    features.backward(cotangent)
    for parameter in encoder.parameters():
        parameter.data = parameter.grad  # maps the names of the gradients
    gradients = published_state_dict(encoder)
    assert gradients.keys() == case["grads"].keys()
    for name, expected in case["grads"].items():
        golden.assert_statistics(gradients[name], expected, rtol, name)


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", golden.cases("swin"), ids=lambda case: case["salt"])
def test_golden_swin_features(case, dtype, rtol):
    encoder = create_encoder("swin_base_patch4_window7_224", img_size=192, window_size=6, depths=case["depths"])
    encoder = encoder.to(dtype)
    shapes = {f"encoder.{name}": value for name, value in published_state_dict(encoder).items()}
    assert shapes.keys() == {name for name in case["grads"] if name.startswith("encoder.")}
    load_published(encoder, golden.parameters(case["salt"], shapes))
    with torch.no_grad():
        features = encoder(golden.images(case).to(dtype), golden.mask(case))
    golden.assert_statistics(features, case["features"], rtol, "features")


@pytest.mark.parametrize(
    "images, mask, error, message",
    [
        (torch.zeros(2, 3, 64), None, ValueError, r"images must have shape \(B, 3, H, W\), got \(2, 3, 64\)"),
        (torch.zeros(2, 1, 64, 64), None, ValueError, r"images must have shape \(B, 3, H, W\), got \(2, 1, 64, 64\)"),
        (
            torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
            None,
            TypeError,
            "images must be floating point, got torch.uint8",
        ),
        (torch.zeros(2, 3, 64, 80), None, ValueError, r"images must be 64x64 pixels, got 64x80.*img_size=\(64, 80\)"),
        (torch.zeros(2, 3, 64, 64), torch.zeros(2, 2, 2), ValueError, r"mask must .* = \(2, 4, 4\) .*got \(2, 2, 2\)"),
        (torch.zeros(2, 3, 64, 64), torch.zeros(1, 4, 4), ValueError, r"mask must .* = \(2, 4, 4\) .*got \(1, 4, 4\)"),
        (
            torch.zeros(2, 3, 64, 64),
            torch.zeros(2, 4, 4, device="meta"),
            ValueError,
            r"mask must be on .* cpu, got meta",
        ),
    ],
)
def test_bad_input(images, mask, error, message):
    encoder, _, _ = make("beit-recipe")
    with pytest.raises(error, match=message):
        encoder(images, mask)


def test_size_that_does_not_divide_into_patches():
    encoder, _, _ = make("vit-any-size")
    with pytest.raises(ValueError, match="images of 60x64 pixels do not divide into patches"):
        encoder(torch.zeros(2, 3, 60, 64), None)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("resnet50", {}),
        ("vgg11", {}),  # has no drop_path_rate; refused by name
        ("no_such_model", {}),
        ("vit_relpos_small_patch16_224", {}),
        ("vit_small_r26_s32_224", {}),
        ("hiera_tiny_224", {}),
        ("convnextv2_tiny", {}),
        ("vit_small_patch16_224", {"use_naflex": True}),
    ],
)
def test_other_families_are_refused(name, arguments):
    with pytest.raises(ValueError, match=r"timm_name must name one of timm's Swin .* got '" + name):
        create_encoder(name, **arguments)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit_smal_patch16_dinov3", r"timm has no model of that name; did you mean vit_small_patch16_dinov3 or"),
        ("swin_bas_patch4_window7_224.ms_in1k", r"did you mean swin_base_patch4_window7_224"),
        ("hiera_tiny_224", "the patches of its stem overlap"),
        ("convnextv2_tiny", "its convolutions would mix"),
    ],
)
def test_why_a_name_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        create_encoder(name)


def test_overlapping_stems_are_refused():
    class Stem(timm.layers.PatchEmbed):
        pass

    with pytest.raises(ValueError, match=r"must be timm's PatchEmbed, .* got Stem"):
        create_encoder("vit_small_patch16_224", embed_layer=Stem, depth=1)


@pytest.mark.parametrize("arguments", [{"num_classes": 10}, {"features_only": True}, {"patch_drop_rate": 0.1}])
def test_arguments_that_cannot_work(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be left out"):
        create_encoder("vit_small_patch16_224", **arguments)
