"""What a model attends to in a text: the data of the attention tab and of its endpoint."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from attention import Mechanism, mechanism_inputs

from .components.heads import HeadsView
from .components.maps import MapsView, MapView, RowSeries, RowsView, pack_bytes, pack_triangle
from .models import LoadedModel
from .parts import Parts, explain, plain, total_variation, weight_tables
from .text import TokenTexts, clean, token_label

THUMBNAIL = 40  # pixels
CACHE_BYTES = 256_000_000


class ViewError(ValueError):
    """A view that cannot be made; the message is for the person who asked for it."""


@dataclass(frozen=True)
class Passage:
    """Part of a text that is looked at.

    Attributes:
        token_ids: what the model reads, at most its context, up to the last token shown.
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


def passage(loaded: LoadedModel, token_ids: list[int], start: int, count: int) -> Passage:
    """The `count` tokens from `start` on, moved to lie inside the text, and as much before them as the model holds.

    Raises:
        ViewError: if the text has no tokens.
    """
    if not token_ids:
        raise ViewError("The text is empty: write a few words, or generate some.")
    count = max(1, min(count, len(token_ids), loaded.context))
    start = max(0, min(start, len(token_ids) - count))
    stop = start + count
    texts = TokenTexts(loaded.tokenizer)
    tokens = [texts.next(token_id) or token_label(loaded.tokenizer, token_id) for token_id in token_ids[start:stop]]
    return Passage(tuple(token_ids[max(0, stop - loaded.context) : stop]), tuple(tokens), start, len(token_ids))


def encode_text(loaded: LoadedModel, text: str, limit: int) -> list[int]:
    """Token ids of a text of any number of tokens.

    Raises:
        ViewError: if it has more than `limit` characters.
    """
    if len(text) > limit:
        raise ViewError(f"The text has {len(text):,} characters; at most {limit:,} are read. Shorten it.")
    return loaded.tokenizer(clean(text), verbose=False)["input_ids"]


@dataclass(frozen=True)
class LayerInputs:
    """What reaches one layer's mechanism: q (1, H, T, D), k (1, H_kv, T, D), x (1, T, E), tokens (1, T)."""

    mechanism: Mechanism
    q: Tensor
    k: Tensor
    x: Tensor
    tokens: Tensor


class Look:
    """One model reading one passage: what reaches its layers, and the maps that were asked for.

    Attributes:
        layers: the inputs of each layer.

    Raises:
        ViewError: if the model is of a family whose attention cannot be looked at.
    """

    def __init__(self, loaded: LoadedModel, part: Passage):
        self.part, self._lock = part, loaded.lock  # not the model itself, which the store may drop
        ids = torch.tensor([part.token_ids], device=loaded.model.device)
        try:
            with self._lock:
                self.layers = [LayerInputs(*inputs, ids) for inputs in mechanism_inputs(loaded.model, ids)]
        except TypeError as error:
            raise ViewError(f"The attention of {loaded.name} cannot be shown: {error}.") from error
        self._maps: dict[int, Tensor] = {}

    @property
    def heads(self) -> int:
        return self.layers[0].q.shape[1]

    def maps(self, layer: int) -> Tensor:
        """(H, W, W) the attention maps of a layer, between the tokens shown; kept in half precision."""
        if layer not in self._maps:
            inputs, shown = self.layers[layer], self.part.shown
            with self._lock:
                maps = inputs.mechanism.attention_map(inputs.q, inputs.k, inputs.x, inputs.tokens)[0]
            self._maps[layer] = maps[:, shown, shown].cpu().half()
        return self._maps[layer].float()

    def parts(self, layer: int, head: int) -> Parts:
        """What happens inside the mechanism for one head."""
        inputs = self.layers[layer]
        with self._lock:
            return explain(inputs.mechanism, inputs.q, inputs.k, inputs.x, inputs.tokens, head, self.part.shown)

    def nbytes(self) -> int:
        """Memory that it holds."""
        tensors = [tensor for layer in self.layers for tensor in (layer.q, layer.k, layer.x)]
        return sum(tensor.nbytes for tensor in [*tensors, *self._maps.values()])


