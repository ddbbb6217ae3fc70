"""Generation side by side: what the models write, what it cost, how it ends."""

import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import attention
from demo.engine import Decoder, Generation, keys_used
from demo.limits import Limits
from demo.models import Access, ModelStore, said
from demo.runs import Column, Settings

from .conftest import CONTEXT
from .zoo import load_zoo

SETTINGS = Settings("The old house", ("base", "masks"), max_new_tokens=12)


def finished(store, settings):
    generation = Generation(store, settings)
    for _ in generation.stream():
        pass
    return generation.run


@pytest.mark.parametrize("name", ["base", "masks"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_what_generate_writes(store, name, penalty):
    settings = replace(SETTINGS, models=(name,), temperature=0.0, repetition_penalty=penalty)
    column = finished(store, settings).columns[0]
    loaded = store.get(name)
    expected = loaded.model.generate(
        torch.tensor([column.token_ids[: column.prompt_length]]),
        do_sample=False, repetition_penalty=penalty, max_new_tokens=12, pad_token_id=0,
    )  # fmt: skip
    assert column.token_ids == expected[0].tolist()


def test_same_seed_same_text_whatever_runs_beside_it(store):
    together = finished(store, SETTINGS)
    alone = finished(store, replace(SETTINGS, models=("masks",)))
    other = finished(store, replace(SETTINGS, seed=1))
    assert together.columns[1].token_ids == alone.columns[0].token_ids
    assert together.columns[1].token_ids != other.columns[1].token_ids


def test_sampling_options_narrow_the_choice(store):
    greedy = finished(store, replace(SETTINGS, temperature=0.0, repetition_penalty=1.0))
    one = finished(store, replace(SETTINGS, top_k=1, repetition_penalty=1.0))
    tiny = finished(store, replace(SETTINGS, top_p=1e-6, top_k=0, repetition_penalty=1.0))
    texts = [[column.token_ids for column in run.columns] for run in (greedy, one, tiny)]
    assert texts[0] == texts[1] == texts[2]


def test_columns_grow_one_token_each_in_turn(store):
    lengths = [[c.generated for c in run.columns] for run in map(snapshot, Generation(store, SETTINGS).stream())]
    writing = [pair for pair in lengths if 0 < pair[0] < 12]
    assert all(a - b in (0, 1) for a, b in writing)
    assert all(sum(after) - sum(before) <= 1 for before, after in pairwise(lengths))


def snapshot(run):
    return replace(run, columns=[replace(c, token_ids=list(c.token_ids)) for c in run.columns])


def test_scores_compare_with_the_base_on_the_same_text(store):
    column = finished(store, SETTINGS).columns[1]
    ids = torch.tensor([column.token_ids])
    with torch.no_grad():
        base, variant = (store.get(name).model(ids).logits[0].log_softmax(-1) for name in ("base", "masks"))
    for i, score in enumerate(column.scores):
        at, token = column.prompt_length + i - 1, column.token_ids[column.prompt_length + i]
        assert score.kl == pytest.approx((base[at].exp() * (base[at] - variant[at])).sum().item(), abs=1e-4)
        assert score.probability == pytest.approx(variant[at, token].exp().item(), abs=1e-5)
        assert score.rank == 1 + (variant[at] > variant[at, token]).sum().item()
        assert score.base_rank == 1 + (base[at] > base[at, token]).sum().item()
        assert [p for _, p in score.top] == pytest.approx(variant[at].exp().topk(5).values.tolist(), abs=1e-5)
    assert len(column.scores) == column.generated == 12
    assert max(score.kl for score in column.scores) > 1e-3


def test_the_base_is_no_distance_from_itself_and_the_others_part_from_it(store):
    run = finished(store, SETTINGS)
    base, masks = run.columns
    assert run.reference == "base"
    assert {score.kl for score in base.scores} == {0.0}
    assert base.parts_at is None
    assert base.token_ids[: masks.parts_at] == masks.token_ids[: masks.parts_at]
    assert base.token_ids[masks.parts_at] != masks.token_ids[masks.parts_at]


def test_keys_that_are_gone_through_count_beside_those_read(checkpoints):
    zoo = load_zoo(checkpoints / "base")
    assert keys_used(zoo["base"], 99) == (100, 0)
    mechanisms = zoo["masks"].model.mechanisms
    read = sum(mechanism.keys_read(99) for mechanism in mechanisms) / len(mechanisms)
    assert keys_used(zoo["masks"], 99) == (round(read), 50)  # 100 in the second of two layers


def test_cost(store):
    base, masks = (column.cost for column in finished(store, SETTINGS).columns)
    tokens = len(finished(store, SETTINGS).columns[0].token_ids)
    assert base.keys_read == tokens - 1  # the last token was drawn after one fewer were read
    assert masks.keys_read < base.keys_read
    layers, keys_and_values, width = 2, 2, 16
    assert base.state_bytes == layers * keys_and_values * (tokens - 1) * width * 4
    weights = sum(p.numel() * 4 for p in store.get("base").model.parameters())
    assert base.peak_bytes >= weights + base.state_bytes
    assert base.prefill_ms > 0 < base.ms_per_token
    assert base.tokens_per_second > 0


def test_stop_from_another_thread_keeps_what_is_written_and_compares_it(store):
    generation = Generation(store, SETTINGS)
    stream = generation.stream()
    while generation.run.columns[0].generated < 3:
        next(stream)
    thread = threading.Thread(target=generation.finish)
    thread.start()
    thread.join(20)
    written = [len(column.token_ids) for column in generation.run.columns]
    for _ in stream:
        pass
    assert [len(column.token_ids) for column in generation.run.columns] == written
    for column in generation.run.columns:
        assert (column.stage, column.stopped) == ("done", "stopped")
        assert len(column.scores) == column.generated > 0
        assert column.cost is not None


def test_stop_before_anything_is_written(store):
    generation = Generation(store, SETTINGS)
    assert [c.stage for c in generation.finish().columns] == ["done", "done"]
    for _ in generation.stream():
        pass
    assert [c.generated for c in generation.run.columns] == [0, 0]


def test_a_closed_stream_computes_nothing_more(store):
    generation = Generation(store, SETTINGS)
    stream = generation.stream()
    while generation.run.columns[0].generated < 2:
        next(stream)
    stream.close()
    assert generation.run.columns[0].generated == 2
    assert generation.run.columns[0].scores == []


def test_texts_end_at_the_end_token_the_context_and_the_time_limit(store, checkpoints):
    end = finished(store, replace(SETTINGS, models=("base",))).columns[0]
    store.get("base").model.generation_config.eos_token_id = end.token_ids[end.prompt_length + 3]
    assert finished(store, replace(SETTINGS, models=("base",))).columns[0].stopped == "end"
    long = replace(SETTINGS, models=("masks",), prompt=" a" * 124, max_new_tokens=100)
    column = finished(store, long).columns[0]
    assert (column.stopped, column.prompt_length, len(column.token_ids)) == ("context", CONTEXT // 2, CONTEXT)
    hasty = ModelStore([checkpoints / "base"], Limits(seconds=0.0), Access())
    hasty.get("base")
    column = finished(hasty, replace(SETTINGS, models=("base",))).columns[0]
    assert (column.stopped, column.generated) == ("time", 1)


def test_one_model_failing_leaves_the_others(store, monkeypatch):
    step = Decoder.step

    def failing(self):
        if self.column.name == "masks" and self.column.generated == 2:
            raise RuntimeError("no memory left")
        step(self)

    monkeypatch.setattr(Decoder, "step", failing)
    base, masks, missing = finished(store, replace(SETTINGS, models=("base", "masks", "gone"))).columns
    assert (base.stage, base.generated) == ("done", 12)
    assert (masks.stage, masks.problem) == ("failed", "The model failed: no memory left")
    assert missing.problem == "There is no model 'gone' here; there are: base, masks."


def test_a_comparison_that_fails_leaves_the_text(store, monkeypatch):
    def failing(loaded, column):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("demo.engine.score", failing)
    column = finished(store, SETTINGS).columns[1]
    assert (column.stage, column.generated, column.scores) == ("done", 12, [])
    assert column.problem == "It could not be compared with its base: no memory left"


def test_of_a_prompt_that_is_too_long_the_last_tokens_are_read(store):
    text = " a" * 100 + " b" * 100
    run = finished(store, replace(SETTINGS, prompt=text))
    tail = finished(store, replace(SETTINGS, prompt=" a" * 16 + " b" * 100))
    for column, same in zip(run.columns, tail.columns, strict=True):
        assert (column.stage, column.generated) == ("done", 12)
        assert (column.prompt_length, column.dropped) == (CONTEXT - 12, 200 - (CONTEXT - 12))
        assert column.token_ids == same.token_ids
        assert same.dropped == 0


def test_a_model_whose_numbers_are_not_finite_says_so_and_the_others_go_on(store):
    own = next(p for name, p in store.get("masks").model.named_parameters() if "mechanism" in name)
    with torch.no_grad():
        own.fill_(float("nan"))
    base, broken = finished(store, replace(SETTINGS, temperature=0.0)).columns
    assert (base.stage, base.generated) == ("done", 12)
    assert broken.stage == "failed"
    assert "not finite" in broken.problem


@pytest.mark.parametrize("error", [RecursionError("too deep"), TypeError(), MemoryError("no room")])
def test_whatever_goes_wrong_as_a_model_loads_stays_in_its_column(store, monkeypatch, error):
    load = attention.load

    def failing(folder, **options):
        if folder.name == "masks":
            raise error
        return load(folder, **options)

    monkeypatch.setattr(attention, "load", failing)
    base, masks = finished(store, SETTINGS).columns
    assert (base.stage, base.generated, len(base.scores)) == ("done", 12, 12)
    assert masks.stage == "failed"
    assert masks.problem == f"masks cannot be used: {said(error)}"


def test_the_time_limit_covers_loading(checkpoints):
    store = ModelStore([checkpoints / "base", checkpoints / "masks"], Limits(seconds=-1.0), Access())
    run = finished(store, SETTINGS)
    assert all("time limit was reached before" in column.problem for column in run.columns)
    assert store.loaded() == []


def test_a_run_ends_at_its_next_step_when_the_app_closes(store):
    generation = Generation(store, SETTINGS)
    stream = generation.stream()
    while generation.run.columns[0].generated < 3:
        next(stream)
    store.closing.set()
    assert list(stream) == []
    assert generation.run.columns[0].generated <= 4


def test_a_column_before_it_starts():
    column = Column("base")
    assert (column.text, column.generated) == ("", 0)
