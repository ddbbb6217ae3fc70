"""What happens inside a mechanism, as maps, curves and tables; told by shapes alone, so that any method fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention import Mechanism
from attention.mechanism import repeat_heads
from attention.reference import softmax_weights

from .components.maps import MapView, RowsView, TableView, pack_triangle

MOST_CURVES = 8
NOTES = {
    "exact": "Softmax over this layer's own queries and keys: what the method stands in for.",
    "effective_mask": "The learned weight of every key, before the scores: 0 is never read.",
    "compressed": "Branch that reads summaries; a summary's weight is spread over its tokens.",
    "selected": "Branch that reads a few whole blocks.",
    "window": "Branch that reads the latest tokens.",
    "selection": "The blocks that were picked for each token.",
    "gates": "How much each branch counts; a gate is between 0 and 1, and they need not sum to 1.",
    "error": "Distance of each row from softmax over the same queries and keys.",
}


@dataclass
class Parts:
    """What a mechanism tells of one head.

    Attributes:
        exact: (W, W) softmax over the mechanism's own queries and keys.
    """

    exact: Tensor
    maps: list[MapView] = field(default_factory=list)
    rows: list[RowsView] = field(default_factory=list)
    tables: list[TableView] = field(default_factory=list)


def explain(mechanism: Mechanism, q: Tensor, k: Tensor, x: Tensor, head: int, shown: slice) -> Parts:
    """What `Mechanism.attention_parts` and softmax over the same queries and keys give for one head.

    Args:
        q, k, x: what reaches the mechanism, one row.
        head: the query head.
        shown: the tokens shown.
    """
    length = q.shape[2]
    exact = softmax_weights(q[:, head, None].float(), repeat_heads(k, q.shape[1])[:, head, None].float())[0, 0]
    parts = Parts(exact[shown, shown])
    for name, tensor in mechanism.attention_parts(q, k, x).items():
        _add(parts, name, _of_head(tensor.float(), head, q.shape[1]), length, shown, mechanism.branches)
    if mechanism.config.method != "softmax":
        parts.maps.append(_map("exact", parts.exact))
    return parts


def _of_head(tensor: Tensor, head: int, heads: int) -> Tensor:
    """Drops the batch, and picks a head where there is a dimension for them."""
    if tensor.shape[:1] == (1,):
        tensor = tensor[0]
    if tensor.shape[:1] in ((1,), (heads,)):
        return tensor[min(head, len(tensor) - 1)]
    groups = heads // len(tensor) if tensor.ndim and len(tensor) and heads % len(tensor) == 0 else 0
    return tensor[head // groups] if groups else tensor


def _add(parts: Parts, name: str, tensor: Tensor, length: int, shown: slice, branches: Sequence[str]) -> None:
    match tuple(tensor.shape):
        case (rows, columns) if rows == columns == length:
            parts.maps.append(_map(name, tensor[shown, shown]))
        case (rows,) if rows == length:
            parts.rows.append(_curves(name, tensor[shown, None], [_words(name)]))
        case (rows, columns) if rows == length and columns <= MOST_CURVES:
            names = list(branches) if len(branches) == columns else [str(i) for i in range(columns)]
            parts.rows.append(_curves(name, tensor[shown], names))
        case (rows, columns) if columns == length and rows <= MOST_CURVES:
            _add(parts, name, tensor.T, length, shown, branches)
        case (rows, blocks) if rows == length:
            spread = tensor.repeat_interleave(math.ceil(length / blocks), dim=1)[:, :length]
            parts.maps.append(_map(name, spread.tril()[shown, shown]))
        case (values,):
            parts.tables.append(_table(name, [str(i) for i in range(values)], {"": tensor}))


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _map(name: str, matrix: Tensor) -> MapView:
    return {
        "key": name,
        "title": _words(name),
        "note": NOTES.get(name, ""),
        "kind": "difference" if bool((matrix < 0).any()) else "share",
        "data": pack_triangle(matrix),
    }


def _curves(name: str, values: Tensor, names: list[str]) -> RowsView:
    return {
        "title": _words(name),
        "note": NOTES.get(name, ""),
        "min": 0,
        "series": [
            {"name": each, "color": index, "values": plain(column)}
            for index, (each, column) in enumerate(zip(names, values.T, strict=True), 1)
        ],
    }


def _table(title: str, columns: list[str], rows: dict[str, Tensor]) -> TableView:
    return {
        "title": _words(title),
        "note": NOTES.get(title, ""),
        "columns": columns,
        "rows": [{"name": name, "values": plain(values)} for name, values in rows.items()],
    }


def weight_tables(mechanisms: Sequence[Mechanism], layer: int) -> list[TableView]:
    """What the layers learned, from `Mechanism.summary`: this layer head by head, and all layers, heads averaged."""
    summaries = [{name: torch.tensor(values) for name, values in each.summary().items()} for each in mechanisms]
    tables = []
    for name, values in summaries[layer].items():
        if values.ndim not in (1, 2) or not values.numel():
            continue
        labels = quantity_names(mechanisms[layer], values.shape[-1])
        layers = [summary[name].reshape(-1, len(labels)).mean(0) for summary in summaries]
        columns = [f"layer {index}" for index in range(len(layers))]
        tables.append(_table(name, columns, dict(zip(labels, torch.stack(layers, 1), strict=True))))
        if values.ndim == 2 and len(values) > 1:
            tables[-1]["note"] = "Mean over the heads of each layer."
            columns = [f"head {index}" for index in range(len(values))]
            tables.append(_table(f"{name} in layer {layer}", columns, dict(zip(labels, values.T, strict=True))))
    return tables


def quantity_names(mechanism: Mechanism, count: int) -> list[str]:
    """Names for `count` learned numbers: the option or the branches that list as many, else their index."""
    for names in (getattr(mechanism.config, "candidates", ()), mechanism.branches):
        if len(names) == count:
            return list(names)
    return [str(index) for index in range(count)]


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """½ Σ |a − b| over the keys: 0 for the same row, 1 for rows that sum to 1 and share no key."""
    return (a - b).abs().sum(-1) / 2


def plain(values: Tensor) -> list[float]:
    """A vector as rounded numbers for JSON."""
    return [round(value, 5) for value in values.tolist()]
