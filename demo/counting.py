"""What attention costs by count, the same on every machine: operations, keys, memory, for texts of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention import Mechanism

from .components.curves import Chart
from .measured import Compared, Level, colours, comparisons, length_axis
from .models import LoadedModel
from .speed import SpeedError, lengths_up_to, mechanisms_of, with_bases
from .views import listed

LONGEST = 2**20
KNOWN = 512  # tokens from which on a state grows evenly, or not at all: no window is longer
_STATES: WeakKeyDictionary[PreTrainedModel, list[dict[int, int]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Count:
    """What one model needs for one length.

    Attributes:
        operations: floating-point operations of one pass over the text; a multiply-add is two.
        keys_read: keys (or rows of the state) that its last token reads, in all layers counted.
        keys_scored: keys, summaries or tokens' ids that it goes through to choose those, likewise.
        state_bytes: what is kept for the tokens to come.
    """

    model: str
    length: int
    operations: int
    keys_read: int
    keys_scored: int
    state_bytes: int

    @property
    def keys(self) -> int:
        """Keys read and keys scored."""
        return self.keys_read + self.keys_scored


class Counter:
    """Counts for one model, or for the attention of some of its layers.

    Raises:
        SpeedError: if the model cannot be taken apart, or has no such layer.
    """

    def __init__(self, loaded: LoadedModel, level: Level, layers: Sequence[int] | None = None):
        mechanisms = mechanisms_of(loaded)
        chosen = range(len(mechanisms)) if layers is None or level == "model" else layers
        if any(not 0 <= layer < len(mechanisms) for layer in chosen):
            raise SpeedError(f"{loaded.name} has layers 0 to {len(mechanisms) - 1}.")
        self.loaded = loaded
        self.mechanisms = [mechanisms[layer] for layer in chosen]
        self._states = [state_sizes(loaded)[layer] for layer in chosen]
        self._rest = 2 * _matrix_weights(loaded.model) if level == "model" else 0

    def operations(self, length: int) -> int:
        return length * self._rest + _summed(self.mechanisms, lambda mechanism: mechanism.operations(length))

    def keys(self, length: int) -> tuple[int, int]:
        """Keys read and keys scored by the last of `length` tokens."""
        return (
            sum(mechanism.keys_read(length - 1) for mechanism in self.mechanisms),
            sum(mechanism.keys_scored(length - 1) for mechanism in self.mechanisms),
        )

    def at(self, length: int) -> Count:
        states = sum(_extended(sizes, length) for sizes in self._states)
        return Count(self.loaded.name, length, self.operations(length), *self.keys(length), states)


def _summed(mechanisms: Sequence[Mechanism], count: Callable[[Mechanism], int]) -> int:
    """Σ over layers; those built alike are counted once."""
    kinds = [_kind(mechanism) for mechanism in mechanisms]
    once = {kind: count(mechanism) for kind, mechanism in zip(kinds, mechanisms, strict=True)}
    return sum(once[kind] for kind in kinds)


def _kind(mechanism: Mechanism) -> str:
    """The same for mechanisms that cost the same: their options, and which of their places are in use."""
    used = {name: [bool(value) for value in values] for name, values in mechanism.summary().items()}
    return repr(
        (mechanism.config.to_dict(), sorted(mechanism.disabled), used if mechanism.config.method == "masks" else 0)
    )


def _matrix_weights(model: nn.Module) -> int:
    """Weights that every token is multiplied with, outside the mechanisms: matrices, the output's among them."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        id(weight): weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and ".mechanism." not in name and id(weight) not in looked_up
    }
    output = model.get_output_embeddings()
    return sum(matrices.values()) + (output.weight.numel() if id(output.weight) in looked_up else 0)


def state_sizes(loaded: LoadedModel) -> list[dict[int, int]]:
    """For each layer the bytes of its state after some lengths, from states that were made; made once for a model."""
    if loaded.model not in _STATES:
        by_kind: dict[str, dict[int, int]] = {}
        layers = []
        for mechanism in mechanisms_of(loaded):
            kind = _kind(mechanism)
            if kind not in by_kind:
                with loaded.lock:
                    by_kind[kind] = {length: _state_bytes(mechanism, length) for length in lengths_up_to(2 * KNOWN)}
            layers.append(by_kind[kind])
        _STATES[loaded.model] = layers
    return _STATES[loaded.model]


@torch.inference_mode()
def _state_bytes(mechanism: Mechanism, length: int) -> int:
    """Bytes of a state that has seen `length` tokens."""
    shape, parameter = mechanism.layer, next(mechanism.parameters(), None)
    options: dict[str, Any] = {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}

    def zeros(*sizes: int) -> Tensor:
        return torch.zeros(1, *sizes, **options)

    state = mechanism.new_state()
    q = zeros(shape.num_heads, length, shape.head_dim)
    k = zeros(shape.num_kv_heads, length, shape.head_dim)
    tokens = torch.zeros(1, length, dtype=torch.long, device=q.device)
    mechanism(q, k, k, zeros(length, shape.hidden_size), state, None, tokens)
    return state.nbytes()


