"""A table of texts."""

from __future__ import annotations

from typing import Any

from .canvas import ScriptedHTML


class TextTable(ScriptedHTML):
    """Rows of short texts; where the page is narrow, a list for each row.

    Args:
        value: `{"headers": [text, ...], "rows": [[text, ...], ...]}`; the first column names the row.
        file: name, without an extension, under which it can be downloaded as CSV; empty: it cannot.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: dict[str, Any] | None = None, *, file: str = "", **kwargs: Any):
        super().__init__(value, scripts=("table.js",), styles=("table.css",), options={"file": file}, **kwargs)
