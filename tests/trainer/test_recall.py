"""Tasks whose answers stand in the text."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from trainer import recall
from trainer.recall import CANDIDATES, LEAD, TASKS, Vocabulary, answer, ask, measure_recall

from .conftest import NAMES, OTHER, byte_pairs


@pytest.fixture(scope="module")
def tokenizer(names_tokenizer):
    return names_tokenizer


@pytest.fixture(scope="module")
def words(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def other(tokenizer) -> np.ndarray:
    return np.array(tokenizer(" ".join([OTHER] * 40))["input_ids"], np.int32)


def reader(monkeypatch, tokenizer, look) -> nn.Module:
    """A model that is sure of what `look(text)` says of each text, a list of tokens, as the next token."""
    model = nn.Module()
    model.device = torch.device("cpu")
    size = len(tokenizer)

    def hidden(model: nn.Module, texts: Tensor) -> Tensor:
        found = torch.zeros(*texts.shape, size)
        for row, text in zip(found, texts.tolist(), strict=True):
            for place in range(len(text)):
                row[place, look(text[: place + 1])] = 100.0
        return found

    monkeypatch.setattr(recall, "last_hidden", hidden)
    monkeypatch.setattr(recall, "output_matrix", lambda model: torch.eye(size))
    return model


def look_up(text: list[int]) -> list[int]:
    """What followed the same three tokens before."""
    places = [place for place in range(len(text) - 3) if text[place : place + 3] == text[-3:]]
    return [text[places[-1] + 3]] if places else []


def test_names_are_words_with_a_capital_that_are_one_token_and_nothing_else(words, tokenizer):
    assert sorted(tokenizer.decode([token]).strip() for token in words.names) == sorted(NAMES)


def test_a_text_of_the_first_task(words, tokenizer, other):
    questions = ask("associative", words, other, 3, between=64, context=400, seed=0)
    for text, answers, candidates in zip(questions.texts, questions.answers, questions.candidates, strict=True):
        said = tokenizer.decode(text.tolist())
        lead, facts = tokenizer.decode(text[:LEAD].tolist()), said.split("This is what we know.")[1]
        stated, between, asked = facts[: facts.rindex(". ")], facts, said.split("Once more.")[1]
        assert said.startswith(f"{lead}\nThis is what we know.")
        pairs = [tuple(fact.strip().split(" lives in ")) for fact in asked.strip(" .").split(".")]
        assert len({who for who, _ in pairs}) == len({where for _, where in pairs}) == CANDIDATES
        assert all(f" {who} lives in {where}." in stated for who, where in pairs)
        assert OTHER in between
        for place, (who, where), options, right in zip(questions.places, pairs, candidates, answers, strict=True):
            assert tokenizer.decode(text[: place + 1].tolist()).endswith(f" {who} lives in")
            assert tokenizer.decode([int(text[place + 1])]) == f" {where}"
            assert options[right] == text[place + 1]
            assert {tokenizer.decode([one]).strip() for one in options.tolist()} == {where for _, where in pairs}


def test_a_text_of_the_second_task(words, tokenizer, other):
    questions = ask("needle", words, other, 4, between=64, context=400, seed=0)
    for text, answers, candidates in zip(questions.texts, questions.answers, questions.candidates, strict=True):
        said = tokenizer.decode(text.tolist())
        name = tokenizer.decode([int(candidates[0][answers[0]])])
        assert said.endswith("\nThe name of the ship was")
        assert said.count("\nThe name of the ship was") == 2
        assert said.count(f"\nThe name of the ship was{name}.") == 1
        assert len(set(candidates[0].tolist())) == CANDIDATES
        assert len(set(candidates[0].tolist()) & set(text.tolist())) == 1
        gap = said.split(f"was{name}.")[1].removesuffix("\nThe name of the ship was")
        assert len(tokenizer(gap)["input_ids"]) == pytest.approx(64, abs=2)


@pytest.mark.parametrize("task", TASKS)
def test_whoever_looks_it_up_is_right(words, tokenizer, other, monkeypatch, task):
    questions = ask(task, words, other, 8, between=64, context=400, seed=1)
    found = answer(reader(monkeypatch, tokenizer, look_up), questions)
    assert found.right.shape == (8, CANDIDATES if task == "associative" else 1)
    assert found.to_dict() == {"score": pytest.approx(0, abs=1e-5), "right": 1}


def test_to_know_which_words_a_text_has_helps_with_the_needle_alone(words, tokenizer, other, monkeypatch):
    names = set(words.names.tolist())

    def present(text: list[int]) -> list[int]:
        return list(names & set(text))

    for task, right in (("needle", 1), ("associative", 1 / CANDIDATES)):
        found = answer(
            reader(monkeypatch, tokenizer, present), ask(task, words, other, 32, between=0, context=400, seed=0)
        )
        assert found.right.mean() == pytest.approx(right, abs=0.08)
        if task == "associative":
            assert found.scores.mean() == pytest.approx(math.log(1 / CANDIDATES), abs=0.01)


def test_texts_follow_from_the_seed(words, other):
    first, same, next_one = (ask("associative", words, other, 5, 64, 400, seed) for seed in (0, 0, 1))
    assert torch.equal(first.texts, same.texts)
    assert torch.equal(first.answers, same.answers)
    assert not torch.equal(first.texts, next_one.texts)


@pytest.fixture(scope="module")
def models(tokenizer) -> list[GPT2LMHeadModel]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=512, vocab_size=len(tokenizer))
    return [GPT2LMHeadModel(config).eval() for _ in range(2)]


def test_models_are_beside_their_base(models, tokenizer, words, other):
    base, variant = models
    rows = measure_recall([variant, base], base, tokenizer, other, 6, context=300, seed=0)
    assert [list(row) for row in rows] == [list(TASKS)] * 2
    assert list(rows[0]["needle"]) == ["0", "64"]  # 256 would be longer than the context
    for task in TASKS:
        questions = ask(task, words, other, 6, 64, 300, seed=0)
        own, others = answer(base, questions), answer(variant, questions)
        found, itself = (row[task]["64"] for row in rows)
        assert found["variant"] == others.to_dict()
        assert found["base"] == itself["base"] == itself["variant"] == own.to_dict()
        assert found["difference"] == pytest.approx(others.scores.mean() - own.scores.mean(), abs=1e-6)
        means = (others.scores - own.scores).mean(1)
        assert found["error"] == pytest.approx(np.std(means, ddof=1) / 6**0.5, rel=1e-4)
        assert (itself["difference"], itself["error"]) == (0, 0)
        assert found["questions"] == questions.answers.numel()
        assert found["at_chance"] == itself["at_chance"]


def test_scores_are_those_of_the_whole_model(models, words, other):
    questions = ask("associative", words, other, 3, 0, 300, seed=0)
    found = answer(models[0], questions)
    with torch.no_grad():
        logits = models[0](questions.texts).logits
    for row in range(3):
        for number, place in enumerate(questions.places):
            scores = logits[row, place, questions.candidates[row, number]].log_softmax(0)
            right = questions.answers[row, number]
            assert found.scores[row, number] == pytest.approx(scores[right].item(), rel=1e-4)
            assert found.right[row, number] == (scores.argmax() == right)


def test_a_base_that_guesses_is_said_to_be_at_chance_and_one_that_knows_is_not(
    models, tokenizer, words, other, monkeypatch
):
    rows = measure_recall(models[:1], models[0], tokenizer, other, 40, context=300, seed=0)
    assert rows[0]["associative"]["64"]["at_chance"]
    base = reader(monkeypatch, tokenizer, look_up)
    (row,) = measure_recall([base], base, tokenizer, other, 4, context=300, seed=0)
    assert not any(one["at_chance"] for rows in row.values() for one in rows.values())


def test_a_single_text_has_no_error(models, tokenizer, other):
    (row,) = measure_recall(models[1:], models[0], tokenizer, other, 1, context=200, seed=0)
    assert row["needle"]["0"]["error"] is None


def test_what_the_tasks_cannot_use_is_said(models, tokenizer, words, other):
    with pytest.raises(ValueError, match=rf"need a context of {words.least} tokens .*; got {words.least - 1} and"):
        measure_recall(models, models[0], tokenizer, other, 1, words.least - 1, seed=0)
    with pytest.raises(ValueError, match="a text of 64; got 400 and 63"):
        measure_recall(models, models[0], tokenizer, other[:63], 1, 400, seed=0)
    (row, _) = measure_recall(models, models[0], tokenizer, other, 1, words.least, seed=0)
    assert list(row["associative"]) == ["0"]


def test_a_vocabulary_without_names_is_refused():
    with pytest.raises(ValueError, match="need 16 names that are one token; the vocabulary has 0"):
        Vocabulary(byte_pairs([OTHER], 300))
