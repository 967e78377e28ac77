"""SIGTERM and Ctrl-C: asked to stop, at the next step, or at once where there are no steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# EX_TEMPFAIL of sysexits.h: not done, to be started again
UNFINISHED = 75


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGINT where nothing is to be saved; `str` is the signal's name."""


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `asked` to its name; a second one ends the process."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)  # also where Python waits for a device or another process


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """While entered, SIGTERM and SIGINT raise `Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in StopSignals.NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
