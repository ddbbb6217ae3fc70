"""A cell of the study's grid, what came out of it, and what came out of those that differ in the seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config

MEASURED = "measured.json"
Row = dict[str, Any]
Figure = Callable[[Row], float | None]  # of what was measured of a cell


@dataclass(frozen=True)
class Cell:
    """One fit of the grid.

    Attributes:
        method: name of a recipe.
        objective: terms of the loss; "kl+l1", which masks alone have, also weighs the masks' weights.
        text: what is trained on: the corpus, or text sampled from the base itself.
        seed: of the fit, and of the sampled text.
    """

    method: str
    objective: str
    text: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.objective}-{self.text}-seed{self.seed}"

    @property
    def setting(self) -> tuple[str, str, str]:
        """All but the seed."""
        return self.method, self.objective, self.text


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


@dataclass(frozen=True)
class Group:
    """Results that differ in the seed alone; at least one."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def cell(self) -> Cell:
        return self.first.cell

    def values(self, figure: Figure) -> list[float]:
        """A figure of each seed's row, of those that have it."""
        found = (figure(result.row) for result in self.results)
        return [value for value in found if value is not None]

    def mean(self, figure: Figure) -> float:
        return statistics.fmean(self.values(figure))

    @property
    def pruning(self) -> list[dict[str, float]]:
        """The sweeps of all seeds, row by row their mean."""
        sweeps = [result.pruning for result in self.results if result.pruning]
        return [
            {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
            for rows in zip(*sweeps, strict=True)
        ]


def grouped(results: Sequence[Result]) -> list[Group]:
    """The results by all but the seed, in the order of the first of each."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        found.setdefault(result.cell.setting, []).append(result)
    return [Group(tuple(members)) for members in found.values()]
