"""What a model attends to in a text: the data of the attention tab and of its endpoint."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

import attention
from attention.mechanism import repeat_heads
from attention.prompts import prompt_tokens

from .busy import BUSY, COMPUTING
from .components.heads import HeadsView
from .components.maps import MapsView, MapView, RowSeries, RowsView, pack_bytes, pack_triangle
from .mechanisms import UNCHANGED, Change, LayerInputs, applied, as_variant, recorded
from .models import LoadedModel
from .parts import Parts, explain, plain, total_variation, weight_tables
from .predictions import Predictions, next_tokens
from .reach import reach
from .steps import Reading, reading_steps
from .text import TokenTexts, clean, token_label

THUMBNAIL = 40  # pixels
CACHE_BYTES = 256_000_000
MOST_READ = 2048  # tokens that the model reads for one view: its maps have as many rows and columns while they are made
NEAR_MEAN = 0.15  # an output this near to the mean of the values, in spreads of the values, says little else
SETTLED = 8  # tokens before which everything is near the mean


class ViewError(ValueError):
    """A view that cannot be made; the message is for the person who asked for it."""


@dataclass(frozen=True)
class Passage:
    """Part of a text that is looked at.

    Attributes:
        token_ids: what the model reads, at most its context and `MOST_READ`, up to the last token shown.
        tokens: the text of each token shown.
        start: position of the first token shown in the text.
        total: tokens of the whole text.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    start: int
    total: int

    @property
    def positions(self) -> range:
        """Positions of the tokens shown among those that the model reads."""
        return range(len(self.token_ids) - len(self.tokens), len(self.token_ids))

    @property
    def shown(self) -> slice:
        """The same as a slice."""
        return slice(self.positions.start, self.positions.stop)

    @property
    def stop(self) -> int:
        """Position in the text after the last token shown."""
        return self.start + len(self.tokens)

    @property
    def first_read(self) -> int:
        """Position in the text of the first token that the model reads."""
        return self.stop - len(self.token_ids)


def passage(loaded: LoadedModel, token_ids: list[int], start: int, count: int) -> Passage:
    """The `count` tokens from `start` on, moved to lie inside the text, and as much before them as the model holds.

    Raises:
        ViewError: if the text has no tokens.
    """
    if not token_ids:
        raise ViewError("The text is empty: write a few words, or generate some.")
    longest = min(loaded.context, MOST_READ)
    count = max(1, min(count, len(token_ids), longest))
    start = max(0, min(start, len(token_ids) - count))
    stop = start + count
    texts = TokenTexts(loaded.tokenizer)
    tokens = [texts.next(token_id) or token_label(loaded.tokenizer, token_id) for token_id in token_ids[start:stop]]
    return Passage(tuple(token_ids[max(0, stop - longest) : stop]), tuple(tokens), start, len(token_ids))


def encode_text(loaded: LoadedModel, text: str, limit: int) -> list[int]:
    """Token ids of a text of any number of tokens.

    Raises:
        ViewError: if it has more than `limit` characters, or the tokenizer cannot read it.
    """
    if len(text) > limit:
        raise ViewError(f"The text has {len(text):,} characters; at most {limit:,} are read. Shorten it.")
    try:
        return prompt_tokens(loaded.tokenizer, clean(text))
    except ValueError as error:
        raise ViewError(f"The text cannot be read: {error}") from error


