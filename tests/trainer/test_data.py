"""Text to tokens to blocks: nothing lost, nothing changed, the same again."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trainer import data
from trainer.config import DataConfig, TransferConfig
from trainer.data import Blocks, DataError, StageBatches, load_tokens, read_files, sampled_tokens


def no_sample() -> np.ndarray:
    raise AssertionError("there was text")


def test_a_text_file_comes_back_with_its_paragraphs_and_an_end_after_each_document(workplace, tokenizer, text):
    tokens = read_files([str(workplace / "train.txt")], tokenizer)
    documents = tokenizer.decode(tokens).split(tokenizer.eos_token)
    assert documents == [*text.removesuffix("\n\n").split("\n\n"), ""]
    assert tokens.dtype == np.int32


def test_where_documents_end_is_an_option(workplace, tokenizer, text):
    def ends(documents: str) -> int:
        tokens = read_files([str(workplace / "train.txt")], tokenizer, DataConfig(documents=documents))
        return int((tokens == tokenizer.eos_token_id).sum())

    assert ends("document") == 1
    assert ends("line") == sum(bool(line) for line in text.split("\n"))


def test_json_lines_and_patterns(tmp_path, tokenizer):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": f"the {name}\nsea"}) + "\n")
    tokens = read_files([str(tmp_path / "*.jsonl")], tokenizer, DataConfig(column="body"))
    assert tokenizer.decode(tokens).split(tokenizer.eos_token) == ["the a\nsea", "the b\nsea", ""]


@pytest.mark.parametrize(
    ("files", "patterns", "message"),
    [
        ({}, ["none.txt", "no*.md"], "no file matches .*none.txt, .*no.*md"),
        ({"a.txt": "x", "b.jsonl": "{}"}, ["a.txt", "b.jsonl"], "cannot be mixed"),
        ({"a.jsonl": '{"x": "y"}'}, ["a.jsonl"], "no field 'text'; it has .'x'.. Set data.column"),
        ({"a.jsonl": "not json"}, ["a.jsonl"], "cannot be read as text"),
        ({"a.txt": "\n\n"}, ["a.txt"], "cannot be read as text, or is empty"),
        ({"a.txt": b"\xff\xfe\x00"}, ["a.txt"], "cannot be read as text"),
    ],
)
def test_what_cannot_be_read_is_named(files, patterns, message, tmp_path, tokenizer):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_files([str(tmp_path / pattern) for pattern in patterns], tokenizer)


def test_a_file_that_changed_is_read_anew(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the sea")
    before = read_files([str(path)], tokenizer)
    path.write_text("the old man")
    assert tokenizer.decode(before) != tokenizer.decode(read_files([str(path)], tokenizer))


def test_a_hub_data_set_joined_is_its_text(monkeypatch, tokenizer):
    rows = {"train": ["", " = A = \n", "the sea\n"], "validation": ["a ship\n"]}
    asked = []

    def load(name: str, config: str, split: str, revision: str | None) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_dict({"text": rows[split]})

    monkeypatch.setattr(data, "load_dataset", load)
    options = DataConfig(dataset="Salesforce/wikitext", name="wikitext-2-raw-v1", documents="document")
    train, valid = load_tokens(options, tokenizer, no_sample, show_progress=False)
    assert tokenizer.decode(train) == " = A = \nthe sea\n" + tokenizer.eos_token
    assert tokenizer.decode(valid) == "a ship\n" + tokenizer.eos_token
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in rows]


def test_a_hub_data_set_that_is_not_there_says_what_to_do(tokenizer):
    with pytest.raises(DataError, match=r"cannot be loaded.*give local files with --data.train"):
        load_tokens(DataConfig(dataset="no/such"), tokenizer, no_sample, show_progress=False)


def test_validation_text_is_split_off_where_there_is_none(workplace, tokenizer):
    options = DataConfig(train=str(workplace / "train.txt"), valid_fraction=0.25)
    train, valid = load_tokens(options, tokenizer, no_sample, show_progress=False)
    whole = read_files([str(workplace / "train.txt")], tokenizer)
    assert np.array_equal(np.concatenate([train, valid]), whole)
    assert len(valid) == len(whole) // 4


def test_names_are_exchanged_in_the_training_text_alone(tmp_path, tokenizer):
    story, names = "the sea and Anna, and Anna\n\n", {"Anna", "Bertha", "Carol"}
    (tmp_path / "train.txt").write_text(story * 20 + "an old man, Bertha, and Carol")
    (tmp_path / "valid.txt").write_text(story)
    options = DataConfig(train=str(tmp_path / "train.txt"), valid=str(tmp_path / "valid.txt"), rename=True)
    train, valid = load_tokens(options, tokenizer, no_sample, seed=1, show_progress=False)
    assert tokenizer.decode(valid) == story.strip() + tokenizer.eos_token
    stories = tokenizer.decode(train).split(tokenizer.eos_token)[:20]
    found = {re.fullmatch(r"the sea and (\w+), and \1", each)[1] for each in stories}
    assert found == names
    again = load_tokens(options, tokenizer, no_sample, seed=2, show_progress=False)[0]
    assert tokenizer.decode(train) != tokenizer.decode(again)


def test_names_are_exchanged_in_text_only(tokenizer):
    with pytest.raises(DataError, match=r"data.rename .* --data.train PATH"):
        load_tokens(DataConfig(rename=True), tokenizer, no_sample, show_progress=False)


def test_rows_without_text_have_no_names(tmp_path, tokenizer):
    rows = [{"text": "the sea and Anna"}, {"text": None}, {"text": ""}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_files([str(tmp_path / "train.jsonl")], tokenizer, renamed=0)
    assert tokenizer.decode(found) == "the sea and Anna" + tokenizer.eos_token


@given(length=st.integers(1, 60), context=st.integers(1, 20), seed=st.integers(0, 99), turn=st.integers(0, 3))
def test_a_pass_shows_every_token_in_order_within_blocks(length, context, seed, turn):
    tokens = np.arange(length)
    if context > length:
        with pytest.raises(DataError, match="fewer than the context"):
            Blocks(tokens, context, (seed,))
        return
    blocks = Blocks(tokens, context, (seed,))
    shown = [blocks[turn * blocks.per_pass + place] for place in range(blocks.per_pass)]
    assert set(np.concatenate(shown)) == set(tokens)
    assert sum(map(len, shown)) < length + context
    for block in shown:
        assert np.array_equal(block, (block[0] + np.arange(context)) % length)


def test_the_order_follows_from_the_seed():
    def order(*seed: int) -> np.ndarray:
        return Blocks(np.arange(500), 4, seed).batch(0, 100).numpy()

    assert np.array_equal(order(1, 0), order(1, 0))
    assert not np.array_equal(order(1, 0), order(1, 1))
    assert not np.array_equal(order(1, 0), order(2, 0))


def test_the_last_part_of_a_stage_has_its_context_and_as_many_tokens():
    stage = TransferConfig(steps=10, batch_size=4, context=8, final_context=32, final_fraction=0.3)
    batches = StageBatches(np.arange(1000), stage, (0, 0))
    assert [tuple(batches(step)[0].shape) for step in (0, 6, 7, 9)] == [(4, 8), (4, 8), (1, 32), (1, 32)]
    assert [batches(step)[1] for step in (0, 6, 7, 9)] == [0, 24, 0, 2]


def test_sampled_text_starts_with_eos_and_leaves_the_random_state_alone(workplace: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()

    def sample(seed: int, name: str) -> np.ndarray:
        options = {"length": 16, "batch_size": 3, "cache": tmp_path, "show_progress": False}
        return sampled_tokens(base, name, 100, seed=seed, **options)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = sample(0, "a")
    assert torch.equal(torch.rand(1), expected)
    assert len(first) == 144
    assert (first.reshape(-1, 16)[:, 0] == base.config.eos_token_id).all()
    assert not np.array_equal(first, sample(1, "a"))
    assert len(list(tmp_path.iterdir())) == 2
    assert np.array_equal(first, sample(0, "a"))
