"""Writing by one compiled graph, for variants whose states keep their size: masks of places, and performer."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .mechanism import traced
from .state import StateCache
from .variant import Variant, body_of, cache_name, named_arguments, positions_of, take_cache

Steady = list[dict[str, Tensor]]  # what a token reads of each layer's state and replaces, by attribute
TOLD = {"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"}


def compile_decoding(model: Variant, **options: Any) -> Variant:
    """Has a variant compute single tokens by one graph of `torch.compile`, which serves every length.

    `generate` and `model(token, cache)` then use it, in evaluation and without gradients, from the moment when no state
    changes its shape any more: after as many tokens as the windows hold. All else goes on as before: prompts, blocks of
    tokens, outputs of attentions. The first such token takes as long as compiling does; another batch size compiles
    once more. Where that fails, a warning says why and tokens are computed without.

    Args:
        model: changed in place.
        options: what `torch.compile` takes besides, such as `mode`.

    Returns:
        The same model.

    Raises:
        ValueError: if the state of a layer grows with the text, so that no graph could serve every length.
    """
    growing = [mechanism for mechanism in model.mechanisms if mechanism.grows()]
    if growing:
        layers = ", ".join(f"{mechanism.layer.layer_idx} ({mechanism.config.method})" for mechanism in growing)
        raise ValueError(
            f"decoding cannot be compiled: layers {layers} keep more with every token; compiled are masks of fixed "
            "places and performer, whose states keep their size"
        )
    if not isinstance(model.forward, Decoder):
        model.forward = Decoder(model, options)
    return model


class Decoder:
    """The `forward` of a variant that takes single tokens through a compiled graph; see `compile_decoding`.

    Attributes:
        model: the variant.
        options: of `torch.compile`.
        eager: the model's own `forward`.
        steps: tokens (or rows of one) that went through the graph.
    """

    def __init__(self, model: Variant, options: dict[str, Any]):
        self.model = model
        self.options = options
        self.eager = model.forward
        self.steps = 0
        self._name = cache_name(type(model))
        self._compiled = torch.compile(self._step, fullgraph=True, **options)
        self.__signature__ = signature(self.eager)

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoder:
        model = copy.deepcopy(self.model, memo)  # which holds its own, unless it is being made just now
        return vars(model).get("forward") or Decoder(model, self.options)

    @cached_property
    def _body(self) -> PreTrainedModel:
        return body_of(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = named_arguments(self.model, args, kwargs)
        if (given := take_cache(kwargs)) is not None:
            kwargs[self._name] = given
        steady = None if self._compiled is None else self._steady(kwargs)
        if steady is None:
            return self.eager(**kwargs)
        ids, cache = kwargs["input_ids"], kwargs[self._name]
        positions = positions_of(self._body, kwargs.get("position_ids"), cache, None, ids)
        try:
            logits, after = self._compiled(ids, positions, steady)
        except TorchDynamoException as error:
            self._compiled = None
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            warnings.warn(
                f"decoding is not compiled, and goes on without: {why} (on a CPU, compiling needs a C++ compiler, g++)",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.eager(**kwargs)
        self.steps += 1
        for state, tensors in zip(cache.layers, after, strict=True):
            for name, tensor in tensors.items():
                setattr(state, name, tensor)
            state.advance(1, None)
        return CausalLMOutputWithPast(logits=logits, **{self._name: cache})

    def _steady(self, kwargs: dict[str, Any]) -> Steady | None:
        """What the graph takes of a call's states; None for a call that is none of the graph's."""
        ids, cache, mask = (kwargs.get(name) for name in ("input_ids", self._name, "attention_mask"))
        model, options = self.model, kwargs.keys() - TOLD - {self._name}
        if torch.is_grad_enabled() or model.training or traced() or not isinstance(cache, StateCache):
            return None
        if ids is None or ids.shape[1] != 1 or kwargs.get("return_dict") is False:
            return None
        if any(kwargs[name] is not None and kwargs[name] is not False for name in options):
            return None
        if model.config.output_attentions or model.config.output_hidden_states:
            return None
        if mask is not None and not (mask.dim() == 2 and mask[:, -1].all()):
            return None
        steady = []
        for mechanism, state in zip(model.mechanisms, cache.layers, strict=True):
            if (tensors := mechanism.steady(state)) is None:
                return None
            steady.append(tensors)
        return steady

    def _step(self, ids: Tensor, positions: Tensor, steady: Steady) -> tuple[Tensor, Steady]:
        """Logits (B, 1, V) of one token in every row, and what the states hold after it."""
        cache = self.model.new_cache()
        for state, tensors in zip(cache.layers, steady, strict=True):
            state.resume(tensors)
        given = {"input_ids": ids, "position_ids": positions, "use_cache": True, self._name: cache}
        logits = self.eager(**given).logits
        after = [
            {name: getattr(state, name) for name in tensors}
            for state, tensors in zip(cache.layers, steady, strict=True)
        ]
        return logits, after
