"""Tiny GPT-2s with one fault each, as functions that `python -m attention.contract` can be pointed at."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from attention.variant import cache_name

CACHE = cache_name(GPT2LMHeadModel)


def made(kind: type[GPT2LMHeadModel], **options: Any) -> GPT2LMHeadModel:
    """A random model with weights large enough to tell tokens apart, and biases that are not zero."""
    torch.manual_seed(0)
    defaults = {"vocab_size": 61, "n_positions": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return kind(GPT2Config(**{**defaults, "bos_token_id": 0, "eos_token_id": 0, **options})).eval()


def sound() -> GPT2LMHeadModel:
    return made(GPT2LMHeadModel)


class Leak(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.mean(1, keepdim=True)
        return output


def leak() -> GPT2LMHeadModel:
    """Each token's logits have the mean over all tokens in them."""
    return made(Leak)


class DivisorLeak(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        length = output.logits.shape[1]
        chunk = max(n for n in range(1, max(2, length // 2 + 1)) if length % n == 0)
        output.logits = output.logits * (1 + torch.arange(length) // chunk)[:, None]
        return output


def divisor_leak() -> GPT2LMHeadModel:
    """Causal by replaced tokens, and yet one token more moves all: the chunk is the largest divisor of the length."""
    return made(DivisorLeak)


class StaleCache(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        cache = kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 20:
            cache.layers[0].values = cache.layers[0].values.roll(1, 2)
        return super().forward(input_ids, **kwargs)


def stale_cache() -> GPT2LMHeadModel:
    """After 20 tokens the cache holds values that belong to other tokens."""
    return made(StaleCache)


class StaleCrop(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        output = super().forward(input_ids, **kwargs)
        if output.get(CACHE) is not None:
            output[CACHE].layers[-1].crop = lambda tokens_to_remove: None
        return output


def stale_crop() -> GPT2LMHeadModel:
    """The last layer's state keeps tokens that were taken back."""
    return made(StaleCrop)


class NoCrop(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        output = super().forward(input_ids, **kwargs)
        if output.get(CACHE) is not None:
            output[CACHE].layers[-1].is_croppable = False
        return output


def no_crop() -> GPT2LMHeadModel:
    """A cache that says of itself that it cannot be cropped."""
    return made(NoCrop)


class FreshBlock(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        cache = kwargs.get(CACHE)
        if cache is not None and input_ids.shape[1] > 1:
            cache.reset()
        return super().forward(input_ids, **kwargs)


def fresh_block() -> GPT2LMHeadModel:
    """A cached block of several tokens starts from no state."""
    return made(FreshBlock)


class LostPositions(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> ModelOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


def lost_positions() -> GPT2LMHeadModel:
    """Positions start at 0 whatever the cache holds, unless they are given."""
    return made(LostPositions)


class ReadsPadding(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> ModelOutput:
        attention_mask = None if attention_mask is None else torch.ones_like(attention_mask)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


def reads_padding() -> GPT2LMHeadModel:
    """The mask of padding is ignored."""
    return made(ReadsPadding)


class MixedRows(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.mean(0, keepdim=True)
        return output


def mixed_rows() -> GPT2LMHeadModel:
    """Rows of a batch see each other."""
    return made(MixedRows)


class Restless(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * torch.randn_like(output.logits)
        return output


def restless() -> GPT2LMHeadModel:
    """Two equal calls differ."""
    return made(Restless)


class ZeroGate(GPT2LMHeadModel):
    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.zeros(config.vocab_size))

    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> ModelOutput:
        cache = kwargs.get(CACHE)
        seen = 0 if cache is None else cache.get_seq_length()
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + self.gate * (seen == 0)
        return output


def zero_gate() -> GPT2LMHeadModel:
    """What differs with a cache is multiplied by a parameter that starts as zero."""
    return made(ZeroGate)


class OldName(GPT2LMHeadModel):
    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> ModelOutput:
        return super().forward(input_ids, past_key_values, attention_mask, None, position_ids, use_cache=use_cache)


def old_name() -> GPT2LMHeadModel:
    """A forward from before 5.24: under the new name the cache is swallowed."""
    return made(OldName)


class Forgetful(GPT2LMHeadModel):
    @wraps(GPT2LMHeadModel.forward)
    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.transformer.wte(input_ids)))


def forgetful() -> GPT2LMHeadModel:
    """Reads no token but the last."""
    return made(Forgetful)


def running_mean() -> GPT2LMHeadModel:
    """Attention gives the mean of the values so far, whatever the queries ask for."""
    AttentionInterface.register("running-mean", _running_mean)
    AttentionMaskInterface.register("running-mean", AttentionMaskInterface()["sdpa"])
    return made(GPT2LMHeadModel, attn_implementation="running-mean")


def _running_mean(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
    total, length = value.cumsum(2), query.shape[2]
    counts = torch.arange(1, value.shape[2] + 1)[:, None]
    return (total / counts)[:, :, -length:].transpose(1, 2), None


def broken() -> GPT2LMHeadModel:
    raise RuntimeError("out of luck")


def no_model() -> str:
    return "text"
