"""Published names in both directions, and files that timm loads strictly, with bitwise equal features."""

from __future__ import annotations

import json
import logging
import re
import sys
import types

import golden
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgmim_fast.checkpoints import export_timm, load_published, published_state_dict
from sgmim_fast.encoders import MaskedEncoder, create_encoder
from sgmim_fast.model import SGMIM

RECIPE = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": False, "init_values": 0.1}
TINY_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
TINY_SWIN = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (1, 2, 1, 1)}

# timm name, arguments of the size, further arguments
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 96, "window_size": 3}, TINY_SWIN),
    "swin-oblong": ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "window_size": 4}, TINY_SWIN),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 128, "window_size": 4}, TINY_SWIN),
    "beit": ("beit_base_patch16_224", {"img_size": 64}, TINY_VIT),
    "beit-recipe": ("beit_base_patch16_224", {"img_size": 64}, {**RECIPE, **TINY_VIT}),
    "beit-token": ("beit_base_patch16_224", {"img_size": 64, "global_pool": "token"}, {**RECIPE, **TINY_VIT}),
    "vit": ("vit_small_patch16_224", {"img_size": 64}, TINY_VIT),
    "vit-mean-pooled": ("vit_base_patch16_gap_224", {"img_size": 64}, TINY_VIT),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, TINY_VIT),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, TINY_VIT),
}


def make_encoder(family: str) -> MaskedEncoder:
    name, size, arguments = FAMILIES[family]
    torch.manual_seed(0)
    encoder = create_encoder(name, **size, **arguments)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return encoder.eval()


def make_model(family: str, **arguments: object) -> SGMIM:
    encoder = make_encoder(family)
    # Results are compared bitwise with timm's.
    return SGMIM(encoder, encoder.stride, accelerate=False, **arguments)


