"""A table of texts."""

from __future__ import annotations

from typing import Any

from .canvas import ScriptedHTML


class TextTable(ScriptedHTML):
    """Rows of short texts; where the page is narrow, a list for each row.

    Args:
        value: `{"headers": [text, ...], "rows": [[text, ...], ...]}`; the first column names the row.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(value, scripts=("table.js",), styles=("table.css",), **kwargs)
