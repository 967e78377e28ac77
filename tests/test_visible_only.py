"""Encoders of visible patches with a decoder: compared with MAE's forward, and with everything that models support."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from typing import Any

import pytest
import timm
import torch
from fake_graph import FakeGraph, values_unread
from safetensors import safe_open
from test_capture import CAPTURE, data, eager
from test_model import assert_right, assert_same, evaluate
from tiny import batch, drawn, nothing_searched
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import sgmim_fast
from sgmim_fast import (
    SGMIM,
    Decoder,
    backends,
    capture,
    create_encoder,
    export_timm,
    reference,
    selective_mask,
    visible,
)
from sgmim_fast.fused import unmodified, vit_blocks
from sgmim_fast.fused.vit_blocks import ViTBlock
from sgmim_fast.positions import sincos_positions
from sgmim_fast.visible_encoder import VisibleEncoder, VisibleTokens

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
NO_RELATIVE = {"use_rel_pos_bias": False, "use_abs_pos_emb": True}
# name -> timm name, arguments of the timm model
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {"img_size": 64}),
    "vit-oblong": ("vit_base_patch16_224", {"img_size": (48, 80)}),
    "vit-patch-14": ("vit_base_patch16_224", {"img_size": 56, "patch_size": 14}),
    "vit-no-class-token": ("vit_base_patch16_224", {"img_size": 64, "class_token": False, "global_pool": "avg"}),
    "vit-class-without-position": ("vit_base_patch16_224", {"img_size": 64, "no_embed_class": True}),
    "vit-no-positions": ("vit_base_patch16_224", {"img_size": 64, "pos_embed": "none"}),
    "vit-any-size": ("vit_base_patch16_224", {"img_size": 64, "dynamic_img_size": True}),
    "vit-norm-before": ("vit_base_patch16_clip_224", {"img_size": 64}),
    "vit-layer-scale": ("vit_base_patch16_224", {"img_size": 64, "init_values": 0.1}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "gap": ("vit_base_patch16_rpn_224", {"img_size": 64}),
    "deit": ("deit_base_patch16_224", {"img_size": (32, 64)}),
    "deit-distilled": ("deit_base_distilled_patch16_224", {"img_size": 64}),
    "deit3": ("deit3_base_patch16_224", {"img_size": 64}),
    "beit": ("beit_base_patch16_224", {"img_size": 64, **NO_RELATIVE}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "dinov3-swiglu-oblong": ("vit_huge_plus_patch16_dinov3_qkvb", {"img_size": (32, 80)}),
    "dinov3-any-size": ("vit_small_patch16_dinov3", {"img_size": 64, "dynamic_img_size": True}),
    "eva": ("eva_giant_patch14_224", {"img_size": 56}),
    "eva02": ("eva02_base_patch14_224", {"img_size": 56, "qk_norm": True}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": 64}),
}
BIT_EXACT = {"rtol": 0, "atol": 0}


def make(
    name: str = "vit", *, depth: int = 2, positions: str = "sincos", **options: Any
) -> tuple[SGMIM, tuple[int, int]]:
    """Returns a tiny model and its image size. `options` go to `SGMIM`."""
    timm_name, arguments = FAMILIES[name]
    torch.manual_seed(0)
    encoder = create_encoder(timm_name, visible_only=True, **TINY, **arguments)
    with torch.no_grad():  # so that no layer is the identity
        for parameter in encoder.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    decoder = Decoder(encoder, depth, 32, 4, positions=positions)
    size = arguments["img_size"]
    return SGMIM(encoder, decoder=decoder, **options), (size, size) if isinstance(size, int) else size


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model, size = make(name)
    assert model.encoder_stride == model.patch_size and model.encoder.mask_token is None
    assert_right(model, size, drawn(model, size))


@pytest.mark.parametrize(
    "options",
    [
        {"target": "normalized_patch", "loss": "l2"},
        {"target": "normalized_patch", "loss": "l2", "guidance": False},
        {"guidance": False},
        {"structure_channels": 2, "loss": "l2"},
        {"hidden_context": "drop"},
        {"position_embedding": True},
        {"depth": 1, "positions": "learned"},
        {"accelerate": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_options(name, options):
    model, size = make(name, **options)
    model.image_head.weight.data.mul_(0.1)  # L1 of normalised patches: rounding must not change a sign
    assert_right(model, size, drawn(model, size))


@pytest.mark.parametrize(
    "ratio",
    [[0.6, 0.3, 0.6], [0.5, 1.0, 0.2], [0.0, 0.5, 0.9], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit", "vit-no-class-token", "registers"])
def test_images_with_different_numbers_of_visible_patches(name, ratio):
    model, size = make(name)
    assert_right(model, size, drawn(model, size, 3, ratio=ratio), count=3)


@pytest.mark.parametrize("shown", ["visible", "all", 0.5])
def test_where_structure_is_shown(shown):
    model, size = make()
    assert_right(model, size, drawn(model, size, shown=shown))


def test_structure_that_is_not_known_everywhere():
    model, size = make(structure_channels=2)
    valid = torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(0)) < 0.7
    assert_right(model, size, drawn(model, size), valid)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_mask_tensors(dtype):
    """A mask tensor gives the results of the drawn mask, also with different numbers of patches."""
    model, size = make()
    inputs = [t.float() for t in batch(model, size, 3)]
    for ratio in (0.6, [0.2, 0.9, 0.2]):
        mask = drawn(model, size, 3, ratio=ratio)
        assert_same(evaluate(model, *inputs, mask.mask.to(dtype)), evaluate(model, *inputs, mask), 1e-6)
    with pytest.raises(ValueError, match="mask has values other than 0 and 1"):
        model(*inputs, mask.mask.float() * 2)


def test_units_of_several_patches():
    model, size = make()
    mask = selective_mask(2, 2, 0.5, torch.Generator().manual_seed(1))
    assert mask.on((4, 4)).counts == (8, 8) and mask.on((4, 4)).visible_counts() == [8, 8]
    assert_right(model, size, mask)


def published_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Computes MAE's `get_2d_sincos_pos_embed` from its formula, one number at a time."""
    table = torch.zeros(grid[0] * grid[1], width, dtype=torch.float64)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for half, place in enumerate((column, row)):
                for i in range(width // 4):
                    angle = place / 10000 ** (i / (width / 4))
                    at = half * width // 2 + i
                    table[row * grid[1] + column, at] = math.sin(angle)
                    table[row * grid[1] + column, at + width // 4] = math.cos(angle)
    return table


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 1)])
def test_sine_cosine_positions_are_those_of_mae(grid):
    table = sincos_positions(grid, 16, prefix=2)
    torch.testing.assert_close(table[2:], published_positions(16, grid), rtol=1e-14, atol=1e-14)
    assert not table[:2].any()
    encoder = create_encoder("vit_base_patch16_224", visible_only=True, positions="sincos", img_size=64, **TINY)
    assert not encoder.model.pos_embed.requires_grad
    torch.testing.assert_close(
        encoder.model.pos_embed[0, 1:].double(), published_positions(48, (4, 4)), atol=1e-6, rtol=0
    )
    decoder = Decoder(encoder, width=16, heads=2)
    assert "pos_embed" not in decoder.state_dict() and not decoder.pos_embed[0, 0].any()
    torch.testing.assert_close(decoder.pos_embed[0, 1:].double(), published_positions(16, (4, 4)), atol=1e-6, rtol=0)