class AttentionViews:
    """Attention as the page shows it; remembers the passages looked at last."""

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self.cache_bytes = cache_bytes
        self._looks: OrderedDict[tuple[Any, ...], Look] = OrderedDict()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def heads(self, loaded: LoadedModel, part: Passage, layer: int, head: int) -> HeadsView:
        """Thumbnails of all layers and heads, with each head's distance from the base's (total variation)."""
        look, base = self._look(loaded, part), self._base_look(loaded, part)
        pixels, distance = [], []
        for index in range(len(look.layers)):
            maps = look.maps(index)
            pixels.append(_thumbnails(maps))
            if base is not None:
                distance.append(plain(total_variation(maps, base.maps(index)).mean(-1)))
        self._shrink()
        view: HeadsView = {
            "layers": len(look.layers),
            "heads": look.heads,
            "size": pixels[0].shape[-1],
            "pixels": pack_bytes(torch.stack(pixels)),
            "layer": min(layer, len(look.layers) - 1),
            "head": min(head, look.heads - 1),
        }
        return {**view, "distance": distance} if distance else view

    @torch.inference_mode()
    def maps(self, loaded: LoadedModel, part: Passage, layer: int, head: int) -> MapsView:
        """One layer and head: the maps, what is behind them, and numbers for each token.

        Raises:
            ViewError: if the model has no such layer or head.
        """
        look = self._look(loaded, part)
        head_maps = self._head_maps(loaded, part, layer, head)
        parts = look.parts(layer, head)
        mechanisms = [each.mechanism for each in look.layers]
        name = loaded.name
        return {
            "title": f"{name} · layer {layer} · head {head}" + _range(part),
            "file": f"{name}-layer{layer}-head{head}",
            "tokens": list(part.tokens),
            "start": part.start,
            "maps": _main_maps(loaded, head_maps),
            "parts": parts.maps,
            "rows": [
                _share_read(loaded, mechanisms[layer], part),
                *_comparison(loaded, part, head_maps, parts),
                *parts.rows,
            ],
            "tables": weight_tables(mechanisms, layer),
        }

    @torch.inference_mode()
    def numbers(self, loaded: LoadedModel, part: Passage, layer: int, head: int) -> dict[str, Any]:
        """The maps as plain numbers: for each a list of rows, row i with i + 1 numbers.

        Raises:
            ViewError: if the model has no such layer or head.
        """
        look = self._look(loaded, part)
        head_maps = self._head_maps(loaded, part, layer, head)
        return {
            "model": loaded.name,
            "method": loaded.method,
            "layer": layer,
            "head": head,
            "layers": len(look.layers),
            "heads": look.heads,
            "tokens": list(part.tokens),
            "start": part.start,
            "total_tokens": part.total,
            "keys_read": [look.layers[layer].mechanism.keys_read(position) for position in part.positions],
            "maps": {name: _triangle(matrix) for name, matrix in head_maps.items()},
        }

    def _head_maps(self, loaded: LoadedModel, part: Passage, layer: int, head: int) -> dict[str, Tensor]:
        """(W, W) map of one head, and for a variant the base's map of the same head."""
        look, base = self._look(loaded, part), self._base_look(loaded, part)
        if not (0 <= layer < len(look.layers) and 0 <= head < look.heads):
            raise ViewError(
                f"{loaded.name} has layers 0 to {len(look.layers) - 1} and heads 0 to {look.heads - 1}; "
                f"layer {layer}, head {head} does not exist."
            )
        maps = {"model": look.maps(layer)[head]}
        return maps if base is None else {**maps, "base": base.maps(layer)[head]}

    def _base_look(self, loaded: LoadedModel, part: Passage) -> Look | None:
        if loaded.entry.is_base or loaded.base is None:
            return None
        return self._look(loaded.base, part)

    def _look(self, loaded: LoadedModel, part: Passage) -> Look:
        key = (loaded.name, id(loaded.model), part)
        with self._lock:
            if key in self._looks:
                self._looks.move_to_end(key)
                return self._looks[key]
        look = Look(loaded, part)
        with self._lock:
            self._looks[key] = look
        self._shrink()
        return look

    def _shrink(self) -> None:
        """Forgets what was looked at longest ago; a model and its base on the newest passage stay."""
        with self._lock:
            while len(self._looks) > 2 and sum(look.nbytes() for look in self._looks.values()) > self.cache_bytes:
                self._looks.popitem(last=False)


