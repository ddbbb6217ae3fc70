"""A tiny base with its tokenizer, and a few kB of text."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
NAMES = [
    *("Alice", "Bob", "Clara", "Daniel", "Emma", "Frank", "Greta", "Henry", "Ida", "Jacob", "Karen"),
    *("Louis", "Mary", "Nora", "Oscar", "Paula", "Quentin", "Ruth", "Simon", "Theresa", "London", "Paris"),
]
OTHER = "the sea was dark and the old man looked at it for a long time"
WORDS = ("the sea old man looked at and a ship came over dark water", "when night fell upon them all")


@pytest.fixture(autouse=True)
def engine() -> None:
    """Accelerate keeps its settings for the life of a process; each test starts with a fresh one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def made_text(documents: int = 4, paragraphs: int = 12, seed: int = 0) -> str:
    """Documents that end at an empty line, paragraphs that are lines."""
    rng = random.Random(seed)
    lines = [
        [
            " ".join(rng.choices(" ".join(WORDS).split(), k=rng.randint(3, 30))).capitalize() + "."
            for _ in range(paragraphs)
        ]
        for _ in range(documents)
    ]
    return "\n\n".join("\n".join(document) for document in lines) + "\n\n"


@pytest.fixture(scope="session")
def text() -> str:
    return made_text()


@pytest.fixture(scope="session")
def tokenizer(text: str) -> PreTrainedTokenizerFast:
    return byte_pairs([text], 320)


@pytest.fixture(scope="session")
def names_tokenizer() -> PreTrainedTokenizerFast:
    """Each word that follows a space is one token; "The" is one, too, and no name."""
    facts = [f"{one} lives in {two}. The {two} said it, the ship was {one}." for one in NAMES for two in NAMES]
    return byte_pairs([f"\nThis is what we know. {OTHER}", *facts], 900)


@pytest.fixture(scope="session")
def names_base(tmp_path_factory: pytest.TempPathFactory, names_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a tiny base of 256 positions with that tokenizer."""
    folder = tmp_path_factory.mktemp("names") / "base"
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=256, vocab_size=len(names_tokenizer), bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    names_tokenizer.save_pretrained(folder)
    return folder


def byte_pairs(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of a vocabulary of at most that size, made from texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, text: str) -> Path:
    """A folder with `base`, `train.txt` and `valid.txt`."""
    folder = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():  # larger than at the start of training, so that attention matters
        parameter.data.mul_(3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "train.txt").write_text(text)
    (folder / "valid.txt").write_text(made_text(documents=1, seed=1))
    return folder


def recipe(workplace: Path, **options: object) -> dict[str, object]:
    """A run of a few steps of both stages, with everything on schedule."""
    return {
        "base": str(workplace / "base"),
        "attention": {"method": "masks", "candidates": ["window(4)", "first(2)"]},
        "data": {
            "train": str(workplace / "train.txt"),
            "valid": str(workplace / "valid.txt"),
            "cache": str(workplace / "cache"),
        },
        "stages": [
            {"stage": "transfer", "steps": 3, "batch_size": 2, "context": 32, "mechanism_lr": 0.1},
            {"stage": "distil", "steps": 5, "batch_size": 4, "micro_batch_size": 2, "context": 16, "final_context": 32},
        ],
        "eval": {"every": 4, "tokens": 128, "context": 32},
        "samples": {"prompts": ["", "The old man"], "length": 8, "every": 4},
        "checkpoint": {"every": 2},
        "log_every": 1,
        "cpu": True,
        **options,
    }


def write_recipe(folder: Path, options: dict[str, object]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(options))
    return path
