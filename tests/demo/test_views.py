"""Runs as the page shows them."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from gradio.utils import diff
from hypothesis import given
from hypothesis import strategies as st

from demo.engine import Generation
from demo.runs import Column, Run, Settings
from demo.views import (
    KL_TICKS,
    colour,
    columns_view,
    cost_table,
    distinction,
    history_label,
    option_text,
    prompt_notices,
)


@pytest.fixture
def run(store):
    generation = Generation(store, Settings("The old <b>house</b>", ("base", "masks"), max_new_tokens=6))
    for _ in generation.stream():
        pass
    return generation.run


def test_every_token_is_shown_and_only_new_ones_are_coloured(run, store):
    views = json.loads(json.dumps(columns_view(run, store)))
    for column, view in zip(run.columns, views, strict=True):
        tokens = tokens_of(view)
        assert view["prompt"] == "The old <b>house</b>"
        assert view["prompt_tokens"] == column.prompt_length
        assert "".join(token["text"] for token in tokens) == column.text
        assert [token["score"] for token in tokens] == pytest.approx([colour(s.kl) for s in column.scores], abs=1e-4)
    parts = [token.get("parts", False) for token in tokens_of(views[1])]
    assert parts.index(True) + run.columns[1].prompt_length == run.columns[1].parts_at
    assert "KL" not in views[0]["status"]
    assert "KL" in views[1]["status"]


def tokens_of(view):
    return [json.loads(line) for line in view["lines"].splitlines()]


def test_while_a_text_is_written_only_what_is_new_is_sent(store):
    """Gradio sends what tells a value from the one before it."""
    generation = Generation(store, Settings("The old house " * 20, ("base", "masks"), max_new_tokens=20))
    views = [json.loads(json.dumps(columns_view(run, store))) for run in generation.stream()]
    writing = [view for view in views if all(0 < column["lines"].count("\n") < 20 for column in view)]
    assert len(writing) > 20
    for before, after in pairwise(writing):
        for kind, path, new in diff(before, after):
            assert kind == ("append" if path[1] == "lines" else "replace")
            assert path[1] in ("lines", "status")
            assert len(new) < 100


@given(st.floats(0.011, 9.9), st.floats(0.011, 9.9), st.floats(1.0, 1.5))
def test_equal_factors_of_the_distance_are_equal_steps_of_the_colour(a, b, factor):
    a, b = min(a, 9.9 / factor), min(b, 9.9 / factor)
    if min(a, b) > 0.01:
        assert colour(a * factor) - colour(a) == pytest.approx(colour(b * factor) - colour(b), abs=1e-9)


def test_the_colour_s_marks_are_where_they_say():
    assert [colour(float(tick)) for tick in KL_TICKS] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert colour(0) == colour(0.0099) == 0
    assert colour(1e9) == 1


def test_what_was_left_out_of_a_prompt_is_said_at_the_prompt():
    columns = [Column(name, prompt_length=900, dropped=450) for name in ("base", "nsa")] + [Column("long")]
    (notice,) = prompt_notices(Run(Settings("x", ("base", "nsa", "long"), max_new_tokens=120), columns))
    for part in ("1,350 tokens", "120 to be written", "base and nsa", "last 900"):
        assert part in notice["text"]


def test_costs_are_beside_the_base(run):
    table = cost_table(run)
    assert table["reference"] == 0
    assert [row[0] for row in table["rows"]] == ["base", "masks"]
    assert all(len(row) == len(table["headers"]) for row in table["rows"])
    cost = run.columns[1].cost
    assert [header[0] for header in table["headers"][-2:]] == ["Keys read", "Keys scored"]
    assert table["rows"][1][-2:] == [cost.keys_read, cost.keys_scored]


def test_what_is_not_there_yet_is_empty(store):
    run = Run(Settings("x", ("base", "gone")), [Column("base"), Column("gone", stage="failed", problem="no <b>")])
    views = columns_view(run, store)
    assert [view["status"] for view in views] == ["waiting …", "no <b>"]
    assert set(cost_table(run)["rows"][0][1:]) == {None}


def test_history_labels_are_short_and_in_one_line(run):
    label = history_label(Run(Settings("one\ntwo " + "x" * 500, ("base",)), []))
    assert label.startswith("“one two xxx")
    assert "\n" not in label
    assert len(label) < 200


def test_models_of_one_method_are_told_apart_by_their_options(store):
    masks = store.entry("masks")
    wider = replace(masks, name="wider", options={**masks.options, "candidates": ["window(9)"]})
    entries = [store.entry("base"), masks, wider]
    assert distinction(wider, entries) == "places window(9)"
    assert distinction(masks, entries) == "places last(0), window(6), first(2)"
    assert distinction(masks, entries[:2]) == distinction(entries[0], entries) == ""


def test_options_by_layer_are_said_by_the_layers_that_share_them():
    assert option_text((64, 64, 0, 0, 0, 256)) == "64 in layers 0–1, 0 in 2–4, 256 in 5"
    assert option_text((8, 8)) == "8"
    mix = [{"layers": [0, 4, 1], "method": "masks"}, {"layers": [2], "method": "nsa"}, {"layers": [3], "method": "a"}]
    assert option_text(mix) == "masks in layers 0–1, 4, nsa in layer 2, a in layer 3"
    several = [
        {"layers": [0], "method": "masks"},
        {"layers": [1, 2], "method": "nsa", "num_selected": 8, "window": 32},
        {"layers": [3], "method": "nsa", "num_selected": 16, "window": 32},
    ]
    assert option_text(several) == "masks in layer 0, nsa in layers 1–3 (blocks 8 in layers 1–2, 16 in layer 3)"
    assert option_text([True, "a"]) == "yes, a"
