"""On a ZeroGPU Space, here an imitation: the models write in another process."""

import multiprocessing
import queue

import pytest

from demo import gpu
from demo.engine import Generation
from demo.example import FirstRun
from demo.limits import Limits
from demo.models import ModelStore
from demo.runs import Settings
from demo.tabs import generate as generate_tab
from demo.tabs.generate import Handlers


class Spaces:
    """Like `spaces`: a decorated generator runs in a forked process, and what it yields is pickled."""

    durations: list[int]

    def __init__(self):
        self.durations = []

    def GPU(self, function, duration):  # noqa: N802 (its name there)
        self.durations.append(duration)

        def call(*arguments):
            context = multiprocessing.get_context("fork")
            results = context.Queue()
            process = context.Process(target=self._work, args=(function, arguments, results), daemon=True)
            process.start()
            try:
                while True:
                    kind, value = results.get(timeout=30)
                    if kind == "end":
                        return
                    yield value
            except queue.Empty:
                raise AssertionError("nothing came from the other process") from None
            finally:
                process.kill()

        return call

    @staticmethod
    def _work(function, arguments, results):
        for value in function(*arguments):
            results.put(("value", value))
        results.put(("end", None))


@pytest.fixture
def spaces(monkeypatch):
    spaces = Spaces()
    monkeypatch.setattr(gpu, "spaces", spaces)
    for module in (gpu, generate_tab):
        monkeypatch.setattr(module, "IS_LENT", True)
    monkeypatch.setattr(ModelStore, "use", lambda self, device: None)  # there is no GPU to move to
    return spaces


FIELDS = ("The old house", ["base", "masks"], 0.8, 40, 0.95, 1.1, 12, 0)


def handlers(store, monkeypatch) -> Handlers:
    monkeypatch.setattr(FirstRun, "__init__", lambda self, store: None)
    return Handlers(store, FirstRun(store))


def test_the_run_comes_back_whole(store, spaces, monkeypatch):
    *_, (_, _, columns, costs, _, generation, runs, *_) = handlers(store, monkeypatch).stream(*FIELDS, [])
    assert store.loaded() == []  # the other process did it
    assert generation is None
    run = runs[0]
    assert [(column.generated, len(column.scores)) for column in run.columns] == [(12, 12), (12, 12)]
    assert columns[1]["status"].startswith("12 tokens · KL")
    assert all(None not in row for row in costs["rows"])


def test_stop_keeps_what_had_come(store, spaces, monkeypatch):
    page = handlers(store, monkeypatch)
    stream = page.stream(*FIELDS, [])
    generation = None
    while True:
        state = next(stream)
        generation = state[5] if isinstance(state[5], Generation) else generation
        if generation.run.columns[0].generated >= 1:
            break
    _, _, columns, _, _, _, runs, *_ = page.stop(generation, [])
    stream.close()
    assert runs[0].columns[0].stopped is not None
    assert "token" in columns[0]["status"]


def test_without_one_nothing_is_wrapped():
    def function():
        yield 1

    assert gpu.with_gpu(function, lambda: 10) is function


def test_what_is_declared_follows_the_request(store, spaces, monkeypatch):
    handlers(store, monkeypatch)
    (declared,) = spaces.durations
    store.limits = Limits(seconds=600)
    short = declared(Settings("x", ("base",), max_new_tokens=10))
    long = declared(Settings("x", ("base", "masks", "nsa"), max_new_tokens=400))
    assert isinstance(short, int)
    assert short <= 15
    assert 3 * short < long <= 600
    store.limits = Limits(seconds=30)
    assert declared(Settings("x", ("base", "masks", "nsa"), max_new_tokens=400)) == 30
