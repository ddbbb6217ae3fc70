"""Tiny checkpoints in folders, for the tests of loading, saving and the Hub."""

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


def make_variant(base: Path, method: str = "masks", *, train: bool = True) -> attention.GPT2VariantLMHeadModel:
    """A variant of the base in a folder; with `train`, its first layer's projections and mechanism are changed."""
    variant = attention.convert(attention.load(base)[0], small_config(method))
    if train:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in variant.named_parameters():
                if name.startswith("transformer.h.0.attn."):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return variant
