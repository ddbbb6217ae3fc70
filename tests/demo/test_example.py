"""The finished run that is shown first."""

import shutil
from datetime import date

import pytest

from demo.example import CHECKPOINTS, FirstRun, make, stored, ticked, write
from demo.models import Access, ModelStore, bundled
from demo.runs import Run
from demo.timing import device_name
from demo.views import cost_table


def test_a_stored_example_comes_back_as_it_was(store, tmp_path):
    example = make(store)
    write(example, tmp_path / "first.json")
    assert stored(store, tmp_path / "first.json") == example.run
    assert example.run.settings.models == ("base", "masks")
    assert [column.stage for column in example.run.columns] == ["done", "done"]


def test_it_is_said_where_and_when_stored_costs_were_measured(store, tmp_path):
    example = make(store)
    year = str(date.today().year)
    assert year in example.run.measured
    assert device_name() in example.run.measured
    write(example, tmp_path / "first.json")
    said = cost_table(stored(store, tmp_path / "first.json"))["measured"]
    assert example.run.measured in said
    assert "not on this machine now" in said
    example.run.measured = ""  # as files had it before
    write(example, tmp_path / "first.json")
    assert "on another machine" in cost_table(stored(store, tmp_path / "first.json"))["measured"]
    assert cost_table(Run(example.run.settings, example.run.columns))["measured"] == ""


def test_other_models_make_a_stored_example_stale(store, checkpoints, tmp_path):
    write(make(store), tmp_path / "first.json")
    changed = shutil.copytree(checkpoints / "base", tmp_path / "base")
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    for sources in ([changed], [changed, checkpoints / "masks"], [checkpoints / "base"]):
        assert stored(ModelStore(sources, access=Access()), tmp_path / "first.json") is None


def test_further_models_leave_a_stored_example_as_it_is(store, checkpoints, tmp_path):
    write(make(store), tmp_path / "first.json")
    further = shutil.copytree(checkpoints / "masks", tmp_path / "further")
    more = ModelStore([checkpoints / "base", checkpoints / "masks", further], access=store.access, limits=store.limits)
    assert stored(more, tmp_path / "first.json").settings.models == ("base", "masks")


@pytest.mark.parametrize("content", [None, "", "{}", '{"fingerprints": {"gone": ""}, "run": 1}'])
def test_a_missing_or_broken_file_is_no_example(store, tmp_path, content):
    if content is not None:
        (tmp_path / "first.json").write_text(content)
    assert stored(store, tmp_path / "first.json") is None


def test_without_a_stored_one_it_is_made_in_the_background(store):
    first = FirstRun(store)
    assert [column.name for column in first.waiting().columns] == store.names()
    assert first.get(seconds=60).settings.prompt.startswith("The lighthouse")


def test_no_models_no_example():
    assert FirstRun(ModelStore(access=Access())).get() is None


def test_the_example_that_is_shipped_is_of_the_checkpoints_that_are_shipped():
    store = ModelStore(bundled(CHECKPOINTS), access=Access())
    run = stored(store)
    assert run is not None, "the checkpoints changed; run `python -m demo.example`"
    assert list(run.settings.models) == store.names()[: store.limits.models_per_run]


def test_the_example_is_long_and_of_a_length_that_the_checkpoints_hold():
    run = stored(ModelStore(bundled(CHECKPOINTS), access=Access()))
    for column in run.columns:
        assert 600 <= column.prompt_length <= 900
        assert (column.dropped, column.stopped) == (0, "length")


def test_models_that_the_app_was_started_with_are_ticked(checkpoints, tmp_path):
    for name in ("mine", "yours"):
        shutil.copytree(checkpoints, tmp_path / name)
    mine = [(tmp_path / name / "masks").rename(tmp_path / name / "variant") for name in ("mine", "yours")]
    store = ModelStore([*bundled(CHECKPOINTS), *mine], access=Access())
    chosen = ticked(store)
    assert {"mine", "yours"} <= set(chosen)
    assert len(chosen) == store.limits.models_per_run
    assert [name for name in store.names() if name in chosen] == chosen
    assert all(store.entry(name).method == "softmax" for name in chosen[:2])
