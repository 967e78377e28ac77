"""As many processes train as the launcher requested, or none. Tests set a launcher's variables without processes."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="training needs the extra [train]")
import torch
from pretraining import fresh_accelerate

from sgmim_fast.engine import launch
from sgmim_fast.errors import UserError

TORCHRUN = {
    **{"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"},
}
ACCELERATE = {"ACCELERATE_DYNAMO_BACKEND": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets environment variables, on a machine that has no GPUs for torch and the system unless given."""
    with fresh_accelerate():
        for name in (*launch.SIZES, *launch.RANKS, *launch.LOCAL_SIZES, *launch.GPUS_ASKED_FOR, *TORCHRUN, *ACCELERATE):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv("ACCELERATE_USE_CPU")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(launch, "DEVICES", tmp_path)
        monkeypatch.setattr(launch, "PCI", tmp_path / "pci")

        def set_up(environment, devices=(), card="", gpus=0):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            for name in devices:
                (tmp_path / name).touch()
            if card:
                (tmp_path / "pci" / "0000:01:00.0").mkdir(parents=True)
                (tmp_path / "pci" / "0000:01:00.0" / "vendor").write_text(f"{card}\n")
                (tmp_path / "pci" / "0000:01:00.0" / "class").write_text("0x030200\n")
            if gpus:
                monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
                monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
                monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

        yield set_up


# environment, properties of the machine, and a part of the error message
REFUSED = {
    "broken driver": (TORCHRUN, {"devices": ["nvidia0", "nvidia1", "nvidiactl"]}, "has nvidia0, nvidia1; mend"),
    "no driver": (TORCHRUN, {"card": "0x10de"}, "1 NVIDIA cards are in the machine"),
    "GPUs given": (TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}, "CUDA_VISIBLE_DEVICES is 0,1"),
    "GPUs of the job": (TORCHRUN | {"SLURM_JOB_GPUS": "3"}, {}, "SLURM_JOB_GPUS is 3"),
    "accelerate's GPUs": (TORCHRUN | ACCELERATE, {}, "told to use GPUs"),
    "accelerate alone": (ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, {}, "without WORLD_SIZE (torch sees CPUs only"),
    "more than GPUs": (TORCHRUN, {"gpus": 1}, "LOCAL_WORLD_SIZE is 2 of WORLD_SIZE 2"),
    "srun": ({"SLURM_STEP_NUM_TASKS": "4"}, {}, "srun started 4 tasks"),
    "no rank": ({"WORLD_SIZE": "2"}, {}, "RANK is missing"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, {}, "MASTER_ADDR is missing"),
    "no number": ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE is 'two'; expected a number"),
    # As a Kubernetes operator sets it. On GPUs, accelerate only reads LOCAL_RANK.
    "not connected": (
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"gpus": 8},
        "this process would train on its own (torch sees 8 GPUs)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_is_refused(machine, what):
    environment, has, message = REFUSED[what]
    machine(environment, **has)
    with pytest.raises(UserError) as error:
        launch.create_accelerator("float32")
    assert message in str(error.value) and "WORLD_SIZE" in str(error.value)


ALONE = {
    "nothing": {},
    "torchrun of one": {**TORCHRUN, "WORLD_SIZE": "1"},
    "unrelated tasks": {"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"},
    "batch script": {"SLURM_NTASKS": "8", "SLURM_JOB_GPUS": "0"},
}


@pytest.mark.parametrize("what", ALONE)
def test_one_process_needs_no_launcher(machine, what):
    machine({name: value for name, value in ALONE[what].items() if "LOCAL" not in name}, devices=["nvidia0"])
    assert launch.create_accelerator("float32").num_processes == 1


def test_cpus_of_a_gpu_machine_can_be_asked_for(machine, monkeypatch):
    """The test stops before the connection, which needs the other process."""
    asked = []
    monkeypatch.setattr(launch, "Accelerator", lambda cpu, **_: asked.append(cpu) or pytest.skip.Exception)
    for environment in (
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "0"},
    ):
        machine(TORCHRUN | environment, devices=["nvidia0"])
        with pytest.raises(AttributeError):
            launch.create_accelerator("float32")
    assert asked == [True, True, True]
