"""`accelerate`: features and all gradients of accelerated timm encoders, compared with plain timm."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import re
from collections.abc import Callable

import pytest
import timm
import torch
from checks import AGAIN, FEW_ULP, moved
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sgmim_fast
from sgmim_fast import SGMIM, accelerate, backends
from sgmim_fast.fused import vit_blocks
from sgmim_fast.fused.accelerate import FAST
from sgmim_fast.fused.unmodified import _said
from sgmim_fast.ops import window_attention

SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
EVA = {"depth": 2, "embed_dim": 64, "num_heads": 4}
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# name -> timm name, arguments, image size
MODELS = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 24, "window_size": 3, **SWIN}, (24, 24)),
    "swin, odd map padded": (
        "swin_tiny_patch4_window7_224",
        {"img_size": (72, 60), "window_size": 4, **SWIN},
        (72, 60),
    ),
    "swin, always in windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 36, "window_size": 7, "always_partition": True, **SWIN},
        (36, 36),
    ),
    "swin, any size": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 24, "window_size": 3, "strict_img_size": False, **SWIN},
        (32, 28),
    ),
    "swin without qkv bias": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 36, "window_size": 4, "qkv_bias": False, **SWIN},
        (36, 36),
    ),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 24, "window_size": 3, **SWIN}, (24, 24)),
    "swinv2, odd map padded": ("swinv2_tiny_window8_256", {"img_size": (36, 28), "window_size": 4, **SWIN}, (36, 28)),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "init_values": 0.1, **VIT}, (64, 64)),
    "beit, shared bias": (
        "beit_base_patch16_224",
        {"img_size": (32, 64), "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, **VIT},
        (32, 64),
    ),
    "vit": ("vit_base_patch16_224", {"img_size": 64, "init_values": 0.1, **VIT}, (64, 64)),
    "vit, any size": ("vit_base_patch16_224", {"img_size": 64, "dynamic_img_size": True, **VIT}, (48, 80)),
    "vit with registers": (
        "vit_base_patch16_224",
        {"img_size": 64, "reg_tokens": 3, **VIT},
        (64, 64),
    ),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, **EVA}, (64, 64)),
    "dinov3, swiglu": ("vit_huge_plus_patch16_dinov3", {"img_size": (48, 64), **EVA}, (48, 64)),
    "eva": ("eva_giant_patch14_224", {"img_size": 56, **EVA}, (56, 56)),
    "eva02, all normed": (
        "eva02_base_patch14_224",
        {"img_size": 56, "qk_norm": True, "scale_attn_inner": True, **EVA},
        (56, 56),
    ),
    "eva02, packed": ("eva02_tiny_patch14_224", {"img_size": 56, "qkv_fused": True, **EVA}, (56, 56)),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64, **EVA}, (64, 64)),
    "rope, separate": ("vit_small_patch16_rope_224", {"img_size": 64, "qkv_fused": False, **EVA}, (64, 64)),
}
SINCE_1_0_30 = ("eva02, all normed", "rope, mixed")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """All tests run on one thread, since all tensors are small."""
    with threads(1):
        yield


def timm_model(name: str, **options) -> tuple[nn.Module, tuple[int, int]]:
    """Returns a model with random parameters and its image size. A parameter that is ignored changes the result, since
    none is 0 or 1."""
    timm_name, arguments, size = MODELS[name]
    if name in SINCE_1_0_30 and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 30):
        pytest.skip(f"timm {timm.__version__} has no {name} that runs in float64")
    torch.manual_seed(0)
    try:
        model = timm.create_model(timm_name, num_classes=0, **{"drop_path_rate": 0.0, **arguments, **options})
    except RuntimeError as error:  # older timm does not pad SwinV2's odd maps
        if "odd map" in name and "is invalid for input of size" in str(error):
            pytest.skip(f"timm {timm.__version__} cannot build {name}")
        raise
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "logit_scale" in key:
                parameter += torch.linspace(-1, 3, parameter.numel()).view_as(parameter)  # some exceed the clamp
            elif parameter.ndim == 1 or "table" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, size


def step(model: nn.Module, images: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Returns features and gradients by name."""
    model.zero_grad()
    images = images.detach().to(next(model.parameters()).dtype).requires_grad_()
    torch.manual_seed(3)  # for the drop path
    with torch.autocast(images.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        features = model.forward_features(images)
    torch.manual_seed(4)
    (features.double() * torch.randn(features.shape, dtype=torch.float64).to(images.device)).sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach(), "images": images.grad, **grads}