class Look:
    """One model reading one passage: what reaches its layers, what it predicts, and the maps that were asked for.

    Attributes:
        layers: the inputs of each layer.
        change: what is switched off while it reads.
        predictions: of the tokens shown, what comes next.

    Raises:
        ViewError: if the model is of a family whose attention cannot be looked at.
    """

    def __init__(self, loaded: LoadedModel, part: Passage, change: Change = UNCHANGED):
        self.part, self.change, self._lock = part, change, loaded.lock  # not the model, which the store may drop
        self.tokens = torch.tensor([part.token_ids], device=loaded.model.device)
        try:
            variant = as_variant(loaded)
        except attention.UnsupportedModelError as error:
            raise ViewError(f"The attention of {loaded.name} cannot be shown: {error}.") from error
        self.mechanisms = list(variant.mechanisms)
        with self._changed(), recorded(self.mechanisms) as layers:
            logits = variant(self.tokens, use_cache=False, logits_to_keep=len(part.tokens)).logits[0]
        self.layers: list[LayerInputs] = layers
        self.predictions = Predictions.of(logits, part.token_ids[part.shown])
        self._rows: dict[int, Tensor] = {}

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """The model for itself, changed; a measurement waits meanwhile."""
        with BUSY.doing(COMPUTING), self._lock, applied(self.mechanisms, self.change):
            yield

    @property
    def heads(self) -> int:
        return self.layers[0].q.shape[1]

    def rows(self, layer: int) -> Tensor:
        """(H, W, T) what the tokens shown read of all that the model reads; kept in half precision."""
        if layer not in self._rows:
            inputs = self.layers[layer]
            with self._changed():
                maps = inputs.mechanism.attention_map(inputs.q, inputs.k, inputs.x, self.tokens)[0]
            rows = maps[:, self.part.shown].cpu().half()
            rows[self.change.silent_in(layer, self.heads)] = 0
            self._rows[layer] = rows
        return self._rows[layer].float()

    def maps(self, layer: int) -> Tensor:
        """(H, W, W) the attention maps of a layer, between the tokens shown."""
        return self.rows(layer)[:, :, self.part.shown]

    def parts(self, layer: int, head: int) -> Parts:
        """What happens inside the mechanism for one head."""
        inputs, rows = self.layers[layer], self.rows(layer)[head]
        with self._changed():
            return explain(inputs.mechanism, inputs.q, inputs.k, inputs.x, self.tokens, head, self.part.shown, rows)

    def keys(self, layer: int) -> tuple[list[int], list[int]]:
        """For each token shown, how many keys it reads in a layer, and how many it goes through to choose them."""
        mechanism = self.layers[layer].mechanism
        with self._changed():
            return (
                [mechanism.keys_read(position) for position in self.part.positions],
                [mechanism.keys_scored(position) for position in self.part.positions],
            )

    def gate_means(self) -> list[dict[str, Tensor]]:
        """Each layer's `Mechanism.means` over the tokens shown."""
        shown = self.part.shown
        with self._changed():
            return [
                {name: torch.tensor(values) for name, values in each.mechanism.means(each.x[:, shown]).items()}
                for each in self.layers
            ]

    def distance_from_mean(self, layer: int) -> Tensor:
        """(H, W) how far each head's output is from the mean of the values so far, in spreads of these values."""
        rows, shown = self.rows(layer), self.part.shown
        values = repeat_heads(self.layers[layer].v, self.heads)[0].float().cpu()
        count = torch.arange(1, values.shape[1] + 1)[:, None]
        mean = values.cumsum(1) / count
        spread = (values.square().sum(-1, keepdim=True).cumsum(1) / count - mean.square().sum(-1, keepdim=True)).clamp(
            min=0
        )
        away = (rows @ values - mean[:, shown]).norm(dim=-1)
        return away / spread[:, shown, 0].sqrt().clamp(min=1e-6)

    def nbytes(self) -> int:
        """Memory that it holds."""
        tensors = [tensor for layer in self.layers for tensor in (layer.q, layer.k, layer.v, layer.x)]
        return sum(tensor.nbytes for tensor in [*tensors, *self._rows.values()]) + self.predictions.nbytes()


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model, changed or not, perhaps another beside it, and a passage."""

    loaded: LoadedModel
    part: Passage
    change: Change = UNCHANGED
    beside: LoadedModel | None = None

    @property
    def base(self) -> LoadedModel | None:
        """The base that the model is compared with."""
        return None if self.loaded.entry.is_base else self.loaded.base

    def looks(self) -> dict[str, tuple[LoadedModel, Change]]:
        """All models that read the passage, by the key of their map."""
        looks = {"model": (self.loaded, self.change)}
        if self.change:
            looks["unchanged"] = (self.loaded, UNCHANGED)
        if self.beside is not None:
            looks["beside"] = (self.beside, UNCHANGED)
        if self.base is not None:
            looks["base"] = (self.base, UNCHANGED)
        return looks

    def name(self, key: str) -> str:
        """What a map is called."""
        loaded, change = self.looks()[key]
        return f"{loaded.name}, {change.words()}" if change else loaded.name


class AttentionViews:
    """Attention as the page shows it; remembers the passages looked at last."""

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self.cache_bytes = cache_bytes
        self._looks: OrderedDict[tuple[Any, ...], Look] = OrderedDict()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def work(self, subject: Subject) -> Iterator[tuple[float, str]]:
        """Computes what `heads` and `maps` show, a layer at a time; yields the share that is done, and what is next."""
        keys = list(subject.looks())
        for done, key in enumerate(keys):
            yield done / len(keys), f"{subject.name(key)} reads the text"
            look = self._look(subject, key)
            for layer in range(len(look.layers)):
                share = (layer + 1) / (len(look.layers) + 1)
                yield (done + share) / len(keys), f"{subject.name(key)}: layer {layer} of {len(look.layers)}"
                look.rows(layer)
        yield 1.0, ""

    @torch.inference_mode()
    def heads(self, subject: Subject, layer: int, head: int) -> HeadsView:
        """Thumbnails of all layers and heads, and what heads can be found by."""
        look = self._look(subject, "model")
        base = self._look(subject, "base") if "base" in subject.looks() else None
        pixels, found = [], []
        for index in range(len(look.layers)):
            pixels.append(_thumbnails(look.maps(index)))
            found.append(_head_measures(look, base, index))
        self._shrink()
        measures = {name: [plain(layer_found[name]) for layer_found in found] for name in found[0]}
        view: HeadsView = {
            "layers": len(look.layers),
            "heads": look.heads,
            "size": pixels[0].shape[-1],
            "pixels": pack_bytes(torch.stack(pixels)),
            "layer": min(layer, len(look.layers) - 1),
            "head": min(head, look.heads - 1),
            "measures": [{**MEASURES[name], "key": name, "values": values} for name, values in measures.items()],
        }
        return {**view, "distance": measures["distance"]} if base is not None else view

    @torch.inference_mode()
    def maps(self, subject: Subject, layer: int, head: int) -> MapsView:
        """One layer and head: the maps, what is behind them, and numbers for each token.

        Raises:
            ViewError: if the model has no such layer or head.
        """
        loaded, part = subject.loaded, subject.part
        look = self._look(subject, "model")
        head_rows = self._head_rows(subject, layer, head)
        parts = look.parts(layer, head)
        name = loaded.name
        return {
            "title": f"{subject.name('model')} · layer {layer} · head {head}" + _range(part),
            "file": f"{name}-layer{layer}-head{head}",
            "tokens": list(part.tokens),
            "start": part.start,
            "total": part.total,
            "says": _says(look, part, layer, head),
            "steps": reading_steps(_reading(look, parts, layer, head)),
            "maps": _main_maps(subject, layer, head_rows),
            "parts": parts.maps,
            "rows": [
                _share_read(subject, look, layer),
                *_comparison(subject, head_rows, parts),
                *parts.rows,
            ],
            "tables": weight_tables(look.mechanisms, layer, look.gate_means(), look.change),
            "next": self._next(subject),
        }

    @torch.inference_mode()
    def numbers(self, subject: Subject, layer: int, head: int) -> dict[str, Any]:
        """The maps as plain numbers: for each a list of rows, row i with i + 1 numbers.

        Raises:
            ViewError: if the model has no such layer or head.
        """
        loaded, part = subject.loaded, subject.part
        look = self._look(subject, "model")
        rows = self._head_rows(subject, layer, head)
        read, scored = look.keys(layer)
        before = part.shown.start
        return {
            "model": loaded.name,
            "method": look.layers[layer].mechanism.config.method,
            "layer": layer,
            "head": head,
            "layers": len(look.layers),
            "heads": look.heads,
            "tokens": list(part.tokens),
            "start": part.start,
            "total_tokens": part.total,
            "keys_read": read,
            "keys_scored": scored,
            "maps": {name: _triangle(matrix[:, part.shown]) for name, matrix in rows.items()},
            "before": {name: plain(matrix[:, :before].sum(-1)) for name, matrix in rows.items()},
            "elsewhere": {
                name: plain(total_variation(rows["model"], matrix)) for name, matrix in rows.items() if name != "model"
            },
        }

    def reach(self, subject: Subject, row: int) -> Iterator[tuple[float, dict[str, Any] | None]]:
        """Which tokens the prediction after a token shown depends on, in each model that is shown.

        Yields:
            The share that is done, and last the data of the view.

        Raises:
            ViewError: if there is no such token.
        """
        part, looks = subject.part, subject.looks()
        if not 0 <= row < len(part.tokens):
            raise ViewError(f"Tokens 0 to {len(part.tokens) - 1} are shown; there is no token {row}.")
        ids = part.token_ids[: part.positions[row] + 1]
        shown, series, together = slice(part.shown.start, len(ids)), [], 1
        for index, (key, (loaded, change)) in enumerate(looks.items()):
            for step in reach(loaded, ids, change):
                if isinstance(step, float):
                    yield (index + step) / len(looks), None
                else:
                    together = step.together
                    series.append(
                        {
                            "key": key,
                            "name": subject.name(key),
                            "effects": [float(f"{value:.3g}") for value in step.effects[shown].tolist()],
                            "reached": int(step.reached.sum()),
                            "before": int(step.reached[: part.shown.start].sum()),
                        }
                    )
        yield 1.0, {"row": row, "of": len(ids), "together": together, "models": series}

    def _head_rows(self, subject: Subject, layer: int, head: int) -> dict[str, Tensor]:
        """(W, T) what one head reads of all that the model reads, by the key of the map."""
        look = self._look(subject, "model")
        if not (0 <= layer < len(look.layers) and 0 <= head < look.heads):
            raise ViewError(
                f"{subject.loaded.name} has layers 0 to {len(look.layers) - 1} and heads 0 to {look.heads - 1}; "
                f"layer {layer}, head {head} does not exist."
            )
        rows = {}
        for key in subject.looks():
            other = self._look(subject, key)
            if layer < len(other.layers) and head < other.heads:
                rows[key] = other.rows(layer)[head]
        return rows

    def _next(self, subject: Subject) -> dict[str, Any]:
        looks = {key: self._look(subject, key) for key in subject.looks()}
        base = looks.get("base")
        return next_tokens(
            {subject.name(key): look.predictions for key, look in looks.items()},
            None if base is None else base.predictions,
            subject.loaded.tokenizer,
        )

    def _look(self, subject: Subject, which: str) -> Look:
        loaded, change = subject.looks()[which]
        key = (loaded.name, id(loaded.model), subject.part, change)
        with self._lock:
            if key in self._looks:
                self._looks.move_to_end(key)
                return self._looks[key]
        look = Look(loaded, subject.part, change)
        with self._lock:
            self._looks[key] = look
        self._shrink()
        return look

    def _shrink(self) -> None:
        """Forgets what was looked at longest ago; a model, what it is compared with, and its base stay."""
        with self._lock:
            while len(self._looks) > 4 and sum(look.nbytes() for look in self._looks.values()) > self.cache_bytes:
                self._looks.popitem(last=False)


MEASURES: dict[str, dict[str, Any]] = {
    "distance": {
        "name": "distance from the base",
        "note": "of the attention lies elsewhere than the base's",
        "order": "most",
        "share": True,
    },
    "previous": {
        "name": "looks at the previous token",
        "note": "of the attention is on the token before",
        "order": "most",
        "share": True,
    },
    "first": {
        "name": "looks at the first token",
        "note": "of the attention is on the first token",
        "order": "most",
        "share": True,
    },
    "followed": {
        "name": "looks at what followed this token before",
        "note": "of the attention is on what followed the same token before, where it occurred before",
        "order": "most",
        "share": True,
    },
    "mean": {
        "name": "nearest to the mean of the values",
        "note": "spreads of the values between its output and their running mean",
        "order": "least",
        "share": False,
    },
}


def _head_measures(look: Look, base: Look | None, layer: int) -> dict[str, Tensor]:
    """(H,) for each of `MEASURES`, means over the tokens shown."""
    rows, positions = look.rows(layer), torch.tensor(list(look.part.positions))
    later = positions >= min(SETTLED, int(positions[-1]))
    after = positions > 0
    measures = {} if base is None else {"distance": total_variation(rows, base.rows(layer)).mean(-1)}
    place = (positions - 1).clamp(min=0)
    previous = rows.gather(2, place.expand(len(rows), -1)[..., None])[..., 0]
    measures["previous"] = _mean_where(previous, after)
    measures["first"] = _mean_where(rows[:, :, 0], after)
    followed = _followers(look.tokens[0].cpu(), look.part)
    if followed.any():
        measures["followed"] = _mean_where((rows * followed).sum(-1), followed.any(-1))
    measures["mean"] = _mean_where(look.distance_from_mean(layer), later)
    return measures


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """(H,) means of (H, W) over some of the tokens."""
    return values[:, where].mean(-1) if where.any() else values.new_zeros(len(values))


def _followers(tokens: Tensor, part: Passage) -> Tensor:
    """(W, T) booleans: the keys right after an earlier occurrence of the query's own token."""
    same = tokens[part.shown][:, None] == tokens[None]
    earlier = torch.arange(len(tokens)) < torch.tensor(list(part.positions))[:, None]
    found = same & earlier
    return torch.cat([torch.zeros(len(found), 1, dtype=torch.bool), found[:, :-1]], 1)


