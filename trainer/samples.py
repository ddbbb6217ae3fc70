"""Texts written from fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    length: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Continues each prompt by up to `length` tokens; the global random state is left as it was.

    Args:
        temperature: 0 takes the most likely token.
        seed: the same for each prompt.
    """
    choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    training = model.training
    model.eval()
    texts = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        for prompt in prompts:
            torch.manual_seed(seed)
            input_ids = prompt_ids(tokenizer, prompt).to(model.device)
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(length, model.config.max_position_embeddings - input_ids.shape[1]),
                pad_token_id=tokenizer.eos_token_id,
                **choice,
            )
            texts.append(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
    model.train(training)
    return texts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """(1, T ≥ 1) token ids; an empty prompt is the beginning of a document."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    return torch.tensor([ids])
