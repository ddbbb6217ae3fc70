"""Measuring a variant, and the command that does it."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import attention
from trainer.data import read_files
from trainer.evaluate import main
from trainer.fidelity import measure
from trainer.writing import measure_writing

MASKS = attention.MasksConfig(candidates=("window(3)", "first(1)"))


@pytest.fixture(scope="module")
def base(workplace):
    return attention.load(workplace / "base")[0]


@pytest.fixture(scope="module")
def variant(base):
    return attention.convert(base, MASKS)


@pytest.fixture(scope="module")
def saved(workplace, variant):
    attention.save(variant, workplace / "measured")
    return workplace / "measured"


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


def test_the_base_is_perfect(base):
    tokens = np.arange(100, dtype=np.int32)
    alone, twice = measure(base, None, tokens, 32), measure(base, base, tokens, 32)
    assert alone == twice
    assert (alone.kl, alone.top1_agreement) == (0.0, 1.0)


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


def test_the_command_prints_one_object(saved, workplace, base, variant, tokenizer, capsys):
    text = str(workplace / "valid.txt")
    assert main(["--variant", str(saved), "--text", text, "--context", "16", "--json", "--ablate"]) == 0
    row = json.loads(capsys.readouterr().out)
    figures = measure(variant, base, read_files([text], tokenizer), 16)
    assert {name: row[name] for name in figures.to_dict()} == pytest.approx(figures.to_dict(), rel=1e-3)
    assert row["method"] == "masks"
    assert set(row["ablations"]) == {"window(3)", "first(1)"}
    assert row["ablations"]["window(3)"]["kl"] > row["kl"]


def test_the_command_prints_a_table_of_several(saved, workplace, capsys):
    variants = [str(saved), str(workplace / "base")]
    options = ["--text", str(workplace / "valid.txt"), "--context", "32", "--samples", "4", "--length", "8"]
    assert main(["--variant", *variants, *options]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["masks", "softmax"]
    for name in ("kl", "perplexity", "sample_perplexity", "distinct_2", "repetition"):
        assert name in header.split()


def test_what_the_command_cannot_load_is_named(workplace, capsys):
    assert main(["--variant", str(workplace / "nothing"), "--text", str(workplace / "valid.txt")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_writing_of_a_model_that_repeats_itself(workplace):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.mul_(0.01)
        model.transformer.wte.weight[7] = 10 * model.transformer.ln_f.bias.sign().add(0.5)
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[7])
    writing = measure_writing(model, model, count=3, length=20)
    assert writing.sample_perplexity == pytest.approx(1.0)
    assert writing.distinct_2 == 1 / (3 * 19)
    assert writing.repetition == pytest.approx(16 / 17)


def test_the_perplexity_of_samples_is_that_of_their_distribution(base):
    writing = measure_writing(base, base, count=32, length=40)
    with torch.no_grad():
        probabilities = base(torch.zeros(1, 1, dtype=torch.long)).logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum().item()
    assert math.log(writing.sample_perplexity) == pytest.approx(entropy, rel=0.35)
