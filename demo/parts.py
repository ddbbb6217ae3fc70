"""What happens inside a mechanism, as maps, curves and tables; told by shapes alone, so that any method fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention import Mechanism
from attention.mechanism import repeat_heads
from attention.reference import softmax_weights

from .components.maps import MapView, RowsView, TableView, pack_labels, pack_triangle
from .mechanisms import UNCHANGED, Change

MOST_CURVES = 8
MADE_HERE = ("exact", "error")
PLACES = {
    "last": "Near places",
    "window": "Near places",
    "dilated": "Near places",
    "causal": "Every place",
    "first": "First tokens",
    "top": "Highest scores",
    "induction": "What followed before",
}
TITLES = {
    "exact": "Softmax instead",
    "mask": "Effective mask",
    "compressed": "Compressed branch",
    "selected": "Selected branch",
    "window": "Window branch",
}
NOTES = {
    "exact": "What softmax would do with this layer's own queries and keys.",
    "mask": "The learned weight of every key, before the scores come in: 0 is never read.",
    "compressed": "Branch that reads short summaries; a summary's weight is spread over its tokens.",
    "selected": "Branch that reads a few whole blocks.",
    "window": "Branch that reads the latest tokens.",
    "selected_blocks": "The blocks that the selected branch picked for each token.",
    "gates": "How much each branch counts; each gate is between 0 and 1, and they need not sum to 1.",
}


@dataclass
class Parts:
    """What a mechanism tells of one head.

    Attributes:
        exact: (W, T) softmax over the mechanism's own queries and keys, of the tokens shown over all that are read.
        method: the layer's method.
        told: what the mechanism tells, of this head, for all T tokens.
        branches: (W, T) what each branch, or kind of place, adds to the attention; empty where there is only one.
    """

    exact: Tensor
    method: str = ""
    told: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[str, Tensor] = field(default_factory=dict)
    maps: list[MapView] = field(default_factory=list)
    rows: list[RowsView] = field(default_factory=list)
    tables: list[TableView] = field(default_factory=list)


def explain(
    mechanism: Mechanism, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor, head: int, shown: slice, rows: Tensor
) -> Parts:
    """What `Mechanism.attention_parts` and softmax over the same queries and keys give for one head.

    Softmax and the distance from it are made here for every method, so the parts that say the same are passed over.

    Args:
        q, k, x, tokens: what reaches the mechanism, one row.
        head: the query head.
        shown: the tokens shown.
        rows: (W, T) the head's attention.
    """
    length, heads = q.shape[2], q.shape[1]
    exact = softmax_weights(q[:, head, None].float(), repeat_heads(k, heads)[:, head, None].float())[0, 0]
    method = mechanism.config.method
    told = {
        name: _of_head(tensor, head, heads).cpu()
        for name, tensor in mechanism.attention_parts(q, k, x, tokens).items()
        if name not in MADE_HERE
    }

    def mask_of(*off: str) -> Tensor:
        with _disabled(mechanism, off):
            return _of_head(mechanism.attention_parts(q, k, x, tokens)["mask"], head, heads)[shown].cpu()

    parts = Parts(exact[shown].cpu(), method, told, branch_shares(mechanism, told, rows, shown, mask_of))
    if parts.branches:
        parts.maps.append(_branch_map(parts.branches, shown))
    for name, tensor in told.items():
        _add(parts, mechanism, name, tensor, length, shown)
    if method != "softmax":
        parts.maps.append(_map("exact", parts.exact[:, shown]))
    return parts


def branch_shares(
    mechanism: Mechanism, told: dict[str, Tensor], rows: Tensor, shown: slice, mask_of: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """(W, T) what each part of a method adds to one head's attention, by name; they add up to its rows.

    Args:
        mask_of: the effective mask (W, T) with some places switched off.
    """
    if "gates" in told:
        gates = told["gates"][shown].float()
        return {
            name: gates[:, i, None] * told[name][shown].float()
            for i, name in enumerate(mechanism.branches)
            if name in told
        }
    if "mask" in told:
        return _place_shares(mechanism, told["mask"][shown], rows, mask_of)
    window = getattr(mechanism.config, "window", 0)
    if not window or "window" in mechanism.disabled:
        return {}
    place = torch.arange(rows.shape[1])
    near = place[shown][:, None] - place < window
    return {"window": rows * near, "linear": rows * ~near}


def _place_shares(
    mechanism: Mechanism, mask: Tensor, rows: Tensor, mask_of: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The same for masks, whose places are told apart by their kind; the last kind has what the others leave."""
    has = [name for name, values in mechanism.summary().items() if any(values) and name not in mechanism.disabled]
    kinds = sorted({_kind(name) for name in has}, key=list(PLACES.values()).index)
    weights = rows / mask.clamp(min=1e-30)  # of a place whose mask is 1
    shares, left = {}, mask.clone()
    for kind in kinds[:-1]:
        own = mask_of(*(name for name in mechanism.branches if _kind(name) != kind))
        own = torch.where(own > left * (1 + 1e-5), 0, own)  # a row that reads nothing is given its own key
        left -= own
        shares[kind] = weights * own
    if len(kinds) > 1:
        shares[kinds[-1]] = weights * left.clamp(min=0)
    return {kind: share for kind, share in shares.items() if share.any()}


def _kind(name: str) -> str:
    return PLACES[name.split("(")[0]]


