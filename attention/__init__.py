"""Efficient attention for pretrained causal language models: swap it, load it, look at it."""

from . import adapters as adapters  # peft, where it is installed, then knows where to adapt a variant
from .compiled import compile_decoding
from .convert import convert
from .errors import CheckpointError, PushError, UnsupportedModelError
from .hub import HubOptions
from .linear import conv1d_to_linear
from .loading import Checkpoint, describe, hub_size, load
from .masks import MasksConfig
from .mechanism import ConfigError, Mechanism, MechanismConfig
from .nsa import NSAConfig
from .performer import PerformerConfig
from .pushing import Push, push
from .recording import attention_maps, mechanism_inputs
from .registry import CONFIGS, METHODS, LayersConfig, config_from_dict
from .saving import save
from .softmax import SoftmaxConfig
from .stored import locate
from .variant import Variant, VariantConfig, is_variant

__all__ = [
    "CONFIGS",
    "METHODS",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "HubOptions",
    "LayersConfig",
    "MasksConfig",
    "Mechanism",
    "MechanismConfig",
    "NSAConfig",
    "PerformerConfig",
    "Push",
    "PushError",
    "SoftmaxConfig",
    "UnsupportedModelError",
    "Variant",
    "VariantConfig",
    "attention_maps",
    "compile_decoding",
    "config_from_dict",
    "conv1d_to_linear",
    "convert",
    "describe",
    "hub_size",
    "is_variant",
    "load",
    "locate",
    "mechanism_inputs",
    "push",
    "save",
]
