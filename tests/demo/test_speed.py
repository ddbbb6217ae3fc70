"""Measuring: what is measured, break-even and noise, words, limits; and counting."""

import base64
import json
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from urllib.parse import urlencode

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

import attention
from demo import counting
from demo.busy import BUSY, COMPUTING
from demo.costs_table import costs_table
from demo.counting import Counted
from demo.measured import Measured, Sample, charts, packed, report, rounded, unpacked, verdicts
from demo.models import LoadedModel
from demo.ratios import Ratio, break_even, falling, interval, ratio, round_length, verdict
from demo.speed import AttentionSubject, SpeedError, SpeedRun, lengths_up_to
from demo.tabs.speed import ALL_LAYERS, Handlers, read_link, settings_in_address

from .zoo import SMALL, load_zoo

METHODS = [name for name in SMALL if name in attention.METHODS]
LENGTHS = (64, 128, 256, 512)


@pytest.fixture(scope="module")
def zoo(checkpoints):
    return load_zoo(checkpoints / "base")


def finished(run: SpeedRun) -> SpeedRun:
    for _ in run.measure():
        pass
    return run


def ratios(*middles: float, noise: float = 1.05) -> list[Ratio]:
    """Ratios at 64, 128, …, with intervals of a factor `noise` both ways."""
    return [Ratio(n, m, m / noise, m * noise) for n, m in zip(LENGTHS, middles, strict=False)]


@pytest.mark.parametrize("level", ["attention", "model"])
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
    assert all(s.prefill_spread[0] <= s.prefill_ms <= s.prefill_spread[1] for s in run.samples)
    assert all(s.token_spread[0] <= s.token_ms <= s.token_spread[1] for s in run.samples)
    assert {key: [each.length for each in found] for key, found in run.ratios.items()} == {
        (name, quantity): [64, 100] for name in METHODS for quantity in ("prefill_ms", "token_ms")
    }


@torch.inference_mode()
def test_all_layers_are_measured_unless_one_is_named(zoo):
    loaded = zoo["masks"]
    sizes = []
    for layers in (None, [0], [1]):
        subject = AttentionSubject(loaded, layers)
        subject.load(96)
        subject.prefill()
        sizes.append(subject.state_bytes())
    assert sizes[0] == sizes[1] + sizes[2]
    assert sizes[1] < sizes[2]  # layer 1 keeps every key, for some of its places the text decides on
    with pytest.raises(SpeedError, match="layers 0 to 1"):
        AttentionSubject(loaded, [2])


@torch.inference_mode()
def test_attention_can_be_measured_past_the_models_context(zoo):
    subject = AttentionSubject(zoo["masks"])
    length = 4 * zoo["masks"].context
    subject.load(length)
    subject.prefill()
    subject.step()
    assert {state.seen for state in subject.states} == {length + 1}


def test_a_whole_model_ends_at_its_context_and_that_is_said(zoo):
    context = zoo["masks"].context
    run = SpeedRun([zoo["masks"]], "model", 4096, seconds=60)
    assert max(run.lengths) == context - 8
    finished(run)
    said = verdicts(run.measured)[-1]
    assert said.startswith(f"4,096 tokens were asked for, {context - 8} reached: the models hold no more")
    found = report(run.measured)
    assert (found["asked"], found["reached"], found["finished"]) == (4096, context - 8, True)


def test_what_was_not_reached_in_time_is_said(zoo):
    run = finished(SpeedRun([zoo["masks"]], "attention", 8192, seconds=0))
    assert not run.finished
    assert "limit" in run.doing
    assert run.samples == []
    assert verdicts(run.measured) == [
        "8,192 tokens were asked for, 0 reached: 0 s are the limit for one measurement. Counted, below, goes on."
    ]
    run = finished(SpeedRun([zoo["masks"]], "attention", 64, seconds=60))
    assert verdicts(run.measured)[-1].startswith("masks, one more")


def test_a_run_that_is_left_keeps_its_samples_and_frees_the_model(zoo):
    run = SpeedRun([zoo["masks"]], "attention", 128, seconds=60)
    steps = run.measure()
    while not run.samples:
        next(steps)
    steps.close()
    assert {sample.length for sample in run.samples} == {64}
    assert not run.finished
    assert zoo["masks"].lock.acquire(blocking=False)
    zoo["masks"].lock.release()


def test_progress_only_grows(zoo):
    run = SpeedRun([zoo["masks"]], "attention", 128, seconds=60)
    shares = [step.share for step in run.measure()]
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[-1] == 1