def fused(model: nn.Module) -> nn.Module:
    """Returns an accelerated copy, and asserts that every block was accelerated."""
    fast = accelerate(copy.deepcopy(model))
    assert sum(isinstance(m, tuple(FAST.values())) for m in fast.modules()) >= 2
    assert not any(type(m) in FAST for m in fast.modules())
    assert not any(why for m in fast.modules() if hasattr(m, "reasons") for why in m.reasons().values())
    return fast


def put(place, model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor]:
    """Moves the model to the device of the forced backend, and returns it with images."""
    if place.backend == "cuda":
        pytest.skip("timm's own forward runs where the forced backend has no window attention")
    return model.to(place.device), torch.randn(2, 3, *size).to(place.device)


def assert_same_function(plain: nn.Module, fast: nn.Module, images: torch.Tensor, autocast: bool = False) -> None:
    truth = step(copy.deepcopy(plain).double(), images)

    def again() -> dict[str, torch.Tensor]:
        """Returns timm's results for parameters and images moved by a rounding error."""
        other = copy.deepcopy(plain)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(*moved([parameter]))
        return step(other, *moved([images]), autocast)

    assert_close(step(fast, images, autocast), step(plain, images, autocast), truth, again)


def assert_close(
    actual: dict, usual: dict, truth: dict, again: Callable[[], dict[str, torch.Tensor]] | None = None
) -> None:
    """Applies the tolerance policy to the gradients of all blocks jointly, per kind of parameter: the error of plain
    timm for few numbers may be small by chance. `again` returns further results of timm."""
    assert actual.keys() == usual.keys() == truth.keys()
    kinds: dict[str, list[str]] = {}
    for key in truth:
        assert actual[key].dtype == usual[key].dtype and actual[key].shape == truth[key].shape, key
        kinds.setdefault(re.sub(r"\d+", "#", key), []).append(key)
    others: list[dict[str, torch.Tensor]] = []
    for kind, keys in kinds.items():
        norms = {key: truth[key].norm().clamp_min(1e-12) for key in keys}

        def whole(column: dict[str, torch.Tensor], keys: list[str] = keys, norms: dict = norms) -> torch.Tensor:
            return torch.cat([(column[key].double() / norms[key]).flatten() for key in keys])

        exact, dtype = whole(truth), actual[keys[0]].dtype
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        error, reference = ((whole(column) - exact).norm() for column in (actual, usual))
        if again is not None and error > 2 * reference + FEW_ULP * eps * exact.norm():
            others = others or [again() for _ in range(AGAIN)]
            reference = max(reference, *((whole(column) - exact).norm() for column in others))
        assert error <= 2 * reference + FEW_ULP * eps * exact.norm(), f"{kind}: {error:.2e}, timm {reference:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_float64(name):
    plain, size = timm_model(name)
    plain.double()
    fast, images = fused(plain), torch.randn(2, 3, *size, dtype=torch.float64)
    with backends.use("torch"):
        actual = step(fast, images)
    for key, expected in step(plain, images).items():
        assert (actual[key] - expected).norm() <= 1e-10 * (1e-3 + expected.norm()), key


@pytest.mark.parametrize("name", MODELS)
def test_float32(place, name):
    plain, images = put(place, *timm_model(name))
    assert_same_function(plain, fused(plain), images)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["swin, odd map padded", "swinv2", "beit", "vit", "dinov3", "dinov3, swiglu"])
def test_bfloat16(place, name, autocast):
    plain, images = put(place, *timm_model(name))
    if not autocast:
        plain.bfloat16().float()  # the truth uses parameters rounded to bfloat16
    images = images.bfloat16().float()
    fast = fused(plain)
    if autocast:
        assert_same_function(plain, fast, images, autocast=True)
        return
    truth = step(copy.deepcopy(plain).double(), images)
    usual, actual = (step(model.bfloat16(), images) for model in (plain, fast))
    assert_close(actual, usual, truth)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit", "dinov3", "eva02, packed"])
