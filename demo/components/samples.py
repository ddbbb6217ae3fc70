"""Texts that a model wrote as it was trained."""

from __future__ import annotations

from typing import Any, TypedDict

from .canvas import ScriptedHTML


class SampleText(TypedDict):
    """A prompt, and how the base (None: there is none) and the model in training continued it."""

    prompt: str
    base: str | None
    variant: str


class SamplesView(TypedDict):
    """What was written after a number of steps."""

    step: int
    texts: list[SampleText]


class Samples(ScriptedHTML):
    """Texts by step, beside the base's; a slider goes through training.

    Args:
        value: in the order of the steps.
        empty: what to say while there are none.
        kwargs: further arguments of `gr.HTML`.
    """

    def __init__(
        self, value: list[SamplesView] | None = None, *, empty: str = "No samples were written.", **kwargs: Any
    ):
        super().__init__(value, scripts=("samples.js",), styles=("samples.css",), options={"empty": empty}, **kwargs)
