"""Untrusted files do not run code, do not read another file or the network, and do not take much memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="reading runs needs the extra [downstream]")
import timm
import torch
from pretraining import arguments as run_arguments
from pretraining import fresh_accelerate
from safetensors.torch import load_file, save_file
from timm.models import _helpers

from sgmim_fast import checkpoints, cli, create_encoder, exported, weights
from sgmim_fast.errors import UserError
from sgmim_fast.finetune.encoder import create_features
from sgmim_fast.fourier.encoders import load as load_for_fourier
from sgmim_fast.pretrain import build

NAME, SMALL = "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}


@pytest.fixture(autouse=True)
def watched(poisoned_buffers, monkeypatch):
    """Fails on any connection. Disables poisoned buffers, since some are allocated on the meta device."""
    monkeypatch.undo()

    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mknod, (self.path,)


READERS = {
    "features": lambda path: create_features(checkpoint=path, img_size=64),
    "named": lambda path: create_features(NAME, checkpoint=path, img_size=64, depth=2, embed_dim=48, num_heads=3),
    "fourier": lambda path: load_for_fourier(str(path)),
    "weights": weights.read,
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("old_timm", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ".PTH", ""])
@pytest.mark.parametrize("protocol", ["zip", "bare"])
def test_pickled_code_is_not_run(tmp_path, monkeypatch, read, old_timm, suffix, protocol):
    if old_timm:  # timm 1.0.24 loads with weights_only=False by default
        monkeypatch.setattr(weights.load_state_dict, "__defaults__", (True, "cpu", False))
    path, sign = tmp_path / f"model{suffix}", tmp_path / "sign"
    if protocol == "zip":
        torch.save({"state_dict": {"a": Runs(sign)}}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Runs(sign)}))
    with pytest.raises(UserError) as error:
        READERS[read](path)
    assert not sign.exists() and "\n" not in str(error.value)


def test_a_file_that_is_both_formats_is_read_as_one(tmp_path, monkeypatch):
    """A safetensors file whose data is a zip with a pickle. timm chooses the format by the suffix."""
    monkeypatch.setattr(weights.load_state_dict, "__defaults__", (True, "cpu", False))
    sign, inner = tmp_path / "sign", tmp_path / "inner.pth"
    torch.save({"a": Runs(sign)}, inner)
    data = inner.read_bytes()
    header = {
        "a": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]},
        "__metadata__": {"timm_name": NAME, "timm_arguments": json.dumps(SMALL)},
    }
    text = json.dumps(header).encode()
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"both{suffix}"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert zipfile.is_zipfile(path)
        for read in READERS.values():
            with contextlib.suppress(UserError):
                read(path)
    assert not sign.exists()


def exported_file(path: Path, **metadata: str) -> Path:
    """Writes a valid file with other metadata."""
    encoder = create_encoder(NAME, **SMALL)
    checkpoints.export_timm(encoder, path)
    with exported.safe_open(path, "pt") as file:
        state, given = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(state, path, {**given, **metadata})
    return path


def steering(other: Path) -> dict[str, object]:
    """Returns arguments of timm.create_model and the functions it calls, with values that would read another file."""
    return {name: str(other) for name in exported._OF_TIMM} | {
        "pretrained": True,
        "pretrained_cfg": {"url": "https://example.com/a.pth", "file": str(other), "hf_hub_id": "example/model"},
        "pretrained_cfg_overlay": {"url": "https://example.com/a.pth", "hf_hub_id": "example/model"},
        "cache_dir": str(other.parent),
        "device": "meta",
        "dtype": "float64",
    }


@pytest.mark.parametrize("name", sorted(steering(Path("x"))))
def test_metadata_steers_nothing(tmp_path, monkeypatch, name):
    """Everything that timm accepts besides the model's own arguments is ignored, and the file loads as it is."""
    other = tmp_path / "other.safetensors"
    monkeypatch.setattr(_helpers, "load_state_dict", _only(tmp_path / "model.safetensors", _helpers.load_state_dict))
    text = json.dumps({**SMALL, "num_classes": 1000, name: steering(other)[name]})
    path = exported_file(tmp_path / "model.safetensors", timm_arguments=text)
    assert name not in exported.describe(path)[1]
    assert create_features(checkpoint=path, img_size=64).name == NAME
    load_for_fourier(str(path))


def _only(path, load):
    def checked(given, *arguments, **options):
        assert str(given) == str(path)
        return load(given, *arguments, **options)

    return checked


@pytest.mark.parametrize(
    "metadata",
    [
        {"timm_name": "hf-hub:example/model"},
        {"timm_name": "hf_hub:example/model"},
        {"timm_name": "local-dir:/tmp"},
        {"timm_name": "https://example.com/model"},
        {"timm_name": "../../etc"},
        {"timm_name": ""},
        {"timm_arguments": "{"},
        {"timm_arguments": "[" * 100000},
        {"timm_arguments": "[1]"},
        {"timm_arguments": '{"embed_dim": 39936}'},
        {"timm_arguments": '{"img_size": 65536}'},
        {"timm_arguments": '{"depth": 1, "patch_size": 0}'},
        {"timm_arguments": '{"depth": 1, "norm_layer": "nothing"}'},
        {"timm_arguments": '{"depth": 1, "block_fn": "os.system"}'},
        {"timm_arguments": '{"num_heads": 0}'},
    ],
    ids=lambda metadata: next(iter(metadata.values()))[:40],
)
@pytest.mark.parametrize("read", ["features", "fourier"])
def test_metadata_of_another_kind_is_refused(tmp_path, metadata, read):
    path = exported_file(tmp_path / "model.safetensors", **metadata)
    with pytest.raises(UserError) as error:
        READERS[read](path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_every_argument_that_shapes_a_model_is_kept(tmp_path):
    given = {**SMALL, "qkv_bias": False, "mlp_ratio": 3.0, "init_values": 1e-5, "reg_tokens": 2, "class_token": True}
    path = tmp_path / "model.safetensors"
    checkpoints.export_timm(create_encoder(NAME, **given), path)
    name, found = exported.describe(path)
    assert name == NAME and found.items() >= given.items()
    assert timm.create_model(name, **found).state_dict().keys() == load_file(path).keys()


@pytest.mark.parametrize("command", ["reconstruct", "export", "resume", "fourier"])
def test_a_runs_checkpoint_needs_no_other_weights(tmp_path, monkeypatch, command):
    """Its configuration only names the weights from which the encoder was initialised."""
    run = tmp_path / "run"
    with fresh_accelerate():
        assert cli.main(["pretrain", f"--out={run}", *run_arguments(optim__epochs=0.25, optim__warmup_epochs=0)]) == 0
        facts = build.checkpoint.choose(run) / "checkpoint.json"
        content = json.loads(facts.read_text())
        content["config"]["model"]["arguments"] |= {
            "pretrained": True,
            "checkpoint_path": str(tmp_path / "other.pth"),
            "pretrained_cfg_overlay": {"file": str(tmp_path / "other.pth")},
        }
        facts.write_text(json.dumps(content))
        words = {
            "reconstruct": ["reconstruct", run, tmp_path / "a.png"],
            "export": ["export", run, tmp_path / "a.safetensors"],
            "resume": ["pretrain", "--resume", run],
            "fourier": ["fourier", run, "--scenes=1", "--out", tmp_path / "a.png"],
        }[command]
        assert cli.main([str(word) for word in words]) == 0
