"""Starts and stops a run on its machine: distributed processes, the lock of the run's folder, and signals."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env

from sgmim_fast.errors import UserError

PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
# World size and rank as set by torchrun, by MPI launchers, and by srun (which sets no rendezvous address)
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
GPUS_ASKED_FOR = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
NO_GPU = ("", "-1", "NoDevFiles")  # values of these variables that mean no GPU
DEVICES, PCI = Path("/dev"), Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI vendor ID, and class of display and 3D controllers
# Exit code EX_TEMPFAIL of sysexits.h: the run is not finished and can be started again
UNFINISHED = 75
# Signals that terminals and clusters send, including those that SLURM sends before a time limit (--signal)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOCK = "run.lock"
TOUCH, STALE = 20.0, 180.0  # seconds; network file systems show a touch up to a minute later
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
TORCHRUN = "torchrun --nproc-per-node=N -m sgmim_fast.cli"


def rank() -> int:
    """Returns the rank of this process; 0 in a run of a single process."""
    return _first(RANKS, 0)[1]


def size() -> int:
    """Returns the world size, the number of processes that the launcher was asked for."""
    return _first(SIZES, 1)[1]


def create_accelerator(precision: str, fsdp: bool = False) -> Accelerator:
    """Creates the Accelerator and connects the processes, by NCCL on GPUs and by gloo on CPUs.

    Args:
        precision: "float32", "bfloat16" or "float16".
        fsdp: whether the run uses FSDP, which requires several processes.

    Raises:
        UserError: the processes would not run as the launcher was asked, or the precision is not supported.
    """
    if precision == "float16":
        if fsdp:
            raise UserError("run.precision is float16 with run.fsdp; expected bfloat16, which needs no loss scaling")
        if not torch.cuda.is_available():
            raise UserError("run.precision is float16, which needs a GPU; expected float32 or bfloat16")
    name, asked = _first(SIZES, 1)
    forced = parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpus = forced or not torch.accelerator.is_available()
    if asked > 1:
        _check(name, asked, on_cpus, forced)
    elif name is None and "MASTER_ADDR" in os.environ and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        # accelerate launch sets these variables. Without WORLD_SIZE it has started only this process, whatever number
        # of processes it was asked for.
        raise UserError(
            "accelerate launch was told to start several processes and started one, without WORLD_SIZE "
            f"({_devices()}); it does so on CPUs and where it sees no GPUs: start them by {TORCHRUN}"
        )
    accelerator = Accelerator(
        cpu=asked > 1 and on_cpus,
        mixed_precision=PRECISION[precision],
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != asked:
        raise UserError(
            f"{name} is {asked}, but this process would train on its own ({_devices()}): the launcher that set it does "
            f"not connect its processes; start one launcher on each machine, {TORCHRUN}, or set WORLD_SIZE=1 for runs "
            "that have nothing to do with each other"
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate was launched with {accelerator.distributed_type.value}; expected a plain launch, with "
            "--set run.fsdp=true for shards"
        )
    if fsdp and accelerator.num_processes == 1:
        raise UserError("run.fsdp is true with one process; expected several, started by torchrun or accelerate launch")
    return accelerator


def _check(name: str, asked: int, on_cpus: bool, forced: bool) -> None:
    """Raises UserError unless the processes can connect and each has a device of its own."""
    if name == "SLURM_STEP_NUM_TASKS":
        raise UserError(
            f"srun started {asked} tasks ({name}) that do not know of each other: WORLD_SIZE is missing "
            f"({_devices()}); start one task on each machine, and in it {TORCHRUN}, or set WORLD_SIZE=1 for runs that "
            "have nothing to do with each other"
        )
    if _first(RANKS, -1)[1] < 0:
        raise UserError(f"{name} is {asked} and RANK is missing ({_devices()}); start the processes by {TORCHRUN}")
    if "MASTER_ADDR" not in os.environ:
        if _first(LOCAL_SIZES, 0)[1] != asked:
            raise UserError(f"{name} is {asked} and MASTER_ADDR is missing; start the processes by {TORCHRUN}")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if forced:
        return
    if on_cpus:
        signs = _signs_of_gpus()
        if signs:
            raise UserError(
                f"{name} is {asked} and torch can use no GPU ({_devices()}), though {signs}; mend the driver or the "
                "installation (nvidia-smi and python -m sgmim_fast.env say more), or train on CPUs with "
                "ACCELERATE_USE_CPU=true"
            )
    elif torch.cuda.is_available() and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's processes see the same GPUs
        local = _first(LOCAL_SIZES, 1)
        if local[1] > torch.cuda.device_count():
            raise UserError(
                f"{local[0]} is {local[1]} of WORLD_SIZE {asked}, and there are fewer GPUs ({_devices()}); expected "
                f"--nproc-per-node={torch.cuda.device_count()} at most, or ACCELERATE_USE_CPU=true for CPUs"
            )


def _first(names: tuple[str, ...], otherwise: int) -> tuple[str | None, int]:
    """Returns name and value of the first of these environment variables that is set, else (None, otherwise)."""
    for name in names:
        if text := os.environ.get(name, ""):
            try:
                return name, int(text)
            except ValueError:
                raise UserError(f"{name} is {text!r}; expected a number, as torchrun sets it") from None
    return None, otherwise


def _devices() -> str:
    """Describes the devices that torch sees, for messages."""
    if torch.cuda.is_available():
        return f"torch sees {torch.cuda.device_count()} GPUs"
    built = "" if torch.version.cuda or torch.version.hip else ", and is built without CUDA"
    return f"torch sees CPUs only{built}"


def _signs_of_gpus() -> str:
    """Describes evidence of GPUs on this machine although torch finds none; "" without evidence."""
    switched_off = os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPU
    signs = [f"{name} is {os.environ[name]}" for name in GPUS_ASKED_FOR if os.environ.get(name, "") not in NO_GPU]
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ and "ACCELERATE_USE_CPU" not in os.environ:
        signs.append("accelerate launch was told to use GPUs")  # for CPUs it always sets ACCELERATE_USE_CPU
    if not switched_off:
        files = sorted(path.name for path in DEVICES.glob("nvidia[0-9]*"))
        cards = [path for path in PCI.glob("*") if _is_gpu(path)]
        signs += [f"{DEVICES} has {', '.join(files)}"] if files else []
        signs += [f"{len(cards)} NVIDIA cards are in the machine"] if cards else []
    return ", and ".join(signs)


def _is_gpu(device: Path) -> bool:
    try:
        return (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
    except OSError:
        return False


class RunLock:
    """Context manager that locks a run's folder, so that only one training at a time writes to it.

    Entering creates the folder, and leaving removes it if it is still empty. The file `run.lock` describes the holder:
    host, process, and when the process and the run started. The lock is the file system's own (`fcntl.lockf`), which
    ends with the process. On file systems without locks, or with locks that are not visible to other machines, the
    file's content decides: a process of this machine is looked up in /proc, and one of another machine must touch the
    file regularly.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / LOCK
        self.taken_over = ""  # description of an earlier holder that is gone
        self._made: list[Path] = []  # folders that were created, innermost first
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        try:
            self._make_folder()
            self._file = self._open()
        except OSError as error:
            self._remove_folder()
            raise UserError(f"cannot write to {self.run}: {error.strerror}") from error
        except UserError:
            self._remove_folder()
            raise
        self._toucher = threading.Thread(target=self._touch, name=LOCK, daemon=True)
        self._toucher.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._toucher.join()
        self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._remove_folder()

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.run, *self.run.parents) if not folder.exists()]
        self.run.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _remove_folder(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # it is not empty
                return

    def _open(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                alone = _lock(file)
                holder = _read(file)
                if alone is False or (holder and self._lives(holder, os.fstat(file).st_mtime)):
                    raise UserError(self._refusal(holder))
                # The former holder may have removed the file after it was opened here and before it was locked.
                if not self._still_there(file):
                    os.close(file)
                    continue
                self.taken_over = _describe(holder) if holder else ""
                self._write(file)
                return file
            except BaseException:
                os.close(file)
                raise

    def _write(self, file: int) -> None:
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_own()).encode(), 0)
        except OSError:
            self.path.unlink()
            raise

    def _still_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _lives(self, holder: dict[str, Any], touched: float) -> bool:
        """Whether the process that wrote the file may still be running."""
        own = _own()
        if (holder["host"], holder.get("boot")) == (own["host"], own["boot"]):
            return _started(holder["process"]) == holder.get("started") is not None
        job, restart = holder.get("job") or (None, None)
        if own["job"] and job == own["job"][0] and restart != own["job"][1]:
            return False  # the holder is an earlier run of the same SLURM job, which was requeued
        return self._now() - touched < STALE

    def _now(self) -> float:
        """Returns the current time of the file system's clock, which may differ from this machine's."""
        probe = self.run / f".{LOCK}.{os.getpid()}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = _describe(holder) if holder else "another process, which has just started"
        return (
            f"{self.run} is in use by {who}; expected one run at a time in a folder: wait for it, or give another --out"
        )

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH):
            try:
                os.utime(self._file)
            except OSError:  # the file system is temporarily unavailable
                continue


