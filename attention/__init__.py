"""Efficient attention for pretrained causal language models: swap it, load it, look at it."""

from .checkpoint import load, save
from .convert import attention_maps, convert, mechanism_inputs
from .mechanism import ConfigError, Mechanism, MechanismConfig
from .registry import METHODS, config_from_dict
from .softmax import SoftmaxConfig

__all__ = [
    "METHODS",
    "ConfigError",
    "Mechanism",
    "MechanismConfig",
    "SoftmaxConfig",
    "attention_maps",
    "config_from_dict",
    "convert",
    "load",
    "mechanism_inputs",
    "save",
]
