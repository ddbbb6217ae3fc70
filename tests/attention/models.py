"""Tiny random GPT-2s and a small configuration of every method."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from attention.mechanism import MechanismConfig
from attention.registry import METHODS, config_from_dict

SMALL_OPTIONS: dict[str, dict] = {
    "softmax": {},
    "masks": {
        "first_layers": [["last(0)", "last(1)", "window(6)", "first(2)", "dilated(3,3)"]],
        "candidates": ["window(5)", "first(1)", "top(4)", "induction(2)"],
    },
    "performer": {"num_features": 8},
    "nsa": {
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "num_selected": 3,
        "window": 5,
        "select_every": 2,
    },
}


def small_config(method: str) -> MechanismConfig:
    """A configuration whose windows and blocks are shorter than the texts in the tests."""
    return config_from_dict({"method": method, **SMALL_OPTIONS[method]})


def tiny_gpt2(dtype: torch.dtype = torch.float32, **options) -> GPT2LMHeadModel:
    """A random GPT-2 of two layers, two heads, 48 positions, with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    defaults = {"vocab_size": 61, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    config = GPT2Config(**{**defaults, "eos_token_id": 0, "initializer_range": 0.3, **options})
    return GPT2LMHeadModel(config).to(dtype).eval()


ALL_METHODS = sorted(METHODS)
