"""The words that a card's parts begin with, by which they are found again when figures are added or a card is shown."""

from __future__ import annotations

import re

MADE = "How it was made"  # titles of sections
FURTHER = "Measured further"
USE = "Use"
PAIRS_SECTION = "Frequent pairs of tokens"
BEFORE = "Before it"  # of the runs that the last one goes on from
RECALL_TABLE, POSITION_TABLE = "tokens that are", "tokens at positions"  # first words of tables


def heading_and_text(title: str) -> re.Pattern[str]:
    """What finds a card's section of that title, with the text under its heading as the first group."""
    return re.compile(rf"^## {re.escape(title)}[ \t]*$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def section(card: str, title: str) -> str:
    """The text under a second-level heading of a card, as it is written; empty where there is no such heading."""
    found = heading_and_text(title).search(card)
    return found[1] if found else ""
