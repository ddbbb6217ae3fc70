"""What there is to say about something, as label and value."""

from __future__ import annotations

from typing import Any

from .canvas import ScriptedHTML


class Facts(ScriptedHTML):
    """Labels with values, as many in a line as there is room for.

    Args:
        value: `[[label, value], ...]`, plain text.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: list[list[str]] | None = None, **kwargs: Any):
        super().__init__(value, scripts=("facts.js",), styles=("facts.css",), **kwargs)
