"""Signals that ask to stop, at the next step, or at once where there are no steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, to be started again
UNFINISHED = 75
# Of clusters and terminals, and those that SLURM is told to send some time before the end (--signal)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


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