def test_measuring_waits_while_a_text_is_written(zoo):
    run = SpeedRun([zoo["masks"]], "attention", 64, seconds=60)
    steps = run.measure()
    next(steps)
    with BUSY.doing(COMPUTING):
        assert "Waiting" in [next(steps).doing for _ in range(3)][-1]
    for _ in steps:
        pass
    assert run.finished


def test_rounds_in_which_a_text_was_written_do_not_count(zoo, monkeypatch):
    run = SpeedRun([zoo["masks"]], "attention", 64, seconds=60)
    base = run.subjects[0]
    passes = []

    def prefill() -> None:
        passes.append(len(passes))
        if len(passes) == 3:
            time.sleep(0.5)
            with BUSY.doing(COMPUTING):
                pass
        type(base).prefill(base)

    monkeypatch.setattr(base, "prefill", prefill)
    finished(run)
    assert run.samples[0].prefill_ms < 400
    assert run.samples[0].prefill_spread[1] < 400


@given(st.integers(1, 100_000))
def test_lengths_rise_to_the_longest(longest):
    lengths = lengths_up_to(longest)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest


# Comparing.


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_a_fit_never_rises_and_keeps_the_mean(values):
    fit = falling(values)
    assert len(fit) == len(values)
    assert all(a >= b - 1e-9 for a, b in pairwise(fit))
    assert sum(fit) == pytest.approx(sum(values), abs=1e-6)
    if all(a >= b for a, b in pairwise(values)):
        assert fit == pytest.approx(values)


def test_a_fit_pools_what_rises():
    assert falling([3, 1, 2, 0]) == [3, 1.5, 1.5, 0]


@pytest.mark.parametrize("count", [5, 8, 12, 15])
def test_the_median_lies_in_its_interval_as_often_as_is_said(count):
    low, high = interval(count)
    rng = random.Random(count)
    inside = 0
    for _ in range(4000):
        values = sorted(rng.random() for _ in range(count))
        inside += values[low] <= 0.5 <= values[high]
    assert inside / 4000 >= 0.9 - 0.015
    if low:
        assert inside / 4000 < 0.999


def test_slow_rounds_that_hit_both_do_not_matter():
    load = [1, 1, 5, 1, 9, 1, 2, 1]
    found = ratio(64, [2 * each for each in load], load)
    assert (found.middle, found.low, found.high) == (2, 2, 2)


@given(st.integers(0, 3), st.floats(0.2, 5), st.floats(0.2, 5))
def test_break_even_lies_where_the_lines_cross(index, slower, faster):
    found = break_even(ratios(*[1 + slower] * index, *[1 / (1 + faster)] * (4 - index)))
    if index == 0:
        assert found.length == LENGTHS[0]
        assert found.slower_to is None
    else:
        assert LENGTHS[index - 1] < found.length < LENGTHS[index]
        assert (found.slower_to, found.faster_from) == (LENGTHS[index - 1], LENGTHS[index])


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((2, 2, 2, 2), None), ((2, 1, 1, 1), 128), ((4, 0.4, 1.6, 0.25), 64 * 2 ** (1.3863 / (1.3863 + 0.2231)))],
)
def test_break_even_is_that_of_the_fit(ours, expected):
    assert break_even(ratios(*ours)).length == (expected and pytest.approx(expected, rel=1e-3))


@given(st.floats(1, 1e6))
def test_lengths_are_said_with_two_digits(length):
    assert round_length(length) == pytest.approx(length, rel=0.06, abs=0.5)
    assert len(str(round_length(length)).rstrip("0")) <= 2


def test_it_is_said_plainly_where_a_method_is_slower():
    assert verdict(ratios(3, 3, 3, 2), "base") == (
        "slower than base up to 512 tokens (3.0 times (2.9 to 3.2) as long at 64); at 512 it takes 2.0 times "
        "(1.9 to 2.1) as long."
    )
    assert verdict(ratios(4, 2, 0.5, 0.25), "base") == (
        "slower than base up to 128 tokens (4.0 times (3.8 to 4.2) as long at 64), faster from 256 on (4.0 times "
        "(3.8 to 4.2) as fast at 512); equal at about 180."
    )
    assert verdict(ratios(0.5, 0.5, 0.1, 0.05), "base") == (
        "faster than base at every length measured (20 times (19 to 21) as fast at 512)."
    )


