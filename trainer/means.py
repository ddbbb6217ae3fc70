"""What a variant's mechanisms do on a text, on the average: recorded while something else reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attention.mechanism import Mechanism

Means = list[dict[str, list[float]]]


@contextmanager
def text_means(model: nn.Module) -> Iterator[Means]:
    """Collects `Mechanism.means` of all that the model reads inside, one entry for each layer.

    Yields:
        A list, filled on leaving; empty where no layer has such means.
    """
    layers = [_LayerMeans(mechanism) for mechanism in getattr(model, "mechanisms", [])]
    hooks = [layer.mechanism.register_forward_pre_hook(layer.add, with_kwargs=True) for layer in layers]
    means: Means = []
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
    if any(layer.sums for layer in layers):
        means.extend(layer.result() for layer in layers)


class _LayerMeans:
    """Sums of one layer's means, each weighted with the tokens that it is of."""

    def __init__(self, mechanism: Mechanism):
        self.mechanism = mechanism
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self._signature = inspect.signature(mechanism.forward)

    @torch.no_grad()
    def add(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = self._signature.bind(*args, **kwargs).arguments["x"]
        tokens = x.shape[0] * x.shape[1]
        for name, values in self.mechanism.means(x).items():
            self.sums[name] = self.sums.get(name, 0) + tokens * torch.tensor(values, dtype=torch.float64)
        self.tokens += tokens

    def result(self) -> dict[str, list[float]]:
        return {name: (total / self.tokens).tolist() for name, total in self.sums.items()}
