"""What the components have in common on the Python side."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

_FOLDER = Path(__file__).parent
TEMPLATE = '<div class="view"></div>'


def source(*names: str) -> str:
    """The text of files beside this one, joined in order: what they declare is shared by those that follow."""
    return "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names)


class ScriptedHTML(gr.HTML):
    """A component whose script builds everything inside one empty element.

    Gradio evaluates templates again with every value, so nothing of a value may reach one: the template is constant,
    and scripts write text through `textContent` or a canvas alone.

    Args:
        value: plain JSON that the script draws; an output of events, never an input of them.
        scripts: script files, the ones with shared functions first.
        styles: style files.
        options: plain JSON that never changes, `options` to the scripts. It is part of them and no property: Gradio
            takes a component's own properties away with the first event that leaves it as it is (`gr.skip`).
        kwargs: further arguments of `gr.HTML`, `elem_id` and `visible` among them.
    """

    def __init__(
        self,
        value: Any = None,
        *,
        scripts: tuple[str, ...],
        styles: tuple[str, ...],
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            value,
            html_template=TEMPLATE,
            css_template=source("shared.css", *styles),
            js_on_load=f"const options = {json.dumps(options or {})};\n{source('shared.js', *scripts)}",
            apply_default_css=False,
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        """The component's properties, its events apart.

        `gr.HTML` takes an argument of a constructor for an event if the script has its name in quotes, and Gradio
        copies all properties, and what they lead to, for each page that is asked for: the whole app, models and all.
        """
        return {name: value for name, value in super().get_config().items() if not isinstance(value, partial)}

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}

    def example_payload(self) -> Any:
        return None

    def example_value(self) -> Any:
        return None
