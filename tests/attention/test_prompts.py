"""What a tokenizer makes of a prompt: opened as its template says, never closed."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from attention.prompts import decode, prompt_tokens, unknown_tokens

WORDS = ["<s>", "</s>", "[UNK]", "a", "the", "sea"]


class CharacterTokenizer(PreTrainedTokenizer):
    """In Python alone, with an eos that it puts after every text."""

    def __init__(self, **options):
        super().__init__(eos_token="\n", unk_token="\n", **options)

    @property
    def vocab_size(self) -> int:
        return 128

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(128)}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def build_inputs_with_special_tokens(self, ids, others=None):
        return [*ids, self.eos_token_id]

    def save_vocabulary(self, save_directory, filename_prefix=None) -> tuple[str, ...]:
        return ()


def character_tokenizer(_: Path) -> PreTrainedTokenizerBase:
    return CharacterTokenizer()


def word_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Words as tokens, with a template such as "<s> $A </s>"."""
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="[UNK]", padding_side="left"
    )


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("$A", "the sea", [4, 5]),
        ("<s> $A </s>", "the sea", [0, 4, 5]),
        ("<s> $A", "the sea", [0, 4, 5]),
        ("$A </s>", "the sea", [4, 5]),
        ("</s> $A </s>", "the sea", [1, 4, 5]),
        ("<s> <s> $A </s> </s>", "the sea", [0, 0, 4, 5]),
        ("<s> $A </s>", "", [0]),
        ("$A </s>", "", []),
        ("$A", "", []),
        ("<s> $A </s>", "the sea </s>", [0, 4, 5, 1]),
        ("$A </s>", "</s>", [1]),
        ("<s> $A </s>", "a a", [0, 3, 3]),
    ],
)
def test_a_prompt_is_opened_and_not_closed(template, text, expected):
    assert prompt_tokens(word_tokenizer(template), text) == expected


def test_tokenizers_of_other_kinds(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "sea"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    assert prompt_tokens(BertTokenizer(str(tmp_path / "vocab.txt")), "the sea") == [2, 6, 7]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    assert prompt_tokens(AutoTokenizer.from_pretrained(tmp_path), "the sea") == [2, 6, 7]
    assert prompt_tokens(ByT5Tokenizer(), "ab") == [100, 101]
    assert prompt_tokens(CharacterTokenizer(), "ab") == [97, 98]


def test_settings_that_cut_or_fill_texts_leave_a_prompt_whole():
    tokenizer = word_tokenizer("<s> $A </s>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert prompt_tokens(tokenizer, "the sea the sea") == [0, 4, 5, 4, 5]


def test_tokens_that_a_model_has_not():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=8, vocab_size=6))
    tokenizer = word_tokenizer("$A")
    assert unknown_tokens(tokenizer, model) == []
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<new>"])
    assert unknown_tokens(tokenizer, model) == ["[PAD]", "<new>"]
    model.resize_token_embeddings(8)
    assert unknown_tokens(tokenizer, model) == []


def test_a_text_that_the_tokenizer_cannot_read_is_a_mistake():
    words = Tokenizer(WordLevel({"sea": 0, "</s>": 1}))  # no token for what it does not know, nor for "a"
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert prompt_tokens(tokenizer, "sea sea") == [0, 0]
    with pytest.raises(ValueError, match="cannot read the text: WordLevel error"):
        prompt_tokens(tokenizer, "the sea")


def test_tokens_that_a_tokenizer_in_python_has_not_are_read():
    tokenizer = ByT5Tokenizer()
    assert decode(tokenizer, [100, 4000, 4001, 101, 198, 172]) == "a\ufffd\ufffdb\u00e9"
    assert decode(tokenizer, torch.tensor([100, 1, 4000]), skip_special_tokens=True) == "a\ufffd"
