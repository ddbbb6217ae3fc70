"""The history of a run: one JSON object a line, and its curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class History:
    """Rows in memory and, as they come, in a file.

    A row has a `kind`:

    - "train": `step`, `stage`, `loss` and its terms (means since the last such row), `lr`, `mechanism_lr` where there
      are such parameters, `grad_norm`, `tokens` (so far), `seconds` (so far), `tokens_per_second`, `peak_memory_mb`.
    - "eval": `step`, `stage`, the fields of `Fidelity`, `tokens` renamed to `eval_tokens`, `tokens`, `seconds`, and
      `mechanisms`, each layer's `summary`, and, where a layer has such, `means`, each layer's over the validation text.
    - "samples": `step`, `stage`, `texts`, each with `prompt`, `base` (None in pretraining) and `variant`.
    - "change": `step`, `stage`, `changes`: sentences on what is learnt or measured otherwise from there on, after a
      resume.

    Two runs that are equal differ only in the values named by `TIMES`.

    Args:
        path: the file; None keeps rows in memory only.
        rows: what the file is to hold at the start.
    """

    TIMES = ("seconds", "tokens_per_second", "peak_memory_mb")

    def __init__(self, path: Path | None, rows: list[Row] | None = None):
        self.path = path
        self.rows: list[Row] = list(rows or [])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            partial.replace(path)

    def add(self, row: Row) -> None:
        """Adds a row.

        Raises:
            OSError: if the file cannot be written.
        """
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Draws the losses, and KL or perplexity on the validation text, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    train = [row for row in rows if row["kind"] == "train"]
    for stage in dict.fromkeys(row["stage"] for row in train):
        part = [row for row in train if row["stage"] == stage]
        left.plot([row["step"] for row in part], [row["loss"] for row in part], label=stage)
    measured = [row for row in rows if row["kind"] == "eval"]
    measure = "kl" if any(row["kl"] for row in measured) else "perplexity"
    right.plot([row["step"] for row in measured], [row[measure] for row in measured], marker=".", label=measure)
    for axes, title in ((left, "training loss"), (right, f"validation {measure}")):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        values = [value for line in axes.lines for value in line.get_ydata()]
        if values and min(values) > 0:
            axes.set_yscale("log")
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
