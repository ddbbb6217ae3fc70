"""Which models a mechanism can be put into: families that are tested, and a proof for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import NotAModelError, UnsupportedModelError
from .mechanism import Mechanism
from .softmax import SoftmaxConfig
from .variant import assemble, attention_modules, cache_name, causal_models

# By `model_type`; the property tests run on each, so `convert` need not prove the seam on a model of these.
TESTED = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "opt", "phi3", "olmo2", "smollm3")
# Linear maps that give queries, keys and values in one, by class and name: whether those alternate head by head, or
# each is in one piece. Their shapes do not tell.
FUSED = {
    (Conv1D, "c_attn"): False,  # GPT-2
    (nn.Linear, "c_attn"): True,  # GPT-BigCode
    (nn.Linear, "query_key_value"): True,  # GPT-NeoX, BLOOM, Persimmon
    (nn.Linear, "qkv_proj"): False,  # Phi-3
    (nn.Linear, "Wqkv"): False,  # MPT
}
PROOF = (7, 5)  # tokens of the two blocks that the proof reads
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of logits, relative to the largest; 5e-2 in half precision


def obstacles(model: PreTrainedModel) -> list[str]:
    """What in a model stands in the way of another attention: a sentence each, none where nothing is known to."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return ["it is an encoder with a decoder, whose layers also look at the encoder's output"]
    if not model.can_generate() or model.get_output_embeddings() is None:
        return ["it is no causal language model: it has no matrix that gives the logits of the next token"]
    found = []
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None):
        found.append("its weights are quantized; load it without quantization")
    if getattr(config, "add_cross_attention", False):
        found.append("it has cross-attention (add_cross_attention), which only decoders of pairs use")
    modules = attention_modules(model)
    found += _layers_without(model, modules)
    if modules:
        found += [sentence for sentence in map(_peculiarity, [model] * len(modules), modules.values()) if sentence][:1]
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found.append(f"its attention scores are capped softly (attn_logit_softcapping={config.attn_logit_softcapping})")
    return found


def _layers_without(model: PreTrainedModel, modules: dict[str, nn.Module]) -> list[str]:
    count = model.config.num_hidden_layers
    layers = [module.layer_idx for module in modules.values()]
    if not modules:
        return ["no attention module with a layer_idx was found in it"]
    if not getattr(model, "_supports_attention_backend", False):
        return ["its attention does not go through the attention functions of transformers, which a method replaces"]
    if missing := sorted(set(range(count)) - set(layers)):
        return [f"layers {missing} have no softmax attention: it is a hybrid of its own"]
    if len(set(layers)) != len(layers):
        return ["several attention modules share one layer"]
    return []


def _peculiarity(model: PreTrainedModel, module: nn.Module) -> str | None:
    """What an attention module does besides softmax of scaled scores over all earlier tokens."""
    config, layer = model.config, module.layer_idx
    kinds = getattr(config, "layer_types", None)
    limit = getattr(config, "max_position_embeddings", None) or 0
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None) if not kinds else None)
    if isinstance(window, int) and window < limit:
        return f"layer {layer} looks at the last {window} tokens alone (sliding_window), and the model holds {limit}"
    if kinds and kinds[layer] not in ("full_attention", "attention", "no_rope_attention"):
        return f"layer {layer} is of the kind {kinds[layer]!r}"
    if getattr(module, "is_causal", True) is False:
        return "it is an encoder, whose tokens look at later ones"
    if getattr(module, "sinks", None) is not None:
        return f"layer {layer} has attention sinks of its own (weights that take a share of every row)"
    if getattr(module, "kv_lora_rank", None) or getattr(config, "kv_lora_rank", None):
        return "its keys and values are compressed together (multi-head latent attention), values narrower than keys"
    if not cache_name(type(module)):
        return f"{type(module).__name__} takes no cache, so a method could keep no state"
    return None


def check_convertible(model: PreTrainedModel) -> None:
    """Checks what can be seen without running a model.

    Raises:
        UnsupportedModelError: naming all that stands in the way.
    """
    found = obstacles(model)
    try:
        known = causal_models(model.config.model_type)
    except NotAModelError as error:
        found = found or [str(error)]
    else:
        if not found and not isinstance(model, known):
            found = [f"it is no {', '.join(each.__name__ for each in known)}"]
    if found:
        raise UnsupportedModelError(model, found)


def prove(model: PreTrainedModel) -> None:
    """Runs softmax through the seam beside the model itself, on a few tokens, where no test of this project does.

    Raises:
        UnsupportedModelError: with the largest difference, or with what went wrong.
    """
    if model.config.model_type in TESTED:
        return
    try:
        difference = seam_difference(model)
    except Exception as error:  # whatever a model does that the seam does not expect
        what = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedModelError(
            model, [f"softmax attention put into it fails: {type(error).__name__}: {what}"]
        ) from error
    if not difference <= (bound := TOLERANCE.get(model.dtype, 5e-2)):
        raise UnsupportedModelError(
            model,
            [
                f"softmax attention put into it differs from its own by {difference:.1e} of the largest logit, more "
                f"than {bound:.0e}: its attention does something else besides"
            ],
        )


@torch.no_grad()
def seam_difference(model: PreTrainedModel) -> float:
    """The largest difference of logits between a model and softmax through the seam, over the largest logit.

    On random tokens, whole, and in two blocks with a cache.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (2, sum(PROOF)), generator=generator).to(model.device)
    variant = assemble(model, SoftmaxConfig(), None, share=True)
    for mechanism in variant.mechanisms:
        mechanism.register_forward_pre_hook(_check_call)
    with _evaluating(model):
        expected = model(tokens, use_cache=False).logits.float()
    whole = variant(tokens, use_cache=False).logits
    cache, blocks = variant.new_cache(), []
    for block in tokens.split(PROOF, 1):
        blocks.append(variant(block, use_cache=True, **{cache_name(type(variant)): cache}).logits)
    found = torch.stack([whole, torch.cat(blocks, 1)]).float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _check_call(mechanism: Mechanism, args: tuple[Any, ...]) -> None:
    """Compares what an attention module hands over with what its config says; softmax alone needs little of it.

    Raises:
        ValueError: naming what differs, or what does not arrive.
    """
    (q, k, v, x, _, _, tokens), layer = args, mechanism.layer
    if tokens is None:
        raise ValueError(f"layer {layer.layer_idx} does not tell its attention which tokens it reads, and which pad")
    sizes = {
        "heads": (q.shape[1], layer.num_heads),
        "heads of keys": (k.shape[1], layer.num_kv_heads),
        "numbers in a query": (q.shape[-1], layer.head_dim),
        "numbers in a value": (v.shape[-1], layer.head_dim),
        "numbers in its input": (x.shape[-1], layer.hidden_size),
    }
    if wrong := [f"{found} {what}, not {said}" for what, (found, said) in sizes.items() if found != said]:
        raise ValueError(f"layer {layer.layer_idx} has {'; '.join(wrong)}, as its config says")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; each of its modules gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
