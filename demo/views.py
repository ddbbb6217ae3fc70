"""Runs as the page shows them: columns of tokens, a table of costs, one line each in the history."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from attention import LayersConfig

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
    return [_column_view(column, run.settings, store) for column in run.columns]


def _column_view(column: Column, settings: Settings, store: ModelStore) -> ColumnView:
    return {
        "title": column.name,
        "note": what_it_reads(column.name, store) if column.name in store.names() else "",
        "status": _status(column, settings),
        "busy": column.stage in ("waiting", "loading", "writing"),
        "prompt": column.prompt,
        "prompt_tokens": column.prompt_length,
        "lines": lines(_token_view(column, i) for i in range(column.generated)),
    }


def lines(tokens: Iterable[TokenView]) -> str:
    """Tokens as `ColumnView.lines` holds them."""
    return "".join(json.dumps(token, ensure_ascii=False) + "\n" for token in tokens)


def prompt_notices(run: Run) -> list[dict[str, str]]:
    """What `Notices` says at the prompt: which models could not read all of it."""
    cut: dict[tuple[int, int], list[str]] = {}
    for column in run.columns:
        if column.dropped:
            cut.setdefault((column.dropped + column.prompt_length, column.prompt_length), []).append(column.name)
    return [
        {
            "level": "info",
            "text": f"The prompt has {total:,} tokens. Together with the {run.settings.max_new_tokens:,} to be written "
            f"that is more than {listed(names)} can hold: the last {used:,} are used.",
        }
        for (total, used), names in cut.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _status(column: Column, settings: Settings) -> str:
    if column.stage == "failed":
        return column.problem or "failed"
    if column.stage == "waiting":
        return "waiting …"
    if column.stage == "loading":
        return "loading the model …"
    if column.stage == "writing":
        return f"{column.generated} of {settings.max_new_tokens:,} tokens …"
    written = f"{column.generated} token{'s' * (column.generated != 1)}"
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
        if column.hits and column.hits[index]:
            view["hit"] = True
            view["details"].append(looked_up(column.hits[index]))
        view["top"] = [[text, round(p, 5)] for text, p in score.top]
        view["base_top"] = [[text, round(p, 5)] for text, p in score.base_top]
    return view


KL_LOW, KL_HIGH = 0.01, 10.0  # nats
KL_LEGEND = "Colour: KL to the base at this token, in nats; each mark is ten times the one before"
KL_TICKS = ["0.01", "0.1", "1", "10"]  # what the colour's scale is marked with, at equal steps


def colour(kl: float) -> float:
    """KL in nats on a scale from 0, for 0.01 and less, to 1, for 10 and more; equal factors are equal steps."""
    if kl <= KL_LOW:
        return 0.0
    return min(math.log(kl / KL_LOW) / math.log(KL_HIGH / KL_LOW), 1.0)


def _details(score: TokenScore) -> list[list[str]]:
    return [
        ["KL to the base", f"{score.kl:.3f} nats"],
        ["Probability", f"{score.probability:.1%} (base {score.base_probability:.1%})"],
        ["Rank", f"{score.rank:,} (base {score.base_rank:,})"],
    ]


def looked_up(distance: int) -> list[str]:
    """What the card of a hit says."""
    return ["To be looked up", f"{distance:,} token{'s' * (distance != 1)} back"]


COST_HEADERS = [
    ["Model", ""],
    ["Prefill", "one pass over the prompt, ms"],
    ["Per token", "median pass over one new token, ms"],
    ["Speed", "new tokens a second, sampling included"],
    ["Peak memory", "weights and the most held beside them, MB"],
    ["Decode state", "what is kept of the text so far, MB"],
    ["Keys read", "by the last token, mean over layers"],
    ["Keys scored", "gone through to choose those, likewise"],
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
        cost.keys_scored,
    ]


def visible_text(token: str) -> str:
    """A token as a label: its white space is visible too."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "(part of a character)"


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


BRIEF = {
    "softmax": "every earlier token",
    "masks": "a few places, by distance and by content",
    "performer": "a running summary of fixed size",
    "nsa": "the latest tokens, picked blocks, summaries of the rest",
}
WORDS = {"num_features": "features", "num_selected": "blocks", "candidates": "places"}


def what_it_reads(name: str, store: ModelStore) -> str:
    """A model in one short line: what tells it from others of its method, or else what a token of it reads."""
    entry = store.entry(name)
    if entry.method == LayersConfig.method:
        return option_text(entry.options["layers"])
    entries = [store.entry(each) for each in store.names()]
    return distinction(entry, entries) or BRIEF.get(entry.method) or entry.description


def distinction(entry: Entry, entries: Sequence[Entry]) -> str:
    """The options that tell a model from others of its method, in words; empty where there is nothing to tell."""
    others = [other.options for other in entries if other.method == entry.method and other is not entry]
    differ = {name: value for name, value in entry.options.items() if any(o.get(name) != value for o in others)}
    return "; ".join([_said(name, value) for name, value in differ.items()][:MOST_OPTIONS])


def _said(option: str, value: Any) -> str:
    return f"no {_word(option)}" if value in (0, False, None) else f"{_word(option)} {option_text(value)}"


def _word(option: str) -> str:
    return WORDS.get(option, option.replace("_", " "))


def option_text(value: Any) -> str:
    """An option's value as one reads it; numbers that are given for each layer by the layers that share them."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, list | tuple):
        return str(value)
    if value and all(isinstance(each, Mapping) for each in value):
        methods = dict.fromkeys(each["method"] for each in value)
        return ", ".join(_layers_of(method, [each for each in value if each["method"] == method]) for method in methods)
    if len(value) > 1 and all(isinstance(each, int | float) for each in value):
        return _by_layer(value)
    return ", ".join(map(option_text, value))


def _layers_of(method: str, choices: Sequence[Mapping[str, Any]]) -> str:
    """A method's layers in a mix, and the options in which they differ."""
    said = f"{method} in {_layers([number for each in choices for number in each['layers']])}"
    names = [name for name in choices[0] if name not in ("method", "layers")]
    differ = [name for name in names if any(each.get(name) != choices[0][name] for each in choices)]
    options = [
        f"{_word(name)} " + ", ".join(f"{option_text(each.get(name))} in {_layers(each['layers'])}" for each in choices)
        for name in differ
    ]
    return f"{said} ({'; '.join(options[:MOST_OPTIONS])})" if options else said


def _layers(numbers: Sequence[int]) -> str:
    """Numbers of layers in words, those that follow each other together."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(sorted(numbers)), lambda e: e[1] - e[0])]
    said = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(said)}"


def _by_layer(values: Sequence[float]) -> str:
    if len(set(values)) == 1:
        return option_text(values[0])
    said, start = [], 0
    for value, run in groupby(values):
        end = start + len(list(run)) - 1
        where = f"{start}–{end}" if end > start else f"{start}"
        said.append(f"{value} in {where}" if said else f"{value} in layer{'s' * (end > start)} {where}")
        start = end + 1
    return ", ".join(said)
