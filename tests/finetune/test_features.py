"""Feature maps of timm models: which maps, from which files, resized to which sizes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import timm
import torch
from downstream import ENCODERS, FAMILIES, features
from safetensors.torch import save_file
from torch import Tensor

import sgmim_fast
from sgmim_fast import weights
from sgmim_fast.checkpoints import export_timm
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.encoder import Features, create_features
from sgmim_fast.fused.accelerate import FAST


def exported(path: Path, kind: str, img_size: int | tuple[int, int], **arguments: object) -> sgmim_fast.SGMIM:
    """Exports a random encoder with random position tables, and returns it."""
    torch.manual_seed(1)
    name, own = ENCODERS[kind]
    encoder = sgmim_fast.create_encoder(name, img_size=img_size, **{**own, **arguments}).eval()
    with torch.no_grad():
        for parameter_name, parameter in encoder.named_parameters():
            if "relative_position_bias_table" in parameter_name or "pos_embed" in parameter_name:
                parameter.normal_()
    export_timm(encoder, path)
    return encoder


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("kind", "channels", "strides", "fixed"),
    [
        ("swin", [24, 48, 96, 192], [4, 8, 16, 32], False),
        ("swinv2", [24, 48, 96, 192], [4, 8, 16, 32], False),
        ("swinv2-3-stages", [24, 48, 96], [4, 8, 16], False),
        ("beit", [48] * 4, [16] * 4, True),
        ("beit-shared", [48] * 4, [16] * 4, True),
        ("vit", [48] * 4, [16] * 4, False),
        ("resnet", [64, 128, 256, 512], [4, 8, 16, 32], False),
    ],
)
def test_maps(kind: str, channels: list[int], strides: list[int], fixed: bool) -> None:
    made = features(kind, (64, 128))
    maps = made(images(64, 128))
    assert made.channels == channels and made.strides == strides
    assert [tuple(x.shape) for x in maps] == [
        (2, width, 64 // stride, 128 // stride) for width, stride in zip(channels, strides, strict=True)
    ]
    assert made.fixed_size == ((64, 128) if fixed else None)


def test_evenly_spaced_blocks() -> None:
    for depth, blocks in ((12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (5, [0, 1, 2, 4]), (2, [0, 1])):
        assert features("vit", depth=depth).indices == blocks
    assert features("vit", indices=(1, -1)).indices == [1, 4]
    with pytest.raises(UserError, match=r"indices are \[0, 7\].* 0 to 4"):
        features("vit", indices=(0, 7))


@pytest.mark.parametrize(
    ("kind", "size"),
    [*((kind, (64, 128)) for kind in FAMILIES), *((kind, (96, 160)) for kind in FAMILIES if kind != "beit-shared")],
)
def test_accelerated_maps_are_timms(kind: str, size: tuple[int, int]) -> None:
    """Also for maps that are padded to windows, and for other sizes than `img_size`."""
    window = {"window_size": 5} if kind.startswith("swin") else {}
    fast, plain = (features(kind, (64, 128), accelerate=on, **window).eval() for on in (True, False))
    assert any(type(module) in FAST.values() for module in fast.modules())
    assert not any(type(module) in FAST.values() for module in plain.modules())
    x = images(*size)
    for ours, timms in zip(fast(x), plain(x), strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_exported_file(kind: str, tmp_path: Path) -> None:
    """Name and arguments are read from the file. At the size of pre-training nothing changes."""
    encoder = exported(tmp_path / "e.safetensors", kind, 64)
    made = create_features(checkpoint=tmp_path / "e.safetensors", img_size=64, accelerate=False).eval()
    assert made.name == ENCODERS[kind][0] and made.notes == []
    x = images(64, 64)
    last = made(x)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.model.norm(last), encoder(x), rtol=1e-5, atol=1e-5)


def test_drop_path_and_checkpointing() -> None:
    made = features("swin", drop_path_rate=0.5, accelerate=False)
    assert max(module.drop_prob for module in made.modules() if hasattr(module, "drop_prob")) == 0.5
    assert not any(hasattr(module, "drop_prob") for module in features("swin").modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_checkpointing(kind: str) -> None:
    x = images(64, 64)
    gradients = []
    for enable in (False, True):
        made = features(kind)
        made.set_grad_checkpointing(enable)
        sum(one.square().mean() for one in made(x)).backward()
        gradients.append({name: parameter.grad for name, parameter in made.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def tables(made: Features) -> dict[str, Tensor]:
    return {name: value for name, value in made.state_dict().items() if name.endswith("relative_position_bias_table")}


def write_timm(path: Path, kind: str, img_size: tuple[int, int], **arguments: object) -> None:
    """Exports a model whose bias tables are the vertical distance in windows, and 7, 8, 9 for the class token."""
    name, own = ENCODERS[kind]
    encoder = sgmim_fast.create_encoder(name, img_size=img_size, **{**own, **arguments})
    for module in encoder.modules():
        if getattr(module, "relative_position_bias_table", None) is not None:
            height, width = module.window_size
            distances = torch.arange(1.0 - height, height) / height
            table = module.relative_position_bias_table.data
            rows = (2 * height - 1) * (2 * width - 1)
            table[:rows] = distances.repeat_interleave(2 * width - 1)[:, None]
            table[rows:] = torch.tensor([[7.0], [8.0], [9.0]])[: len(table) - rows]
    export_timm(encoder, path)


@pytest.mark.parametrize("kind", ["swin", "beit", "beit-shared"])
@pytest.mark.parametrize(("old", "new"), [((64, 64), (128, 128)), ((64, 64), (32, 96)), ((32, 224), (64, 192))])
def test_relative_tables_are_resized(
    kind: str, old: tuple[int, int], new: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bias that only depends on the vertical distance, and grows with it, still does. Class token entries stay."""
    path = tmp_path / "e.safetensors"
    swin = kind == "swin"
    # (2, 14) tokens of 16 pixels have a table of 3 x 27 entries, which could also be 9 x 9. So do Swin's windows.
    windows = [{"window_size": tuple(side // 16 for side in size)} if swin else {} for size in (old, new)]
    write_timm(path, kind, img_size=old, **windows[0])
    with caplog.at_level(logging.INFO, "sgmim_fast"):
        made = create_features(checkpoint=path, img_size=new, **windows[1])
    found = tables(made)
    assert found
    for name, table in found.items():
        module = made.get_submodule(name.removesuffix(".relative_position_bias_table"))
        height, width = module.window_size
        rows = (2 * height - 1) * (2 * width - 1)
        grid = table[:rows].reshape(2 * height - 1, 2 * width - 1, -1)
        torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
        torch.testing.assert_close(grid, -grid.flip(0))
        assert (grid.diff(dim=0) > -1e-6).all()
        assert (grid[-1] > 0.1).all() or "layers.3" in name  # a window may be one token high there
        if not swin:
            assert (table[rows:] == torch.tensor([[7.0], [8.0], [9.0]])).all()
    (note,) = (note for note in made.notes if "relative" in note)
    grids = [f"{size[0] // 16}x{size[1] // 16}" for size in (old, new)]
    assert f"{grids[0]} -> {grids[1]}" in note and str(path) in note
    assert note in caplog.messages


def test_absolute_positions_are_resized(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    encoder = exported(path, "vit", (32, 128))
    with torch.no_grad():  # the position is the row, of 2
        encoder.model.pos_embed[:, 1:] = torch.tensor([0.0, 1.0]).repeat_interleave(8)[None, :, None]
    export_timm(encoder, path)
    made = create_features(checkpoint=path, img_size=(64, 64))
    grid = made.model.pos_embed[0, 1:].reshape(4, 4, -1)
    assert (grid[0] < 0.1).all() and (grid[-1] > 0.9).all()
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
    assert torch.equal(made.model.pos_embed[:, 0], encoder.model.pos_embed[:, 0])
    assert made.notes == [f"{path}: absolute positions resized for a grid of tokens: 2x8 -> 4x4"]


def test_a_table_without_known_window_is_square(tmp_path: Path) -> None:
    """For a plain timm file with another image size than timm's default for the name."""
    path = tmp_path / "plain.pth"
    name, own = ENCODERS["beit"]
    own = {**own, "use_abs_pos_emb": True}
    source = timm.create_model(name, img_size=48, **own)
    torch.save({"model": source.state_dict()}, path)
    made = create_features(name, checkpoint=path, img_size=64, **own)
    assert {note.split(": ", 1)[1] for note in made.notes} == {
        "relative position bias tables resized for windows of tokens: 3x3 -> 4x4",
        "absolute positions resized for a grid of tokens: 3x3 -> 4x4",
    }


def test_swinv2_keeps_the_unit_of_its_distances(tmp_path: Path) -> None:
    """With other windows, tokens at the same distance keep their bias."""
    path = tmp_path / "e.safetensors"
    encoder = exported(path, "swinv2", 64, window_size=4)
    made = create_features(checkpoint=path, img_size=128, window_size=8)
    for old_stage, new_stage in zip(encoder.model.layers, made.model.layers, strict=True):
        old, new = old_stage.blocks[0].attn, new_stage.blocks[0].attn
        assert new.window_size[0] > old.window_size[0]
        reach = old.window_size[0] - 1
        biases = [
            attn.cpb_mlp(attn.relative_coords_table)[0][
                attn.window_size[0] - 1 - reach : attn.window_size[0] + reach,
                attn.window_size[1] - 1 - reach : attn.window_size[1] + reach,
            ]
            for attn in (old, new)
        ]
        if reach > 0:
            torch.testing.assert_close(biases[1], biases[0])
    (note,) = made.notes
    assert "continuous" in note and "4x4 -> 8x8, 2x2 -> 4x4" in note and "default" not in note


def test_swinv2_from_a_file_that_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    name, own = ENCODERS["swinv2"]
    torch.save(timm.create_model(name, **own).state_dict(), path)
    own = {key: value for key, value in own.items() if key != "window_size"}
    made = create_features(name, checkpoint=path, img_size=256, window_size=16, **own)
    assert made.model.layers[0].blocks[0].attn.pretrained_window_size == (8, 8)
    assert "timm's default for the name" in made.notes[0]


def test_patches_are_resized(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    exported(path, "vit", 64)
    made = create_features(checkpoint=path, img_size=64, patch_size=8)
    assert made.strides == [8] * 4
    assert made.notes == [
        f"{path}: resized by timm's filter: patch_embed.proj.weight",
        f"{path}: absolute positions resized for a grid of tokens: 4x4 -> 8x8",
    ]


def test_microsofts_names(tmp_path: Path) -> None:
    """Microsoft's Swin has a downsampling at the end of a stage, which timm's filter renames."""
    name, own = ENCODERS["swin"]
    source = timm.create_model(name, img_size=64, **own)
    renamed = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key): value
        for key, value in source.state_dict().items()
        if not key.startswith("head.")
    }
    renamed |= {"head.weight": source.head.fc.weight, "head.bias": source.head.fc.bias}
    torch.save({"model": renamed}, tmp_path / "swin.pth")
    made = create_features(name, checkpoint=tmp_path / "swin.pth", img_size=64, **own)
    for key, value in made.model.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key], rtol=0, atol=0)


def test_pretrained(tmp_path: Path) -> None:
    """timm's own weights are treated in the same way. Here they are read from a file, since nothing is downloaded."""
    name, own = ENCODERS["swin"]
    own = {key: value for key, value in own.items() if key != "window_size"}
    path = tmp_path / "e.safetensors"
    source = timm.create_model(name, **own)
    save_file(source.state_dict(), path)
    overlay = {"file": str(path), "custom_load": False}
    made = create_features(name, img_size=64, window_size=4, pretrained=True, pretrained_cfg_overlay=overlay, **own)
    torch.testing.assert_close(made.model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert "7x7 -> 4x4" in made.notes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": None}, "name is missing and there is no checkpoint"),
        ({"name": "swin_tinny_patch4_window7_224"}, "timm has no model .*did you mean swin_tiny_patch4"),
        ({"name": "vit_tiny_patch16_224", "window_size": 7}, "window_size"),
        ({"name": "vit_tiny_patch16_224", "depht": 2}, "depht"),
        ({"name": "vit_tiny_patch16_224", "checkpoint": "nowhere.pth"}, "there is no file nowhere.pth"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_features(**{"img_size": 64, **arguments})


def test_bad_files(tmp_path: Path) -> None:
    good = tmp_path / "swin.safetensors"
    exported(good, "swin", 64)
    with pytest.raises(UserError, match=r"holds a swin_tiny_patch4_window7_224, not a vit_tiny_patch16_224"):
        create_features("vit_tiny_patch16_224", checkpoint=good, img_size=64)
    with pytest.raises(UserError, match="expected one of them"):
        create_features(checkpoint=good, img_size=64, pretrained=True)
    for suffix in (".safetensors", ".pth"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"not a checkpoint at all")
        with pytest.raises(UserError, match=f"cannot read .*broken{suffix}") as caught:
            create_features("vit_tiny_patch16_224", checkpoint=broken, img_size=64)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    strange = tmp_path / "strange.pth"
    torch.save({"epoch": 3}, strange)
    with pytest.raises(UserError, match="no state dict"):
        create_features("vit_tiny_patch16_224", checkpoint=strange, img_size=64)


def test_parameters_that_do_not_fit(tmp_path: Path) -> None:
    name, own = ENCODERS["vit"]
    path = tmp_path / "plain.pth"
    state = timm.create_model(name, img_size=64, **own).state_dict()
    state["blocks.0.adapter.weight"] = torch.zeros(3)
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.2.attn.qkv.bias"] = torch.zeros(5)
    torch.save(state, path)
    with pytest.raises(UserError) as caught:
        create_features(name, checkpoint=path, img_size=64, **own)
    message = str(caught.value)
    assert "1 missing: blocks.1.mlp.fc1.bias;" in message
    assert "1 unexpected: blocks.0.adapter.weight;" in message
    assert "1 of another shape: blocks.2.attn.qkv.bias (5,) instead of (144,)" in message


def test_a_timm_that_knows_squares_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.safetensors"
    exported(path, "beit", (32, 64))
    monkeypatch.setattr(weights, "resize_rel_pos_bias_table", lambda table, new_window_size, new_bias_shape: table)
    with pytest.raises(
        UserError, match=r"timm .* cannot resize blocks.0.* oblong windows of 2x4; install a newer timm"
    ):
        create_features(checkpoint=path, img_size=64)