def test_noise_is_not_stated_as_fact():
    assert verdict(ratios(1.4, 0.7, 1.3, 0.8, noise=2), "base") == (
        "too noisy to tell from base up to 512 tokens: their times overlap at every length."
    )
    assert verdict(ratios(3, 1.1, 0.9, 1, noise=1.5), "base") == (
        "slower than base up to 64 tokens (3.0 times (2.0 to 4.5) as long at 64); too noisy to tell from there on."
    )
    assert verdict(ratios(1.1, 1, 0.9, 0.3, noise=1.5), "base") == (
        "too noisy to tell from base below 512 tokens, faster from 512 on (3.3 times (2.2 to 5.0) as fast at 512)."
    )


def told(zoo, *middles: float, noise: float = 1.05) -> Measured:
    run = SpeedRun([zoo["masks"]], "attention", 512, seconds=1)
    run.samples = [
        Sample(name, name, length, time, time, (time, time), (time, time), 1, 1)
        for name, times in (("masks", middles), ("base", (1.0,) * 4))
        for length, time in zip(LENGTHS, times, strict=True)
    ]
    run.ratios = {("masks", quantity): ratios(*middles, noise=noise) for quantity in ("prefill_ms", "token_ms")}
    return run.measured


def test_charts_have_a_curve_a_model_its_spread_and_mark_the_break_even(zoo):
    assert charts(SpeedRun([zoo["masks"]], "attention", 512, seconds=1).measured) == []
    prefill, token, memory = charts(told(zoo, 4, 2, 0.5, 0.25))
    assert [(series["name"], series["color"]) for series in prefill["series"]] == [("base", 0), ("masks", 1)]
    assert prefill["series"][1]["spread"] == [[64, 4, 4], [128, 2, 2], [256, 0.5, 0.5], [512, 0.25, 0.25]]
    assert prefill["events"][0]["label"] == token["events"][0]["label"] == "masks from 180"
    assert memory["events"] == []
    assert charts(told(zoo, 1.2, 1, 1, 0.9, noise=3))[0]["events"] == []


def test_a_report_is_plain_data(zoo):
    result = report(finished(SpeedRun([zoo["masks"]], "attention", 64, seconds=60)).measured)
    assert set(result["samples"][0]) == set(Sample._fields)
    assert set(result["break_even"]["masks"]) == {"prefill_ms", "token_ms"}
    assert set(result["break_even"]["masks"]["token_ms"]) == {"length", "slower_to", "faster_from"}
    assert len(result["verdicts"]) == 2


# In the address.


def test_what_was_measured_comes_back_from_the_address_as_it_was(zoo):
    found = finished(SpeedRun([zoo["masks"], zoo["nsa"]], "attention", 128, seconds=60)).measured
    again = unpacked(packed(found))
    assert again == found
    assert (charts(again), verdicts(again), report(again)) == (charts(found), verdicts(found), report(found))
    assert all(rounded(sample.prefill_ms) == sample.prefill_ms for sample in found.samples)


def test_six_models_at_all_lengths_fit_into_an_address(zoo):
    names = [f"a-model-of-many-words-{index}" for index in range(6)]
    loaded = [LoadedModel(replace(zoo["masks"].entry, name=name), *vars_of(zoo["masks"])) for name in names]
    run = SpeedRun(loaded, "attention", 8192, seconds=1)
    draw = random.Random(0)

    def time() -> float:
        return rounded(draw.uniform(0.01, 5000))

    run.samples = [
        Sample(name, "masks", length, time(), time(), (time(), time()), (time(), time()), draw.randrange(10**9), 10**7)
        for length in run.lengths
        for name in ["base", *names]
    ]
    run.ratios = {
        (name, quantity): [Ratio(length, time(), time(), time()) for length in run.lengths]
        for name in names
        for quantity in ("prefill_ms", "token_ms")
    }
    assert 0 < len(packed(run.measured)) < 4000


SAMPLES, COMPARISONS, LENGTHS_AT, WHERE = map(Measured._fields.index, ("samples", "comparisons", "lengths", "where"))


def put(values: list, index: int, value: object) -> None:
    values[index] = value


def vars_of(loaded: LoadedModel) -> tuple:
    return loaded.model, loaded.tokenizer, loaded.made_from


@pytest.mark.parametrize(
    "change",
    [
        lambda word: "<b>",
        lambda word: "",
        lambda word: "é" + word,
        lambda word: word[:-9],
        lambda word: again(word, lambda data: put(data[SAMPLES][0], 3, -1)),
        lambda word: again(word, lambda data: put(data[SAMPLES][0], 3, "1e999")),
        lambda word: again(word, lambda data: data[COMPARISONS][0][2].clear()),
        lambda word: again(word, lambda data: put(data[COMPARISONS][0][2][0], 2, 0)),
        lambda word: again(word, lambda data: put(data, LENGTHS_AT, [])),
        lambda word: again(word, lambda data: put(data, WHERE, "x" * 400_000)),
    ],
)
def test_results_that_anyone_may_have_written_are_refused(zoo, change):
    with pytest.raises(ValueError, match="cannot be read; Measure takes them anew"):
        unpacked(change(packed(told(zoo, 4, 2, 0.5, 0.25))))


