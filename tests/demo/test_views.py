"""Runs as the page shows them."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.engine import Generation
from demo.runs import Column, Run, Settings
from demo.views import colour, columns_view, cost_table, distinction, history_label


@pytest.fixture
def run(store):
    generation = Generation(store, Settings("The old <b>house</b>", ("base", "masks"), max_new_tokens=6))
    for _ in generation.stream():
        pass
    return generation.run


def test_every_token_is_shown_and_only_new_ones_are_coloured(run, store):
    views = json.loads(json.dumps(columns_view(run, store)))
    for column, view in zip(run.columns, views, strict=True):
        assert "".join(token["text"] for token in view["tokens"]) == "The old <b>house</b>" + column.text
        assert [bool(token.get("prompt")) for token in view["tokens"]] == [True] * column.prompt_length + [False] * 6
        scores = [token["score"] for token in view["tokens"][column.prompt_length :]]
        assert scores == pytest.approx([colour(score.kl) for score in column.scores], abs=1e-4)
    assert [token.get("parts", False) for token in views[1]["tokens"]].index(True) == run.columns[1].parts_at
    assert "KL" not in views[0]["status"]
    assert "KL" in views[1]["status"]


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=2).flatmap(lambda p: st.tuples(st.just(p), st.permutations(p)))
)
def test_the_colour_is_never_less_than_the_total_variation(pair):
    p, q = ([x / sum(weights) for x in weights] for weights in pair)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2 <= colour(max(kl, 0)) + 1e-6
    assert colour(0) == 0
    assert colour(50) == pytest.approx(1)


def test_costs_are_beside_the_base(run):
    table = cost_table(run)
    assert table["reference"] == 0
    assert [row[0] for row in table["rows"]] == ["base", "masks"]
    assert all(len(row) == len(table["headers"]) for row in table["rows"])
    assert table["rows"][1][-1] == run.columns[1].cost.keys_read


def test_what_is_not_there_yet_is_empty(store):
    run = Run(Settings("x", ("base", "gone")), [Column("base"), Column("gone", stage="failed", problem="no <b>")])
    views = columns_view(run, store)
    assert [view["status"] for view in views] == ["waiting", "no <b>"]
    assert cost_table(run)["rows"][0][1:] == [None] * 6


def test_history_labels_are_short_and_in_one_line(run):
    label = history_label(Run(Settings("one\ntwo " + "x" * 500, ("base",)), []))
    assert label.startswith("“one two xxx")
    assert "\n" not in label
    assert len(label) < 200


def test_models_of_one_method_are_told_apart_by_their_options(store):
    masks = store.entry("masks")
    wider = replace(masks, name="wider", options={**masks.options, "candidates": ["window(9)"]})
    entries = [store.entry("base"), masks, wider]
    assert distinction(wider, entries) == " Here: candidates window(9)."
    assert distinction(masks, entries) == " Here: candidates last(0), window(6), first(2)."
    assert distinction(masks, entries[:2]) == distinction(entries[0], entries) == ""
