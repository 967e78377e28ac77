"""A run on its machine: the processes that the launcher asked for, the lock of the run's folder, and the signals that
ask to stop."""

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
# Of torchrun, of MPI, and of srun, which says how many it started, but not where they find each other
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
GPUS_ASKED_FOR = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
NO_GPU = ("", "-1", "NoDevFiles")  # in these variables
DEVICES, PCI = Path("/dev"), Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # of a PCI device: vendor, and the class of display and 3D controllers
# EX_TEMPFAIL of sysexits.h: not done, to be started again
UNFINISHED = 75
# Of clusters and terminals, and those that SLURM is told to send some time before the end (--signal)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LOCK = "run.lock"
TOUCH, STALE = 20.0, 180.0  # seconds; network file systems show a touch up to a minute later
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
TORCHRUN = "torchrun --nproc-per-node=N -m sgmim_fast.cli"


def rank() -> int:
    """Of this process, 0 where there is one."""
    return _first(RANKS, 0)[1]


def size() -> int:
    """How many processes were asked for."""
    return _first(SIZES, 1)[1]


def create_accelerator(precision: str, fsdp: bool = False) -> Accelerator:
    """Connects the processes: NCCL on GPUs, gloo where there are none.

    Raises:
        UserError: what the launcher asked for is not what would run, or the machine cannot do it.
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
        # accelerate launch sets these; without WORLD_SIZE it has started this process alone, however many it was told
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
    """That so many processes can find each other, on devices of their own."""
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
    elif torch.cuda.is_available() and "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun, whose processes see the same
        local = _first(LOCAL_SIZES, 1)
        if local[1] > torch.cuda.device_count():
            raise UserError(
                f"{local[0]} is {local[1]} of WORLD_SIZE {asked}, and there are fewer GPUs ({_devices()}); expected "
                f"--nproc-per-node={torch.cuda.device_count()} at most, or ACCELERATE_USE_CPU=true for CPUs"
            )


def _first(names: tuple[str, ...], otherwise: int) -> tuple[str | None, int]:
    """The first of these variables that is set, and its number."""
    for name in names:
        if text := os.environ.get(name, ""):
            try:
                return name, int(text)
            except ValueError:
                raise UserError(f"{name} is {text!r}; expected a number, as torchrun sets it") from None
    return None, otherwise


def _devices() -> str:
    """What torch sees."""
    if torch.cuda.is_available():
        return f"torch sees {torch.cuda.device_count()} GPUs"
    built = "" if torch.version.cuda or torch.version.hip else ", and is built without CUDA"
    return f"torch sees CPUs only{built}"


def _signs_of_gpus() -> str:
    """Why there should be GPUs, though torch finds none; "" where nothing says so."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPU
    signs = [f"{name} is {os.environ[name]}" for name in GPUS_ASKED_FOR if os.environ.get(name, "") not in NO_GPU]
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ and "ACCELERATE_USE_CPU" not in os.environ:
        signs.append("accelerate launch was told to use GPUs")  # it always sets the second one otherwise
    if not hidden:
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
    """Holds a run's folder while entered: one training at a time. Makes it, and removes it again where nothing else was
    put into it.

    The file `run.lock` says who holds it: host, process, when that process started, and when the run did. It is held by
    the file system's own lock, which ends with the process; where there is none, or it does not reach other machines,
    by what the file says: a process of this machine is looked up, one of another machine has to touch the file now and
    then.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / LOCK
        self.taken_over = ""  # from whom, where that process is gone
        self._made: list[Path] = []  # folders, innermost first
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
            except OSError:  # has something in it
                return

    def _open(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                alone = _lock(file)
                holder = _read(file)
                if alone is False or (holder and self._lives(holder, os.fstat(file).st_mtime)):
                    raise UserError(self._refusal(holder))
                # whoever held it may have removed the file between our opening and locking it
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
        """Whether the process that wrote the file may still be there."""
        own = _own()
        if (holder["host"], holder.get("boot")) == (own["host"], own["boot"]):
            return _started(holder["process"]) == holder.get("started") is not None
        job, restart = holder.get("job") or (None, None)
        if own["job"] and job == own["job"][0] and restart != own["job"][1]:
            return False  # the same job of SLURM, which has put it into the queue again
        return self._now() - touched < STALE

    def _now(self) -> float:
        """The time of the file system, whose clock may be another one."""
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
            except OSError:  # the file system is away for a moment
                continue


def _lock(file: int) -> bool | None:
    """Whether the file system's lock is ours; None where it has none.

    A POSIX lock: loading processes do not inherit it, so that it ends with the training however that ends.
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
    """What a holder wrote; {} where that was cut off."""
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
    """When a process of this machine started, in ticks since it booted; None where there is no such process."""
    try:
        # the name, in brackets, may have any character
        fields = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    """A name of this machine since it booted: machines may share a host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _job() -> list[str] | None:
    """SLURM's number of this job, and how often it was put into the queue again."""
    job = os.environ.get("SLURM_JOB_ID")
    return None if job is None else [job, os.environ.get("SLURM_RESTART_COUNT", "0")]


class Stopped(KeyboardInterrupt):
    """One of `SIGNALS` where nothing is to be saved; `str` is the signal's name."""


class StopSignals:
    """While entered, the first of `SIGNALS` only sets `asked` to its name; a second one ends the process."""

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
            signal.signal(each, signal.SIG_DFL)  # also where Python waits for a device or another process


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """While entered, `SIGNALS` raise `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