class PublishedMAE(nn.Module):
    """MAE as in its paper and appendix, without any code of this package."""

    def __init__(self, model: SGMIM):
        super().__init__()
        self.vit, decoder = model.encoder.model, model.decoder
        self.patch = model.patch_size
        self.decoder_embed, self.mask_token = decoder.embed, decoder.mask_token
        self.decoder_pos_embed, self.decoder_blocks = decoder.pos_embed, decoder.blocks
        self.decoder_norm, self.decoder_pred = decoder.norm, model.image_head

    def patchify(self, images: Tensor) -> Tensor:
        p = self.patch
        x = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)  # channels first, as in our head

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        vit, mask = self.vit, mask.flatten(1).to(images.dtype)
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        kept = int((mask[0] == 0).sum())
        ids_shuffle = mask.argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1)
        x = x.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, x.shape[2]))
        cls_token = vit.cls_token + vit.pos_embed[:, :1]
        x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        latent = vit.norm(vit.blocks(x))

        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.repeat(x.shape[0], ids_restore.shape[1] + 1 - x.shape[1], 1)
        x_ = torch.cat([x[:, 1:, :], mask_tokens], dim=1)
        x_ = x_.gather(1, ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1, :], x_], dim=1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:, :]

        target = self.patchify(images)
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


