"""Encoders of visible patches with rotary positions: every kind of timm's EVA, compared with timm's own patch dropout,
which is told which patches to keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models import is_model_in_modules
from tiny import nothing_searched
from torch import Tensor, nn

from sgmim_fast import SGMIM, Decoder, accelerate, create_encoder, selective_mask
from sgmim_fast.fused import eva_blocks

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
GRID = 2, 3
SCALE = {"rope_shift_coords": 0.3, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}  # drawn in every forward


def tiny(name: str, **options: Any) -> nn.Module:
    """Returns an encoder of visible patches with random parameters."""
    patch = 14 if "patch14" in name else 16
    arguments = {"img_size": (GRID[0] * patch, GRID[1] * patch), **TINY, **options}
    if "sapiens2" in name:
        arguments["num_kv_heads"] = (3, 1)
    torch.manual_seed(0)
    encoder = create_encoder(name, visible_only=True, **arguments)
    with torch.no_grad():  # so that no layer is the identity
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder.double().eval()


def kind(encoder: nn.Module) -> tuple[Any, ...]:
    """Returns what distinguishes models that differ in more than their sizes."""
    model = encoder.model
    settings = (
        {} if model.rope is None else {k: v for k, v in model.rope.__dict__.items() if isinstance(v, (bool, str))}
    )
    modules = tuple((name, type(m)) for name, m in model.named_modules())
    parameters = tuple(name for name, _ in model.named_parameters())
    attn = model.blocks[0].attn
    return modules, parameters, model.no_embed_class, attn.rotate_half, model.rope_mixed, *sorted(settings.items())


def kinds() -> list[nn.Module]:
    """Returns one encoder of each kind among all of timm's names."""
    names = [name for name in timm.list_models() if is_model_in_modules(name, {"eva"})]
    return list({kind(encoder): encoder for encoder in map(tiny, names)}.values())


@pytest.fixture(autouse=True)
def one_thread(threads):
    """All tests run on one thread, since all tensors are small."""
    with threads(1):
        yield


class Keep(nn.Module):
    """Replaces timm's patch dropout: keeps the patches `keep` (B, V) and the prefix tokens."""

    def __init__(self, keep: Tensor, prefix: int):
        super().__init__()
        self.keep, self.prefix = keep, prefix

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = self.keep[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, index)], 1), self.keep


def by_timm(encoder: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """Returns timm's tokens, (B, P + V, C)."""
    encoder.model.patch_drop = Keep(keep, encoder.prefix_tokens)
    tokens = encoder.model.forward_features(images)
    encoder.model.patch_drop = None
    return tokens


def results(encoder: nn.Module, images: Tensor, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the tokens, and the gradients of a weighted sum of them."""
    weight = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view_as(tokens).cos()
    leaves = {"images": images, **dict(encoder.named_parameters())}
    grads = torch.autograd.grad((weight * tokens).sum(), list(leaves.values()), allow_unused=True)
    yield "tokens", tokens
    yield from ((name, grad) for name, grad in zip(leaves, grads, strict=True) if grad is not None)


def assert_as_timm(encoder: nn.Module, ratio: float, seed: int = 0) -> None:
    size = encoder.model.patch_embed.img_size
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images.requires_grad_()
    mask = selective_mask(2, GRID, ratio, torch.Generator().manual_seed(2))
    keep = mask.visible.index.view(2, -1) % (GRID[0] * GRID[1])
    torch.manual_seed(seed)
    expected = dict(results(encoder, images, by_timm(encoder, images, keep)))
    torch.manual_seed(seed)
    encoded = encoder(images, mask)
    tokens = torch.cat([encoded.prefix, encoded.tokens.unflatten(0, (2, -1))], 1)
    actual = dict(results(encoder, images, tokens))
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        assert (actual[name] - e).norm() <= 1e-10 * e.norm().clamp_min(1e-6), f"{encoder.timm_name}: {name}"


def test_every_kind_of_timms():
    """Tokens and gradients are those of timm's forward with all patches visible, and accelerated with half of them."""
    encoders, fused = kinds(), 0
    assert len(encoders) > 10
    for encoder in encoders:
        assert_as_timm(encoder, 0.0)
        accelerate(encoder)
        fused += all(type(m) is eva_blocks.EvaBlock and not any(m.reasons().values()) for m in encoder.model.blocks)
        assert_as_timm(encoder, 0.5)
    assert fused >= len(encoders) - 3  # the others have post-norms or fewer keys than queries


@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "vit_base_patch16_rope_mixed_224"])
def test_positions_drawn_in_training_are_those_of_the_batch(name):
    """timm draws DINOv3's coordinates once per forward, and so do we, for images with any number of patches."""
    encoder = tiny(name, **(SCALE if "dinov3" in name else {})).train()
    assert_as_timm(encoder, 0.5, seed=3)
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    several = selective_mask(3, GRID, [0.5, 0.0, 0.5], torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    encoded = encoder(images, several)
    first = 0
    for i, count in enumerate(several.visible_counts()):
        keep = several.visible.index[None, first : first + count] % (GRID[0] * GRID[1])
        torch.manual_seed(5)
        alone = by_timm(encoder, images[i : i + 1], keep)
        torch.testing.assert_close(encoded.prefix[i], alone[0, : encoder.prefix_tokens], rtol=1e-10, atol=1e-10)
        own = encoded.tokens[first : first + count]
        torch.testing.assert_close(own, alone[0, encoder.prefix_tokens :], rtol=1e-10, atol=1e-10)
        first += count


def test_gradient_checkpointing_and_no_search():
    encoder = tiny("vit_base_patch16_rope_mixed_224")
    model = SGMIM(encoder.float(), decoder=Decoder(encoder, 1, 32, 4), guidance=False)
    images, mask = torch.randn(2, 3, 32, 48), selective_mask(2, GRID, 0.5)
    expected = torch.autograd.grad(model(images, mask=mask), list(encoder.parameters()))
    encoder.model.set_grad_checkpointing()
    for a, e in zip(torch.autograd.grad(model(images, mask=mask), list(encoder.parameters())), expected, strict=True):
        assert torch.equal(a, e)
    with torch.no_grad(), nothing_searched():
        encoder(images, mask)


def test_positions_are_rotary_alone():
    with pytest.raises(ValueError, match="positions is 'sincos', but Eva has no absolute positions here"):
        create_encoder("vit_base_patch16_dinov3", visible_only=True, positions="sincos", img_size=64, **TINY)