def _reading(look: Look, parts: Parts, layer: int, head: int) -> Reading:
    positions = torch.tensor(list(look.part.positions))
    mechanism, rows, away = look.layers[layer].mechanism, look.rows(layer)[head], look.distance_from_mean(layer)[head]
    return Reading(mechanism, parts, positions, rows, away, *look.keys(layer))


def _says(look: Look, part: Passage, layer: int, head: int) -> list[str]:
    """What is worth saying of a head before anyone looks at it."""
    says = []
    distances = look.distance_from_mean(layer)[head]
    positions = torch.tensor(list(part.positions))
    if (later := positions >= SETTLED).any():
        distance = float(distances[later].mean())
        if distance < NEAR_MEAN:
            says.append(
                f"This head's output is near the running mean of the values: on average {distance:.2f} of their spread "
                "away from it. It tells tokens apart hardly more than evenly spread attention would."
            )
    if part.first_read > 0:
        says.append(
            f"The model reads the text from token {part.first_read:,} on: it holds {len(part.token_ids):,} tokens here."
        )
    return says


def _thumbnails(maps: Tensor) -> Tensor:
    """(H, S, S) in [0, 1]: the largest weight under each pixel, its square root so that small ones can be seen."""
    if maps.shape[-1] > THUMBNAIL:
        maps = adaptive_max_pool2d(maps, THUMBNAIL)
    return maps.clamp(0, 1).sqrt()


