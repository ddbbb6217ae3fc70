"""Attention maps of one layer and head, linked with one another and with the text."""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from .canvas import ScriptedHTML


class MapView(TypedDict, total=False):
    """One map of T tokens by T tokens.

    Attributes:
        key: unique among the maps.
        data: `pack_triangle` of it; or `of` instead.
        of: keys of two maps above: this one is the first less the second.
        kind: "share" (0 and up) or "difference" (signed).
        scale: maps with one `scale` share their largest value; left out, a map has its own.
        limit: the largest value of the colours, instead of the largest there is.
        lowLabel, highLabel: what a negative and a positive difference mean.
    """

    key: str
    title: str
    note: str
    data: str
    of: list[str]
    kind: Literal["share", "difference"]
    scale: str
    limit: float
    lowLabel: str
    highLabel: str


class RowSeries(TypedDict, total=False):
    """A number for each token."""

    name: str
    color: int
    dashed: bool
    values: list[float | None]


class RowsView(TypedDict, total=False):
    """A chart of numbers for each token."""

    title: str
    note: str
    unit: str
    log: bool
    min: float
    max: float
    series: list[RowSeries]


class TableRow(TypedDict):
    """A line of a table."""

    name: str
    values: list[float | None]


class TableView(TypedDict, total=False):
    """A table of numbers."""

    title: str
    note: str
    columns: list[str]
    rows: list[TableRow]


class MapsView(TypedDict, total=False):
    """What is known of one layer and head.

    Attributes:
        title: names the model, layer and head.
        file: name of a download, without an extension.
        tokens: the text of each of the T tokens.
        start: position of the first of them in the text.
        maps: the main maps, side by side; the first one colours the text.
        parts: further maps, what happens inside the method.
        rows: numbers for each token.
        tables: learned quantities.
    """

    title: str
    file: str
    tokens: list[str]
    start: int
    maps: list[MapView]
    parts: list[MapView]
    rows: list[RowsView]
    tables: list[TableView]


class AttentionMaps(ScriptedHTML):
    """Attention maps with labels, the value under the pointer, and links to the text.

    Hovering shows a cell in all maps, a click keeps it, a second click or Escape lets it go; arrow keys move the kept
    cell, + and − zoom. The maps can be saved as a picture or as numbers.

    Args:
        value: what to show.
        empty: what to say while there is nothing.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: MapsView | None = None, *, empty: str = "No text yet.", **kwargs: Any):
        scripts = ("heat.js", "chart.js", "figure.js", "maps.js")
        super().__init__(value, scripts=scripts, styles=("chart.css", "maps.css"), empty=empty, **kwargs)


def pack_triangle(matrix: Tensor) -> str:
    """The lower triangle of (T, T), row after row, as base64 of little-endian float16."""
    length = matrix.shape[0]
    rows, columns = torch.tril_indices(length, length)
    return _base64(matrix[rows, columns].to(torch.float16).cpu().numpy().astype("<f2"))


def pack_bytes(tensor: Tensor) -> str:
    """A tensor of values in [0, 1] as base64 of bytes, 255 for 1."""
    return _base64((tensor.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def _base64(array: np.ndarray) -> str:
    return b64encode(array.tobytes()).decode("ascii")
