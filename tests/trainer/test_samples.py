"""Texts that models write, and what is counted in them."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

import attention
from trainer.config import SampleConfig
from trainer.samples import (
    SETTLED,
    Writing,
    continue_texts,
    count_new_names,
    describe_texts,
    draw_prompts,
    measure_writing,
    sample_texts,
    seeded,
    write_texts,
)


@pytest.fixture(scope="module")
def base(workplace):
    return attention.load(workplace / "base")[0]


@pytest.fixture
def parrot(workplace):
    """A model that always writes token 7."""
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.mul_(0.01)
        model.transformer.wte.weight[7] = 10 * model.transformer.ln_f.bias.sign().add(0.5)
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[7])
    return model


def test_writing_of_a_model_that_repeats_itself(parrot, tokenizer):
    writing = measure_writing(parrot, parrot, tokenizer, torch.arange(6).view(3, 2), 20, seed=0)
    assert writing.sample_perplexity == pytest.approx(1.0)
    assert [writing.distinct_1, writing.distinct_2, writing.distinct_3] == [1 / (3 * 20), 1 / (3 * 19), 1 / (3 * 18)]
    assert writing.repetition == pytest.approx(16 / 17)


def test_the_base_judges_what_was_written_and_not_the_prompts(base, parrot, tokenizer):
    prompts = draw_prompts(np.arange(100, dtype=np.int32), 4, 5, seed=1)
    writing = measure_writing(parrot, base, tokenizer, prompts, 10, seed=0)
    texts = torch.cat([prompts, torch.full((4, 10), 7)], 1)
    with torch.no_grad():
        logs = base(texts).logits[:, 4:-1].log_softmax(-1)
    assert math.log(writing.sample_perplexity) == pytest.approx(-logs[..., 7].mean().item(), rel=1e-4)


def test_the_perplexity_of_samples_is_that_of_their_distribution(base, tokenizer):
    prompts = torch.zeros(256, 1, dtype=torch.long)
    writing = measure_writing(base, base, tokenizer, prompts, 4, seed=0)
    with torch.no_grad():
        probabilities = base(torch.zeros(1, 1, dtype=torch.long)).logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum().item()
    assert math.log(writing.sample_perplexity) == pytest.approx(entropy, rel=0.35)


@given(st.integers(2, 6), st.integers(4, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_figures_without_each_text(count, length, vocabulary, seed):
    rng = np.random.default_rng(seed)
    losses, texts = rng.random(count), rng.integers(0, vocabulary, (count, length))
    names = rng.integers(0, 3, count)
    writing = describe_texts(losses, texts, names)
    for one in range(count):
        rest = describe_texts(np.delete(losses, one), np.delete(texts, one, 0), np.delete(names, one))
        for name, values in writing.without.items():
            assert values[one] == pytest.approx(getattr(rest, name))


def test_the_error_of_a_difference_is_that_of_means_of_pairs():
    rng = np.random.default_rng(0)
    losses, texts = rng.normal(3.0, 0.2, (2, 400)), np.tile(np.arange(4), (400, 1))
    other, own = (describe_texts(each, texts, np.ones(400)) for each in losses)
    found = other.beside(own)["sample_perplexity"]
    ratio = math.exp(losses[0].mean() - losses[1].mean())
    assert found["difference"] == pytest.approx(ratio - 1)
    assert found["error"] == pytest.approx(ratio * np.std(losses[0] - losses[1]) / 20, rel=0.02)
    assert other.beside(own)["repetition"] == {"variant": 0.0, "base": 0.0, "difference": None, "error": None}
    assert other.beside(own)["distinct_1"]["difference"] == 0


def test_more_new_names_than_the_bases_are_drift():
    rng = np.random.default_rng(0)
    names = rng.poisson(3, 400)
    more = names + rng.integers(0, 2, 400)
    own, other = (describe_texts(np.ones(400), np.tile(np.arange(4), (400, 1)), each) for each in (names, more))
    found = other.beside(own)["new_names"]
    ratio = more.mean() / names.mean()
    assert (found["variant"], found["base"]) == (more.mean(), names.mean())
    assert found["difference"] == pytest.approx(ratio - 1)
    assert found["error"] == pytest.approx(np.std(more - ratio * names) / names.mean() / 20, rel=0.02)


TEXT = (
    "Once Peter met Bobbie. Mother and Phyllis came, then Peter saw Doctor Forrest. Roberta met Phyllis, Roberta knew"
)


@pytest.mark.parametrize(
    ("start", "names"),
    [
        ("", {"Peter", "Bobbie", "Phyllis", "Doctor", "Forrest", "Roberta"}),  # not the first words of sentences
        ("Once Peter met Bobbie. Moth", {"Phyllis", "Doctor", "Forrest", "Roberta"}),
        ("Once Peter met Bobbie. Mother and Phyll", {"Doctor", "Forrest", "Roberta"}),
        ("Once Peter met Bobbie. Mother and Phyllis came, then Peter saw Doctor Forrest.", {"Roberta"}),
        ("Once Peter met Bobbie. Mother and Phyllis came, then Peter saw Doctor Forrest. Roberta", set()),
        (TEXT, set()),
    ],
)
def test_names_are_new_where_they_were_not_before(tokenizer, start, names):
    head, tail = (tokenizer(part)["input_ids"] if part else [] for part in (start, TEXT.removeprefix(start)))
    assert tokenizer.decode(head + tail) == TEXT
    assert count_new_names(tokenizer, head + tail, len(head)) == len(names)


def test_names_are_counted_after_the_prompt_and_50_tokens(base, tokenizer, monkeypatch):
    counted = []
    monkeypatch.setattr("trainer.samples.count_new_names", lambda _, text, start: counted.append((text, start)) or 3)
    writing = measure_writing(base, base, tokenizer, torch.arange(6).view(3, 2), 20, seed=0)
    assert writing.new_names == 3
    assert [(text[:2], len(text), start) for text, start in counted] == [
        ([first, first + 1], 22, 2 + SETTLED) for first in (0, 2, 4)
    ]
    assert SETTLED == 50


def test_a_single_text_has_no_error():
    text = describe_texts(np.array([2.0]), np.array([[1, 1, 1, 1, 1]]), np.ones(1))
    assert text.beside(text)["sample_perplexity"] == {
        **{"variant": math.exp(2), "base": math.exp(2)},
        **{"difference": 0.0, "error": None},
    }


def test_the_same_seed_writes_the_same(base, tokenizer):
    prompts = draw_prompts(np.arange(100, dtype=np.int32), 20, 3, seed=0)
    again, other = (measure_writing(base, base, tokenizer, prompts, 8, seed=seed) for seed in (0, 1))
    assert measure_writing(base, base, tokenizer, prompts, 8, seed=0) == again != other


def test_samples_are_continuations_of_eos(base):
    with seeded(5, base.device):
        texts = sample_texts(base, 3, 10)
    with seeded(5, base.device):
        continued = continue_texts(base, torch.full((3, 1), base.config.eos_token_id), 9)
    assert texts.shape == (3, 10)
    assert torch.equal(texts, continued)


OWN_WAYS = [
    {"min_p": 0.9, "typical_p": 0.1, "top_k": 1, "top_p": 0.1, "temperature": 0.01, "epsilon_cutoff": 0.5},
    {"no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "bad_words_ids": [[7]], "suppress_tokens": [5]},
    {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 1.0, "length_penalty": 2.0, "early_stopping": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"stop_strings": ["e"], "max_time": 1e-9, "max_length": 3, "min_length": 60},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "output_hidden_states": True},
    {"eos_token_id": [1, 2, 3], "pad_token_id": 9, "forced_eos_token_id": 4, "decoder_start_token_id": 3},
    {"use_cache": False, "cache_implementation": "static", "penalty_alpha": 0.6, "guidance_scale": 3.0},
    {"prompt_lookup_num_tokens": 2, "assistant_early_exit": 1, "sequence_bias": [[[5], 9.0]], "no_such_option": 1},
]


@pytest.mark.parametrize("own", OWN_WAYS, ids=lambda own: next(iter(own)))
@pytest.mark.parametrize("swapped", [False, True], ids=["base", "variant"])
def test_a_models_own_way_of_generating_changes_nothing(own, swapped, workplace, base, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    if swapped:
        model = attention.convert(model, attention.MasksConfig(candidates=("window(64)",)))
    options = SampleConfig(prompts=["the sea", ""], length=24)

    def written() -> tuple[torch.Tensor, Writing, list[list[str]]]:
        with seeded(3, model.device):
            texts = sample_texts(model, 4, 24)
        writing = measure_writing(model, base, tokenizer, torch.arange(6).view(3, 2), 20, seed=0)
        cooler = options.model_copy(update={"temperature": 0.0})
        return texts, writing, [write_texts(model, tokenizer, one, seed=1) for one in (options, cooler)]

    plain = written()
    assert plain[0].shape == (4, 24)
    model.generation_config = GenerationConfig(**own)
    before = model.generation_config.to_dict()
    changed = written()
    assert torch.equal(plain[0], changed[0])
    assert plain[1:] == changed[1:]
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("eos", [50256, [0, 5], None, -1])
def test_a_base_that_names_no_eos_token_writes_from_the_one_it_is_given(eos, workplace, base):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    model.config.eos_token_id = eos
    with pytest.raises(ValueError, match=r"eos_token_id is .*, which is not one of its 320 tokens"):
        sample_texts(model, 2, 8)
    with seeded(0, model.device):
        texts = sample_texts(model, 2, 8, start=0)
    with seeded(0, base.device):
        assert torch.equal(texts, sample_texts(base, 2, 8))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_prompts_are_opened_and_not_closed(temperature, base, tokenizer):
    closing = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    closing.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    options = SampleConfig(prompts=["the sea", "the old man", ""], length=16, temperature=temperature)
    assert write_texts(base, closing, options, seed=0) == write_texts(base, tokenizer, options, seed=0)
    opening = copy.deepcopy(tokenizer)
    opening.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    prompts = [end + prompt for prompt in options.prompts]
    explicit = write_texts(base, tokenizer, options.model_copy(update={"prompts": prompts}), seed=0)
    assert write_texts(base, opening, options, seed=0) == explicit


def test_a_text_ends_at_the_tokenizers_eos(parrot, tokenizer):
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(7)
    options = SampleConfig(prompts=["the sea"], length=9)
    assert write_texts(parrot, tokenizer, options, seed=0) == [tokenizer.decode([7] * 9)]
    assert write_texts(parrot, ending, options, seed=0) == [tokenizer.decode([7])]


def test_prompts_are_passages():
    tokens = np.arange(50, 90, dtype=np.int32)
    prompts = draw_prompts(tokens, 200, 6, seed=0)
    assert torch.equal(prompts - prompts[:, :1], torch.arange(6).expand(200, -1))
    assert prompts.min() == 50
    assert prompts.max() == 89
    assert torch.equal(draw_prompts(tokens, 1, 40, seed=0)[0], torch.arange(50, 90))
    with pytest.raises(ValueError, match="prompts of 41 tokens cannot be drawn from a text of 40"):
        draw_prompts(tokens, 1, 41, seed=0)


@pytest.mark.parametrize("length", [3, 63])
def test_texts_that_do_not_fit(base, tokenizer, length):
    with pytest.raises(ValueError, match=f"texts must have 4 to 62, not {length}"):
        measure_writing(base, base, tokenizer, torch.zeros(1, 2, dtype=torch.long), length, seed=0)