def test_without_guidance_it_is_mae():
    """Eight blocks of width 512 with 16 heads, as published. All gradients agree to 1e-10 in float64."""
    torch.manual_seed(0)
    encoder = create_encoder("vit_base_patch16_224", visible_only=True, img_size=64, positions="sincos", **TINY)
    model = SGMIM(encoder, decoder=Decoder(encoder), guidance=False, target="normalized_patch", loss="l2").double()
    assert len(model.decoder.blocks) == 8 and model.decoder.num_features == 512
    assert model.decoder.blocks[0].attn.num_heads == 16
    images, _ = batch(model, (64, 64), 3)
    mask = drawn(model, (64, 64), 3, ratio=0.75)
    published, trained = PublishedMAE(model), [p for p in model.parameters() if p.requires_grad]
    loss, expected = model(images, mask=mask), published(images, mask.mask)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, p, a, e in zip(
        [n for n, p in model.named_parameters() if p.requires_grad],
        trained,
        torch.autograd.grad(loss, trained),
        torch.autograd.grad(expected, trained),
        strict=True,
    ):
        assert a.shape == p.shape and (a - e).norm() <= 1e-10 * e.norm(), name


@pytest.mark.parametrize("target", ["pixels", "normalized_patch"])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("dense", [False, True])
def test_targets_and_losses_of_an_encoder_with_mask_tokens(target, loss, dense):
    """Applies also to the symmetric model, through the op and, with a hook on the head, on all tokens."""
    torch.manual_seed(0)
    encoder = create_encoder("vit_base_patch16_224", img_size=64, **TINY)
    model = SGMIM(encoder, target=target, loss=loss)
    model.image_head.weight.data.mul_(0.1)
    if dense:
        model.image_head.register_forward_hook(lambda *_: None)
    assert_right(model, (64, 64), drawn(model, (64, 64)))