def _range(part: Passage) -> str:
    if len(part.tokens) == part.total:
        return ""
    return f" · tokens {part.start:,} to {part.stop - 1:,} of {part.total:,}"


def _method_of(loaded: LoadedModel, layer: int) -> str:
    """The method of a layer in one line: in a mix it is not that of the model."""
    return as_variant(loaded).mechanisms[layer].config.description


def _main_maps(subject: Subject, layer: int, head_rows: dict[str, Tensor]) -> list[MapView]:
    shown, name = subject.part.shown, subject.name
    notes = {
        "model": _method_of(subject.loaded, layer),
        "unchanged": "The same head with nothing switched off.",
        "beside": _method_of(subject.beside, layer) if subject.beside else "",
        "base": "The same layer and head of the base, on the same text.",
    }
    titles = {key: f"{name(key)} (softmax)" if key == "base" else name(key) for key in head_rows}
    maps: list[MapView] = [
        {
            "key": key,
            "title": titles[key],
            "note": notes[key],
            "kind": "share",
            "scale": "attention",
            "data": pack_triangle(rows[:, shown]),
        }
        for key, rows in head_rows.items()
    ]
    against = [key for key in ("unchanged", "beside", "base") if key in head_rows]
    for key in against:
        maps.append(
            {
                "key": "difference" if key == "base" else f"difference-{key}",
                "title": f"{name('model')} less {name(key)}",
                "note": f"Blue: {name('model')} reads more there; orange: {name(key)} does.",
                "kind": "difference",
                "of": ["model", key],
                "lowLabel": name(key),
                "highLabel": name("model"),
            }
        )
    return maps


