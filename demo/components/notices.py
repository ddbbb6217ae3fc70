"""Short messages on top of the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .canvas import ScriptedHTML


class Notices(ScriptedHTML):
    """Messages one below the other; takes no room while there are none.

    Args:
        value: `[{"level": "info" or "warning", "text": ...}, ...]`.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(self, value: list[dict[str, str]] | None = None, **kwargs: Any):
        super().__init__(value, scripts=("notices.js",), styles=("notices.css",), **kwargs)


def notice(text: str) -> list[dict[str, str]]:
    """One message, as `Notices` shows it."""
    return [{"level": "info", "text": text}]


def warnings(problems: Iterable[object]) -> list[dict[str, str]]:
    """Things that went wrong, as `Notices` shows them."""
    return [each for problem in problems for each in warning(problem)]


def warning(problem: object) -> list[dict[str, str]]:
    """One thing that went wrong, as `Notices` shows it."""
    return [{"level": "warning", "text": str(problem)}]
