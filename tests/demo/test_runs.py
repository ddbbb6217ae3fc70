"""Runs as data."""

from hypothesis import given
from hypothesis import strategies as st

from demo.runs import Column, Run, Settings, newest


def run_of(tokens: int) -> Run:
    """A run of one model that wrote so many tokens after a prompt of three."""
    return Run(Settings("x", ("base",)), [Column("base", token_ids=[0] * (3 + tokens), prompt_length=3)])


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 10), st.integers(0, 120))
def test_a_history_keeps_the_newest_runs_within_its_limits(sizes, count, tokens):
    runs = [run_of(size) for size in sizes]
    kept = newest(runs, count, tokens)
    assert all(a is b for a, b in zip(kept, runs, strict=False))
    assert len(kept) <= count
    assert len(kept) <= 1 or sum(sizes[: len(kept)]) <= tokens
    if len(kept) < min(len(runs), count):
        assert sum(sizes[: len(kept) + 1]) > tokens
    assert bool(kept) == bool(runs)
