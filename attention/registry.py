"""The methods that exist, by name, and a choice among them layer by layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .masks import MasksConfig
from .mechanism import ConfigError, LayerShape, Mechanism, MechanismConfig
from .nsa import NSAConfig
from .performer import PerformerConfig
from .softmax import SoftmaxConfig

METHODS: dict[str, type[MechanismConfig]] = {
    config.method: config for config in (SoftmaxConfig, MasksConfig, PerformerConfig, NSAConfig)
}


MOST_CHOICES = 1000  # as many as a model has layers


@dataclass(frozen=True, kw_only=True)
class LayersConfig(MechanismConfig):
    """A method for each layer.

    Attributes:
        layers: each {"layers": numbers of layers, from 0, "method": ..., and the method's options}; together they name
            every layer of the model once.
    """

    method: ClassVar[str] = "layers"
    description: ClassVar[str] = "Each layer has the method that serves it best."

    layers: tuple[dict[str, Any], ...]

    def problems(self) -> list[str]:
        if len(self.layers) > MOST_CHOICES:
            return [f"layers has {len(self.layers)} entries; the most is {MOST_CHOICES}"]
        problems = [] if self.layers else ["layers is empty; name every layer of the model once"]
        for place, choice in enumerate(self.layers):
            numbers = choice.get("layers")
            if not isinstance(numbers, list | tuple) or not numbers or not all(_is_number(n) for n in numbers):
                problems.append(f"layers.{place}.layers is {numbers!r}; it must be a list of numbers of layers, from 0")
            try:
                _choice(choice)
            except ConfigError as error:
                problems += [f"layers.{place}: {problem}" for problem in error.problems]
        return problems

    def by_layer(self, count: int) -> list[MechanismConfig]:
        found = {number: _choice(choice) for choice in self.layers for number in choice["layers"]}
        counts = Counter(number for choice in self.layers for number in choice["layers"])
        problems = []
        if twice := sorted(number for number, times in counts.items() if times > 1):
            problems.append(f"layers {twice} are named more than once")
        if missing := sorted(set(range(count)) - found.keys()):
            problems.append(f"layers {missing} are not named; the model has layers 0 to {count - 1}")
        if outside := sorted(found.keys() - set(range(count))):
            problems.append(f"layers {outside} do not exist; the model has layers 0 to {count - 1}")
        if problems:
            raise ConfigError(self.method, problems)
        return [found[number] for number in range(count)]

    def build(self, layer: LayerShape) -> Mechanism:
        (choice,) = (choice for choice in self.layers if layer.layer_idx in choice["layers"])
        return _choice(choice).build(layer)

    def to_dict(self) -> dict[str, Any]:
        """As in `MechanismConfig`; the layers' own defaults are written out."""
        layers = [{"layers": list(choice["layers"]), **_choice(choice).to_dict()} for choice in self.layers]
        return {"method": self.method, "layers": layers}


CONFIGS: dict[str, type[MechanismConfig]] = METHODS | {LayersConfig.method: LayersConfig}  # what a model may have


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _choice(choice: Mapping[str, Any]) -> MechanismConfig:
    options = {name: value for name, value in choice.items() if name != "layers"}
    if not isinstance(options.get("method"), str) or options["method"] not in METHODS:
        raise ConfigError("attention", [f"method {options.get('method')!r} does not exist; choose one of {[*METHODS]}"])
    return config_from_dict(options)


def config_from_dict(data: Mapping[str, Any]) -> MechanismConfig:
    """Rebuilds a config from `MechanismConfig.to_dict`, or from a recipe's options.

    Raises:
        ConfigError: for a method that does not exist, options it does not have, and values that are wrong.
    """
    options = dict(data)
    method = options.pop("method", None)
    if not isinstance(method, str) or method not in CONFIGS:
        raise ConfigError("attention", [f"method {method!r} does not exist; choose one of {list(CONFIGS)}"])
    config_class = CONFIGS[method]
    names = [field.name for field in dataclasses.fields(config_class)]
    unknown = [f"{name!r} is not an option; {method} has {names or 'none'}" for name in options if name not in names]
    missing = [
        f"{field.name} is missing"
        for field in dataclasses.fields(config_class)
        if field.name not in options and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(method, unknown + missing)
    try:
        config = config_class(**{name: value for name, value in options.items() if name in names})
    except ConfigError as error:
        raise ConfigError(method, unknown + error.problems) from None
    if unknown:
        raise ConfigError(method, unknown)
    return config
