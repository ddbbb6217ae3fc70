"""Fidelity on some of a text's tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.fidelity import Reading
from trainer.slices import by_position, by_recall, slice_by, slice_tokens


def reading(kl: list[float], loss: list[float], base_loss: list[float]) -> Reading:
    arrays = [np.array(values, np.float32) for values in (kl, loss, base_loss)]
    return Reading(*arrays, np.ones(len(kl), np.float32))


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_means_and_errors_are_those_of_the_definition(count, blocks, seed):
    rng = np.random.default_rng(seed)
    kl, loss, base_loss = rng.random((3, count)).astype(np.float32)
    which, chosen = np.sort(rng.integers(0, blocks, count)), rng.random(count) < 0.5
    which -= which.min()
    found = slice_tokens(Reading(kl, loss, base_loss, kl), chosen, which)
    assert found.tokens == chosen.sum()
    if not chosen.any():
        assert (found.kl, found.kl_error, found.ce_excess, found.base_loss) == (None,) * 4
        return
    assert found.base_loss == pytest.approx(base_loss[chosen].mean())
    number = which[-1] + 1
    for values, mean, error in (
        (kl, found.kl, found.kl_error),
        (loss - base_loss, found.ce_excess, found.ce_excess_error),
    ):
        assert mean == pytest.approx(values[chosen].mean(), abs=1e-6)
        residuals = [(values - mean)[chosen & (which == block)].sum() for block in range(number)]
        if number == 1:
            assert error is None
        else:
            square = number / (number - 1) * sum(one**2 for one in residuals)
            assert error == pytest.approx(square**0.5 / chosen.sum(), abs=1e-6)


def test_the_error_over_blocks_of_one_token_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=400).astype(np.float32)
    found = slice_tokens(reading(values, values, 0 * values), np.ones(400, bool), np.arange(400))
    assert found.kl_error == pytest.approx(values.std(ddof=1) / 20, rel=1e-4)


def test_the_error_tells_how_far_means_of_other_blocks_lie():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        level, sizes = rng.normal(size=20), rng.integers(1, 9, 20)
        values = np.repeat(level, sizes) + 0.1 * rng.normal(size=sizes.sum())
        blocks = np.repeat(np.arange(20), sizes)
        found.append(slice_tokens(reading(values, values, values), np.ones(len(values), bool), blocks))
    assert np.mean([one.kl_error for one in found]) == pytest.approx(np.std([one.kl for one in found]), rel=0.15)


def test_hits_by_distance():
    distances = np.array([0, 1, 64, 65, 256, 257, 1024, 1025])
    short, long = by_recall(distances, 1026), by_recall(distances, 1027)
    assert {name: np.flatnonzero(chosen).tolist() for name, chosen in long.items()} == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7],
        "other": [0],
        "hits": [1, 2, 3, 4, 5, 6, 7],
        "hits, 1 to 64 back": [1, 2],
        "hits, 65 to 256 back": [3, 4],
        "hits, over 256 back": [5, 6, 7],
        "hits, over 1,024 back": [7],
    }
    assert list(short) == list(long)[:-1]


@pytest.mark.parametrize(
    ("context", "names"),
    [
        (16, ["0 to 15"]),
        (128, ["0 to 127"]),
        (129, ["0 to 127", "128 to 128"]),
        (1024, ["0 to 127", "128 to 255", "256 to 511", "512 to 1,023"]),
        (3000, ["0 to 127", "128 to 255", "256 to 511", "512 to 1,023", "1,024 to 2,047", "2,048 to 2,999"]),
    ],
)
def test_buckets_of_positions_double(context, names):
    positions = np.arange(context)
    found = by_position(positions, context)
    assert list(found) == names
    assert np.stack(list(found.values())).sum(0).tolist() == [1] * context
    for name, chosen in found.items():
        first, last = name.replace(",", "").split(" to ")
        assert positions[chosen][[0, -1]].tolist() == [int(first), int(last)]


def test_each_choice_is_a_slice():
    read = reading([1, 2, 3], [1, 1, 1], [0, 1, 2])
    found = slice_by(read, {"first": np.array([1, 0, 0], bool), "rest": np.array([0, 1, 1], bool)}, np.zeros(3, int))
    assert [(one.tokens, one.kl, one.ce_excess, one.base_loss) for one in found.values()] == [
        (1, 1, 1, 0),
        (2, 2.5, -0.5, 1.5),
    ]
