"""Caps that keep one visitor from taking the machine from the others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request, one visitor and the whole app may use.

    Attributes:
        prompt_characters: a longer prompt is refused before it is tokenized.
        new_tokens: the longest text that can be asked for.
        models_per_run: columns side by side.
        seconds: a computation that takes longer ends with what it has.
        queue: requests that may wait; the next is told that the app is busy.
        runs: runs that a visitor's history keeps.
        history_tokens: written tokens in all of them, each about 2 kB with its scores; older runs go.
        view_tokens: tokens of a text that a view shows at once; longer texts are windowed.
        loaded_models: models in memory; the least recently used goes.
        listed_models: models that can be chosen, loaded or not.
        download_bytes: the largest model that is pulled from the Hub.
    """

    prompt_characters: int = 100_000
    new_tokens: int = 400
    models_per_run: int = 6
    seconds: float = 60.0
    queue: int = 64
    runs: int = 8
    history_tokens: int = 6_000
    view_tokens: int = 400
    loaded_models: int = 8
    listed_models: int = 24
    download_bytes: int = 2_000_000_000
