"""Tiny checkpoints in folders, for the tests of loading, saving and the Hub."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import attention

from .models import small_config, tiny_gpt2

WORDS = ["<|end|>", "the", "cat", "sat", "on", "a", "mat"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Seven words, split at spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=WORDS[0], unk_token=WORDS[0])


def save_base(folder: Path, dtype: torch.dtype = torch.float16, **options) -> Path:
    """A plain model with its tokenizer, as transformers saves it."""
    tiny_gpt2(dtype, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def damage(folder: Path, seed: int, spared: str | None = None) -> Path:
    """Cuts a file of a folder short, or flips one of its bits; returns which. A file called `spared` is left alone."""
    rng = random.Random(seed)
    path = rng.choice([path for path in sorted(folder.iterdir()) if path.name != spared])
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path


def make_variant(base: Path, method: str = "masks", *, train: bool = True) -> attention.Variant:
    """A variant of the base in a folder; with `train`, its first layer's projections and mechanism are changed."""
    variant = attention.convert(attention.load(base)[0], small_config(method))
    if train:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in variant.named_parameters():
                if name.startswith("transformer.h.0.attn."):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return variant


def bare(base: Path) -> Path:
    """Takes the tokenizer out of a base."""
    for path in base.glob("*token*"):
        path.unlink()
    return base


def write_bert_vocabulary(folder: Path) -> None:
    """A BERT tokenizer of seven words, as old models have it: a list of words and settings."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
