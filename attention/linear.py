"""Linear layers that other tools know as such."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

Model = TypeVar("Model", bound=nn.Module)


def conv1d_to_linear(model: Model) -> Model:
    """Puts `nn.Linear` in place of every transformers `Conv1D`, which is what the layers of a GPT-2 are.

    Quantizers look for `nn.Linear`, and leave all else as it is without a word. The model computes the same; it can be
    saved no more, since its weights are transposed, so save it before.

    Args:
        model: changed in place; other models that share its tensors keep theirs.

    Returns:
        `model`.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                setattr(parent, name, _linear(layer))
    return model


def _linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf, device="meta")  # no memory of its own
    linear.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)