class NoConvolution(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func._opname != "convolution"
        return func(*args, **(kwargs or {}))


def test_the_stem_reads_nothing_of_masked_patches():
    model, size = make()
    images, mask = batch(model, size)[0].float(), drawn(model, size)
    hidden = sgmim_fast.masking.resize(mask.mask, *size)[:, None]
    with NoConvolution():  # timm's own stem would convolve all patches
        encoded = model.encoder(images, mask)
    again = model.encoder(images.where(~hidden, torch.nan), mask)
    torch.testing.assert_close(again, encoded, **BIT_EXACT)
    torch.testing.assert_close(encoded, model.encoder(images, mask), **BIT_EXACT)
    assert encoded.tokens.isfinite().all() and encoded.tokens.shape == (len(mask.visible.index), 48)
    assert encoded.prefix.shape == (2, 1, 48)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask_it_is_timm(name):
    model, size = make(name)
    images = batch(model, size)[0].float()
    encoder = model.encoder.eval()
    expected = encoder.model.forward_features(images)[:, encoder.prefix_tokens :]
    torch.testing.assert_close(encoder(images), expected, **BIT_EXACT)


@pytest.mark.parametrize("name", ["vit", "gap", "deit-distilled", "beit", "dinov3"])
def test_exports_as_ever(name, tmp_path):
    """The file is that of the same encoder with mask tokens, and loads into its timm model."""
    model, _ = make(name)
    timm_name, arguments = FAMILIES[name]
    symmetric = create_encoder(timm_name, **TINY, **arguments)
    symmetric.model.load_state_dict(model.encoder.model.state_dict())
    for file, what in (("visible.safetensors", model), ("symmetric.safetensors", symmetric)):
        export_timm(what, tmp_path / file)
    files = [safe_open(tmp_path / f"{name}.safetensors", "pt") for name in ("visible", "symmetric")]
    assert files[0].metadata() == files[1].metadata()
    assert sorted(files[0].keys()) == sorted(files[1].keys())
    for key in files[0].keys():  # noqa: SIM118
        torch.testing.assert_close(*(file.get_tensor(key) for file in files), **BIT_EXACT)
    loaded = timm.create_model(timm_name, **TINY, **arguments, checkpoint_path=str(tmp_path / "visible.safetensors"))
    assert loaded.num_features == 48


@pytest.mark.parametrize("name", ["vit", "deit-distilled"])
def test_positions_are_dropped_out_with_the_tokens(name):
    """pos_drop drops elements of tokens, not of the position table that all images share."""
    model, size = make(name, guidance=False)
    model.encoder.model.pos_drop.p = 0.5
    images, mask = batch(model, size)[0].float(), drawn(model, size)
    model.encoder.eval()
    expected = model.encoder(images, mask)
    model.encoder.train()
    dropped = []
    model.encoder.model.pos_drop.register_forward_hook(lambda _, inputs, output: dropped.append((inputs[0], output)))
    assert not torch.equal(model.encoder(images, mask).tokens, expected.tokens)
    ((before, after),) = [pair for pair in dropped if pair[0].shape[0] == 2]
    kept = after != 0
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert not torch.equal(kept[0], kept[1]) and model.encoder.model.pos_drop.training


def test_drop_path_draws_for_each_image():
    torch.manual_seed(0)
    encoder = create_encoder("vit_base_patch16_224", visible_only=True, img_size=64, drop_path_rate=0.5, **TINY)
    model = SGMIM(encoder, decoder=Decoder(encoder, 1, 32, 4), guidance=False)
    images, mask = batch(model, (64, 64), 4)[0].float(), drawn(model, (64, 64), 4)
    found = set()
    for _ in range(8):
        loss = model(images, mask=mask)
        loss.backward()
        found.add(loss.item())
    assert len(found) > 1
    model.eval()
    assert model(images, mask=mask) == model(images, mask=mask)


def test_gradient_checkpointing_changes_no_bit():
    model, size = make()
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    expected = evaluate(model, *inputs, mask)
    model.encoder.model.set_grad_checkpointing()
    model.decoder.set_grad_checkpointing()
    assert_same(evaluate(model, *inputs, mask), expected, 0)
    model.decoder.embed.register_forward_hook(lambda *_: None)  # the decoder then embeds all cells
    assert_same(evaluate(model, *inputs, mask), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, size = make(target="normalized_patch", loss="l2")
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    expected = evaluate(model, *inputs, mask)
    with torch.autocast("cpu", dtype):
        actual = evaluate(model, *inputs, mask)
    assert all(value.dtype == torch.float32 for value in actual.values())
    assert_same(actual, expected, 0.15)


def test_nothing_is_searched_in_a_drawn_mask():
    model, size = make()
    images, structure = (t.float() for t in batch(model, size))
    mask = drawn(model, size)
    with backends.use("torch"), values_unread(), nothing_searched():
        model(images, structure, mask)


def test_copies_and_pickles():
    model, size = make()
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    expected = evaluate(model, *inputs, mask)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(evaluate(other, *inputs, mask), expected, 0)
    again, _ = make()
    again.load_state_dict(model.state_dict())


def test_accelerated_and_plain_agree():
    model, size = make()
    plain, _ = make(accelerate=False)
    plain.load_state_dict(model.state_dict())
    assert all(type(block) is ViTBlock for block in (*model.encoder.model.blocks, *model.decoder.blocks))
    assert not any(type(block) is ViTBlock for block in (*plain.encoder.model.blocks, *plain.decoder.blocks))
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    assert_same(evaluate(model, *inputs, mask), evaluate(plain, *inputs, mask), 1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["vit", "vit-no-class-token", "registers"])
def test_a_masked_cells_queries_and_keys_are_computed_once_for_all_images(monkeypatch, name, depth):
    """Before the decoder's first block, the token of a masked cell is the same in every image."""
    model, size = make(name, depth=depth)
    model.double()
    inputs, mask = batch(model, size, 4), drawn(model, size, 4)
    rows, own = [], vit_blocks.norm_linear

    def norm_linear(x: Tensor, *args: Any) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return own(x, *args)

    monkeypatch.setattr(vit_blocks, "norm_linear", norm_linear)
    found = evaluate(model, *inputs, mask)
    prefix, cells = model.encoder.prefix_tokens, mask.mask[0].numel()
    assert rows == [len(mask.visible.index) + 4 * prefix + prefix + cells]
    assert_same(found, evaluate(model, *inputs, mask, dense=True), 1e-10)


def each_decoder_module() -> list[str]:
    """Returns the names of all modules of the decoder except those that timm itself does not call."""
    names = [name for name, _ in make()[0].named_modules() if name.startswith(("decoder", "image_head"))]
    return [name for name in names if not name.endswith("attn_drop")]


@pytest.mark.parametrize("place", each_decoder_module())
def test_hooks_in_the_decoder_are_called(place):
    """Hooks on every module are called, and the loss does not change."""
    model, size = make()
    inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
    expected = evaluate(model, *inputs, mask)
    calls = []
    model.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
    assert_same(evaluate(model, *inputs, mask), expected, 1e-5)
    assert calls


@pytest.mark.parametrize("place", [name for name in each_decoder_module() if name != "decoder"])
def test_a_changed_output_in_the_decoder_is_obeyed(place):
    model, size = make()
    inputs, mask = [t.double() for t in batch(model, size)], drawn(model, size)
    model.double()
    model.get_submodule(place).register_forward_hook(lambda *args: args[2] * 0.5)
    assert_same(evaluate(model, *inputs, mask), evaluate(model, *inputs, mask, dense=True), 1e-10)


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize(
    "place", [name for name in each_decoder_module() if name.startswith(("decoder.b", "decoder.n"))]
)
def test_tokens_are_mixed_in_the_decoder(place, accelerate):
    """A hook gets all tokens of an image, whatever the decoder could leave out."""
    model, size = make(accelerate=accelerate)
    inputs, mask = [t.double() for t in batch(model, size)], drawn(model, size)
    model.double()

    def mix(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        return result - 0.5 * result.mean(-2, keepdim=True)  # all of it would make gradients 0

    model.get_submodule(place).register_forward_hook(mix)
    assert_same(evaluate(model, *inputs, mask), evaluate(model, *inputs, mask, dense=True), 1e-10)


class OfTheBatch(nn.Module):
    """An MLP whose result for a token depends on all images, and which has a state."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("block", [0, 1])
def test_a_module_of_the_batch_in_the_decoder(block, monkeypatch):
    """The decoder is then called once, for the whole batch."""
    monkeypatch.setattr(visible, "MIN_TOKENS", {"cpu": 1})
    monkeypatch.setattr(visible, "UNSPLIT_SHARE", 0)
    found = []
    for accelerate in (False, True):
        model, size = make(accelerate=accelerate)
        inputs, mask = [t.float() for t in batch(model, size)], drawn(model, size)
        model.decoder.blocks[block].mlp = OfTheBatch(model.decoder.num_features)
        found.append(model(*inputs, mask).item())
        assert model.decoder.blocks[block].mlp.norm.num_batches_tracked == 1
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"target": "normalized_patch", "loss": "l2"}, {"guidance": False}], ids=str)
def test_predict(options):
    """The losses are those of the predictions. The predicted structure is meaningful where the image is visible."""
    model, size = make(**options)
    images, structure = (t.float() for t in batch(model, size))
    mask = drawn(model, size)
    image, guess = model.predict(images, structure, mask)
    losses = model(images, structure, mask, return_losses=True)
    hidden = reference.pixel_mask(mask.mask, images)
    if "target" in options:
        back = reference.normalized_patches(images, 16)
        patches = torch.nn.functional.pixel_unshuffle(images, 16)
        mean, deviation = patches.mean(1, keepdim=True), (patches.var(1, keepdim=True) + 1e-6).sqrt()
        normal = torch.nn.functional.pixel_unshuffle(image, 16)
        found = torch.nn.functional.pixel_shuffle((normal - mean) / deviation, 16)
        distance = (hidden * (found - back) ** 2).sum() / hidden.sum() / 3
        torch.testing.assert_close(distance, losses.image, rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(reference.masked_l1(image, images, hidden), losses.image)
    if guess is None:
        assert "guidance" in options
    else:
        torch.testing.assert_close(reference.masked_l1(guess, structure, 1 - hidden), losses.structure)


def test_other_sizes_than_the_encoders():
    model, _ = make("vit-any-size")
    inputs = [torch.randn(2, c, 48, 96) for c in (3, 1)]
    mask = selective_mask(2, (3, 6), generator=torch.Generator().manual_seed(0))
    losses = model(*inputs, mask, return_losses=True)
    model.decoder.pos_embed, model.decoder.grid = sincos_positions((3, 6), 32, 1)[None].float(), (3, 6)
    torch.testing.assert_close(losses, reference.sgmim_losses(model, *inputs, mask))
    learned, _ = make("vit-any-size", positions="learned")
    with pytest.raises(ValueError, match="images have 3x6 cells, and the decoder learned positions of 4x4; expected"):
        learned(*inputs, mask)


def test_capture(monkeypatch):
    """Replays are bitwise equal to the eager step, with masks drawn from a seed inside the graph."""
    monkeypatch.setattr(CAPTURE, "Graph", FakeGraph)
    model, size = make(target="normalized_patch", loss="l2")
    plain = copy.deepcopy(model)
    with backends.use("torch"), values_unread():
        step = capture(model)
        for i in range(5):
            inputs = data(model, size, i)
            model.zero_grad()
            plain.zero_grad()
            torch.testing.assert_close(step(*inputs), eager(plain, *inputs), **BIT_EXACT)
            for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, **BIT_EXACT, msg=name)
        assert step.captures == 1 and step.reasons == []


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    model, size = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        inputs = [t.float() for t in batch(model, size, seed=seed)]
        mask = drawn(model, size, seed=seed)
        actual, expected = compiled(*inputs, mask), model(*inputs, mask)
        torch.testing.assert_close(actual, expected)
        parameters = list(model.parameters())
        for a, e in zip(*(torch.autograd.grad(loss, parameters) for loss in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_no_weight_decay():
    model, _ = make(positions="learned")
    names = model.no_weight_decay()
    assert {"decoder.mask_token", "decoder.pos_embed", "encoder.model.cls_token", "encoder.model.pos_embed"} <= names
    assert "encoder.mask_token" not in names and "encoder.mask_token" not in model.state_dict()


def test_jit_trace_is_refused():
    model, size = make(guidance=False)
    images, mask = batch(model, size)[0].float(), drawn(model, size)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would record .* as constants; expected"):
        torch.jit.trace(lambda x: model(x, mask=mask), images)


def test_forward_mode_goes_through_plain_modules():
    model, size = make(guidance=False)
    model.double()
    images, mask = batch(model, size)[0], drawn(model, size)
    tangent = torch.randn_like(images)
    with sdpa_kernel(SDPBackend.MATH):  # the only attention of PyTorch that supports it
        _, slope = torch.func.jvp(lambda x: model(x, mask=mask), (images,), (tangent,))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(model(images, mask=mask), images)
    torch.testing.assert_close(slope, (gradient * tangent).sum(), rtol=1e-8, atol=1e-10)


def test_says_what_is_not_fused(caplog):
    model, size = make()
    model.decoder.embed.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        unmodified._said.clear()
        model(*(t.float() for t in batch(model, size)), drawn(model, size))
    assert "decoder.embed has hooks" in caplog.text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {},
            "visible_only is True for 'swin_tiny_patch4_window7_224', which has windows",
        ),
        ("swinv2_tiny_window8_256", {}, "which has windows and stages of whole images; expected a plain ViT"),
        ("beit_base_patch16_224", {}, r"which has relative positions \(use_rel_pos_bias=False, use_abs_pos_emb=True"),
        (
            "beit_base_patch16_224",
            {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False},
            "which has relative positions",
        ),
    ],
)
def test_families_that_cannot(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(name, visible_only=True, **arguments)


def test_bad_arguments():
    encoder, symmetric = (
        create_encoder("vit_base_patch16_224", visible_only=flag, img_size=64, **TINY) for flag in (True, False)
    )
    assert isinstance(encoder, VisibleEncoder) and not isinstance(symmetric, VisibleEncoder)
    decoder = Decoder(encoder, 1, 32, 4)
    with pytest.raises(
        ValueError, match=r"decoder is missing: the encoder sees .*decoder=sgmim_fast\.Decoder\(encoder\)"
    ):
        SGMIM(encoder)
    with pytest.raises(ValueError, match=r"decoder is given with a _MaskedViT that sees masked cells; expected"):
        SGMIM(symmetric, decoder=decoder)
    with pytest.raises(TypeError, match=r"decoder is a Linear; expected sgmim_fast\.Decoder\(encoder\)"):
        SGMIM(encoder, decoder=nn.Linear(3, 3))
    wide = create_encoder("vit_base_patch16_224", visible_only=True, img_size=64, depth=1, embed_dim=60, num_heads=3)
    with pytest.raises(
        ValueError, match=r"decoder reads tokens of width 48 with 1 prefix tokens; expected .*, 60 and 1"
    ):
        SGMIM(wide, decoder=decoder)
    with pytest.raises(
        TypeError, match=r"encoder is a _MaskedViT; expected one of create_encoder\(timm_name, visible_only"
    ):
        Decoder(symmetric)
    with pytest.raises(ValueError, match="depth is 0; expected at least 1 block"):
        Decoder(encoder, 0)
    with pytest.raises(ValueError, match="heads is 5 for a width of 32; expected a divisor of the width"):
        Decoder(encoder, 1, 32, 5)
    with pytest.raises(ValueError, match="positions is 'rotary'; expected 'sincos' or 'learned'"):
        Decoder(encoder, positions="rotary")
    with pytest.raises(ValueError, match="width is 6; expected a multiple of 4, for sine-cosine positions"):
        Decoder(encoder, width=6, heads=2)
    with pytest.raises(ValueError, match="positions must be 'timm' or 'sincos', got 'learned'"):
        create_encoder("vit_base_patch16_224", positions="learned", img_size=64, **TINY)
    with pytest.raises(ValueError, match="positions is 'sincos', but SwinTransformer has no absolute positions here"):
        create_encoder("swin_tiny_patch4_window7_224", positions="sincos")
    with pytest.raises(ValueError, match="target is 'patches'; expected 'pixels' or 'normalized_patch'"):
        SGMIM(symmetric, target="patches")
    with pytest.raises(ValueError, match="loss is 'huber'; expected 'l1' or 'l2'"):
        SGMIM(encoder, decoder=decoder, loss="huber")
    model = SGMIM(encoder, decoder=decoder)
    with pytest.raises(TypeError, match="mask is missing"):
        model(torch.randn(1, 3, 64, 64), torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"mask must have shape \(B, H/p, W/p\) = \(1, 4, 4\)"):
        encoder(torch.randn(1, 3, 64, 64), torch.zeros(1, 3, 4))
    encoder.register_forward_hook(lambda *args: args[2].tokens)
    with pytest.raises(
        ValueError, match=r"encoder returned no VisibleTokens with tokens \(visible cells, C\) = \(6, 48\)"
    ):
        model(torch.randn(1, 3, 64, 64), torch.randn(1, 1, 64, 64), drawn(model, (64, 64), 1))


def test_encoded_tokens_are_a_tuple_of_two():
    model, size = make("registers")
    encoded = model.encoder(batch(model, size)[0].float(), drawn(model, size))
    assert isinstance(encoded, VisibleTokens) and encoded.prefix.shape == (2, 5, 48)
