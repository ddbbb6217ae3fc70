"""The mechanisms of a loaded model: what reaches them, and what changes when parts of them are switched off."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

import attention
from attention import Mechanism

from .models import LoadedModel

_BASES: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()
_LOCK = threading.Lock()


def as_variant(loaded: LoadedModel) -> PreTrainedModel:
    """The model as one whose attention is made of mechanisms; a base's are softmax attention on its own tensors.

    Raises:
        UnsupportedModelError: if the attention of the model cannot be taken apart.
    """
    model = loaded.model
    if attention.is_variant(model):
        return model
    with _LOCK:
        if model not in _BASES:
            _BASES[model] = attention.convert(model, attention.SoftmaxConfig(), share=True).eval()
        return _BASES[model]


@dataclass(frozen=True)
class Change:
    """What is switched off or made smaller, to see what it is worth; the default changes nothing.

    Attributes:
        off: branches, or places of masks, that are off.
        layers: the layers in which they are off; empty: in all that have them.
        silent_layers: layers whose attention adds nothing.
        silent_heads: (layer, head) whose output is zero.
        window: tokens of the window, where a layer has a larger one.
        blocks: blocks that are read, where a layer reads more.
    """

    off: frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    silent_layers: frozenset[int] = frozenset()
    silent_heads: frozenset[tuple[int, int]] = frozenset()
    window: int | None = None
    blocks: int | None = None

    def __bool__(self) -> bool:
        return self != Change()

    def off_in(self, layer: int, mechanism: Mechanism) -> frozenset[str]:
        """The branches of a layer that are off."""
        return self.off & set(mechanism.branches) if not self.layers or layer in self.layers else frozenset()

    def silent_in(self, layer: int, heads: int) -> list[int]:
        """The heads of a layer whose output is zero."""
        if layer in self.silent_layers:
            return list(range(heads))
        return sorted(head for index, head in self.silent_heads if index == layer and 0 <= head < heads)

    def config_of(self, mechanism: Mechanism) -> Any:
        """A mechanism's config with the sizes asked for, where it has larger ones."""
        config, smaller = mechanism.config, {}
        for name, size in (("window", self.window), ("num_selected", self.blocks)):
            if size is not None and (getattr(config, name, 0) or 0) > size:
                smaller[name] = size
        return dataclasses.replace(config, **smaller) if smaller else config

    def words(self) -> str:
        """The change in a few words; empty where there is none."""
        where = f" in layer {_listed(self.layers)}" if self.layers else ""
        parts = [f"without {', '.join(sorted(self.off))}{where}"] if self.off else []
        parts += [f"layer {_listed(self.silent_layers)} silent"] if self.silent_layers else []
        heads = ", ".join(f"{layer}.{head}" for layer, head in sorted(self.silent_heads))
        parts += [f"head {heads} silent"] if heads else []
        parts += [f"window of {self.window}"] if self.window is not None else []
        parts += [f"{self.blocks} blocks"] if self.blocks is not None else []
        return ", ".join(parts)


def _listed(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


UNCHANGED = Change()


@contextmanager
def applied(mechanisms: Sequence[Mechanism], change: Change) -> Iterator[None]:
    """Makes a change to a model's mechanisms and takes it back on leaving; hold the model's lock meanwhile."""
    if not change:
        yield
        return
    before = [(mechanism.disabled, mechanism.config) for mechanism in mechanisms]
    hooks = []
    try:
        for layer, mechanism in enumerate(mechanisms):
            mechanism.disable(*(mechanism.disabled | change.off_in(layer, mechanism)))
            mechanism.config = change.config_of(mechanism)
            if silent := change.silent_in(layer, mechanism.layer.num_heads):
                hooks.append(mechanism.register_forward_hook(_Silence(silent)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mechanism, (disabled, config) in zip(mechanisms, before, strict=True):
            mechanism.disable(*disabled)
            mechanism.config = config


class _Silence:
    """A forward hook that sets the outputs (B, H, T, D) of some heads to zero."""

    def __init__(self, heads: list[int]):
        self.heads = heads

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[:, self.heads] = 0
        return output


@dataclass(frozen=True)
class LayerInputs:
    """What reaches one layer's mechanism: q (B, H, T, D), k and v (B, H_kv, T, D), x (B, T, E)."""

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor


@contextmanager
def recorded(mechanisms: Sequence[Mechanism]) -> Iterator[list[LayerInputs]]:
    """Collects what reaches each mechanism, in the order in which they run."""
    inputs: list[LayerInputs] = []

    def keep(mechanism: Mechanism, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(mechanism.forward).bind(*args, **kwargs).arguments
        inputs.append(LayerInputs(mechanism, *(given[name] for name in ("q", "k", "v", "x"))))

    hooks = [mechanism.register_forward_pre_hook(keep, with_kwargs=True) for mechanism in mechanisms]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
