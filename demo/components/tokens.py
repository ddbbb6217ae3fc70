"""Tokens side by side, coloured by a score, with a card that explains the one under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runs import ColumnView
from .canvas import ScriptedHTML


class TokenColumns(ScriptedHTML):
    """Columns of tokens in a grid; see `runs.ColumnView` for the value.

    A value that only grew repaints only what is new, so it can be streamed; boxes follow the text unless they were
    scrolled up. A long prompt is folded to its last lines. The card shows a token's details when it is hovered, focused
    (arrow keys move) or locked by a click; Escape or a second click unlocks it. An end of what was busy is said to
    those who do not see it.

    Args:
        value: the columns.
        legend: what the colour means, shown once a token has a score.
        ticks: marks of the colour's scale from 0 to 1, at equal steps.
        mark: what "≠" at a token means; "" where none has it.
        hit: what a dotted line under a token means, said once one has it.
        takes: whether the card of a locked token offers others in its place: `select` then fires with `column`,
            `index`, `of_base` (whether it stands in `base_top` rather than in `top`) and `rank` (its place there).
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(
        self,
        value: list[ColumnView] | None = None,
        *,
        legend: str = "Distance from the base",
        ticks: Sequence[str] = ("none", "large"),
        mark: str = "first token that differs from the base's text",
        hit: str = "has to be looked up: it ends a rare pair of tokens that stood in the text before",
        takes: bool = False,
        **kwargs: Any,
    ):
        options = {"legend": legend, "ticks": list(ticks), "mark": mark, "hit": hit, "takes": takes}
        super().__init__(value, scripts=("tokens.js",), styles=("tokens.css",), options=options, **kwargs)
