"""Measuring variants against their base."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from trainer.fidelity import Reader, measure, measure_each, predicted, read_each, switched_off

MASKS = attention.MasksConfig(candidates=("window(3)", "first(1)"))
PERFORMER = attention.PerformerConfig(num_features=4, window=3)


@pytest.fixture(scope="module")
def base(workplace):
    return attention.load(workplace / "base")[0]


@pytest.fixture(scope="module")
def variant(base):
    return attention.convert(base, MASKS)


@given(length=st.integers(2, 70), context=st.integers(2, 32), batch_size=st.integers(1, 4), seed=st.integers(0, 9))
def test_figures_are_those_of_the_definition(base, variant, length, context, batch_size, seed):
    tokens = np.random.default_rng(seed).integers(0, 300, length).astype(np.int32)
    figures = measure(variant, base, tokens, context, batch_size)
    kl, loss, base_loss, same, count = 0.0, 0.0, 0.0, 0, 0
    for start in range(0, length, context):
        block = torch.from_numpy(tokens[start : start + context].astype(np.int64))[None]
        with torch.no_grad():
            log_q, log_p = (model(block).logits[0, :-1].log_softmax(-1) for model in (variant, base))
        labels = block[0, 1:, None]
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        loss -= log_q.gather(1, labels).sum().item()
        base_loss -= log_p.gather(1, labels).sum().item()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        count += len(labels)
    assert figures.tokens == count == length - math.ceil(length / context)
    expected = (kl / count, math.exp(loss / count), math.exp(base_loss / count), same / count)
    found = (figures.kl, figures.perplexity, figures.base_perplexity, figures.top1_agreement)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(length=st.integers(2, 70), context=st.integers(1, 32), batch_size=st.integers(1, 4))
def test_every_predicted_token_is_read_in_its_place(base, variant, length, context, batch_size):
    places = predicted(length, context)
    assert places.tolist() == [place for place in range(length) if place % context]
    if not len(places):
        return
    tokens = np.random.default_rng(length).integers(0, 300, length).astype(np.int32)
    (reading,) = read_each([Reader(variant)], base, tokens, context, batch_size)
    assert reading.kl.shape == reading.loss.shape == reading.base_loss.shape == places.shape
    for place, loss, base_loss in zip(places, reading.loss, reading.base_loss, strict=True):
        block = torch.from_numpy(tokens[place // context * context : place + 1].astype(np.int64))[None]
        with torch.no_grad():
            found = [-model(block[:, :-1]).logits[0, -1].log_softmax(-1)[block[0, -1]] for model in (variant, base)]
        assert [loss, base_loss] == pytest.approx([one.item() for one in found], rel=1e-4)


def test_the_base_is_perfect(base):
    tokens = np.arange(100, dtype=np.int32)
    alone, twice = measure(base, None, tokens, 32), measure(base, base, tokens, 32)
    assert alone == twice
    assert (alone.kl, alone.top1_agreement) == (0.0, 1.0)


def test_together_is_as_one_by_one(base, variant):
    tokens = np.random.default_rng(0).integers(0, 300, 150).astype(np.int32)
    performer = attention.convert(base, PERFORMER)
    together = measure_each([Reader(variant), Reader(performer), Reader(base)], base, tokens, 32)
    assert together == [measure(model, base, tokens, 32) for model in (variant, performer, base)]


@pytest.mark.parametrize("config", [MASKS, PERFORMER], ids=lambda config: config.method)
def test_a_part_that_is_off_is_off_while_its_reader_reads(base, config):
    tokens = np.random.default_rng(0).integers(0, 300, 150).astype(np.int32)
    model = attention.convert(base, config)
    parts = model.mechanisms[0].branches
    readers = [Reader(model), *(Reader(model, (part,)) for part in parts)]
    whole, *without = measure_each(readers, base, tokens, 32)
    assert whole == measure(model, base, tokens, 32)
    for part, figures in zip(parts, without, strict=True):
        for mechanism in model.mechanisms:
            mechanism.disable(part)
        assert figures == measure(model, base, tokens, 32) != whole
        for mechanism in model.mechanisms:
            mechanism.disable()


def test_parts_are_as_before_after_an_error(variant):
    def off() -> list[frozenset[str]]:
        return [mechanism.disabled for mechanism in variant.mechanisms]

    before = off()
    with pytest.raises(ValueError, match="no branch"), switched_off(variant, ["linear"]):
        pass
    assert off() == before
    with switched_off(variant, ["window(3)"]):
        with pytest.raises(ZeroDivisionError), switched_off(variant, ["first(1)"]):
            assert 1 / 0
        assert off() == [{"window(3)"}] * 2
    assert off() == before == [frozenset()] * 2


@pytest.mark.parametrize(("length", "context", "message"), [(1, 8, "at least 2 tokens"), (9, 65, "holds 64 tokens")])
def test_what_cannot_be_measured(base, length, context, message):
    with pytest.raises(ValueError, match=message):
        measure(base, None, np.zeros(length, np.int32), context)


def test_the_mode_of_a_model_is_left_as_it_was(base, variant):
    variant.train()
    measure(variant, base, np.arange(20), 8)
    assert variant.training
    assert not base.training
    variant.eval()
