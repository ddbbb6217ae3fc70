"""Text whose names are exchanged for others, so that who is meant has to be read and cannot be known."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
INSIDE = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}\b")  # where a capital is not that of a sentence's first word
PASSAGE = re.compile(r"(?s).{1,8192}[^\n]*\n?")  # to the end of a line


def find_names(texts: Iterable[str]) -> list[str]:
    """The words with a capital inside a sentence, each once, in alphabetical order."""
    return sorted({name for text in texts for name in INSIDE.findall(text)})


def rename(text: str, names: list[str], seed: tuple[int, ...]) -> str:
    """The text with other names, the same one for all occurrences of a name within a passage of some 8,000 characters.

    Args:
        text: in English, or another language that writes names, and little else, with capitals.
        names: to draw from, all with the same probability; at least as many as a passage has.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)

    def passage(match: re.Match[str]) -> str:
        old = find_names([match[0]])
        new = generator.choice(len(names), len(old), replace=False)
        exchange = dict(zip(old, (names[index] for index in new), strict=True))
        return NAME.sub(lambda word: exchange.get(word[0], word[0]), match[0])

    return PASSAGE.sub(passage, text)