def again(word: str, change: Callable[[list], object]) -> str:
    """The word with its data changed."""
    data = json.loads(zlib.decompress(base64.urlsafe_b64decode(word + "==")))
    change(data)
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(data).encode())).decode()


def test_settings_come_back_from_the_address(store):
    parameters = settings_in_address(["masks"], "model", "1", 512)["parameters"]
    link = read_link(QueryParams(urlencode(parameters, doseq=True)), store)
    assert link.problems == []
    layer = link.settings.pop("speed_layer")
    assert (layer.value, [value for _, value in layer.choices]) == ("1", [ALL_LAYERS, "1"])
    assert link.settings == {"speed_models": ["masks"], "speed_level": "model", "speed_longest": 512}
    assert read_link(QueryParams("tab=speed"), store).settings == {}


def test_mistakes_in_an_address_are_said(store):
    link = read_link(
        QueryParams("speed_models=gone&speed_level=x&speed_layer=9999&speed_longest=7&speed_results=x"), store
    )
    words = ("gone", "'x'", "'9999'", "'7'", "Measure")
    assert [word in said for word, said in zip(words, link.problems, strict=True)] == [True] * 5
    assert (link.settings, link.found) == ({}, None)


# Counting.


@pytest.mark.parametrize("method", SMALL)
def test_what_is_counted_is_the_sum_of_what_the_mechanisms_say(zoo, method):
    mechanisms = zoo[method].model.mechanisms
    for layers in (None, [0], [1]):
        chosen = mechanisms if layers is None else [mechanisms[layer] for layer in layers]
        for count in Counted([zoo[method]], "attention", layers, longest=300).of(method):
            assert count.operations == sum(mechanism.operations(count.length) for mechanism in chosen)
            assert count.keys_read == sum(mechanism.keys_read(count.length - 1) for mechanism in chosen)
            assert count.keys_scored == sum(mechanism.keys_scored(count.length - 1) for mechanism in chosen)


@pytest.mark.parametrize("method", ["base", *SMALL])
@torch.inference_mode()
def test_memory_is_counted_as_states_have_it_at_any_length(zoo, method):
    counter = counting.Counter(zoo[method], "attention")
    for length in (64, 700, 1024, 3000):
        subject = AttentionSubject(zoo[method])
        subject.load(length)
        subject.prefill()
        assert counter.at(length).state_bytes == pytest.approx(subject.state_bytes(), rel=0.02)


def test_counting_reaches_a_million_tokens_past_any_context(zoo):
    for level in ("attention", "model"):
        found = Counted([zoo[method] for method in METHODS], level)
        assert found.lengths[-1] == 2**20
        base = found.of("base")[-1]
        assert base.keys_read == 2 * 2**20
        assert all(count.state_bytes <= 1.3 * base.state_bytes for count in found.counts)


def test_the_whole_model_counts_what_is_the_same_for_every_method(zoo):
    attention_alone, whole = (Counted([zoo["masks"]], level, longest=64) for level in ("attention", "model"))
    rest = [w.operations - a.operations for w, a in zip(whole.counts, attention_alone.counts, strict=True)]
    width, vocabulary = 16, zoo["base"].model.config.vocab_size
    assert set(rest) == {2 * 64 * (2 * 12 * width * width + vocabulary * width)}


@pytest.mark.parametrize("quantity", ["operations", "keys"])
def test_a_counted_break_even_is_exact(zoo, quantity):
    found = Counted([zoo["nsa"], zoo["performer"], zoo["masks"]], "attention")

    def needs(name: str, length: int) -> int:
        counter = found.counters[name]
        return counter.operations(length) if quantity == "operations" else sum(counter.keys(length))

    for name, base in found.comparisons:
        even = found.break_even(name, base, quantity)
        assert even is not None or name == "masks"  # whose second layer goes through every token, besides reading some
        if even is not None and even > 1:
            assert needs(name, even) <= needs(base, even)
            assert needs(name, even - 1) > needs(base, even - 1)


def test_keys_scored_are_counted_beside_keys_read(zoo):
    count = Counted([zoo["masks"]], "attention", [1], longest=4096).of("masks")[-1]
    assert (count.keys_read, count.keys_scored) == (12, 4096)  # window(6), top(4), induction(2)


