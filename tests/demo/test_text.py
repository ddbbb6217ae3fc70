"""Prompts into tokens, and tokens into text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.text import PromptError, TokenTexts, clean, encode, room_for_prompt


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoints / "base")


@given(text=st.text(st.characters(), min_size=1, max_size=40))  # surrogates included
def test_any_text_is_encoded_and_comes_back(tokenizer, text):
    ids = encode(tokenizer, text)
    texts = TokenTexts(tokenizer)
    assert "".join(map(texts.next, ids)) == clean(text)


def test_clean_joins_pairs_and_replaces_what_is_alone():
    assert clean("a\ud83d\ude00b\ud800c\x00") == "a😀b\ufffdc\x00"


def test_characters_of_several_tokens_belong_to_the_last(tokenizer):
    texts = TokenTexts(tokenizer)
    pieces = [texts.next(i) for i in encode(tokenizer, "😀")]
    assert pieces[-1] == "😀"
    assert set(pieces[:-1]) == {""}


def test_an_empty_prompt_cannot_be_continued(tokenizer):
    with pytest.raises(PromptError, match="empty"):
        encode(tokenizer, "")


def test_a_prompt_leaves_room_for_what_is_asked_for_but_keeps_half_of_the_context():
    assert room_for_prompt(context=1024, new_tokens=120) == 904
    assert room_for_prompt(context=128, new_tokens=400) == 64
    assert room_for_prompt(context=1, new_tokens=1) == 1