def _lock(file: int) -> bool | None:
    """Takes the file system's lock: True if it is ours, False if another process holds it, None if there are no locks.

    A POSIX lock is not inherited by data loader workers, so it always ends with the training process.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(file: int) -> dict[str, Any]:
    """Reads the holder's description of itself; {} if it is incomplete."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and {"host", "process", "since"} <= holder.keys() else {}


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "job": _job(),
    }


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}, since {holder['since']}"


def _started(process: Any) -> str | None:
    """Returns the start time of a process of this machine, in clock ticks since boot; None if it does not exist."""
    try:
        # The process name, in parentheses, may contain any character.
        fields = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    """Returns the boot ID, which distinguishes machines with the same host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _job() -> list[str] | None:
    """Returns SLURM's job ID and how often the job was requeued; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else [job, os.environ.get("SLURM_RESTART_COUNT", "0")]


class Stopped(KeyboardInterrupt):
    """One of `SIGNALS` arrived when there was nothing to save; `str` is the signal's name."""


class StopSignals:
    """Context manager in which the first of `SIGNALS` sets `asked` to its name, and a second one ends the process."""

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for each in SIGNALS:
            # unlike Python's handlers, the default ones also run while Python waits for a device or another process
            signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Context manager in which `SIGNALS` raise `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