def test_the_table_says_what_is_known_and_what_is_not(zoo, tmp_path):
    found = Counted([zoo["masks"], zoo["nsa"]], "attention")
    table = costs_table(found, None)
    assert [row[0] for row in table["rows"]] == ["base", "masks", "nsa"]
    by_header = [dict(zip(table["headers"], row, strict=True)) for row in table["rows"]]
    assert by_header[2]["Reading: fewer operations from"] == f"{found.break_even('nsa', 'base', 'operations'):,}"
    assert by_header[2]["Reading: faster from"] == "–"
    assert (by_header[0]["Reading: faster from"], by_header[0]["A token: fewer keys from"]) == ("", "")
    kept = found.of("base")[found.lengths.index(131072)].state_bytes / 1e6
    assert by_header[0]["Kept after 131,072, MB"] == (f"{kept:.3g}" if kept < 100 else f"{kept:,.0f}")
    results = report(told(zoo, 4, 2, 0.5, 0.25))
    table = costs_table(found, results)
    measured = dict(zip(table["headers"], table["rows"][1], strict=True))
    assert measured["Reading: faster from"] == "about 180"
    assert measured["Reading 512, ms"] == "0.25 (0.25 to 0.25)"
    assert measured["Hits: nats above the base"] == "–"
    noisy = costs_table(found, report(told(zoo, 1.2, 1, 1, 0.9, noise=3)))
    assert dict(zip(noisy["headers"], noisy["rows"][1], strict=True))["A token: faster from"] == "?"


def test_counts_come_with_the_choice_and_once(store):
    handlers = Handlers(store)
    choices, said, shown, table, state = handlers.count(["masks"], "attention", ALL_LAYERS, None, None)
    assert choices.choices == [(ALL_LAYERS, ALL_LAYERS), ("0", "0"), ("1", "1")]
    assert said[0]["text"].startswith("masks, counted: reading a text takes no more operations than base's")
    assert [chart["title"] for chart in shown] == [
        "Operations",
        "Keys read",
        "Keys read and scored",
        "Memory of the text",
    ]
    assert shown[0]["series"][0]["points"][-1][0] == 2**20
    assert [row[0] for row in table["rows"]] == ["base", "masks"]
    *again, same, _ = handlers.count(["masks"], "attention", ALL_LAYERS, None, state)
    assert all(isinstance(each, dict) and each.get("__type__") == "update" for each in again)
    assert same == table
    assert handlers.count([], "attention", ALL_LAYERS, None, state)[2:4] == ([], {})
    assert "layers 0 to 1" in handlers.count(["masks"], "attention", "7", None, None)[1][0]["text"]


def test_the_table_follows_what_is_measured_and_the_layers_that_are_shown(store, zoo):
    """Both come to it by one event, so a table of the layers shown before cannot come last."""
    handlers, found = Handlers(store), told(zoo, 4, 2, 0.5, 0.25)
    *_, table, _ = handlers.count(["masks"], "attention", "1", found, ("masks", "attention", ALL_LAYERS))
    row = dict(zip(table["headers"], table["rows"][0], strict=True))
    one = Counted([store.get("masks")], "attention", [1])
    kept = one.of("base")[one.lengths.index(8192)].state_bytes / 1e6
    assert (row["Kept after 8,192, MB"], row["Reading 512, ms"]) == (f"{kept:.3g}", "1 (1 to 1)")


def test_stop_says_that_nothing_is_measured(store):
    class Request:
        session_hash = "x"

    said, *_, start, stop = Handlers(store).stop(["masks"], "attention", ALL_LAYERS, 512, Request())
    assert said == {"share": 0.0, "text": "Nothing is being measured."}
    assert (start.interactive, stop.interactive) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([], "attention", 512), "Choose 1 to 3 models"),
        ((["base"] * 9, "attention", 512), "Choose 1 to 3 models"),
        ((["<b>"], "attention", 512), "No model <b>; there are: base, masks"),
        ((["base"], "galaxy", 512), "'attention' or 'model'"),
        ((["base"], "attention", 10**9), "64 to 8,192"),
        ((["base"], "attention", "many"), "64 to 8,192"),
        ((["base"], "attention", 512, "-1"), "A layer is a number from 0"),
        ((["base"], "attention", 512, "9"), "layers 0 to 1"),
        ((None, None, None), "Choose 1 to 3 models.*'attention' or 'model'.*64 to 8,192"),
    ],
)
def test_bad_requests_name_all_that_is_wrong(store, arguments, problem):
    with pytest.raises(SpeedError, match=problem):
        Handlers(store)._run(*arguments)
