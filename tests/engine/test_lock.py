"""The lock of a run's folder: held, released, taken over, and on file systems without locks."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

pytest.importorskip("accelerate", reason="training needs the extra [train]")
from sgmim_fast.engine import launch
from sgmim_fast.engine.launch import RunLock
from sgmim_fast.errors import UserError

FORK = multiprocessing.get_context("fork")  # starts at once; a new process would import torch


def _hold(run, ready, child):
    with RunLock(run):
        ready.put(os.fork() if child else 0)
        time.sleep(60)


def holds(run, child=False):
    """Starts a process that holds the lock, with a child that has a copy of every open file if `child` is True."""
    ready = FORK.SimpleQueue()
    process = FORK.Process(target=_hold, args=(run, ready, child))
    process.start()
    while not (number := ready.get()) and child:
        pass  # skips what the child put
    return process, number


@pytest.fixture(params=["locks", "no locks", "locks that hold nobody back"])
def filesystem(request, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param != "locks":
        monkeypatch.setattr(launch.fcntl, "lockf", refuse if request.param == "no locks" else lambda *_: None)


@pytest.fixture
def holder(filesystem, tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process, _ = holds(tmp_path / "run")
    yield process
    process.kill()
    process.join()


def refusal(run):
    with pytest.raises(UserError) as error, RunLock(run):
        pass
    return str(error.value)


def test_a_second_start_is_refused_with_the_first_ones_name(filesystem, tmp_path, holder):
    message = refusal(tmp_path / "run")
    written = json.loads((tmp_path / "run" / launch.LOCK).read_text())
    for part in (f"process {holder.pid} on {written['host']}", written["since"], "--out"):
        assert part in message
    assert written["process"] == holder.pid  # the file was not changed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(filesystem, tmp_path, holder, number):
    os.kill(holder.pid, number)
    holder.join()
    assert (tmp_path / "run" / launch.LOCK).exists()
    with RunLock(tmp_path / "run") as taken:
        assert f"process {holder.pid}" in taken.taken_over
    assert os.listdir(tmp_path / "run") == []


def test_a_loading_process_that_is_left_over_holds_nothing(tmp_path):
    """The parent of this process was killed. It has a copy of every open file."""
    process, child = holds(tmp_path / "run", child=True)
    try:
        process.kill()
        process.join()
        with RunLock(tmp_path / "run") as taken:
            assert taken.taken_over
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_same_process_is_another_run_too(filesystem, tmp_path):
    with RunLock(tmp_path / "run"):
        assert f"process {os.getpid()}" in refusal(tmp_path / "run")


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    """The machine or container was restarted."""
    path = tmp_path / launch.LOCK
    path.write_text(json.dumps(launch._own() | {"started": "1"}))
    with RunLock(tmp_path) as taken:
        assert taken.taken_over


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "before"}])
def test_another_machine_holds_as_long_as_it_touches_the_file(filesystem, tmp_path, other):
    path = tmp_path / launch.LOCK
    path.write_text(json.dumps(launch._own() | other))
    assert f"process {os.getpid()} on" in refusal(tmp_path)
    long_ago = path.stat().st_mtime - launch.STALE - 1
    os.utime(path, (long_ago, long_ago))
    with RunLock(tmp_path) as taken:
        assert taken.taken_over


def test_a_holder_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TOUCH", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / launch.LOCK, (0, 0))
        for _ in range(1000):
            if (tmp_path / launch.LOCK).stat().st_mtime:
                break
            time.sleep(0.01)
        assert (tmp_path / launch.LOCK).stat().st_mtime > 0


def test_a_requeued_job_takes_over_from_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / launch.LOCK).write_text(json.dumps(launch._own() | {"host": "elsewhere"}))
    assert "elsewhere" in refusal(tmp_path)  # another task of the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path) as taken:
        assert "elsewhere" in taken.taken_over


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_torn_file_is_nobodys(tmp_path, content):
    (tmp_path / launch.LOCK).write_text(content)
    with RunLock(tmp_path):
        pass


def test_folders_that_were_made_for_nothing_go_away(tmp_path):
    with RunLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "other").touch()
    assert not (tmp_path / "a" / "b").exists() and (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["open", "pwrite"])
def test_a_full_disk_is_said(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(launch.os, name, full)
    assert refusal(tmp_path / "run") == f"cannot write to {tmp_path / 'run'}: No space left on device"
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    assert "cannot write to" in refusal(tmp_path / "run")


def test_many_at_once_are_one_after_the_other(tmp_path):
    """Each process holds the lock for a moment, and writes a file into the folder that must be its own."""
    run = tmp_path / "run"
    run.mkdir()

    def hold():
        held = 0
        while held < 30:
            try:
                with RunLock(run):
                    (run / "alone").touch(exist_ok=False)
                    (run / "alone").unlink()
                    held += 1
            except UserError:
                time.sleep(0.001)

    processes = [FORK.Process(target=hold) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
