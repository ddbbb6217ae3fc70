"""What was measured of variants, as aligned tables for a terminal."""

from __future__ import annotations

import json
from typing import Any

from .card import as_difference, as_number, with_error
from .recall import CHANCE

Row = dict[str, Any]
NOTHING, HARM = "does nothing", "better without"


def tables(rows: list[Row]) -> str:
    """Rows as aligned tables: fidelity, its slices, then answers, texts written and ablations, as far as measured."""
    aside = (
        "samples",
        "drafting",
        "ablations",
        "ablated_tokens",
        "tolerance",
        "text",
        "rare",
        "slices",
        "positions",
        "recall",
    )
    parts = [
        [{name: value for name, value in row.items() if name not in aside} for row in rows],
        *(lines for group in _by_base(rows) for lines in _slice_tables(group)),
        *(lines for group in _by_base([row for row in rows if "recall" in row]) for lines in _recall_tables(group)),
        [_writing_line(row) for row in rows if "samples" in row],
        [line for row in rows if "ablations" in row for line in _ablation_lines(row)],
    ]
    rare = "".join(f"A hit's pair is rare: {said}.\n" for said in dict.fromkeys(row["rare"] for row in rows))
    return "\n".join([*(table(lines) for lines in parts if lines), rare])


def _by_base(rows: list[Row]) -> list[list[Row]]:
    """Rows that can share a table, as the base read the same tokens for them and made the same of them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        read = {name: (one["tokens"], one["base_loss"]) for name, one in row["slices"].items()}
        groups.setdefault(json.dumps(read), []).append(row)
    return list(groups.values())


def _slice_tables(rows: list[Row]) -> list[list[Row]]:
    """For hits and positions, cross-entropy above the base's and KL: a line a variant, a column a slice."""
    return [
        [*_base_lines(rows[0][kind], title), *(_slice_line(row, kind, title, value, form) for row in rows)]
        for kind in ("slices", "positions")
        for title, value, form in (("cross-entropy above the base's", "ce_excess", "+.4f"), ("KL", "kl", ".4f"))
    ]


def _base_lines(slices: dict[str, Row], title: str) -> list[Row]:
    """How many tokens there are, and the base's cross-entropy on them."""
    return [
        {title: "(tokens)", **{name: f"{one['tokens']:,}" for name, one in slices.items()}},
        {
            title: "(the base's cross-entropy)",
            **{name: as_number(one["base_loss"], ".4f") for name, one in slices.items()},
        },
    ]


def _slice_line(row: Row, kind: str, title: str, value: str, form: str) -> Row:
    cells = {name: with_error(one[value], one[f"{value}_error"], form) for name, one in row[kind].items()}
    return {title: row["variant"], **cells}


def _recall_tables(rows: list[Row]) -> list[list[Row]]:
    """For each task, scores above the base's and shares of right answers: a line a variant, a column a distance."""
    return [
        [_base_answers(asked, title), *(_answers(row, task, title) for row in rows)]
        for task, asked in rows[0]["recall"]["tasks"].items()
        for title in [f"{task}: score above the base's (right), by tokens between"]
    ]


def _base_answers(asked: dict[str, Row], title: str) -> Row:
    chance = f", chance: {CHANCE:.0%}"
    cells = {
        between: f"{one['base']['score']:.2f} ({one['base']['right']:.0%}{chance if one['at_chance'] else ''})"
        for between, one in asked.items()
    }
    return {title: "(the base's)", **cells}


def _answers(row: Row, task: str, title: str) -> Row:
    cells = {
        between: f"{with_error(one['difference'], one['error'], '+.2f')} ({one['variant']['right']:.0%})"
        for between, one in row["recall"]["tasks"][task].items()
    }
    return {title: row["variant"], **cells}


def _writing_line(row: Row) -> Row:
    """Figures as `variant / base (difference ± standard error)`."""
    line: Row = {"variant": row["variant"]}
    for name, value in row["samples"].items():
        if isinstance(value, dict):
            difference = as_difference(value)
            line[name] = f"{value['variant']:.4f} / {value['base']:.4f}" + (difference and f" ({difference})")
    drafting = row["drafting"]
    title = f"tokens a round, drafts of {drafting['draft']}"
    return line | {title: with_error(drafting["tokens_a_round"], drafting["error"], ".2f")}


def _ablation_lines(row: Row) -> list[Row]:
    lines = [
        {
            "variant": row["variant"],
            "without": name,
            "kl": figures["kl"],
            "kl_change": figures["kl_change"],
            "perplexity": figures["perplexity"],
            "": _verdict(figures, row["tolerance"]),
        }
        for name, figures in row["ablations"].items()
    ]
    return lines or [{"variant": row["variant"], "without": "has no part that can be switched off"}]


def _verdict(figures: Row, tolerance: float) -> str:
    if figures["does_nothing"]:
        return f"{NOTHING} (changes KL by less than {tolerance:g})"
    return HARM if figures["kl_change"] < 0 else ""


def table(lines: list[Row]) -> str:
    """Lines as aligned columns under their names."""
    header = list(dict.fromkeys(name for line in lines for name in line))
    cells = [header, *([_cell(line.get(name, "")) for name in header] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
