"""The one interface that every attention method implements."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn

from .state import State

LARGEST_SEED = 2**32 - 1  # of an option; `seeded_generator` multiplies it
FARTHEST = 65_536  # the most tokens that an option may reach back: bounds what a typo, or a stranger, can allocate


class ConfigError(ValueError):
    """A configuration with mistakes; the message lists all of them, one a line.

    Attributes:
        problems: the mistakes, each a sentence that says what was wrong and what was expected.
    """

    def __init__(self, subject: str, problems: list[str]):
        self.problems = problems
        super().__init__("\n  - ".join([f"{subject} has {len(problems)} problem(s):", *problems]))


@dataclass(frozen=True)
class LayerShape:
    """What a mechanism must know of the layer that it serves.

    Attributes:
        num_heads: query heads H.
        num_kv_heads: key and value heads H_kv; divides H.
        head_dim: width D of a head.
        hidden_size: width E of the layer's input.
        max_length: positions that the model can hold.
        layer_idx: place of the layer in the model, from 0.
        dropout: probability with which an attention weight is dropped in training, at the start.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_length: int
    layer_idx: int = 0
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MechanismConfig(ABC):
    """Hyper-parameters of a method; immutable, checked as a whole when it is made.

    Raises:
        ConfigError: naming every option that has a wrong type or value.
    """

    method: ClassVar[str]
    description: ClassVar[str]

    def __post_init__(self) -> None:
        problems = self._type_problems() or self.problems()
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def _type_problems(self) -> list[str]:
        hints = get_type_hints(type(self))
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                value = _as_tuple(value)
                object.__setattr__(self, field.name, value)
            try:
                type_validator(field.name, value, hints[field.name])
            except (TypeError, ValueError) as error:
                problems.append(str(error))
        return problems

    def problems(self) -> list[str]:
        """Sentences on options whose types are right and whose values are not."""
        return []

    @abstractmethod
    def build(self, layer: LayerShape) -> Mechanism:
        """A new mechanism for one layer, its parameters at their starting values."""

    def by_layer(self, count: int) -> list[MechanismConfig]:
        """The config of each of a model's `count` layers.

        Raises:
            ConfigError: if it names other layers than these.
        """
        return [self] * count

    def alone(self, layer_idx: int) -> MechanismConfig:
        """The same for one of a model's layers, without the options of the others."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `method` included, from which `config_from_dict` rebuilds the config."""
        return {"method": self.method, **dataclasses.asdict(self)}


