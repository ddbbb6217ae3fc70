"""Tokens side by side, coloured by a score, with a card that explains the one under the pointer."""

from __future__ import annotations

from typing import Any

from ..runs import ColumnView
from .canvas import ScriptedHTML

class TokenColumns(ScriptedHTML):
    """Columns of tokens in a grid; see `runs.ColumnView` for the value.

    A value that only grew repaints only what is new, so it can be streamed. The card shows a token's details when it
    is hovered, focused (arrow keys move) or locked by a click; Escape or a second click unlocks it.

    Args:
        value: the columns.
        legend: what the colour means, shown once a token has a score.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: list[ColumnView] | None = None, *, legend: str = "Distance from the base", **kwargs: Any):
        super().__init__(value, scripts=("tokens.js",), styles=("tokens.css",), legend=legend, **kwargs)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component