class ForeignEncoder(nn.Module):
    """An encoder like the published classes: names of its own, a persistent buffer, and a stem that it does not use."""

    num_features, in_chans, patch_size = 64, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].downsample = nn.Linear(4, 4)
        self.depth_patch_embed = nn.Linear(4, 4)
        self.register_buffer("relative_position_index", torch.arange(4))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timm_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Returns the tokens after the final norm, wherever timm applies it, without prefix tokens."""
    with torch.no_grad():
        tokens = model.eval().forward_features(images)
        if tokens.ndim == 4:
            return tokens.flatten(1, 2)
        return model.fc_norm(tokens)[:, model.num_prefix_tokens :]


def images_for(encoder: MaskedEncoder) -> Tensor:
    return torch.randn(2, encoder.in_chans, *encoder.model.patch_embed.img_size)


# --- published names -------------------------------------------------------------------------------------------------


def test_names_are_the_published_ones():
    case = golden.cases("swin")[0]
    encoder = create_encoder("swin_base_patch4_window7_224", img_size=192, window_size=6, depths=case["depths"])
    assert published_state_dict(SGMIM(encoder, 32)).keys() == case["grads"].keys()


def test_every_published_value_lands_in_its_place():
    model = make_model("swin")
    published = golden.parameters("places", published_state_dict(model))
    load_published(model, published)
    for own, name in (
        (model.encoder.mask_token, "encoder.mask_token"),
        (model.encoder.model.patch_embed.proj.weight, "encoder.patch_embed.proj.weight"),
        (model.encoder.model.layers[1].downsample.reduction.weight, "encoder.layers.0.downsample.reduction.weight"),
        (model.encoder.model.layers[3].downsample.norm.bias, "encoder.layers.2.downsample.norm.bias"),
        (model.encoder.model.layers[1].blocks[1].mlp.fc1.bias, "encoder.layers.1.blocks.1.mlp.fc1.bias"),
        (model.structure_encoder.patch_embed.proj.weight, "depth_encoder.depth_patch_embed.proj.weight"),
        (model.structure_encoder.merges[0].reduction.weight, "depth_encoder.patch_merging_1.reduction.weight"),
        (model.structure_encoder.merges[2].norm.weight, "depth_encoder.patch_merging_3.norm.weight"),
        (model.guidance.query_norm.weight, "fusion_blk_img.query_norm.weight"),
        (model.guidance.context_norm.bias, "fusion_blk_img.context_norm.bias"),
        (model.guidance.attn.k.weight, "fusion_blk_img.cross_attn.k.weight"),
        (model.guidance.mlp.fc2.weight, "fusion_blk_img.mlp.fc2.weight"),
        (model.image_head.bias, "img_decoder.0.bias"),
    ):
        assert torch.equal(own, published[name].float()), name
    assert torch.equal(model.image_head.weight, published["img_decoder.0.weight"][:, :, 0, 0].float())
    assert torch.equal(model.structure_head.weight, published["dep_decoder.0.weight"][:, :, 0, 0].float())


@pytest.mark.parametrize("arguments", [{}, {"guidance": False}, {"position_embedding": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, arguments):
    model = make_model(family, **arguments)
    drawn = {k: v.float() for k, v in golden.parameters("round trip", published_state_dict(model)).items()}
    load_published(model, drawn)
    assert same(published_state_dict(model), drawn)
    assert len(drawn) == len(list(model.parameters()))


def test_without_guidance_the_names_are_simmims():
    names = published_state_dict(make_model("beit-recipe", guidance=False))
    outside = {name for name in names if not name.startswith("encoder.")}
    assert outside == {"decoder.0.weight", "decoder.0.bias"}
    vit_names = golden.cases("vit_encoder")[0]["grads"].keys()
    assert {name.removeprefix("encoder.") for name in names.keys() - outside} == vit_names


@pytest.mark.parametrize(
    "wrap", [lambda s: {"model": s, "epoch": 3}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_what_the_published_code_wraps_around(wrap):
    source, model = make_model("swin"), make_model("swin")
    nn.init.normal_(source.encoder.mask_token)
    load_published(model, wrap(published_state_dict(source)))
    assert same(model.state_dict(), source.state_dict())


def test_buffers_and_the_unused_stem_are_ignored():
    source, model = make_model("swin"), make_model("swin")
    nn.init.normal_(source.encoder.mask_token)
    published = published_state_dict(source) | {
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 9, 9),
        "encoder.depth_patch_embed.proj.weight": torch.zeros(16, 1, 4, 4),
    }
    load_published(model, published)
    assert same(model.state_dict(), source.state_dict())


class CfgNode(dict):
    """Simulates the class of yacs whose objects the published code saves together with the weights."""

    def __init__(self, values: dict[str, object]) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = False


def test_files_of_the_published_code(tmp_path, monkeypatch):
    """Files are loaded by path, also safetensors, and with pickled settings whose package is not installed."""
    model, other = make_model("swin"), make_model("swin")
    published = published_state_dict(model)
    with monkeypatch.context() as patch:
        patch.setattr(CfgNode, "__module__", "yacs.config")
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", types.ModuleType("yacs.config"))
        sys.modules["yacs.config"].CfgNode = CfgNode
        settings = CfgNode({"TRAIN": CfgNode({"EPOCHS": 800})})
        torch.save({"model": published, "config": settings, "epoch": 799}, tmp_path / "model.pth")
    save_file({name: value.contiguous() for name, value in published.items()}, tmp_path / "model.safetensors")
    for file in (tmp_path / "model.pth", str(tmp_path / "model.safetensors")):
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        load_published(other, file)
        assert same(other.state_dict(), model.state_dict())


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("name", ["code.pth", "cut.pth", "empty.pth", "text.pth", "text.safetensors", "list.pth"])
def test_files_that_are_no_checkpoints(name, tmp_path, capsys):
    path, model = tmp_path / name, make_model("swin")
    torch.save({"model": published_state_dict(model), "x": Code()}, path)
    if name == "cut.pth":
        path.write_bytes(path.read_bytes()[:-1000])
    elif name == "list.pth":
        torch.save([1, 2], path)
    elif name != "code.pth":
        path.write_text("" if name == "empty.pth" else "text of a page that was not found")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_published(model, path)
    assert not capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="absent"):
        load_published(model, tmp_path / name.replace(path.stem, "absent"))


def test_foreign_encoder_keeps_its_names():
    model, source = SGMIM(ForeignEncoder(), 32), SGMIM(ForeignEncoder(), 32)
    published = published_state_dict(source)
    own = {name for name in source.state_dict() if name.startswith("encoder.")}
    assert own == {name for name in published if name.startswith("encoder.")}
    published["encoder.relative_position_index"] = torch.tensor([3, 2, 1, 0])
    load_published(model, published)
    assert torch.equal(model.encoder.layers[0].downsample.weight, source.encoder.layers[0].downsample.weight)
    assert model.encoder.relative_position_index.tolist() == [3, 2, 1, 0]  # a buffer of the file is loaded
    del published["encoder.relative_position_index"], published["encoder.depth_patch_embed.weight"]
    load_published(model, published)
    assert model.encoder.relative_position_index.tolist() == [3, 2, 1, 0]  # absent: the buffer keeps its value


@pytest.mark.parametrize("family", ["swin", "beit-recipe"])
def test_encoder_alone(family):
    source, encoder = make_model(family), make_encoder(family)
    nn.init.normal_(source.encoder.mask_token)
    published = published_state_dict(source)
    load_published(encoder, published)
    assert same(encoder.state_dict(), source.encoder.state_dict())
    alone = published_state_dict(encoder)
    assert same(alone, {k.removeprefix("encoder."): v for k, v in published.items() if k.startswith("encoder.")})
    encoder = make_encoder(family)
    load_published(encoder, alone)
    assert same(encoder.state_dict(), source.encoder.state_dict())


def test_compiled_models_have_the_same_names():
    model = make_model("swin")
    published = published_state_dict(model)
    assert same(published_state_dict(torch.compile(model)), published)
    model.encoder = torch.compile(model.encoder)
    assert same(published_state_dict(model), published)
    load_published(model, {name: torch.zeros_like(value) for name, value in published.items()})
    assert not any(value.any() for value in model.state_dict().values())


@pytest.mark.parametrize("kind", [lambda t: t.to("meta"), lambda t: t.numpy(), lambda t: t.to_sparse(), lambda t: None])
def test_values_that_cannot_be_read(kind):
    model = make_model("swin")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    published = {name: torch.ones_like(value) for name, value in published_state_dict(model).items()}
    published["dep_decoder.0.bias"] = kind(published["dep_decoder.0.bias"])
    with pytest.raises(ValueError, match=r"no dense tensors of real numbers in dep_decoder\.0\.bias"):
        load_published(model, published)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("state", [None, 5, ["a"], {1: torch.ones(1)}, {"model": None}], ids=str)
def test_what_is_no_state_dict(state):
    with pytest.raises(TypeError, match=r"state_dict is a .*; expected a dict from names to tensors, or a path"):
        load_published(make_model("swin"), state)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be an SGMIM or an encoder of create_encoder, got a dict"):
        load_published({}, {})


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    model = make_model("swin")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    published = {name: torch.ones_like(value) for name, value in published_state_dict(model).items()}
    del published["encoder.norm.bias"], published["dep_decoder.0.weight"]
    published["encoder.absolute_pos_embed"] = torch.zeros(1)
    published["img_decoder.0.weight"] = published["img_decoder.0.weight"][:, :, 0, 0]
    with pytest.raises(ValueError) as raised:
        load_published(model, published)
    message = str(raised.value)
    assert "missing: encoder.norm.bias, dep_decoder.0.weight" in message
    assert "unexpected: encoder.absolute_pos_embed" in message
    assert "img_decoder.0.weight (3072, 128) instead of (3072, 128, 1, 1)" in message
    assert same(model.state_dict(), before)


def test_simmim_checkpoint_does_not_fit_a_guided_model():
    with pytest.raises(ValueError, match=r"missing: .*depth_encoder.*unexpected: decoder\.0\.weight, decoder\.0\.bias"):
        load_published(make_model("swin"), published_state_dict(make_model("swin", guidance=False)))


@pytest.mark.parametrize("function", [published_state_dict, lambda model: load_published(model, {})])
def test_other_modules_are_refused(function):
    with pytest.raises(TypeError, match="model must be an SGMIM or an encoder of create_encoder, got a Linear"):
        function(nn.Linear(2, 2))


# --- files for timm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 0, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_timm_loads_the_file_and_computes_the_same(family, num_classes, tmp_path):
    model = make_model(family)
    path = tmp_path / "encoder.safetensors"
    name, size, arguments = FAMILIES[family]
    export_timm(model, path, num_classes=num_classes)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    plain = timm.create_model(name, checkpoint_path=str(path), **size, **arguments, **classes)
    assert plain.num_classes == (plain.pretrained_cfg["num_classes"] if num_classes is None else num_classes)
    images = images_for(model.encoder)
    with torch.no_grad():
        assert torch.equal(timm_tokens(plain, images), model.encoder(images, None))
    with torch.no_grad():
        assert plain.num_classes == 0 or not plain(images).any()  # the classifier is zero


def test_pooling_of_beit_decides_where_the_norm_is(tmp_path):
    encoder = make_encoder("beit-recipe")
    name, size, arguments = FAMILIES["beit-recipe"]
    images, path = images_for(encoder), str(tmp_path / "encoder.safetensors")
    with torch.no_grad():
        expected = encoder(images, None)
        export_timm(encoder, path, global_pool="token")
        plain = timm.create_model(name, checkpoint_path=path, global_pool="token", **size, **arguments).eval()
        assert torch.equal(plain.forward_features(images)[:, 1:], expected)
        export_timm(encoder, path)
        plain = timm.create_model(name, checkpoint_path=path, **size, **arguments).eval()
        assert not torch.equal(plain.forward_features(images)[:, 1:], expected)
        assert torch.equal(plain.fc_norm(plain.forward_features(images))[:, 1:], expected)


@pytest.mark.parametrize("family", ["swin-oblong", "swinv2", "beit-recipe", "vit"])
def test_file_says_how_to_load_it(family, tmp_path):
    encoder = make_encoder(family)
    path = str(tmp_path / "encoder.safetensors")
    export_timm(encoder, path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    plain = timm.create_model(meta["timm_name"], **json.loads(meta["timm_arguments"]), checkpoint_path=path)
    images = images_for(encoder)
    with torch.no_grad():
        assert torch.equal(timm_tokens(plain, images), encoder(images, None))


def test_arguments_of_the_training_stay_out_of_the_file(tmp_path):
    name, size, arguments = FAMILIES["vit"]
    encoder = create_encoder(name, **size, **arguments, drop_path_rate=0.2, proj_drop_rate=0.1, num_classes=0)
    path = tmp_path / "encoder.safetensors"
    export_timm(encoder, path)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["timm_arguments"]) == {**size, **arguments}


@pytest.mark.parametrize("family", ["swin", "swinv2", "beit", "beit-recipe", "vit"])
def test_timm_filters_resize_the_file(family, tmp_path):
    encoder = make_encoder(family)
    name, size, arguments = FAMILIES[family]
    path = str(tmp_path / "encoder.safetensors")
    export_timm(encoder, path)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "custom_load": False}}
    images = images_for(encoder)
    same_size = timm.create_model(name, **overlay, **size, **arguments, num_classes=3)
    with torch.no_grad():
        assert torch.equal(timm_tokens(same_size, images), encoder(images, None))
    other_size = timm.create_model(name, **overlay, **arguments)
    own, other = load_file(path), other_size.state_dict()
    resized = {key for key in own if own[key].shape != other[key].shape}
    assert resized == {k for k in own if k.endswith("relative_position_bias_table") or k == "pos_embed"}
    assert same({k: other[k] for k in own if k not in resized}, {k: own[k] for k in own if k not in resized})


def test_export_draws_no_random_numbers(tmp_path):
    encoder = make_encoder("vit")
    state = torch.get_rng_state()
    export_timm(encoder, tmp_path / "encoder.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_export_of_a_compiled_model(tmp_path):
    model = make_model("vit")
    export_timm(model, tmp_path / "a.safetensors")
    model.encoder = torch.compile(model.encoder)
    export_timm(torch.compile(model), tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_timm_says_nothing_while_loading(tmp_path, caplog):
    encoder = make_encoder("swin")
    name, size, arguments = FAMILIES["swin"]
    path = str(tmp_path / "encoder.safetensors")
    export_timm(encoder, path)
    with caplog.at_level(logging.WARNING):
        timm.create_model(name, checkpoint_path=path, **size, **arguments)
    assert caplog.records == []


def test_foreign_encoders_cannot_be_exported(tmp_path):
    with pytest.raises(TypeError, match="encoder of create_encoder to be exported to timm, got a ForeignEncoder"):
        export_timm(SGMIM(ForeignEncoder(), 32), tmp_path / "encoder.safetensors")


def test_timm_goes_by_the_ending(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*encoder\.pth"):
        export_timm(make_encoder("vit"), tmp_path / "encoder.pth")


def test_models_with_more_or_other_parameters_than_the_encoder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    pooled = create_encoder("vit_base_patch16_siglip_224", img_size=64, **TINY_VIT)
    with pytest.raises(ValueError, match=r"does not fit timm\.create_model\('vit_base.*missing: attn_pool\.latent"):
        export_timm(pooled, path)
    export_timm(pooled, path, global_pool="avg", num_classes=0)
    with pytest.raises(ValueError, match=r"of another shape: pos_embed \(1, 17, 48\) instead of \(1, 26, 48\)"):
        export_timm(make_encoder("vit"), path, img_size=80)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.1\."):
        export_timm(make_encoder("vit"), path, depth=1)
