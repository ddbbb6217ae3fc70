"""The blind test on the server: what is drawn, what is told before a vote, what counts."""

import json
import random
import time
from dataclasses import replace

import pytest

from demo.engine import Generation
from demo.request import FIELDS, RequestError
from demo.runs import Settings
from demo.tabs import blind
from demo.tabs.blind import EQUAL, FIRST, SECOND, Handlers, Round, draw_pair, keep, nameless, revealed, vote_of
from demo.votes import read, reading_seconds

SETTINGS = Settings("The old house", ("base", "masks"), max_new_tokens=12)


@pytest.fixture
def shown(store) -> Round:
    generation = Generation(store, SETTINGS)
    for _ in generation.stream():
        pass
    return Round(generation.run)


@pytest.fixture
def handlers(store) -> Handlers:
    return Handlers(store, lambda settings: Generation(store, settings))


def start(handlers: Handlers, **changes) -> list[tuple]:
    settings = replace(SETTINGS, **changes)
    values = [list(v) if isinstance(v, tuple) else v for v in (getattr(settings, name) for name in FIELDS)]
    for _ in range(20):  # tiny models may write the same text twice, which is no question
        steps = list(handlers.start(*values))
        if isinstance(steps[-1][6], Round):
            break
    return steps


def test_a_pair_is_drawn_with_the_base_where_it_is_chosen_and_in_either_order(store):
    draw = random.Random(0)
    drawn = {draw_pair(("base", "masks"), store, draw) for _ in range(30)}
    assert drawn == {("base", "masks"), ("masks", "base")}
    for names in (("base",), ("masks",)):
        with pytest.raises(RequestError, match="two models"):
            draw_pair(names, store, draw)


def test_nothing_that_is_sent_before_the_vote_tells_the_models(handlers):
    steps = start(handlers)
    public = [[part for part in step if not isinstance(part, Round)] for step in steps]  # a State stays on the server
    text = json.dumps(public, default=str)
    for name in ("base", "masks", "softmax", "window", '"kl"', "KL"):
        assert name not in text.replace("the base", "")
    shown = steps[-1][6]
    assert [column.generated for column in shown.run.columns] == [12, 12]
    assert shown.run.settings.models == tuple(column.name for column in shown.run.columns)


def test_pairs_have_one_prompt_and_one_seed_that_nobody_picked(handlers):
    rounds = [start(handlers, seed=7)[-1][6] for _ in range(3)]
    seeds = {each.run.settings.seed for each in rounds}
    assert len(seeds) == 3
    assert 7 not in seeds
    assert {each.run.settings.prompt for each in rounds} == {SETTINGS.prompt}


def test_the_same_text_twice_is_no_question(handlers, monkeypatch):
    monkeypatch.setattr(Round, "texts", ["same", "same"])
    said, *_ = start(handlers)[-1]
    assert "nothing to tell apart" in said[0]["text"]


def test_an_answer_counts_only_after_the_time_to_read(handlers, shown):
    assert shown.least_seconds == max(blind.LEAST_SECONDS, reading_seconds(shown.texts))
    said, *rest = handlers.answer(shown, FIRST, EQUAL, "")
    assert "nobody reads them in less" in said[0]["text"]
    assert all(part == {"__type__": "update"} for part in rest)


@pytest.mark.parametrize(
    ("base", "better", "message"),
    [(None, EQUAL, "a guess will do"), (FIRST, None, "reads better"), ("x", "y", "reads")],
)
def test_an_answer_is_whole(handlers, shown, base, better, message):
    early = replace(shown, since=time.monotonic() - 1000)
    assert message in handlers.answer(early, base, better, "")[0][0]["text"]
    assert "nothing to answer" in handlers.answer(None, base, better, "")[0][0]["text"]


def test_a_vote_tells_the_names_and_is_kept(handlers, shown):
    early = replace(shown, since=time.monotonic() - 1000)
    said, views, _, current, kept, tally = handlers.answer(early, SECOND, FIRST, "")
    assert "You took the other one" in said[0]["text"]
    assert "A is by base" in said[0]["text"]
    assert [view["title"] for view in views] == ["A: base", "B: masks"]
    assert current is None
    (vote,) = read(kept)[0]
    assert (vote.first.model, vote.second.model, vote.base, vote.better) == ("base", "masks", "second", "first")
    scores = shown.run.columns[1].scores
    assert vote.second.kl == pytest.approx(sum(score.kl for score in scores) / 12, abs=1e-4)
    assert vote.second.perplexity > 1
    assert tally["rows"][0][0] == "masks"
    again = handlers.answer(early, FIRST, EQUAL, kept)[4]
    assert len(read(again)[0]) == 2


def test_what_a_browser_keeps_has_an_end(shown, monkeypatch):
    votes = [replace(vote_of(shown, FIRST, EQUAL), time=f"2026-01-01T00:00:{i:02}") for i in range(5)]
    monkeypatch.setattr(blind, "KEPT_CHARACTERS", 2 * len(keep(votes[:1])) + 20)
    assert [vote.time[-2:] for vote in read(keep(votes))[0]] == ["03", "04"]
    monkeypatch.setattr(blind, "KEPT_CHARACTERS", 1)
    assert len(read(keep(votes))[0]) == 1


def test_texts_without_names_hold_every_token(shown):
    for view, column in zip(nameless(shown.run), shown.run.columns, strict=True):
        assert "".join(json.loads(line)["text"] for line in view["lines"].splitlines()) == column.text
        assert set(view) == {"title", "status", "prompt", "prompt_tokens", "lines"}


def test_what_is_revealed_has_the_numbers(shown):
    text = revealed(vote_of(shown, FIRST, EQUAL))
    assert text.startswith("You found the base. A is by base (perplexity to the base ")
    assert "B is by masks (KL to the base" in text
    assert "hit" not in text  # what is rare is not known here
    for column in shown.run.columns:
        column.hits = [0] * 12
    assert "0 hits to be looked up)" in revealed(vote_of(shown, FIRST, EQUAL))
    for column in shown.run.columns:
        column.hits[3] = 40
    kl = shown.run.columns[1].scores[3].kl
    text = revealed(vote_of(shown, FIRST, EQUAL))
    assert f"1 hit to be looked up, KL {kl:.3f} there)" in text
    assert "1 hit to be looked up)." in text  # the base's is no distance from itself
