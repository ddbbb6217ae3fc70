"""What the mechanisms of a model are called with, and the attention that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .convert import convert
from .mechanism import Mechanism
from .softmax import SoftmaxConfig
from .variant import is_variant, mechanisms_of

ARGUMENTS = signature(Mechanism.forward)


@dataclass(frozen=True)
class Call:
    """One call of a mechanism: the arguments of `Mechanism.forward` that are tensors, and what it gave.

    Attributes:
        q, k, v, x, lengths, tokens: see `Mechanism.forward`.
        mixed: (B, H, T, D).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    lengths: Tensor | None
    tokens: Tensor | None
    mixed: Tensor


@contextmanager
def recorded(mechanisms: Iterable[Mechanism]) -> Iterator[list[Call]]:
    """Collects the calls of mechanisms, in the order in which they are made."""
    calls: list[Call] = []

    def record(mechanism: Mechanism, args: tuple, kwargs: dict, mixed: Tensor) -> None:
        given = ARGUMENTS.bind(mechanism, *args, **kwargs)
        given.apply_defaults()
        named = {name: given.arguments[name] for name in ("q", "k", "v", "x", "lengths", "tokens")}
        calls.append(Call(**named, mixed=mixed))

    hooks = [mechanism.register_forward_hook(record, with_kwargs=True) for mechanism in mechanisms]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def mechanism_inputs(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Mechanism, Tensor, Tensor, Tensor]]:
    """Each layer's mechanism with its queries (B, H, T, D), keys (B, H_kv, T, D) and input (B, T, E).

    Args:
        model: a variant, or a base, which is seen through the softmax mechanism.
        input_ids: (B, T) without padding.
    """
    variant = model if is_variant(model) else convert(model, SoftmaxConfig(), share=True)
    mechanisms = mechanisms_of(variant)
    with torch.no_grad(), recorded(mechanisms) as calls:
        variant(input_ids, use_cache=False)
    return [(mechanism, call.q, call.k, call.x) for mechanism, call in zip(mechanisms, calls, strict=True)]


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