def test_drop_path_and_checkpointing(name):
    """The same samples are dropped, also in blocks that checkpointing computes twice."""
    plain, size = timm_model(name, drop_path_rate=0.5)
    assert any(isinstance(m, DropPath) for m in plain.modules())
    fast, images = fused(plain), torch.randn(3, 3, *size)
    expected = step(plain, images)
    for checkpointing in (False, True):
        fast.set_grad_checkpointing(checkpointing)
        actual = step(fast, images)
        for key, value in expected.items():
            assert (actual[key] - value).norm() <= 1e-4 * (1e-2 + value.norm()), key
    fast.eval(), plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit", "dinov3"])
def test_the_module_stays_what_it_was(name, tmp_path):
    plain, size = timm_model(name)
    fast, images = fused(plain), torch.randn(1, 3, *size)
    assert accelerate(fast) is fast  # accelerating twice changes nothing
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in fast.named_modules()] == [key for key, _ in plain.named_modules()]
    assert all(isinstance(f, type(p)) for f, p in zip(fast.modules(), plain.modules(), strict=True))
    expected = fast(images)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(images), expected)
    plain.load_state_dict(fast.state_dict())
    torch.testing.assert_close(plain(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["swin, odd map padded", "swinv2", "beit, shared bias", "vit", "dinov3, swiglu"])
def test_compile_in_one_graph(name):
    torch.compiler.reset()
    fast, size = timm_model(name)
    accelerate(fast)
    images = torch.randn(2, 3, *size)
    expected = step(fast, images)
    compiled = torch.compile(fast.forward_features, fullgraph=True, backend="aot_eager")
    model = copy.copy(fast)
    model.forward_features = compiled
    actual = step(model, images)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4, msg=key)


