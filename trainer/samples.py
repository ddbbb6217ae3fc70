"""Texts written from fixed prompts."""

from __future__ import annotations

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
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        for prompt in options.prompts:
            torch.manual_seed(seed)
            input_ids = prompt_ids(tokenizer, prompt).to(model.device)
            room = model.config.max_position_embeddings - input_ids.shape[1]
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
