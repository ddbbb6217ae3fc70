"""A cell of the study's grid, and what came out of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config

MEASURED = "measured.json"


@dataclass(frozen=True)
class Cell:
    """One fit of the grid.

    Attributes:
        method: name of a recipe.
        objective: terms of the loss; "kl+l1", which masks alone have, also weighs the masks' weights.
        text: what is trained on: the corpus, or text sampled from the base itself.
    """

    method: str
    objective: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.objective}-{self.text}"


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: which.
        folder: of the run.
        row: what `trainer/evaluate.py` measured.
        pruning: for masks, what dropping light masks costs; see `prune_sweep`.
    """

    cell: Cell
    folder: Path
    row: dict[str, Any]
    pruning: list[dict[str, float]]

    @cached_property
    def config(self) -> RunConfig:
        return load_config(self.folder / "config.yaml")

    @cached_property
    def environment(self) -> dict[str, Any]:
        return json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        lines = (self.folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of the history that are of a kind; see `History`."""
        return [row for row in self.history if row["kind"] == kind]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.rows("train")[-1]["tokens"]