class Additions(TorchDispatchMode):
    """Counts the additions outside of ops."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.add
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["swin", "vit with registers", "dinov3", "dinov3, swiglu"])
def test_the_ops_add_the_residuals(name):
    """Residuals are added in the ops unless a drop path is active or has a hook."""
    model, _ = timm_model(name, drop_path_rate=0.5)
    block = [m for m in fused(model).modules() if type(m) in FAST.values() and hasattr(m, "attn")][1]
    assert isinstance(block.drop_path1, DropPath) and isinstance(block.drop_path2, DropPath)
    shape = (1, *block.input_resolution, 24) if name == "swin" else (1, 9, block.norm1.weight.numel())
    counts = []
    for training, listening in ((True, False), (False, False), (False, True)):
        block.train(training)
        if listening:
            block.drop_path2.register_forward_hook(lambda module, args, result: result)
        with Additions() as additions:
            block(torch.randn(shape))
        counts.append(additions.count)
    assert counts == [2, 0, 1]


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit"])
def test_channels_last_images(name):
    model, size = timm_model(name)
    fast, images = fused(model), torch.randn(2, 3, *size)
    expected, actual = (step(fast, x) for x in (images, images.contiguous(memory_format=torch.channels_last)))
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-5 * (1e-2 + value.norm()), key


class Adapter(nn.Linear):
    """A layer as parameter-efficient fine-tuning inserts it."""

    def forward(self, x):
        return 2 * super().forward(x)


def adapt(block):
    block.attn.qkv.__class__ = Adapter
    block.mlp.fc2.__class__ = Adapter


def listen(block):
    block.attn.proj.register_forward_hook(lambda module, args, result: 2 * result)
    block.mlp.act.register_forward_hook(lambda module, args, result: 2 * result)


def drop(block):
    block.attn.proj_drop.p = block.mlp.drop1.p = 0.5


def rescale(block):
    block.attn.scale = 1.0
    block.mlp.act = nn.GELU(approximate="tanh")


def activate(block):
    block.attn.attn_drop = nn.Dropout(0.3)
    block.mlp.act = nn.ReLU()


@pytest.mark.parametrize("change", [adapt, listen, drop, rescale, activate])
@pytest.mark.parametrize("name", ["swin, odd map padded", "swinv2", "beit", "vit", "dinov3"])
def test_what_is_not_timms_own_is_called(name, change):
    """Modules changed after acceleration are not bypassed either. Float64 reveals small differences."""
    plain, size = timm_model(name)
    plain, images = plain.double(), torch.randn(2, 3, *size, dtype=torch.float64)
    fast = accelerate(copy.deepcopy(plain))
    before = step(fast, images)["features"]
    for model in (plain, fast):
        for module in model.modules():
            if isinstance(module, tuple(FAST)) and hasattr(module, "attn"):
                change(module)
                if module.__class__ in FAST.values() and not (change is rescale and name == "swinv2"):
                    assert all(module.reasons().values()), module.reasons()
    expected, actual = step(plain, images), step(fast, images)
    error = (actual["features"] - expected["features"]).norm()
    assert (expected["features"] - before).norm() > 100 * error, "the change does not show"
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-9 * (1e-2 + value.norm()), key


def test_attention_masks_of_a_vit():
    plain, _ = timm_model("vit")
    fast = fused(plain)
    x, mask = torch.randn(2, 7, 48), torch.rand(7, 7) > 0.3
    mask.fill_diagonal_(True)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(fast.blocks[0](x, **options), plain.blocks[0](x, **options), rtol=1e-4, atol=1e-4)


def test_says_once_what_it_leaves(caplog):
    _said.clear()
    model, size = timm_model("vit", qk_norm=True)
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        accelerate(model)
        accelerate(model)
        accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)))
        accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert [record.message for record in caplog.records] == [
        "accelerate leaves the attention of VisionTransformer's ViTBlock unchanged: attn.q_norm is a LayerNorm; "
        "expected Identity",
        "accelerate leaves Sequential unchanged: it has no block of timm's Swin, SwinV2, BEiT, ViT or EVA, or of the "
        "published code",
    ]
    plain, _ = timm_model("vit", qk_norm=True)
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)


def test_without_the_library_nothing_changes(monkeypatch, caplog):
    _said.clear()
    monkeypatch.setattr(backends, "available", lambda: dict.fromkeys(backends.NAMES, (False, "no compiler")))
    model, _ = timm_model("swin")
    with caplog.at_level(logging.WARNING, "sgmim_fast"):
        accelerate(model)
    assert not any(isinstance(m, tuple(FAST.values())) for m in model.modules())
    assert caplog.messages == ["accelerate leaves encoders unchanged: no compiler"]


def test_a_forced_backend_without_these_ops_leaves_it_to_timm():
    plain, size = timm_model("swin")
    fast, images = fused(plain), torch.randn(1, 3, *size)
    with backends.use("cuda"):
        assert torch.equal(fast(images), plain(images))


def test_attention_without_bias_as_a_gpu_computes_it():
    """It uses PyTorch's own attention."""
    qkv = torch.randn(2, 11, 3 * 24, dtype=torch.float64)
    expected = window_attention(qkv.unsqueeze(1), 3, (1, 11)).squeeze(1)
    torch.testing.assert_close(vit_blocks._flash(qkv, 3), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_model_does_it_unless_told_not_to(wanted):
    encoder = sgmim_fast.create_encoder("vit_base_patch16_224", img_size=64, **VIT)
    model = SGMIM(encoder, 16, accelerate=wanted)
    assert isinstance(model.encoder.model.blocks[0], vit_blocks.ViTBlock) == wanted
    assert model.encoder is encoder


@pytest.mark.parametrize("name", ["swin", "swinv2", "beit", "vit", "dinov3", "eva02, packed"])
def test_export_for_timm(name, tmp_path):
    """timm's own model computes the same with the file of an accelerated encoder."""
    timm_name, arguments, size = MODELS[name]
    stride = 8 if "swin" in name else 14 if "eva" in name else 16
    model = SGMIM(sgmim_fast.create_encoder(timm_name, **arguments), stride, accelerate=True)
    sgmim_fast.checkpoints.export_timm(model, tmp_path / "encoder.safetensors", num_classes=0)
    plain = timm.create_model(timm_name, checkpoint_path=tmp_path / "encoder.safetensors", num_classes=0, **arguments)
    images = torch.randn(1, 3, *size)
    features = plain.eval().forward_features(images)
    if features.ndim == 4:
        features = features.flatten(1, 2)
    if name in ("beit", "eva02, packed"):
        features = plain.fc_norm(features)
    features = features[:, -model.encoder(images, None).shape[1] :]
    torch.testing.assert_close(model.encoder(images, None), features, rtol=1e-4, atol=1e-4)
