"""The lock of a run's folder: one training at a time.

The file `run.lock` says who holds it: host, process, when that process started, and when the run did. It is held by
the file system's own lock, which ends with the process; where there is none, or it does not reach other machines, by
what the file says: a process of this machine is looked up, one of another machine has to touch the file now and then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sgmim_fast.errors import UserError

NAME = "run.lock"
TOUCH, STALE = 20.0, 180.0  # seconds; network file systems show a touch up to a minute later
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Holds a run's folder while entered; makes it, and removes it again where nothing else was put into it.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / NAME
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
        self._toucher = threading.Thread(target=self._touch, name=NAME, daemon=True)
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
        probe = self.run / f".{NAME}.{os.getpid()}"
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
