"""Tokens that must be looked up in their text, and the table that says which pairs of tokens are rare."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from trainer.hits import (
    PairTable,
    count_pairs,
    find_pairs,
    hit_distances,
    hit_distances_without_table,
    load_pairs,
    pair_codes,
    save_pairs,
)

WORDS = ["of", "the", "Jane", "Eyre", "went", "to", "see", "Mr", "Reed", ";", "then"]
NUMBER = {word: number for number, word in enumerate(WORDS)}


def ids(text: str) -> np.ndarray:
    return np.array([NUMBER[word] for word in text.split()], np.int32)


def table_of(*pairs: tuple[int, int], tokens: int = 3_000_000) -> PairTable:
    return PairTable(np.unique([first << 32 | second for first, second in pairs]).astype(np.int64), tokens, "a text")


def brute_force(tokens: np.ndarray, context: int, rare) -> list[int]:
    """The definition, token by token; `rare` takes a pair and the number of its block."""
    found = []
    for place, token in enumerate(tokens.tolist()):
        start = place // context * context
        distance = 0
        for earlier in range(start + 1, place):
            same = (tokens[earlier - 1], tokens[earlier]) == (tokens[place - 1], token)
            if same and rare((int(tokens[place - 1]), token), place // context):
                distance = place - earlier
        found.append(distance)
    return found


def test_hits_of_a_text_made_by_hand():
    text = ids("of the Jane Eyre went to see Mr Reed ; then Jane Eyre went of the Reed Mr Reed Jane Eyre")
    frequent = table_of((NUMBER["of"], NUMBER["the"]))
    expected = {12: 9, 13: 9, 18: 10, 20: 8}  # Eyre, went, Reed and Eyre again; "of the" is frequent
    assert {place: distance for place, distance in enumerate(hit_distances(text, frequent)) if distance} == expected
    assert hit_distances(text, table_of())[15] == 14


def test_a_block_knows_nothing_of_another():
    text = ids("Jane Eyre ; Jane Eyre Jane Eyre ;")
    assert hit_distances(text, table_of()).tolist() == [0, 0, 0, 0, 3, 0, 2, 5]
    assert (
        hit_distances(text, table_of(), context=4).tolist() == [0] * 8
    )  # the pair that spans two blocks is in neither
    assert hit_distances(text, table_of(), context=5).tolist() == [0, 0, 0, 0, 3, 0, 0, 0]


@pytest.mark.parametrize("text", ["", "Jane", "Jane Eyre"])
def test_a_text_too_short_for_a_pair_again(text):
    assert hit_distances(ids(text), table_of()).tolist() == [0] * len(text.split())


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.sets(st.tuples(*[st.integers(0, 3)] * 2)))
def test_hits_are_those_of_the_definition(tokens, context, frequent):
    tokens, table = np.array(tokens, np.int32), table_of(*frequent)
    assert hit_distances(tokens, table, context).tolist() == brute_force(
        tokens, context, lambda p, _: p not in frequent
    )
    whole = brute_force(tokens, max(1, len(tokens)), lambda pair, _: pair not in frequent)
    assert hit_distances(list(tokens), table).tolist() == whole


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 12), st.integers(0, 100_000))
def test_without_a_table_what_is_rare_is_rare_in_the_other_blocks(tokens, context, per_million):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.hits.RARE", per_million)
        tokens = np.array(tokens, np.int32)

        def rare(pair, block):
            others = [place for place in range(len(tokens)) if place // context != block]
            pairs = [(tokens[place - 1], tokens[place]) for place in others if place % context]
            return sum(one == pair for one in pairs) <= per_million * len(others) // 1_000_000

        assert hit_distances_without_table(tokens, context).tolist() == brute_force(tokens, context, rare)


def test_pairs_up_to_60_times_in_3_million_tokens_are_rare():
    tokens = np.full(3_000_000, 9, np.int32)
    for first, times in ((1, 60), (3, 61)):
        places = 100 + 4 * np.arange(times) + 1000 * first
        tokens[places], tokens[places + 1] = first, first + 1
    table = count_pairs(tokens, "a text")
    assert table.at_most == 60
    assert table.rare(pair_codes(np.array([1, 2, 7, 3, 4]))).tolist() == [True, True, True, False]


def test_a_text_in_which_nothing_is_rare_is_refused():
    with pytest.raises(ValueError, match=r"a text has 49,999 tokens; at least 50,000 show what is rare"):
        count_pairs(np.zeros(49_999, np.int32), "a text")


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model)


@given(st.sets(st.tuples(*[st.integers(0, 2**31 - 1)] * 2), max_size=20))
def test_a_table_is_read_as_it_was_written(tmp_path_factory, pairs):
    path, tokenizer = tmp_path_factory.mktemp("table") / "pairs.safetensors", word_tokenizer("a", "b")
    table = table_of(*pairs, tokens=123_456)
    save_pairs(table, path, tokenizer)
    found = load_pairs(path, tokenizer)
    assert found.codes.tolist() == table.codes.tolist()
    assert (found.tokens, found.source) == (123_456, "a text")
    assert [path] == list(path.parent.iterdir())


def test_a_table_of_another_tokenizer_is_refused(tmp_path):
    path = tmp_path / "pairs.safetensors"
    save_pairs(table_of((0, 1)), path, word_tokenizer("a", "b"))
    with pytest.raises(ValueError, match=r"another tokenizer.*python -m trainer\.pairs"):
        load_pairs(path, word_tokenizer("b", "a"))


@pytest.mark.parametrize("broken", ["bytes", "no pairs", "flat", "no text"])
def test_a_file_that_is_no_table_is_refused(tmp_path, broken):
    path, about = tmp_path / "pairs.safetensors", {"tokens": "9", "text": "x", "tokenizer": "y"}
    pairs = np.zeros((2, 2), np.int32)
    if broken == "bytes":
        path.write_bytes(b"no safetensors")
    elif broken == "no pairs":
        save_file({"other": pairs}, path, about)
    elif broken == "flat":
        save_file({"pairs": pairs[0]}, path, about)
    else:
        save_file({"pairs": pairs}, path)
    with pytest.raises(ValueError, match=r"pairs.safetensors is no table of pairs .*make it anew"):
        load_pairs(path, word_tokenizer("a"))


def test_a_base_may_have_a_table(workplace, tokenizer, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert find_pairs(base, tokenizer) is None
    save_pairs(table_of((1, 2)), base / "pairs.safetensors", tokenizer)
    assert find_pairs(base, tokenizer).codes.tolist() == table_of((1, 2)).codes.tolist()
