"""The generate tab on the server: links, and what is sent while a run goes on."""

import pytest

from demo.example import FirstRun
from demo.models import Access, ModelStore
from demo.tabs.generate import Handlers

from .conftest import Visit, make_checkpoints

FIELDS = ("The old house", ["base", "masks"], 0.8, 40, 0.95, 1.1, 12, 0)


@pytest.fixture
def handlers(store, monkeypatch) -> Handlers:
    monkeypatch.setattr(FirstRun, "__init__", lambda self, store: None)  # which would write an example
    return Handlers(store, FirstRun(store))


def test_each_frame_says_all_for_the_page_may_miss_those_before(handlers):
    *_, end = frames = list(handlers.stream(*FIELDS, []))
    for frame in frames:
        _, line, columns, costs, address, _, _, start, stop, busy, link = frame
        assert line.startswith("base, masks · temperature 0.8")
        assert address["parameters"]["prompt"] == ["The old house"]
        assert [row[0] for row in costs["rows"]] == ["base", "masks"]
        assert (start.value, start.interactive, stop.interactive) == ("Writing …", False, True)
        assert (busy, link.interactive, len(columns)) == (True, True, 2)
    current, runs = end[5:7]
    assert (current, len(runs)) == (None, 1)


def test_a_link_shows_the_columns_of_its_own_run_while_that_waits(handlers):
    *_, said, asks, line, columns, costs = handlers.open_link(Visit("prompt=The+sea&models=masks&max_new_tokens=7"))
    assert (said, isinstance(asks, float)) == ([], True)
    assert "7 tokens" in line
    assert [(column["title"], column["status"]) for column in columns] == [("masks", "waiting …")]
    assert [row[0] for row in costs["rows"]] == ["masks"]
    assert [column["title"] for column in handlers.open_link(Visit("prompt=x"))[-2]] == ["base", "masks"]
    for query in ("tab=speed", "prompt=x&models=gone"):
        assert all(part == {"__type__": "update"} for part in handlers.open_link(Visit(query))[-4:])


def test_a_prompt_of_6000_tokens_is_read_whole_where_the_models_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(FirstRun, "__init__", lambda self, store: None)
    folder = make_checkpoints(tmp_path, context=8192)
    store = ModelStore([folder / "base", folder / "masks"], access=Access(None, (tmp_path,)))
    prompt = "\n".join(f"The lighthouse stood on rock {number}." for number in range(700))
    *_, end = Handlers(store, FirstRun(store)).stream(prompt, *FIELDS[1:], [])
    said, columns = end[0], end[2]
    assert said == []
    for column in columns:
        assert column["prompt_tokens"] > 6000
        assert column["lines"].count("\n") == 12
