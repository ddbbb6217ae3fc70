"""A tiny random model of every family that `attention.families.TESTED` names, and of some that must be refused."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.3,
    "use_cache": True,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**GROUPED, "head_dim": 6},
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gpt_neox": {"intermediate_size": 24, "rotary_pct": 0.25},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "smollm3": {**GROUPED, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12, "rope_theta": 10000.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": YARN,
    "llama3": LLAMA3,
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model of a family, with weights large enough to tell tokens apart, its zeros and ones moved, too."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SIZES, **OPTIONS.get(family, {}), **options})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model
