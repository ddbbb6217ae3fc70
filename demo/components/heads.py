"""Thumbnails of every layer's and head's attention map."""

from __future__ import annotations

from typing import Any, TypedDict

from .canvas import ScriptedHTML


class HeadsView(TypedDict, total=False):
    """What the grid shows.

    Attributes:
        layers, heads: size of the grid.
        size: pixels of a thumbnail's side.
        pixels: base64 of layers · heads · size · size bytes, 0 (nothing) to 255.
        distance: [layer][head] in [0, 1], how far a head is from the base's; left out for a base.
        layer, head: the one that is open.
        measures: what heads can be ordered by: `key`, `name`, `note` (what a value says), `order` ("most" or "least"
            first), `share` (whether values are shares), `values` by [layer][head].
    """

    layers: int
    heads: int
    size: int
    pixels: str
    distance: list[list[float]]
    layer: int
    head: int
    measures: list[dict[str, Any]]


class HeadGrid(ScriptedHTML):
    """A grid of thumbnails, layers by heads; `select` fires with `layer` and `head` when one is opened.

    Args:
        value: what to show.
        empty: what to say while there is nothing.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: HeadsView | None = None, *, empty: str = "No text yet.", **kwargs: Any):
        scripts, styles = ("heat.js", "heads.js"), ("heads.css",)
        super().__init__(value, scripts=scripts, styles=styles, options={"empty": empty}, **kwargs)
