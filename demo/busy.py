"""Who uses the machine: a measurement waits while anything else is computed, so that neither slows the other unsaid."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Busy:
    """Kinds of work that are being done now, in this process."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._ends: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Says that work of a kind goes on inside."""
        with self._lock:
            self._counts[kind] = self._counts.get(kind, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._counts[kind] -= 1
                self._ends[kind] = time.monotonic()

    def quiet_since(self, kind: str) -> float:
        """When such work ended last, on the clock of `time.monotonic`: −∞ if there was none, ∞ while there is some."""
        with self._lock:
            return math.inf if self._counts.get(kind) else self._ends.get(kind, -math.inf)


BUSY = Busy()
COMPUTING = "computing"  # texts, scores, maps: all but measurements
