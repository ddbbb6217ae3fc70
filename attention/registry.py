"""The methods that exist, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from .masks import MasksConfig
from .mechanism import ConfigError, MechanismConfig
from .nsa import NSAConfig
from .performer import PerformerConfig
from .softmax import SoftmaxConfig

METHODS: dict[str, type[MechanismConfig]] = {
    config.method: config for config in (SoftmaxConfig, MasksConfig, PerformerConfig, NSAConfig)
}


def config_from_dict(data: dict[str, Any]) -> MechanismConfig:
    """Rebuilds a config from `MechanismConfig.to_dict`, or from a recipe's options.

    Raises:
        ConfigError: for a method that does not exist, options it does not have, and values that are wrong.
    """
    options = dict(data)
    method = options.pop("method", None)
    if method not in METHODS:
        raise ConfigError("attention", [f"method {method!r} does not exist; choose one of {list(METHODS)}"])
    config_class = METHODS[method]
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = [f"{name!r} is not an option; {method} has {known or 'none'}" for name in options if name not in known]
    try:
        config = config_class(**{name: value for name, value in options.items() if name in known})
    except ConfigError as error:
        raise ConfigError(method, unknown + error.problems) from None
    if unknown:
        raise ConfigError(method, unknown)
    return config
