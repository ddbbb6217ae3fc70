"""Models from strangers: whatever is in their files, they are refused soon, cheaply, and in a sentence."""

import contextlib
import threading
import time
from pathlib import Path

import psutil
import pytest

import attention
from attention.errors import CheckpointError

from .checkpoints import make_variant, save_base
from .hostile import make_hostile

SECONDS, MEGABYTES = 2.0, 200


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """A variant of each method, and their base."""
    place = tmp_path_factory.mktemp("sources")
    base = save_base(place / "base")
    found = [base]
    for method in ("masks", "performer", "nsa"):
        attention.save(make_variant(base, method), place / method)
        found.append(place / method)
        attention.load(place / method)  # what the first one of a process imports is not the files' cost
    return found


class Watch:
    """The most memory that this process takes while it is open, above what it had, in MB."""

    def __enter__(self) -> "Watch":
        self.process, self.open = psutil.Process(), True
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while self.open:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()

    @property
    def megabytes(self) -> float:
        return (self.most - self.before) / 1e6


def refuse(sources, tmp_path, number):
    source = sources[number // 8 % len(sources)]
    folder = source.with_name(f"hostile-{number}")  # beside the base that it names
    what = make_hostile(source, folder, number)
    started = time.process_time()
    caught = None
    with Watch() as watch:
        try:
            attention.load(folder)
        except CheckpointError as error:
            caught = error
    assert caught is not None, f"{what} in {source.name} was loaded"
    assert time.process_time() - started < SECONDS, what
    assert watch.megabytes < MEGABYTES, what
    assert len(str(caught)) < 3500, what
    with contextlib.suppress(CheckpointError):  # it reads no weights, so it may find nothing wrong
        attention.describe(folder)


@pytest.mark.parametrize("number", range(32))
def test_hostile_models_are_refused(sources, tmp_path, number):
    refuse(sources, tmp_path, number)


@pytest.mark.long
@pytest.mark.parametrize("number", range(32, 282))
def test_many_hostile_models_are_refused(sources, tmp_path, number):
    refuse(sources, tmp_path, number)
