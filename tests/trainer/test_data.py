"""Text to tokens to blocks: nothing lost, nothing changed, the same again."""

import copy
import gzip
import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.attention.test_prompts import character_tokenizer
from trainer import data
from trainer.config import DataConfig, RunConfig, TransferConfig
from trainer.data import (
    Blocks,
    DataError,
    StageBatches,
    check_length,
    check_sample,
    check_vocabulary,
    load_tokens,
    read_files,
    sampled_tokens,
)


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
        ({"a.jsonl": "not json"}, ["a.jsonl"], "line 1: is not JSON"),
        ({"a.txt": "\n\n"}, ["a.txt"], "holds no text, or is empty"),
        ({"a.txt": "\u00a0\n"}, ["a.txt"], "holds no text, or is empty"),
        ({"a.txt": "", "b.jsonl": ""}, ["a.txt", "b.jsonl"], "holds no text, or is empty"),
        ({"a.jsonl": '{"text": null}'}, ["a.jsonl"], "holds no text, or is empty"),
        ({"a.parquet": b"PAR1"}, ["a.parquet"], "cannot be read as Parquet"),
        ({"a.txt": b"\xff\xfe\x00"}, ["a.txt"], "is UTF-16"),
        ({"a.txt": b"x\nca\xe9"}, ["a.txt"], "line 2: byte 4 is 0xe9"),
    ],
)
def test_what_cannot_be_read_is_named(files, patterns, message, tmp_path, tokenizer):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_files([str(tmp_path / pattern) for pattern in patterns], tokenizer)


