"""Hits of associative recall, marked on generated and on scored tokens."""

import json

import numpy as np
import pytest

from attention.files import PAIRS
from demo import hits
from demo.engine import Generation
from demo.runs import Settings
from demo.score import score_text
from demo.tabs.score import means_table, text_view
from demo.views import columns_view
from trainer.hits import PairTable, hit_distances, save_pairs

TABLE = PairTable(np.empty(0, np.int64), 10**6, "a text in which nothing is frequent")
TEXT = "Anna Karenina looked at the sea. Then Anna Karenina looked away."


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every base has a table."""
    monkeypatch.setattr(hits, "_table", lambda base: TABLE)


def test_a_table_is_read_from_beside_the_base(store):
    base = store.get("base")
    path = base.entry.folder / PAIRS
    assert hits.distances(base, [5, 6, 7, 5, 6]) == []
    hits._TABLES.clear()
    save_pairs(TABLE, path, base.tokenizer)
    try:
        assert hits.distances(base, [5, 6, 7, 5, 6]) == [0, 0, 0, 0, 3]
        hits._TABLES.clear()
        path.write_bytes(b"broken")
        assert hits.distances(base, [5, 6, 7, 5, 6]) == []
    finally:
        path.unlink()
        hits._TABLES.clear()


def test_generated_hits_are_marked_and_say_how_far_back(store, known):
    *_, run = Generation(store, Settings(TEXT, ("base", "masks"), temperature=0, max_new_tokens=20)).stream()
    for column, view in zip(run.columns, columns_view(run, store), strict=True):
        assert column.hits == hit_distances(column.token_ids, TABLE)[column.prompt_length :].tolist()
        tokens = [json.loads(line) for line in view["lines"].splitlines()]
        assert [token.get("hit", False) for token in tokens] == [distance > 0 for distance in column.hits]
        said = [dict(token["details"]).get("To be looked up") for token in tokens]
        assert [text is not None for text in said] == [distance > 0 for distance in column.hits]


def test_means_of_hits_are_those_of_the_tokens_that_are_marked(store, known):
    *_, scores = score_text(store, ["base", "masks"], TEXT)
    marked = [row for row in scores.rows() if row["hit"]]
    assert 3 <= len(marked) < len(scores.rows())
    masks = next(mean for mean in scores.means_of_hits() if mean["name"] == "masks")
    assert masks["tokens"] == len(marked)
    assert masks["kl"] == pytest.approx(np.mean([row["models"]["masks"]["kl"] for row in marked]), abs=1e-4)
    table = means_table(scores)
    assert table["headers"][-3:] == ["KL on hits", "Perplexity on hits", "Hits"]
    assert table["rows"][1][-1] == str(len(marked))
    (view,) = text_view(scores, "masks", 0)
    tokens = [json.loads(line) for line in view["lines"].splitlines()]
    assert sum(token.get("hit", False) for token in tokens) == len(marked)


def test_without_a_table_nothing_is_said_of_hits(store):
    *_, scores = score_text(store, ["base", "masks"], TEXT)
    assert scores.means_of_hits() == []
    assert {row["hit"] for row in scores.rows()} == {None}
    assert means_table(scores)["headers"][-1] == "Tokens"
