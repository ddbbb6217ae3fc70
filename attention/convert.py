"""Swapping the attention of a loaded model, and looking at the attention of one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.initialization import no_init_weights

from .gpt2 import GPT2VariantConfig, GPT2VariantLMHeadModel
from .hub import cached_origin
from .mechanism import Mechanism, MechanismConfig
from .softmax import SoftmaxConfig

logger = logging.getLogger(__name__)


def convert(base: PreTrainedModel, config: MechanismConfig, *, share: bool = False) -> GPT2VariantLMHeadModel:
    """A variant of `base`: its weights, another attention.

    Args:
        base: a `GPT2LMHeadModel` of any size, or a variant of one, whose own mechanism is left behind. Untouched.
        config: the method and its options, one for all layers.
        share: use the base's tensors instead of copies; whoever changes one in place then changes both.

    Returns:
        The variant, in the base's dtype, device and mode; its `new_parameters` names what the base has not.

    Raises:
        TypeError: if no adapter exists for the base's family.
        ValueError: if the base has cross-attention.
    """
    if not isinstance(base, GPT2LMHeadModel):
        raise TypeError(f"no adapter for {type(base).__name__}; convert takes a GPT2LMHeadModel")
    if base.config.add_cross_attention:
        raise ValueError("the base has cross-attention (add_cross_attention=True), which only decoders of pairs use")
    weights = {name: tensor for name, tensor in base.state_dict().items() if ".mechanism." not in name}
    if not share:
        weights = _clone(weights)
    variant = _build(base, config)
    variant.to(device=base.device, dtype=base.dtype)
    load_weights(variant, weights)
    logger.info("swapped attention for %s; new: %s", config.method, ", ".join(variant.new_parameters) or "nothing")
    return variant.train(base.training)


def load_weights(variant: GPT2VariantLMHeadModel, weights: dict[str, Tensor]) -> None:
    """Puts tensors into a variant, without copying; its mechanisms may keep the values they have.

    Raises:
        ValueError: naming every tensor that is missing or that the variant has no place for.
    """
    result = variant.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in result.missing_keys if ".mechanism." not in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {result.unexpected_keys}")
    variant.tie_weights()


def _build(base: PreTrainedModel, config: MechanismConfig) -> GPT2VariantLMHeadModel:
    options = base.config.to_dict()
    for key in ("model_type", "architectures", "attention", "base", "auto_map"):
        options.pop(key, None)
    variant_config = GPT2VariantConfig(**options, attention=config.to_dict(), base=origin(base))
    with no_init_weights():
        variant = GPT2VariantLMHeadModel(variant_config)
    variant.generation_config = base.generation_config
    return variant


def origin(model: PreTrainedModel) -> dict[str, Any] | None:
    """Where a base's weights came from, as `GPT2VariantConfig.base` says it; None for a model made in memory.

    For a variant, the base that it was made from.
    """
    if isinstance(model.config, GPT2VariantConfig):
        return model.config.base
    name = model.config.name_or_path
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {"id": name, "revision": None}
    place = cached_origin(folder.resolve())
    if place is None:
        return {"id": str(folder.resolve()), "revision": None}
    return {"id": place.name, "revision": place.revision}


def _clone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    clones: dict[int, Tensor] = {}  # tied weights stay tied
    return {name: clones.setdefault(tensor.data_ptr(), tensor.clone()) for name, tensor in weights.items()}


@contextmanager
def _recorded_inputs(mechanisms: list[Mechanism]) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collects (q, k, x) of each mechanism, in the order in which they run."""
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        mechanism.register_forward_pre_hook(lambda _, args: inputs.append((args[0], args[1], args[3])))
        for mechanism in mechanisms
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def mechanism_inputs(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Mechanism, Tensor, Tensor, Tensor]]:
    """Each layer's mechanism with its queries (B, H, T, D), keys (B, H_kv, T, D) and input (B, T, E).

    Args:
        model: a variant, or a base, which is seen through the softmax mechanism.
        input_ids: (B, T) without padding.
    """
    variant = model if isinstance(model, GPT2VariantLMHeadModel) else convert(model, SoftmaxConfig(), share=True)
    with torch.no_grad(), _recorded_inputs(variant.mechanisms) as inputs:
        variant(input_ids, use_cache=False)
    return [(mechanism, *tensors) for mechanism, tensors in zip(variant.mechanisms, inputs, strict=True)]


def attention_maps(model: PreTrainedModel, input_ids: Tensor) -> list[Tensor]:
    """The attention of every layer as dense matrices, one (B, H, T, T) tensor a layer; see `Mechanism.attention_map`.

    Args:
        model: a base or a variant.
        input_ids: (B, T) without padding; memory grows with T².
    """
    with torch.no_grad():
        return [
            mechanism.attention_map(q, k, x, input_ids) for mechanism, q, k, x in mechanism_inputs(model, input_ids)
        ]