class Mechanism(nn.Module, ABC):
    """How one layer mixes values: works on queries, keys and values after the projections.

    Every mechanism is strictly causal, scales scores by D^(−1/2), and gives the same outputs with a state,
    in any split of the tokens, as without.

    Attributes:
        branches: names of the parts that can be switched off, for ablation.
        takes_float32: whether queries, keys and values may be in float32 where the model is not.
        choosing: names of the parameters that do nothing but choose keys, see `choosing_parameters`.
        disabled: the branches that are off; see `disable`.
        dropout: probability with which an attention weight is dropped in training.
    """

    branches: tuple[str, ...] = ()
    takes_float32: ClassVar[bool] = True
    choosing: tuple[str, ...] = ()

    def __init__(self, config: MechanismConfig, layer: LayerShape):
        super().__init__()
        self.config = config
        self.layer = layer
        self.dropout = layer.dropout
        self.disabled: frozenset[str] = frozenset()

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Mixes the values.

        Args:
            q: queries (B, H, T, D).
            k: keys (B, H_kv, T, D).
            v: values (B, H_kv, T, D).
            x: the layer's input (B, T, E).
            state: what was seen before, from `new_state`; updated in place. None: the rows start here.
            lengths: (B,) how many of the T tokens of each row are real; the rest, at the end of the row, are
                padding: their outputs are finite and meaningless, and the state never sees them. None: all.
            tokens: (B, T) the tokens' ids, for methods that look at them; None if the model was given embeddings alone.

        Returns:
            (B, H, T, D), in the dtype of v.
        """

    @abstractmethod
    def attention_map(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The dense matrix A (B, H, T, T) for which `forward` equals A @ v; its rows sum to 1."""

    def attention_parts(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        """Further tensors that explain the map, by name; each method documents its own."""
        return {}

    def selection_loss(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor | None:
        """How badly the keys that it chooses fit softmax attention (a scalar, in nats); None where nothing is learned.

        Builds (T, T) matrices. Only `choosing_parameters` have a gradient.
        """
        return None

    def choosing_parameters(self) -> list[nn.Parameter]:
        """The parameters named in `choosing` that are in use: only `selection_loss` gives them a gradient.

        They do not require one when they are made, or whoever trains the rest would find them unused.
        """
        return []

    @abstractmethod
    def new_state(self) -> State:
        """An empty decode state for this mechanism."""

    def grows(self) -> bool:
        """Whether a decode state keeps more with every token, at whatever length."""
        return True

    def steady(self, state: State) -> dict[str, Tensor] | None:
        """What a further single token without gradients reads of a state and replaces, by attribute.

        None while the state still changes its shape, or the way in which it is read; always where it `grows`.
        """
        return None

    @abstractmethod
    def keys_read(self, position: int) -> int:
        """How many keys (or the equivalent in state rows) a query at 0-based `position` reads."""

    def keys_scored(self, position: int) -> int:
        """How many keys, summaries of keys or tokens' ids a query at 0-based `position` goes through to choose some."""
        return 0

    @abstractmethod
    def operations(self, length: int) -> int:
        """Floating-point operations of `forward` on one row of `length` tokens, all heads; a multiply-add is two."""

    def after_step(self, step: int) -> None:
        """What the trainer calls after optimiser step `step`, counted from 1; most methods have nothing to do."""

    def settle(self) -> None:
        """What must be read from the weights before a graph can be made; called whenever they have been put in."""

    def resized(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a mechanism of this method as weights of this one, which keeps what it has room for.

        Where this one is larger it computes nearly the same. Given back as they are by methods whose sizes are fixed.
        """
        return weights

    def disable(self, *names: str) -> None:
        """Switches branches off, and every branch that is not named on.

        Raises:
            ValueError: if a name is not one of `branches`.
        """
        unknown = set(names) - set(self.branches)
        if unknown:
            raise ValueError(f"no branch {sorted(unknown)} in {self.config.method}; it has {list(self.branches)}")
        self.disabled = frozenset(names)

    def penalty(self) -> Tensor | None:
        """The term that an L1 objective adds for this layer (a scalar), or None where the method has none."""
        return None

    def summary(self) -> dict[str, list[float] | list[list[float]]]:
        """Learned quantities worth recording in a training history, by name, as plain numbers."""
        return {}

    def means(self, x: Tensor) -> dict[str, list[float]]:
        """What depends on the text, by name and head: means over the tokens of the layer's input x (B, T, E)."""
        return {}


def is_mechanism(name: str) -> bool:
    """Whether a parameter's or a tensor's name is one of a mechanism's own."""
    return ".mechanism." in f".{name}"


def _as_tuple(value: Any) -> Any:
    """Lists, and lists in lists, as tuples, which JSON and YAML do not have."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def seeded_generator(seed: int, layer_idx: int) -> torch.Generator:
    """A CPU generator for one layer's random start: layers differ, runs with one seed do not."""
    return torch.Generator().manual_seed(seed * 1_000_003 + layer_idx)


def traced() -> bool:
    """Whether a graph is being made, by `torch.compile` or `torch.export`, and not a result.

    Lengths may then be symbols: nothing may branch on them, be repeated as often as they say, or be kept for later.
    """
    return torch.compiler.is_compiling()


def blocks_for(length: int, size: int) -> int:
    """How many blocks of `size` tokens hold `length` of them; in a graph 2 or more, as 1 would be a case of its own."""
    return length // size + 2 if traced() else -(-length // size)


def writes_in_place() -> bool:
    """Whether results may be written into parts of tensors: not while gradients are kept or a graph is made."""
    return not torch.is_grad_enabled() and not traced()


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeats grouped key or value heads (B, H_kv, T, D) to (B, H, T, D); the same tensor when H_kv = H."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
