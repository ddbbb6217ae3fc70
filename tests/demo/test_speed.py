"""Measuring: what is measured and counted, break-even, words, limits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from demo.speed import (
    COUNTED,
    MEASURED,
    LayerSubject,
    Sample,
    SpeedError,
    SpeedRun,
    break_even,
    charts,
    lengths_up_to,
    report,
    round_length,
    verdicts,
)
from demo.tabs.speed import Handlers

from .zoo import SMALL, load_zoo

METHODS = [name for name in SMALL if name in attention.METHODS]
LENGTHS = (64, 128, 256, 512)


@pytest.fixture(scope="module")
def zoo(checkpoints):
    return load_zoo(checkpoints / "base")


def samples(times: list[float], name: str = "m") -> list[Sample]:
    lengths = LENGTHS[: len(times)]
    return [Sample(name, name, n, t, t, 1, 1, 1, 1.0) for n, t in zip(lengths, times, strict=True)]


def finished(run: SpeedRun) -> SpeedRun:
    for _ in run.measure():
        pass
    return run


@pytest.mark.parametrize("level", ["layer", "model"])
def test_every_model_is_measured_at_every_length_with_its_base(zoo, level):
    chosen = [zoo[method] for method in METHODS]
    run = finished(SpeedRun(chosen, level, 100, seconds=60))
    assert run.finished
    assert run.share == 1
    assert run.lengths == [64, 100]
    assert [(s.model, s.length) for s in run.samples] == [
        (name, length) for length in run.lengths for name in ["base", *METHODS]
    ]
    assert all(s.prefill_ms > 0 and s.token_ms > 0 and s.peak_bytes >= s.state_bytes > 0 for s in run.samples)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_counted_is_what_the_mechanism_says(zoo, method):
    loaded = zoo[method]
    first = loaded.model.mechanisms[0]
    for sample in finished(SpeedRun([loaded], "layer", 80, seconds=60)).of(method):
        assert sample.operations == first.operations(sample.length)
        assert sample.keys_read == first.keys_read(sample.length - 1)
    total = sum(mechanism.operations(64) for mechanism in loaded.model.mechanisms)
    assert finished(SpeedRun([loaded], "model", 64, seconds=60)).of(method)[0].operations == total


@torch.inference_mode()
def test_one_layer_can_be_measured_past_the_models_context(zoo):
    subject = LayerSubject(zoo["masks"])
    length = 4 * zoo["masks"].context
    subject.load(length)
    subject.prefill()
    subject.step()
    assert subject.state.seen == length + 1


def test_a_whole_model_ends_at_its_context(zoo):
    context = zoo["masks"].context
    run = SpeedRun([zoo["masks"]], "model", 4096, seconds=60)
    assert max(run.lengths) == context - 8


def test_a_run_that_is_left_keeps_its_samples_and_frees_the_model(zoo):
    run = SpeedRun([zoo["masks"]], "layer", 128, seconds=60)
    steps = run.measure()
    while not run.samples:
        next(steps)
    steps.close()
    assert {sample.length for sample in run.samples} == {64}
    assert not run.finished
    assert zoo["masks"].lock.acquire(blocking=False)
    zoo["masks"].lock.release()


def test_time_is_limited(zoo):
    run = finished(SpeedRun([zoo["masks"]], "layer", 8192, seconds=0))
    assert not run.finished
    assert "limit" in run.doing
    assert run.samples == []


def test_progress_only_grows(zoo):
    run = SpeedRun([zoo["masks"]], "layer", 128, seconds=60)
    shares = [step.share for step in run.measure()]
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[-1] == 1


@given(st.integers(1, 100_000))
def test_lengths_rise_to_the_longest(longest):
    lengths = lengths_up_to(longest)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest


@given(st.integers(0, 3), st.floats(0.2, 5), st.floats(0.2, 5))
def test_break_even_lies_where_the_lines_cross(index, slower, faster):
    slower, faster = 1 + slower, 1 / (1 + faster)
    ours = [slower] * index + [faster] * (4 - index)
    length = break_even(samples(ours), samples([1.0] * 4), "prefill_ms")
    if index == 0:
        assert length == LENGTHS[0]
    else:
        assert LENGTHS[index - 1] < length < LENGTHS[index]


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([2, 2, 2, 2], None), ([0.5, 0.5, 0.5, 2], None), ([2, 0.5, 2, 0.5], 256 * 2**0.5), ([2, 1, 1, 1], 128)],
)
def test_break_even_counts_only_what_lasts(ours, expected):
    assert break_even(samples(ours), samples([1.0] * 4), "prefill_ms") == (expected and pytest.approx(expected))


def test_break_even_of_nothing():
    assert break_even([], samples([1.0]), "prefill_ms") is None


@given(st.floats(1, 1e6))
def test_lengths_are_said_with_two_digits(length):
    assert round_length(length) == pytest.approx(length, rel=0.06, abs=0.5)
    assert len(str(round_length(length)).rstrip("0")) <= 2


def told(zoo, ours: list[float]) -> str:
    run = SpeedRun([zoo["masks"]], "layer", 512, seconds=1)
    run.samples = samples(ours, "masks") + samples([1.0] * 4, "base")
    return verdicts(run)[0]


def test_it_is_said_plainly_where_a_method_is_slower(zoo):
    assert told(zoo, [3, 3, 3, 2]) == (
        "masks, reading a text: slower than base up to 512 tokens; at 512 it takes 2.0 times as long."
    )
    assert told(zoo, [4, 2, 0.5, 0.25]) == (
        "masks, reading a text: slower than base below about 180 tokens (4.0 times as long at 64 tokens), "
        "no slower from there on; 4.0 times as fast at 512."
    )
    assert told(zoo, [0.5, 0.5, 0.1, 0.05]) == (
        "masks, reading a text: no slower than base at any length measured; 2.0 times as fast at 64 tokens, "
        "20 times at 512."
    )


def test_charts_have_a_curve_a_model_and_mark_the_break_even(zoo):
    run = SpeedRun([zoo["masks"]], "layer", 512, seconds=1)
    assert charts(run, MEASURED) == []
    run.samples = samples([4, 2, 0.5, 0.25], "masks") + samples([1.0] * 4, "base")
    prefill, token, memory = charts(run, MEASURED)
    assert [(series["name"], series["color"]) for series in prefill["series"]] == [("base", 0), ("masks", 1)]
    assert prefill["events"][0]["label"] == token["events"][0]["label"] == "masks from 180"
    assert memory["events"] == []
    assert [chart["title"] for chart in charts(run, COUNTED)] == ["Operations", "Keys read", "Memory of the text"]


def test_a_report_is_plain_data(zoo):
    result = report(finished(SpeedRun([zoo["masks"]], "layer", 64, seconds=60)))
    assert set(result["samples"][0]) == set(Sample.__dataclass_fields__)
    assert set(result["break_even"]["masks"]) == {"prefill_ms", "token_ms"}
    assert len(result["verdicts"]) == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([], "layer", 512), "Choose 1 to 3 models"),
        ((["base"] * 9, "layer", 512), "Choose 1 to 3 models"),
        ((["<b>"], "layer", 512), "No model <b>; there are: base, masks"),
        ((["base"], "galaxy", 512), "'layer' or 'model'"),
        ((["base"], "layer", 10**9), "64 to 8,192"),
        ((["base"], "layer", "many"), "64 to 8,192"),
        ((None, None, None), "Choose 1 to 3 models.*'layer' or 'model'.*64 to 8,192"),
    ],
)
def test_bad_requests_name_all_that_is_wrong(store, arguments, problem):
    with pytest.raises(SpeedError, match=problem):
        Handlers(store)._run(*arguments)
