"""How models see a given text."""

import csv
import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo.limits import Limits
from demo.models import Access, ModelStore
from demo.score import ScoreError, check, score_text, windows
from demo.tabs.score import Handlers, in_address, means_table, places_table, position_curves, progress, text_view

from .conftest import CONTEXT, Visit

NAMES = ["base", "masks"]
TEXT = "The old house stood at the end of the lane, and nobody had lived in it for a hundred years. " * 12


def scored(store, text=TEXT, names=NAMES):
    *_, scores = score_text(store, names, text)
    return scores


@given(st.integers(2, 600), st.integers(2, 128))
def test_windows_score_every_token_once_after_half_a_context(total, context):
    seen = []
    for start, first, end in windows(total, context):
        assert 0 <= start < first < end <= total
        assert end - start <= context
        assert start == 0 or first - start == max(context // 2, 1)
        seen += range(first, end)
    assert seen == list(range(1, total))


def test_scores_are_those_of_the_models_on_the_text(store):
    text = TEXT[:300]
    scores = scored(store, text)
    ids = torch.tensor([scores.token_ids])
    assert len(scores.token_ids) < CONTEXT
    with torch.no_grad():
        base, masks = (store.get(name).model(ids).logits[0, :-1].log_softmax(-1) for name in NAMES)
    expected = ids[0, 1:, None]
    seen = scores.seen["masks"]
    torch.testing.assert_close(seen.kl, (base.exp() * (base - masks)).sum(-1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen.probability, masks.gather(1, expected).exp()[:, 0], atol=1e-5, rtol=1e-3)
    assert seen.rank.tolist() == ((masks > masks.gather(1, expected)).sum(-1) + 1).tolist()
    assert scores.seen["base"].kl.abs().max() == 0
    mean = scores.means()[1]
    assert mean["kl"] == pytest.approx(seen.kl.mean().item(), abs=1e-5)
    assert mean["perplexity"] == pytest.approx(math.exp(-masks.gather(1, expected).mean()), rel=1e-3)
    assert mean["same_top"] == pytest.approx((base.argmax(-1) == masks.argmax(-1)).float().mean().item(), abs=1e-3)
    assert "".join(scores.tokens) == text


def test_the_parting_is_the_divergence_between_all_models(store):
    scores = scored(store, TEXT[:300])
    ids = torch.tensor([scores.token_ids])
    with torch.no_grad():
        p, q = (store.get(name).model(ids).logits[0, :-1].softmax(-1) for name in NAMES)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    torch.testing.assert_close(scores.parting, expected, atol=1e-4, rtol=1e-3)
    places = scores.places(5)
    partings = [place["parting"] for place in places]
    assert partings == sorted(partings, reverse=True)
    assert partings[0] == pytest.approx(expected.max().item(), abs=1e-4)
    assert scores.tokens[places[0]["position"]] == places[0]["token"]
    assert scored(store, TEXT[:300], ["masks"]).places() == []


def test_a_text_longer_than_the_context_is_read_in_windows(store):
    stages = [s.scored for s in score_text(store, NAMES, TEXT)]
    assert stages[0] == 0
    assert stages[1] == CONTEXT - 1
    scores = scored(store)
    assert scores.scored == len(scores.token_ids) - 1 > 2 * CONTEXT
    ids = torch.tensor([scores.token_ids[CONTEXT // 2 : CONTEXT // 2 + CONTEXT]])
    with torch.no_grad():
        logits = store.get("masks").model(ids).logits[0].log_softmax(-1)
    at = CONTEXT  # the first token that the second window scores
    expected = logits[at - CONTEXT // 2 - 1, scores.token_ids[at]].exp().item()
    assert scores.seen["masks"].probability[at - 1].item() == pytest.approx(expected, abs=1e-5)


def test_means_by_position_make_up_the_mean(store):
    scores = scored(store)
    ranges = scores.by_position()
    assert [each["start"] for each in ranges[:3]] == [1, 64, 128]
    assert ranges[-1]["end"] == scores.scored + 1
    counts = [each["models"][1]["tokens"] for each in ranges]
    total = sum(each["models"][1]["kl"] * count for each, count in zip(ranges, counts, strict=True))
    assert sum(counts) == scores.scored
    assert total / sum(counts) == pytest.approx(scores.means()[1]["kl"], abs=1e-4)


def test_a_model_that_fails_is_named_and_the_others_go_on(store):
    own = next(p for name, p in store.get("masks").model.named_parameters() if "mechanism" in name)
    with torch.no_grad():
        own.fill_(float("nan"))
    scores = scored(store)
    assert "not finite" in scores.problems["masks"]
    assert list(scores.seen) == ["base"]
    assert scores.scored == len(scores.token_ids) - 1
    assert torch.equal(scores.parting, torch.zeros_like(scores.parting)) or scores.parting.max() < 1e-4


def test_it_ends_at_the_time_limit_with_what_it_has(checkpoints):
    store = ModelStore([checkpoints / "base"], Limits(seconds=0.0), Access())
    scores = scored(store, names=["base"])
    assert "time limit" in scores.ended
    assert scores.summary()["scored"] == 0
    json.dumps(scores.summary(), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("", NAMES, "text is empty"),
        (" \n", NAMES, "text is empty"),
        (None, NAMES, "text is empty"),
        ("x" * 2001, NAMES, "2,001 characters"),
        ("x", [], "No model is chosen"),
        ("x", ["gone"], "No model gone"),
        ("x", ["base", "base"], "different models"),
        ("x", None, "No model is chosen"),
        ("x", [{}], "No model"),
    ],
)
def test_what_cannot_be_scored_is_said(store, text, names, message):
    with pytest.raises(ScoreError, match=message):
        check(text, names, store)


def test_one_token_is_too_short(store):
    with pytest.raises(ScoreError, match="two tokens"):
        scored(store, "a")


def test_exports_hold_every_token(store):
    scores = scored(store, 'A "quoted", text\nof two lines')
    rows = list(csv.DictReader(io.StringIO(scores.csv())))
    assert [row["token"] for row in rows] == scores.tokens[1:]
    assert [float(row["masks kl"]) for row in rows] == pytest.approx(scores.seen["masks"].kl.tolist(), abs=1e-5)
    data = json.loads(json.dumps(scores.rows(), allow_nan=False))
    assert [row["position"] for row in data] == list(range(1, len(scores.tokens)))


def test_the_views_show_what_was_scored(store):
    scores = scored(store)
    assert [row[0] for row in means_table(scores)["rows"]] == NAMES
    (chart,) = position_curves(scores)
    assert [series["name"] for series in chart["series"]] == ["masks"]
    table = places_table(scores)
    assert all(len(row) == len(table["headers"]) for row in table["rows"])
    (column,) = text_view(scores, "masks", 10)
    assert column["prompt"] == "".join(scores.tokens[:11])
    assert column["lines"].count("\n") == scores.scored - 10
    assert text_view(scores, "gone", 0) == []


def test_the_tab_streams_and_says_what_is_wrong(store):
    handlers = Handlers(store)
    *_, last = handlers.stream(TEXT, NAMES)
    assert last[0][0]["text"].startswith("Scored")
    assert last[7].scored > 0
    (refused,) = handlers.stream("", NAMES)
    assert refused[0][0]["level"] == "warning"


def test_the_endpoint_gives_plain_data(store):
    handlers = Handlers(store)
    data = handlers.score(TEXT)
    assert [mean["name"] for mean in data["means"]] == NAMES
    assert "rows" not in data
    assert len(handlers.score(TEXT, ["masks"], tokens=True)["rows"]) == data["scored"]
    json.dumps(data, allow_nan=False)


def test_files_are_read_as_text(store, tmp_path):
    handlers = Handlers(store)
    (tmp_path / "good").write_text("\ufeffTwo words", encoding="utf-8")
    assert handlers.read_file(str(tmp_path / "good")) == "Two words"
    (tmp_path / "large").write_bytes(b"x" * 100_001)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("large", "100 kB"), ("binary", "UTF-8")):
        with pytest.raises(Exception, match=message):
            handlers.read_file(str(tmp_path / name))


def test_a_link_is_scored_unless_it_has_mistakes(store):
    handlers = Handlers(store)
    text, names, asks, said = handlers.open_link(Visit("score_text=The+sea&score_models=masks"))
    assert (text, names, said) == ("The sea", ["masks"], [])
    assert isinstance(asks, float)
    text, names, asks, said = handlers.open_link(Visit("score_text=The+sea&score_models=masks&score_models=gone"))
    assert (text, names) == ("The sea", ["masks"])
    assert not isinstance(asks, float)
    assert "'gone'; there are: base, masks" in said[0]["text"]


def test_what_an_address_has_no_room_for_is_said(store):
    scores = scored(store)
    assert "address" not in progress(scores, done=True)[0]["text"]
    assert in_address(TEXT, NAMES)["parameters"]["score_text"] == [TEXT]
    scores.tokens = ["é" * 1000]  # six characters each in an address
    assert "too long for the page's address" in progress(scores, done=True)[0]["text"]
    assert in_address("é" * 1000, NAMES)["parameters"] == {"score_text": [], "score_models": []}
