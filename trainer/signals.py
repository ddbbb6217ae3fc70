"""Stopping at the end of a step when asked to."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not an error, go on later
ECHO_SECONDS = 2.0


class StopRequest:
    """Remembers SIGINT and SIGTERM; a later one acts at once, as usual.

    One that follows within `ECHO_SECONDS` is taken for the same: Ctrl-C reaches every process of a terminal, and a
    launcher of several processes then hands on what it got itself.

    `accelerate launch` with one process does not hand SIGTERM on: it dies and leaves the trainer running. So the
    launcher's death counts as a request, too.
    """

    def __init__(self) -> None:
        self._asked_at = math.inf
        self._launcher = os.getppid() if launcher_arguments() is not None else None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._asked_at > ECHO_SECONDS:
            self.close()
            signal.raise_signal(number)
        self._asked_at = min(self._asked_at, now)

    @property
    def asked(self) -> bool:
        return self._asked_at < math.inf or (self._launcher is not None and os.getppid() != self._launcher)

    def close(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def launcher_arguments() -> list[str] | None:
    """What `accelerate launch` was told; None if this process was started in another way."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    for place, word in enumerate(words[:4]):
        if word == "accelerate.commands.launch" or Path(word).name == "accelerate-launch":
            return words[place + 1 :]
        if Path(word).name == "accelerate" and words[place + 1 : place + 2] == ["launch"]:
            return words[place + 2 :]
    return None
