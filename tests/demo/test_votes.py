"""Votes of the blind test: how they are kept, and what follows from them."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.votes import (
    Text,
    Vote,
    bradley_terry,
    dump,
    main,
    merged,
    read,
    reading_seconds,
    standings,
    table,
    verdict,
    wilson,
)

BASE = Text("base", "softmax", 0.0, 20.0)
NSA = Text("nsa", "nsa", 0.03, 21.0)


def vote(number: int, first=BASE, second=NSA, base="first", better="tie") -> Vote:
    return Vote(f"{number:032x}", f"2026-01-01T00:00:{number:02}", "x", number, 120, first, second, base, better, 30.0)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_that_of_the_literature(successes, total, low, high):
    """Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3."""
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share_and_is_the_mirror_of_the_other_side(pair):
    found, total = pair
    low, high = wilson(found, total)
    assert 0 <= low <= found / total <= high <= 1
    assert wilson(total - found, total) == pytest.approx((1 - high, 1 - low))


def test_two_that_met_have_the_odds_of_their_wins():
    games = [("a", "base", 1.0)] * 3000 + [("a", "base", 0.0)] * 1000
    assert bradley_terry(games, "base")["a"] == pytest.approx(0.75, abs=1e-3)
    assert bradley_terry([("base", "a", 0.5)] * 10, "base")["a"] == pytest.approx(0.5)


def test_strengths_are_found_again_through_others():
    """b never met the base; that it beats a, which beats the base, says how they compare."""
    odds = {"base": 1.0, "a": 2.0, "b": 6.0}
    draw = random.Random(0)
    games = []
    for first, second in [("base", "a"), ("a", "b")] * 4000:
        share = odds[first] / (odds[first] + odds[second])
        games.append((first, second, float(draw.random() < share)))
    fitted = bradley_terry(games, "base")
    assert fitted == pytest.approx({"a": 2 / 3, "b": 6 / 7}, abs=0.02)


def test_who_always_won_is_not_infinitely_better():
    assert 0.5 < bradley_terry([("a", "base", 1.0)] * 3, "base")["a"] < 1


def test_standings_count_what_was_asked():
    votes = [vote(i, base="first", better="first") for i in range(3)]  # found
    votes += [vote(i, NSA, BASE, base="first", better="first") for i in range(3, 5)]  # took nsa for the base
    other = Text("masks", "masks")
    votes.append(vote(9, NSA, other, base=None, better="second"))
    by_name = {standing.model: standing for standing in standings(votes, resamples=20)}
    assert set(by_name) == {"nsa", "masks"}
    nsa = by_name["nsa"]
    assert (nsa.asked, nsa.found, nsa.votes) == (5, 3, 6)
    assert nsa.found_interval == wilson(3, 5)
    assert by_name["masks"].asked == 0
    assert verdict(by_name["masks"]) == "not asked"
    assert by_name["masks"].preferred > nsa.preferred
    low, high = nsa.preferred_interval
    assert low <= nsa.preferred <= high
    assert standings([]) == []


def test_verdicts_need_more_than_chance():
    sure = standings([vote(i) for i in range(20)], resamples=2)[0]
    assert verdict(sure) == "told from the base"
    wrong = standings([vote(i, base="second") for i in range(20)], resamples=2)[0]
    assert verdict(wrong) == "taken for the base"
    mixed = standings([vote(i, base="second" if i % 2 else "first") for i in range(20)], resamples=2)[0]
    assert verdict(mixed) == "not told from chance so far"


def test_votes_come_back_from_their_lines_and_what_is_no_vote_is_named():
    votes = [vote(1), vote(2, better="second")]
    text = dump(votes) + "\nnonsense\n" + json.dumps({"id": "x"}) + "\n"
    again, problems = read(text, "file")
    assert again == votes
    assert [problem.split(":")[0] for problem in problems] == ["file, line 4", "file, line 5"]


def test_files_are_merged_each_vote_once(tmp_path, capsys):
    (tmp_path / "a").write_text(dump([vote(2), vote(1)]))
    (tmp_path / "b").write_text(dump([vote(2), vote(3)]) + "{}\n")
    out = tmp_path / "all"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "gone"), "--output", str(out)]) == 2
    said = capsys.readouterr()
    assert "3 votes; the base was found in 3 of 3" in said.out
    assert "b, line 3" in said.err
    assert "gone" in said.err
    assert read(out.read_text())[0] == [vote(1), vote(2), vote(3)]
    assert main([str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["model"] == "nsa"


def test_merging_keeps_the_order_of_time():
    assert [v.seed for v in merged([vote(3), vote(1), vote(3), replace(vote(2), seconds=1.0)])] == [1, 2, 3]


def test_a_table_has_a_row_for_each_variant():
    shown = table([vote(1), vote(2)])
    assert [len(row) for row in shown["rows"]] == [len(shown["headers"])]


def test_reading_takes_time():
    assert reading_seconds(["one two three four", "five six seven eight"]) == 1.0
