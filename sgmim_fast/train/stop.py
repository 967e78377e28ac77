"""SIGTERM and Ctrl-C: asked to stop, at the next step."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignals:
    """While entered, the first SIGTERM or SIGINT only sets `asked` to its name; a second one is not held back."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
