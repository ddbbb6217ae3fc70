"""Texts written from fixed prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import SampleConfig


@torch.no_grad()
def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleConfig, seed: int
) -> list[str]:
    """Continues each prompt; the global random state is left as it was.

    Args:
        seed: the same for each prompt.
    """
    choice = {"do_sample": bool(options.temperature)}
    if options.temperature:
        choice |= {"temperature": options.temperature, "top_k": 0}
    training = model.training
    model.eval()
    texts = []
    for prompt in options.prompts:
        input_ids = prompt_ids(tokenizer, prompt).to(model.device)
        room = model.config.max_position_embeddings - input_ids.shape[1]
        with seeded(seed, model.device):
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(options.length, room),
                pad_token_id=tokenizer.eos_token_id,
                **choice,
            )
        texts.append(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
    model.train(training)
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """(1, T ≥ 1) token ids; an empty prompt is the beginning of a document."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return torch.tensor([ids])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed inside the block; outside, as if it were not there."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def sample_texts(model: PreTrainedModel, count: int, length: int) -> Tensor:
    """(count, length) tokens that a model in evaluation mode writes from eos on, at temperature 1.

    Sampled from the whole distribution; a text goes on after an eos inside it.
    """
    eos = model.config.eos_token_id
    prompt = torch.full((count, 1), eos, device=model.device)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=eos,
    )
