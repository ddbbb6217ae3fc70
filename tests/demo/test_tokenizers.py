"""Models whose tokenizers are not the bundled one: of other kinds, with templates, too large, or with gaps."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from demo.attention import ViewError, encode_text, passage
from demo.engine import Generation
from demo.limits import Limits
from demo.models import Access, LoadError, ModelStore
from demo.request import read_settings
from demo.score import ScoreError, score_text
from demo.text import PromptError, TokenTexts, encode

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sea", "##s", "and"]


def of_words(**options) -> PreTrainedTokenizerFast:
    """Words between spaces, each text closed with [SEP]."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, **options))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", **options)


def write_bert(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


WRITERS = {
    "bert": write_bert,
    "byt5": lambda folder: ByT5Tokenizer().save_pretrained(folder),
    "closing": lambda folder: of_words(unk_token="[UNK]").save_pretrained(folder),
    "gaps": lambda folder: of_words().save_pretrained(folder),
}


@pytest.fixture
def make(tmp_path):
    def make_store(*kinds: str, vocab_size: int = 400) -> ModelStore:
        for kind in kinds:
            torch.manual_seed(0)
            config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=1, n_head=2)
            GPT2LMHeadModel(config).save_pretrained(tmp_path / kind)
            WRITERS[kind](tmp_path / kind)
        return ModelStore([tmp_path / kind for kind in kinds], Limits(seconds=30), Access(None, (tmp_path,)))

    return make_store


def generate(store: ModelStore, prompt: str):
    settings = {"prompt": prompt, "models": store.names(), "max_new_tokens": 4}
    (*_, run) = Generation(store, read_settings(settings, store)).stream()
    return {column.name: column for column in run.columns}


@pytest.mark.parametrize(
    ("kind", "prompt", "ids"), [("bert", "the seas", [2, 5, 6, 7]), ("closing", "the sea", [2, 5, 6])]
)
def test_no_prompt_is_closed(make, kind, prompt, ids):
    store = make(kind)
    assert generate(store, prompt)[kind].token_ids[:-4] == ids
    assert encode_text(store.get(kind), prompt, 100) == ids
    *_, scores = score_text(store, [kind], prompt)
    assert scores.token_ids == ids


def test_a_tokenizer_in_python_works_in_every_view(make):
    store = make("byt5", vocab_size=4096)  # most of which it does not know
    column = generate(store, "Ein Käse")["byt5"]
    assert column.problem is None
    assert "".join(column.tokens[: column.prompt_length]) == "Ein Käse"
    *_, scores = score_text(store, ["byt5"], "Ein Käse")
    assert "".join(scores.tokens) == "Ein Käse"
    part = passage(store.get("byt5"), encode_text(store.get("byt5"), "Ein Käse", 100), 0, 100)
    assert len(part.tokens) == len(part.token_ids) == 9


def test_characters_of_several_tokens_belong_to_the_last_also_in_python():
    tokenizer = ByT5Tokenizer()
    texts = TokenTexts(tokenizer)
    assert [texts.next(i) for i in encode(tokenizer, "aä😀</s>b")] == ["a", "", "ä", *3 * [""], "😀", "</s>", "b"]
    assert [texts.next(4000) for _ in range(4)] == ["", "", "", 4 * "\ufffd"]
    assert [texts.next(i) for i in (4000, *encode(tokenizer, "c"))] == ["", "\ufffdc"]


def test_what_a_tokenizer_cannot_read_is_said_in_its_column_alone(make):
    store = make("gaps", "closing")
    columns = generate(store, "the mountain")
    assert columns["gaps"].problem.startswith("The prompt cannot be read: the tokenizer, a ")
    assert columns["closing"].generated == 4
    assert generate(store, "the sea")["gaps"].generated == 4
    with pytest.raises(ViewError, match="cannot be read"):
        encode_text(store.get("gaps"), "the mountain", 100)
    with pytest.raises(ScoreError, match="cannot be read"):
        next(score_text(store, ["gaps"], "the mountain"))
    with pytest.raises(PromptError, match="cannot be read"):
        encode(store.get("gaps").tokenizer, "the mountain")


def test_tokens_that_the_model_has_not_are_said_in_its_column_alone(make, checkpoints):
    store = make("closing", vocab_size=7)
    store._add(str(checkpoints / "base"))
    columns = generate(store, "the sea")
    assert columns["closing"].problem == (
        "closing has no embedding for 2 tokens that its tokenizer knows, such as '##s'; resize the model "
        "(resize_token_embeddings) and save it again."
    )
    assert columns["base"].generated == 4
    with pytest.raises(LoadError, match="no embedding"):
        store.get("closing")
