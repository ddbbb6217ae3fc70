"""Runs as the page shows them: columns of tokens, a table of costs, one line each in the history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .models import Entry, ModelStore
from .runs import Column, ColumnView, Cost, Run, Settings, TokenScore, TokenView

MOST_OPTIONS = 4
ENDINGS = {
    "length": "",
    "end": ", ended by itself",
    "context": ", the context is full",
    "time": ", time limit reached",
    "stopped": ", stopped",
}


def columns_view(run: Run, store: ModelStore) -> list[ColumnView]:
    """What `TokenColumns` shows of a run."""
    return [_column_view(column, store) for column in run.columns]


def _column_view(column: Column, store: ModelStore) -> ColumnView:
    return {
        "title": column.name,
        "note": store.entry(column.name).description if column.name in store.names() else "",
        "status": _status(column),
        "tokens": _prompt_views(column) + [_token_view(column, i) for i in range(column.generated)],
    }


def _prompt_views(column: Column) -> list[TokenView]:
    return [{"text": text, "prompt": True} for text in column.tokens[: column.prompt_length]]


def _status(column: Column) -> str:
    if column.stage == "failed":
        return column.problem or "failed"
    if column.stage == "waiting":
        return "waiting"
    if column.stage == "loading":
        return "loading the model"
    written = f"{column.generated} token{'s' * (column.generated != 1)}"
    if column.stage == "writing":
        return f"{written} …"
    return written + ENDINGS.get(column.stopped or "", "") + _distance(column)


def _distance(column: Column) -> str:
    if column.problem:
        return f" · {column.problem}"
    if not column.scores or column.method == "softmax":
        return ""
    mean = math.fsum(score.kl for score in column.scores) / len(column.scores)
    return f" · KL {mean:.3f} nats/token"


def _token_view(column: Column, index: int) -> TokenView:
    place = column.prompt_length + index
    view: TokenView = {"text": column.tokens[place]}
    if place == column.parts_at:
        view["parts"] = True
    if column.scores:
        score = column.scores[index]
        view["score"] = round(colour(score.kl), 4)
        view["details"] = _details(score)
        view["top"] = [[text, round(p, 5)] for text, p in score.top]
        view["base_top"] = [[text, round(p, 5)] for text, p in score.base_top]
    return view


def colour(kl: float) -> float:
    """KL in nats on a scale from 0 to 1: √(1 − e^−KL), which total variation never exceeds (Bretagnolle-Huber)."""
    return math.sqrt(-math.expm1(-kl))


def _details(score: TokenScore) -> list[list[str]]:
    return [
        ["KL to the base", f"{score.kl:.3f} nats"],
        ["Probability", f"{score.probability:.1%} (base {score.base_probability:.1%})"],
        ["Rank", f"{score.rank:,} (base {score.base_rank:,})"],
    ]


COST_HEADERS = [
    ["Model", ""],
    ["Prefill", "one pass over the prompt, ms"],
    ["Per token", "median pass over one new token, ms"],
    ["Speed", "new tokens a second, sampling included"],
    ["Peak memory", "weights and the most held beside them, MB"],
    ["Decode state", "what is kept of the text so far, MB"],
    ["Keys read", "by the last token, mean over layers"],
]


def cost_table(run: Run) -> dict[str, Any]:
    """What `CostTable` shows of a run: one row a model, its cells empty until they are known."""
    names = [column.name for column in run.columns]
    return {
        "headers": COST_HEADERS,
        "rows": [[column.name, *_cost_cells(column.cost)] for column in run.columns],
        "reference": names.index(run.reference) if run.reference in names else None,
        "measured": f"These times were measured {run.measured}, not on this machine now." if run.measured else "",
    }


def _cost_cells(cost: Cost | None) -> list[float | None]:
    if cost is None:
        return [None] * (len(COST_HEADERS) - 1)
    return [
        cost.prefill_ms,
        cost.ms_per_token,
        cost.tokens_per_second,
        cost.peak_bytes / 1e6,
        cost.state_bytes / 1e6,
        cost.keys_read,
    ]


def settings_line(settings: Settings) -> str:
    """Settings in one line."""
    return (
        f"{', '.join(settings.models)} · temperature {settings.temperature:g} · top-k {settings.top_k} · "
        f"top-p {settings.top_p:g} · penalty {settings.repetition_penalty:g} · {settings.max_new_tokens} tokens · "
        f"seed {settings.seed}"
    )


def history_label(run: Run) -> str:
    """A run in the list of earlier ones."""
    prompt = " ".join(run.settings.prompt.split())
    return f"“{prompt[:48]}{'…' if len(prompt) > 48 else ''}” {settings_line(run.settings)}"


def distinction(entry: Entry, entries: Sequence[Entry]) -> str:
    """The options that tell a model from others of its method, in words; empty where there is nothing to tell."""
    others = [other.options for other in entries if other.method == entry.method and other is not entry]
    differ = {name: value for name, value in entry.options.items() if any(o.get(name) != value for o in others)}
    said = [f"{name} {option_text(value)}" for name, value in differ.items()][:MOST_OPTIONS]
    return f" Here: {', '.join(said)}." if said else ""


def option_text(value: Any) -> str:
    """An option's value as one reads it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(option_text, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