def _extended(sizes: dict[int, int], length: int) -> int:
    """A state's bytes after any length: as it was made, in between and beyond on straight lines."""
    if length in sizes:
        return sizes[length]
    known = sorted(sizes)
    after = next((each for each in known if each > length), known[-1])
    before = known[known.index(after) - 1] if after != known[0] else after
    if before == after:
        return sizes[after]
    slope = (sizes[after] - sizes[before]) / (after - before)
    return round(sizes[after] + slope * (length - after))


@dataclass
class Counted:
    """What several models need, by length, and where variants need no more than their bases."""

    loaded: Sequence[LoadedModel]
    level: Level
    layers: Sequence[int] | None = None
    longest: int = LONGEST

    def __post_init__(self) -> None:
        self.models = with_bases(self.loaded)
        self.counters = {each.name: Counter(each, self.level, self.layers) for each in self.models}
        self.lengths = lengths_up_to(self.longest)
        self.counts = [counter.at(length) for counter in self.counters.values() for length in self.lengths]

    @property
    def scope(self) -> str:
        """What is counted, as a sentence."""
        if self.level == "model":
            return "The whole model."
        return "All layers." if self.layers is None else f"Layer {listed([str(layer) for layer in self.layers])} alone."

    def of(self, name: str) -> list[Count]:
        """A model's counts, shortest first."""
        return [count for count in self.counts if count.model == name]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        return comparisons([Compared.of(each) for each in self.models])

    def break_even(self, name: str, base: str, quantity: str) -> int | None:
        """The length from which on a variant needs no more of "operations" or "keys" than its base.

        None where it needs more at the longest length; to the token.
        """
        ours, theirs = self.counters[name], self.counters[base]

        def is_less(length: int) -> bool:
            if quantity == "operations":
                return ours.operations(length) <= theirs.operations(length)
            return sum(ours.keys(length)) <= sum(theirs.keys(length))

        if not is_less(self.lengths[-1]):
            return None
        grid = [1, *self.lengths]
        above = next((index for index in range(len(grid) - 1, -1, -1) if not is_less(grid[index])), None)
        if above is None:
            return 1
        low, high = grid[above], grid[above + 1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_less(middle) else (middle, high)
        return high


COUNTED = {
    "operations": ("Operations", "Floating-point operations of one pass over the text.", "", 1.0),
    "keys_read": ("Keys read", "By the last token: keys, or rows of the state.", "", 1.0),
    "keys": ("Keys read and scored", "With what it goes through to choose the keys that it reads.", "", 1.0),
    "state_bytes": ("Memory of the text", "The decode state: what is kept for the tokens to come.", "kB", 1e-3),
}


def charts(counted: Counted) -> list[Chart]:
    """One log-log chart for each quantity."""
    found = colours([Compared.of(each) for each in counted.models])
    ticks = [length for length in counted.lengths if length.bit_length() % 2 or length == counted.lengths[-1]]
    return [
        {
            "title": title,
            "note": f"{note} {counted.scope}",
            "x": {**length_axis(counted.lengths), "ticks": [float(tick) for tick in ticks]},
            "y": {"label": unit, "unit": unit, "log": True},
            "series": [
                {
                    "name": name,
                    "color": color,
                    "dots": True,
                    "points": [[count.length, getattr(count, quantity) * factor] for count in counted.of(name)],
                }
                for name, color in found.items()
            ],
            "events": [],
        }
        for quantity, (title, note, unit, factor) in COUNTED.items()
    ]


def verdicts(counted: Counted) -> list[str]:
    """For each variant, in words, from which length on it needs less than its base."""
    what = {"operations": "reading a text takes {} operations", "keys": "a token reads and scores {} keys"}
    sentences = []
    for name, base in counted.comparisons:
        parts = []
        for quantity, words in what.items():
            even = counted.break_even(name, base, quantity)
            if even is None:
                parts.append(words.format("more") + f" than {base}'s up to {counted.lengths[-1]:,} tokens")
            elif even <= 1:
                parts.append(words.format("no more") + f" than {base}'s at any length")
            else:
                parts.append(words.format("no more") + f" than {base}'s from {even:,} tokens on")
        sentences.append(f"{name}, counted: " + "; ".join(parts) + ".")
    return sentences


def report(counted: Counted) -> dict[str, Any]:
    """Counts as JSON."""
    return {
        "counted": [asdict(count) for count in counted.counts],
        "counted_break_even": {
            name: {quantity: counted.break_even(name, base, quantity) for quantity in ("operations", "keys")}
            for name, base in counted.comparisons
        },
    }