def _share_read(subject: Subject, look: Look, layer: int) -> RowsView:
    counts = zip(subject.part.positions, *look.keys(layer), strict=True)
    read, scored = zip(
        *([round(number / (position + 1), 5) for number in numbers] for position, *numbers in counts), strict=True
    )
    series: list[RowSeries] = [{"name": f"{subject.name('model')} reads", "color": 1, "values": list(read)}]
    if any(scored):
        series.append(
            {"name": "goes through to choose them", "color": 2, "values": [value or None for value in scored]}
        )
    if look.layers[layer].mechanism.config.method != "softmax":
        series.append({"name": "softmax", "color": 0, "dashed": True, "values": [1.0] * len(read)})
    return {
        "title": "Share of the keys read",
        "note": "Keys, or rows of the state, read for a token over the tokens up to it; logarithmic.",
        "log": True,
        "min": min(0.1, *read, *(value for value in scored if value)),
        "max": max(1.0, *read, *scored),
        "series": series,
    }


def _comparison(subject: Subject, head_rows: dict[str, Tensor], parts: Parts) -> list[RowsView]:
    """How far a head's rows are from others', over all keys that the model reads, shown or not."""
    names = {"base": "than {}'s", "beside": "than {}'s", "unchanged": "than unchanged"}
    others = {names[key].format(subject.name(key)): rows for key, rows in head_rows.items() if key != "model"}
    if parts.method != "softmax":
        others["than softmax, same queries and keys"] = parts.exact
    rows: list[RowsView] = []
    if others:
        rows.append(
            {
                "title": "Attention that lies elsewhere",
                "note": "Total variation of each row, over all tokens that are read: 0 for the same attention, 1 for "
                "no key in common. Over the same queries and keys it is the method's own error.",
                "min": 0,
                "series": [
                    {"name": name, "color": index, "values": plain(total_variation(head_rows["model"], other))}
                    for index, (name, other) in enumerate(others.items(), 1)
                ],
            }
        )
    if before := subject.part.shown.start:
        rows.append(
            {
                "title": "Attention to tokens before the part shown",
                "min": 0,
                "series": [
                    {"name": subject.name(key), "color": 0 if key == "base" else index, "dashed": key == "base",
                     "values": plain(matrix[:, :before].sum(-1))}
                    for index, (key, matrix) in enumerate(head_rows.items(), 1)
                ],
            }
        )  # fmt: skip
    return rows


def _triangle(matrix: Tensor) -> list[list[float]]:
    return [plain(row[: index + 1]) for index, row in enumerate(matrix)]
