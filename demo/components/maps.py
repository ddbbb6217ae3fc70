"""Attention maps of one layer and head, linked with one another and with the text."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from .canvas import TEMPLATE, ScriptedHTML, source

SCRIPTS = ("heat.js", "chart.js", "figure.js", "drawing.js", "maps.js")
STYLES = ("chart.css", "maps.css")


class MapView(TypedDict, total=False):
    """One map of T tokens by T tokens.

    Attributes:
        key: unique among the maps.
        data: `pack_triangle` of it; or `of` instead.
        of: keys of two maps above: this one is the first less the second.
        kind: "share" (0 and up), "difference" (signed), or "branches": shares, each in the colour of its branch.
        labels, names: of branches, `pack_labels` of them, and their names.
        scale: maps with one `scale` share their largest value; left out, a map has its own.
        limit: the largest value of the colours, instead of the largest there is.
        lowLabel, highLabel: what a negative and a positive difference mean.
    """

    key: str
    title: str
    note: str
    data: str
    of: list[str]
    kind: Literal["share", "difference", "branches"]
    labels: str
    names: list[str]
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
        total: tokens of the whole text; where there are more than are shown, a strip moves the part.
        says: sentences on the head.
        steps: sentences with gaps for a token's numbers, the first one sums up; see `steps.StepView`.
        next: what the models expect after each token; see `predictions.next_tokens`.
        reach: which tokens a prediction depends on; see `attention.AttentionViews.reach`.
    """

    title: str
    file: str
    tokens: list[str]
    start: int
    maps: list[MapView]
    parts: list[MapView]
    rows: list[RowsView]
    tables: list[TableView]
    total: int
    says: list[str]
    steps: list[Any]
    next: dict[str, Any]
    reach: dict[str, Any]


class AttentionMaps(ScriptedHTML):
    """Attention maps with labels, the value under the pointer, and links to the text.

    Hovering shows a cell in all maps, a click keeps it, a second click or Escape lets it go; arrow keys move the kept
    cell, + and − zoom. The maps can be saved as a picture, a drawing, numbers, or a page of their own.

    `select` fires with `start` where another part of the text is asked for, and with `reach`, the index of a token,
    where its reach is.

    Args:
        value: what to show.
        empty: what to say while there is nothing.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: MapsView | None = None, *, empty: str = "No text yet.", **kwargs: Any):
        options = {"empty": empty, "sheet": page_template()}
        super().__init__(value, scripts=SCRIPTS, styles=STYLES, options=options, **kwargs)


def page_template() -> str:
    """A page of its own for one view, with nothing to fetch: DARK and VALUE stand for a theme and for the view.

    Its scripts find what Gradio would give them: an element, the value, and ways to be told of changes.
    """
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention</title>
<style>
body {{ margin: 16px; font-family: system-ui, sans-serif; background: #ffffff; }}
body.dark {{ background: #0b0f19; --body-text-color: #f3f4f6; --background-fill-primary: #0b0f19; }}
body.dark {{ --border-color-primary: #374151; }}
.sheet {{ {source("shared.css", *STYLES)} }}
</style>
<body class="DARK">
<div class="sheet" id="sheet">{TEMPLATE}</div>
<script type="application/json" id="value">VALUE</script>
<script>
(() => {{
const element = document.getElementById("sheet");
const value = JSON.parse(document.getElementById("value").textContent);
const props = {{ value }};
const options = {{ empty: "", standalone: true }};
const watch = () => {{}};
const trigger = () => {{}};
{source("shared.js", *SCRIPTS)}
}})();
</script>
</body>
</html>
"""


def standalone(view: MapsView, dark: bool = False) -> str:
    """One view as a page of its own, which fetches nothing; no token of it is ever read as markup."""
    value = json.dumps(view, ensure_ascii=False).replace("<", "\\u003c")
    before, after = page_template().split("VALUE", 1)
    return before.replace("DARK", "dark" if dark else "", 1) + value + after


def pack_triangle(matrix: Tensor) -> str:
    """The lower triangle of (T, T), row after row, as base64 of little-endian float16."""
    length = matrix.shape[0]
    rows, columns = torch.tril_indices(length, length)
    return _base64(matrix[rows, columns].to(torch.float16).cpu().numpy().astype("<f2"))


def pack_labels(matrix: Tensor) -> str:
    """The lower triangle of (T, T) small whole numbers, row after row, as base64 of bytes."""
    length = matrix.shape[0]
    rows, columns = torch.tril_indices(length, length)
    return _base64(matrix[rows, columns].to(torch.uint8).cpu().numpy())


def pack_bytes(tensor: Tensor) -> str:
    """A tensor of values in [0, 1] as base64 of bytes, 255 for 1."""
    return _base64((tensor.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def _base64(array: np.ndarray) -> str:
    return b64encode(array.tobytes()).decode("ascii")
