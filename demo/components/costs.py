"""A table of what each model cost, next to what the reference cost."""

from __future__ import annotations

from typing import Any

from .canvas import ScriptedHTML


class CostTable(ScriptedHTML):
    """Numbers by model, each with its ratio to the reference's.

    Args:
        value: `{"headers": [[label, explanation], ...], "rows": [[name, number or None, ...], ...],
            "reference": index of the row that ratios are relative to, or None, "measured": where and when it was}`.
        note: one line below the table.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: dict[str, Any] | None = None, *, note: str = "", **kwargs: Any):
        super().__init__(value, scripts=("costs.js",), styles=("costs.css",), options={"note": note}, **kwargs)