def _thumbnails(maps: Tensor) -> Tensor:
    """(H, S, S) in [0, 1]: the largest weight under each pixel, its square root so that small ones can be seen."""
    if maps.shape[-1] > THUMBNAIL:
        maps = adaptive_max_pool2d(maps, THUMBNAIL)
    return maps.clamp(0, 1).sqrt()


def _range(part: Passage) -> str:
    if len(part.tokens) == part.total:
        return ""
    return f" · tokens {part.start:,} to {part.start + len(part.tokens) - 1:,} of {part.total:,}"


def _main_maps(loaded: LoadedModel, head_maps: dict[str, Tensor]) -> list[MapView]:
    name = loaded.name
    maps: list[MapView] = [
        {
            "key": "model",
            "title": name,
            "note": loaded.entry.description,
            "kind": "share",
            "scale": "attention",
            "data": pack_triangle(head_maps["model"]),
        }
    ]
    if "base" in head_maps:
        maps += [
            {
                "key": "base",
                "title": f"{loaded.base.name} (softmax)",
                "note": "The same layer and head of the base, on the same text.",
                "kind": "share",
                "scale": "attention",
                "data": pack_triangle(head_maps["base"]),
            },
            {
                "key": "difference",
                "title": f"{name} less {loaded.base.name}",
                "note": f"Blue: {name} reads more there; orange: {loaded.base.name} does.",
                "kind": "difference",
                "of": ["model", "base"],
                "lowLabel": loaded.base.name,
                "highLabel": name,
            },
        ]
    return maps


def _share_read(loaded: LoadedModel, mechanism: Mechanism, part: Passage) -> RowsView:
    shares = [round(mechanism.keys_read(position) / (position + 1), 5) for position in part.positions]
    series: list[RowSeries] = [{"name": loaded.name, "color": 1, "values": shares}]
    if mechanism.config.method != "softmax":
        series.append({"name": "softmax", "color": 0, "dashed": True, "values": [1.0] * len(shares)})
    return {
        "title": "Share of the keys read",
        "note": "Keys, or rows of the state, read for a token over the tokens up to it; logarithmic.",
        "log": True,
        "min": min(0.1, *shares),
        "max": max(1.0, *shares),
        "series": series,
    }


def _comparison(loaded: LoadedModel, part: Passage, head_maps: dict[str, Tensor], parts: Parts) -> list[RowsView]:
    others = {} if loaded.entry.is_base else {"than softmax, same queries and keys": parts.exact}
    if "base" in head_maps:
        others = {f"than {loaded.base.name}'s": head_maps["base"], **others}
    rows: list[RowsView] = []
    if others:
        rows.append(
            {
                "title": "Attention that lies elsewhere",
                "note": "Total variation of each row: 0 for the same attention, 1 for no key in common. Over the same "
                "queries and keys it is the method's own error.",
                "min": 0,
                "series": [
                    {"name": name, "color": index, "values": plain(total_variation(head_maps["model"], other))}
                    for index, (name, other) in enumerate(others.items(), 1)
                ],
            }
        )
    if part.shown.start:
        outside = plain(1 - head_maps["model"].sum(-1))
        rows.append(
            {
                "title": "Attention to tokens before the part shown",
                "min": 0,
                "series": [{"name": loaded.name, "color": 1, "values": outside}],
            }
        )
    return rows


def _triangle(matrix: Tensor) -> list[list[float]]:
    return [plain(row[: index + 1]) for index, row in enumerate(matrix)]