def test_compressed_rows_and_rows_without_text(tmp_path, tokenizer, caplog):
    rows = [
        {"text": "the sea", "x": 1},
        {"text": None},
        {"x": ["the ship"], "text": "\ufeffthe old man"},
        {"text": " \n"},
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for _ in range(2):  # read, then cached
        caplog.clear()
        tokens = read_files([str(tmp_path / "a.jsonl.gz")], tokenizer)
        assert tokenizer.decode(tokens).split(tokenizer.eos_token) == ["the sea", "the old man", ""]
        assert "a.jsonl.gz: 1 of 4 rows have no text and are left out" in caplog.text


def test_rows_can_be_joined_as_they_stand(tmp_path, tokenizer):
    rows = [{"text": "the sea\n"}, {"text": None}, {"text": " \n"}, {"text": "the ship"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    tokens = read_files([str(tmp_path / "a.json")], tokenizer, DataConfig(documents="document"))
    assert tokenizer.decode(tokens) == "the sea\n \nthe ship" + tokenizer.eos_token


def test_an_empty_file_among_others_is_nothing(tmp_path, tokenizer):
    for name, content in {"a.txt": "", "b.txt": "the sea\n", "c.txt": "\n"}.items():
        (tmp_path / name).write_text(content)
    assert tokenizer.decode(read_files([str(tmp_path / "*.txt")], tokenizer)) == "the sea" + tokenizer.eos_token


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("the sea and a text that no other test has")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(DataError, match=r"a.txt cannot be tokenised into the cache, .*file.datasets: .*HF_HOME"):
        read_files([str(tmp_path / "a.txt")], tokenizer)


@pytest.mark.parametrize("make", [lambda _: ByT5Tokenizer(), character_tokenizer], ids=["ByT5", "in Python"])
def test_a_tokenizer_in_python_reads_text(make, tmp_path):
    (tmp_path / "a.txt").write_text("the sea\n\na ship\n")
    tokenizer = make(tmp_path)
    tokens = read_files([str(tmp_path / "a.txt")], tokenizer)
    assert tokenizer.decode(tokens).replace(" ", "") == f"thesea{tokenizer.eos_token}aship{tokenizer.eos_token}"
    assert np.array_equal(tokens, read_files([str(tmp_path / "a.txt")], make(tmp_path)))


def test_a_tokenizer_needs_an_eos_token(tmp_path, text):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300, show_progress=False)
    (tmp_path / "a.txt").write_text("the sea")
    with pytest.raises(DataError, match="has no eos token"):
        read_files([str(tmp_path / "a.txt")], PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer))


def test_a_template_has_no_part_in_a_document(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    (tmp_path / "a.txt").write_text("the sea\n\na ship\n")
    assert tokenizer.decode(read_files([str(tmp_path / "a.txt")], tokenizer)) == f"the sea{end}a ship{end}"


def test_tokens_that_a_model_has_not_are_named(workplace, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    check_vocabulary(tokenizer, base)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>", "<other>"])
    with pytest.raises(DataError, match=r"knows 2 tokens for which the model has no embedding: '<new>', '<other>'. "):
        check_vocabulary(larger, base)
    base.resize_token_embeddings(len(tokenizer) - 20)
    with pytest.raises(DataError, match=r"knows 20 tokens .*, \.\.\.\. Take the model's own"):
        check_vocabulary(tokenizer, base)


def test_a_text_must_fill_a_block_of_every_stage():
    stages = [
        TransferConfig(steps=1, context=64),
        TransferConfig(steps=1, context=128),
        TransferConfig(steps=1, batch_size=8, context=32, final_context=256),
    ]
    check_length(256, stages)
    with pytest.raises(DataError, match=r"100 tokens, but stages.1.context is 128, stages.2.final_context is 256: "):
        check_length(100, stages)


def test_a_file_that_changed_is_read_anew(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("the sea")
    before = read_files([str(path)], tokenizer)
    path.write_text("the old man")
    assert tokenizer.decode(before) != tokenizer.decode(read_files([str(path)], tokenizer))


def test_a_file_that_moved_is_not_read_again(tmp_path, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(data, "read_documents", lambda file, *_: [read.append(file.name) or file.read_text()])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "a.txt").write_text("the sea")
    before = read_files([str(tmp_path / "a.txt")], tokenizer)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert np.array_equal(before, read_files([str(tmp_path / "b.txt")], tokenizer))
    assert read == ["a.txt"]
    read_files([str(tmp_path / "b.txt")], tokenizer, DataConfig(documents="document"))
    assert read == ["a.txt", "b.txt"]


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
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("validation", "train")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": [["the", "sea"]]}, "the field 'text' of a/b is List.*, not text. Set data.column"),
        ({"text": [5]}, "the field 'text' of a/b is Value.*int64.*, not text"),
        ({"text": [{"content": "the sea"}]}, "the field 'text' of a/b is .*, not text"),
        ({"messages": ["the sea"]}, "a/b has no field 'text'; it has .'messages'.. Set data.column"),
        ({"text": [None, None]}, "not text|holds no text"),
    ],
)
def test_a_hub_data_set_of_something_else_is_refused(rows, message, monkeypatch, tokenizer):
    monkeypatch.setattr(data, "load_dataset", lambda *_, **__: Dataset.from_dict(rows))
    with pytest.raises(DataError, match=message):
        load_tokens(DataConfig(dataset="a/b"), tokenizer, no_sample, show_progress=False)


def test_a_hub_data_set_without_some_texts_is_read(monkeypatch, tokenizer, caplog):
    rows = {"text": ["the sea", None, "", " ", "\ufeffa ship"], "x": [[1], [], [], [], []]}
    monkeypatch.setattr(data, "load_dataset", lambda *_, **__: Dataset.from_dict(rows))
    for documents, expected in (None, ["the sea", "a ship", ""]), ("document", ["the sea \ufeffa ship", ""]):
        options = DataConfig(dataset="a/b", documents=documents)
        train, _ = load_tokens(options, tokenizer, no_sample, show_progress=False)
        assert tokenizer.decode(train).split(tokenizer.eos_token) == expected
    assert "a/b: 1 of 5 rows have no text and are left out" in caplog.text


@pytest.mark.parametrize(
    "error",
    [DatasetGenerationError("broken"), RuntimeError("Dataset scripts are no longer supported"), OSError("full")],
)
def test_whatever_goes_wrong_with_a_hub_data_set_is_said(error, monkeypatch, tokenizer):
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(data, "load_dataset", load)
    with pytest.raises(DataError, match=f"cannot be loaded: {error}"):
        load_tokens(DataConfig(dataset="a/b"), tokenizer, no_sample, show_progress=False)


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


def test_a_validation_text_is_read_before_anything_is_sampled(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no file matches none.txt"):
        load_tokens(DataConfig(valid="none.txt"), tokenizer, no_sample, show_progress=False)


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
    (damaged,) = (path for path in tmp_path.iterdir() if np.array_equal(load_file(path)["tokens"], first))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert np.array_equal(first, sample(0, "a"))
    assert np.array_equal(first, load_file(damaged)["tokens"])


@pytest.mark.parametrize("fails", ["mkdir", "write_bytes"])
def test_a_cache_for_sampled_text_is_tried_before_anything_is_sampled(fails, workplace, tmp_path, monkeypatch):
    def no_samples(*_: object) -> None:
        raise AssertionError("sampled before the cache was tried")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    base = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    monkeypatch.setattr(data, "sample_texts", no_samples)
    monkeypatch.setattr(Path, fails, full)
    with pytest.raises(DataError, match=r"kept in .*cache, which cannot be written: .*No space left.*--data.cache"):
        sampled_tokens(base, "a", 100, length=16, batch_size=3, seed=0, cache=tmp_path / "cache", show_progress=False)
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_is_full_after_sampling_is_said(workplace, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    write, written = Path.write_bytes, []

    def once(path: Path, content: bytes) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", once)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left"):
        sampled_tokens(base, "a", 100, length=16, batch_size=3, seed=0, cache=tmp_path / "cache", show_progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_text_that_will_be_sampled_too_short_is_refused_before():
    stages = [{"stage": "transfer", "steps": 1, "context": 64, "final_context": 1024, "batch_size": 16}]
    options = {"base": "b", "attention": {"method": "masks"}, "output": "o", "stages": stages}
    for valid, refused in (None, True), (["v.txt"], False):
        data_options = {"sampled_tokens": 1024, "sample_batch": 4, "valid": valid}
        config = RunConfig.model_validate({**options, "data": data_options})
        with pytest.raises(DataError, match=r"1,004 tokens, but stages.0.final_context") if refused else nullcontext():
            check_sample(config)
