"""Tiny checkpoints as the app finds them: a base with the bundled tokenizer, and a variant of it."""

import socket
from pathlib import Path

import pytest
import torch
from starlette.datastructures import QueryParams
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import attention
from demo.limits import Limits
from demo.models import Access, ModelStore

BUNDLED = Path(__file__).parents[2] / "checkpoints"
CONTEXT = 128
OPTIONS = {"masks": {"candidates": ["last(0)", "window(6)", "first(2)"]}}


def make_checkpoints(folder: Path, context: int) -> Path:
    """Writes base/ and masks/ of so many positions."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "base")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=context, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base, _ = attention.load(folder / "base")
    for method, options in OPTIONS.items():
        variant = attention.convert(base, attention.config_from_dict({"method": method, **options}))
        attention.save(variant, folder / method, dtype=None)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with base/ and masks/."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"), CONTEXT)


@pytest.fixture
def store(checkpoints) -> ModelStore:
    """A store with both, and small limits."""
    limits = Limits(new_tokens=24, models_per_run=3, prompt_characters=2000, seconds=30)
    return ModelStore([checkpoints / "base", checkpoints / "masks"], limits, Access(None, (checkpoints,)))


class Visit:
    """A request, as the page's load has it, for an address with this query."""

    def __init__(self, query: str):
        self.query_params = QueryParams(query)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