@contextmanager
def _disabled(mechanism: Mechanism, names: Sequence[str]) -> Iterator[None]:
    before = mechanism.disabled
    mechanism.disable(*before.union(names))
    try:
        yield
    finally:
        mechanism.disable(*before)


def _branch_map(branches: dict[str, Tensor], shown: slice) -> MapView:
    """Every cell in the colour of the branch that adds most to it, as strong as the attention."""
    shares = torch.stack(list(branches.values()))[:, :, shown]
    return {
        "key": "branches",
        "title": "Which part reads it",
        "note": "Every cell has the colour of the part that reads it most, as strong as the attention.",
        "kind": "branches",
        "scale": "attention",
        "data": pack_triangle(shares.sum(0)),
        "labels": pack_labels(shares.argmax(0)),
        "names": [_words(name) for name in branches],
    }


def _of_head(tensor: Tensor, head: int, heads: int) -> Tensor:
    """Drops the batch, and picks a head where there is a dimension for them."""
    if tensor.shape[:1] == (1,):
        tensor = tensor[0]
    if tensor.shape[:1] in ((1,), (heads,)):
        return tensor[min(head, len(tensor) - 1)]
    groups = heads // len(tensor) if tensor.ndim and len(tensor) and heads % len(tensor) == 0 else 0
    return tensor[head // groups] if groups else tensor


def _add(parts: Parts, mechanism: Mechanism, name: str, tensor: Tensor, length: int, shown: slice) -> None:
    """Adds one head's tensor as what its shape says that it is; a shape that says nothing is left out."""
    match tuple(tensor.shape):
        case (rows, columns) if rows == columns == length:
            parts.maps.append(_map(name, tensor[shown, shown].float()))
        case (rows, blocks) if rows == length and tensor.dtype == torch.bool:
            size = getattr(mechanism.config, "select_block", math.ceil(length / blocks))
            keys = tensor.repeat_interleave(size, dim=1)[:, :length].tril()
            parts.maps.append(_map(name, keys[shown, shown].float()))
        case (rows, columns) if rows == length and columns <= MOST_CURVES:
            names = mechanism.branches if len(mechanism.branches) == columns else range(columns)
            parts.rows.append(_curves(name, tensor[shown].float(), [str(each) for each in names]))
        case (rows,) if rows == length:
            parts.rows.append(_curves(name, tensor[shown, None].float(), [_words(name)]))


def _words(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


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


def weight_tables(
    mechanisms: Sequence[Mechanism],
    layer: int,
    means: Sequence[dict[str, Tensor]] = (),
    change: Change = UNCHANGED,
) -> list[TableView]:
    """What the layers learned: over all layers, heads averaged, and in one layer head by head.

    From `Mechanism.summary`, and, where a layer has them, from its means over the tokens shown instead. What a layer
    does not have is left empty: a place of masks that is not among its own, a weight of another method.
    """
    means = means or [{} for _ in mechanisms]
    summaries = [_learned(index, *each, change) for index, each in enumerate(zip(mechanisms, means, strict=True))]
    names = list(dict.fromkeys(name for summary in summaries for name in summary))
    if not names:
        return []
    by_text = any(means)
    note = "Mean over the heads of each layer" + (" and over the tokens shown." if by_text else ".")
    by_layer = {name: [_mean_of(summary.get(name)) for summary in summaries] for name in names}
    tables = [_table("By layer", f"{note} –: not in this layer.", "layer", by_layer)]
    heads = {name: values for name, values in summaries[layer].items() if any(value is not None for value in values)}
    if heads and len({len(values) for values in heads.values()}) == 1 and len(next(iter(heads.values()))) > 1:
        note = "The layer that is open; means over the tokens shown." if means[layer] else "The layer that is open."
        tables.append(_table(f"Layer {layer}, by head", note, "head", heads))
    return tables


def _learned(
    layer: int, mechanism: Mechanism, means: dict[str, Tensor], change: Change
) -> dict[str, list[float | None]]:
    """A layer's learned numbers, one for each head; None for a part that it does not have, or that is off."""
    off = mechanism.disabled | change.off_in(layer, mechanism)
    learned = {}
    for name, values in {**mechanism.summary(), **means}.items():
        numbers = torch.as_tensor(values, dtype=torch.float32)
        if numbers.ndim == 1 and numbers.numel():
            missing = (numbers == 0) & (name in mechanism.branches) | (name in off)
            learned[name] = [None if no else value for no, value in zip(missing.tolist(), plain(numbers), strict=True)]
    return learned


def _mean_of(values: Sequence[float | None] | None) -> float | None:
    """The mean over heads; None where no head has it."""
    known = [value for value in values or () if value is not None]
    return round(math.fsum(known) / len(values), 5) if known else None


def _table(title: str, note: str, column: str, rows: dict[str, list[float | None]]) -> TableView:
    return {
        "title": title,
        "note": note,
        "columns": [f"{column} {index}" for index in range(max(map(len, rows.values())))],
        "rows": [{"name": name.replace("_", " "), "values": values} for name, values in rows.items()],
    }


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """½ Σ |a − b| over the keys: 0 for the same row, 1 for rows that sum to 1 and share no key."""
    return (a - b).abs().sum(-1) / 2


def plain(values: Tensor) -> list[float]:
    """A vector as rounded numbers for JSON."""
    return [round(value, 5) for value in values.tolist()]
