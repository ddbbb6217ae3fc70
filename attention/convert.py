"""Swapping the attention of a loaded model."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .families import check_convertible, prove
from .mechanism import MechanismConfig
from .stored import misfits, origin
from .variant import Variant, assemble, is_variant

logger = logging.getLogger(__name__)


def convert(base: PreTrainedModel, config: MechanismConfig, *, share: bool = False) -> Variant:
    """A variant of `base`: its weights, another attention.

    Args:
        base: a causal language model of transformers of any family whose attention goes through the library's
            attention functions, or a variant of one, whose own mechanisms are left behind. Untouched.
        config: the method and its options, for all layers; `LayersConfig` gives each its own.
        share: use the base's tensors instead of copies; whoever changes one in place then changes both.

    Returns:
        The variant, in the base's dtype, device and mode; its `new_parameters` names what the base has not.

    Raises:
        UnsupportedModelError: saying what in the base stands in the way.
        ConfigError: if the layers that the config names are not the base's.
        TypeError: if `base` is no model of transformers.
    """
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"convert takes a causal language model of transformers, and got {type(base).__name__}")
    if not is_variant(base):
        check_convertible(base)
    if found := misfits(base):
        raise UnsupportedModelError(base, [*found, "convert it before quantizing it or putting adapters on it"])
    if not is_variant(base):
        prove(base)
    variant = assemble(base, config, origin(base), share=share)
    logger.info("swapped attention for %s; new: %s", config.method, ", ".join(variant.new_parameters) or "nothing")
    return variant.train(base.training)
