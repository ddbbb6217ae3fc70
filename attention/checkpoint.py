"""Saving and loading variants: a folder that holds only what differs from the base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .convert import convert, load_weights
from .gpt2 import GPT2VariantConfig, GPT2VariantLMHeadModel
from .registry import config_from_dict


def load(
    spec: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base: PreTrainedModel | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder: a variant, or a plain model."""
    folder = Path(spec)
    dtype = torch.float32 if dtype is None else dtype
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != GPT2VariantConfig.model_type:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
        return model, AutoTokenizer.from_pretrained(folder)
    if base is None:
        base, _ = load(folder / config["base"]["id"], device=device, dtype=dtype)
    variant = convert(base, config_from_dict(config["attention"]), share=True)
    weights = load_file(folder / "model.safetensors")
    load_weights(
        variant, {**variant.state_dict(), **{name: t.to(base.device, base.dtype) for name, t in weights.items()}}
    )
    return variant.eval(), AutoTokenizer.from_pretrained(folder)


def save(
    variant: GPT2VariantLMHeadModel,
    folder: str | Path,
    *,
    base: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = torch.float16,
    card: str | None = None,
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Writes a variant."""
    folder = Path(folder)
    origin = variant.config.base["id"]
    base = base or load(origin)[0]
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(origin)
    folder.mkdir(parents=True, exist_ok=True)
    known = base.state_dict()
    delta: dict[str, Tensor] = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in variant.state_dict().items()
        if name not in known or not torch.equal(tensor.cpu(), known[name].to("cpu", tensor.dtype))
    }
    delta.pop("lm_head.weight", None)
    save_file(delta, folder / "model.safetensors")
    config = variant.config.to_dict()
    config["base"] = {"id": os.path.relpath(origin, folder)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    if history is not None:
        (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
