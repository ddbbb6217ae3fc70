"""Efficient attention for pretrained causal language models: swap it, load it, look at it."""

from transformers import AutoConfig, AutoModelForCausalLM

from .convert import attention_maps, convert, mechanism_inputs
from .errors import CheckpointError, PushError
from .gpt2 import GPT2VariantConfig, GPT2VariantLMHeadModel
from .hub import HubOptions
from .loading import Checkpoint, describe, hub_size, load, locate
from .masks import MasksConfig
from .mechanism import ConfigError, Mechanism, MechanismConfig
from .nsa import NSAConfig
from .performer import PerformerConfig
from .pushing import Push, push
from .registry import METHODS, config_from_dict
from .saving import save
from .softmax import SoftmaxConfig

__all__ = [
    "METHODS",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "GPT2VariantConfig",
    "GPT2VariantLMHeadModel",
    "HubOptions",
    "MasksConfig",
    "Mechanism",
    "MechanismConfig",
    "NSAConfig",
    "PerformerConfig",
    "Push",
    "PushError",
    "SoftmaxConfig",
    "attention_maps",
    "config_from_dict",
    "convert",
    "describe",
    "hub_size",
    "load",
    "locate",
    "mechanism_inputs",
    "push",
    "save",
]

AutoConfig.register(GPT2VariantConfig.model_type, GPT2VariantConfig)
AutoModelForCausalLM.register(GPT2VariantConfig, GPT2VariantLMHeadModel)
