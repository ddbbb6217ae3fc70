"""How far a computation has come."""

from __future__ import annotations

from typing import Any, TypedDict

from .canvas import ScriptedHTML


class MeterView(TypedDict):
    """What the bar shows: a share in [0, 1], and what is being done in words."""

    share: float
    text: str


class Meter(ScriptedHTML):
    """A bar with a line of text; takes the same room whether there is something to show or not.

    Args:
        value: how far.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: MeterView | None = None, **kwargs: Any):
        super().__init__(value, scripts=("meter.js",), styles=("meter.css",), **kwargs)
