"""How a checkpoint came to be: its history and card, as the training tab shows them."""

from __future__ import annotations

import json
import logging
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

import attention
from attention.files import CARD, HISTORY
from trainer.card_words import BEFORE, FURTHER, MADE, POSITION_TABLE, RECALL_TABLE, section

from .components.curves import Chart, Event, Series
from .components.samples import SamplesView
from .models import Entry
from .views import option_text

logger = logging.getLogger(__name__)

HISTORY_BYTES = 50_000_000
CURVE_POINTS = 400
CARD_BYTES = 1_000_000
MEASURES = {"kl": "KL", "perplexity": "Perplexity", "top1_agreement": "Same choice"}
LAUNCHERS = ("accelerate launch", "python", "torchrun")
SLICES = (RECALL_TABLE, POSITION_TABLE)
NO_SLICES = "Its card has no such figures; trainer/evaluate.py --card writes them into it."
SHARES = ("kl", "ce", "reverse_kl", "jsd")  # terms of a loss that are nats per token

Row = dict[str, Any]


def read_history(folder: Path) -> list[Row]:
    """The rows of a checkpoint's history that can be read; none where there is no history.

    A history is written by whoever made the checkpoint, so lines that are no rows are left out.
    """
    path = folder / HISTORY
    if not path.is_file() or path.stat().st_size > HISTORY_BYTES:
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and _number(row.get("step")) is not None:
            rows.append(row)
    return rows


def read_card(folder: Path) -> ModelCard:
    """A checkpoint's card; an empty one where there is none that can be read."""
    path = folder / CARD
    if path.is_file() and path.stat().st_size <= CARD_BYTES:
        try:
            return ModelCard(path.read_text(encoding="utf-8", errors="replace"), ignore_metadata_errors=True)
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            logger.info("the card in %s cannot be read: %s", folder, error)
    return ModelCard("---\n---\n")


def plain_section(card: ModelCard, title: str) -> str:
    """The text under a second-level heading of a card, as plain text; empty where there is no such heading."""
    plain = re.sub(r"^```.*$|\*\*|`", "", section(card.text, title), flags=re.MULTILINE)
    return re.sub(r"\n\s*\n", "\n", plain).strip()


def slices(card: ModelCard) -> dict[str, Any]:
    """What a card says of tokens that must be looked up and of tokens by position, as `TextTable` shows it."""
    headers, rows = [NO_SLICES], []
    for context, line in _lines_by_context(card):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[0] in SLICES:
            headers = ["tokens", "context", *cells[1:]]
        elif len(cells) == len(headers) - 1 and not cells[0].startswith("---"):
            rows.append([cells[0], context, *cells[1:]])
    return {"headers": headers, "rows": rows}


def hits_excess(card: ModelCard) -> str:
    """What a card says of hits: the cross-entropy above the base's, at the longest context; "–" where it says nothing.

    The base is no distance from itself, so its own card says nothing of it.
    """
    found = slices(card)
    lines = [dict(zip(found["headers"], row, strict=False)) for row in found["rows"]]
    by_context = {int(line["context"]): line.get("above it") for line in lines if _is_hits(line)}
    if not by_context or not by_context[max(by_context)]:
        return "–"
    return f"{by_context[max(by_context)]} (at {max(by_context):,})"


def _is_hits(line: dict[str, str]) -> bool:
    context = line["context"]
    return line["tokens"] == "hits" and context.isascii() and context.isdecimal() and len(context) < 10


def _lines_by_context(card: ModelCard) -> Iterator[tuple[str, str]]:
    """The lines of all tables of slices in a card, with the contexts that they were measured at."""
    for part in re.split(r"^### Context ", section(card.text, FURTHER), flags=re.MULTILINE)[1:]:
        context, _, said = part.partition("\n")
        for block in re.split(r"\n\s*\n", said):
            if block.strip().startswith(tuple(f"| {start} |" for start in SLICES)):
                yield from ((context.strip(), line) for line in block.strip().splitlines())


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """Rows of one kind, in the order of their steps."""
    return sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["step"])


@dataclass(frozen=True)
class Spent:
    """What training took."""

    steps: float = 0
    tokens: float = 0
    seconds: float = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.steps + other.steps, self.tokens + other.tokens, self.seconds + other.seconds)


_SPENT = re.compile(r"([\d,]+) steps, ([\d,]+) tokens[^,;()]*, ([\d,]+) s\b")


def recorded(rows: list[Row]) -> Spent:
    """What the history has on record."""
    last = (of_kind(rows, "train") or [{}])[-1]
    return Spent(*(_number(last.get(name)) or 0 for name in ("step", "tokens", "seconds")))


def own_and_before(card: ModelCard) -> tuple[Spent, Spent]:
    """What the last run took, and what those took that it went on from, as the card says it."""
    made = plain_section(card, MADE)
    own, _, before = made.partition(BEFORE)
    return _spent(own), _spent(before)


def _spent(text: str) -> Spent:
    found = [Spent(*(float(number.replace(",", "")) for number in numbers)) for numbers in _SPENT.findall(text)]
    return sum(found, Spent())


def total(rows: list[Row], card: ModelCard) -> Spent:
    """What all stages took: the history may have them all, or only those of the last run, as against the card."""
    own, before = own_and_before(card)
    here = recorded(rows)
    return here if here.tokens >= (own + before).tokens else (own if own.tokens > here.tokens else here) + before


def unrecorded(rows: list[Row], card: ModelCard) -> Spent:
    """What of it came before the curves begin."""
    here, whole = recorded(rows), total(rows, card)
    return Spent(whole.steps - here.steps, whole.tokens - here.tokens, whole.seconds - here.seconds)


def facts(entry: Entry, rows: list[Row], card: ModelCard) -> list[list[str]]:
    """The card in short: what it is, what it was fitted on, for how long, what it reached."""
    evals, train = of_kind(rows, "eval"), of_kind(rows, "train")
    last_eval, whole, missing = (evals or [{}])[-1], total(rows, card), unrecorded(rows, card)
    found = {
        "Method": entry.method,
        "Base": entry.base or "",
        "Fitted on": _names(card.data.datasets),
        "Stages": ", ".join(dict.fromkeys(str(row["stage"]) for row in train if row.get("stage"))),
        "Steps": _count(whole.steps or None),
        "Tokens": _count(whole.tokens or None),
        "Time": _duration(whole.seconds or None),
        "Before the curves": f"{missing.steps:,.0f} steps, {missing.tokens:,.0f} tokens" if missing.tokens > 0 else "",
        "KL, validation": _value(last_eval.get("kl"), " nats/token"),
        "Perplexity, validation": _perplexity(last_eval),
        "Same choice, validation": _percent(last_eval.get("top1_agreement")),
        "On disk": f"{entry.size / 1e6:.1f} MB",
        **_measured(card, known=bool(evals)),
        "Options": " · ".join(f"{name} {option_text(value)}" for name, value in _own_options(entry).items()),
        MADE: how_it_was_made(card),
        "On a clone": "\n".join(commands(card)),
    }
    return [[label, value] for label, value in found.items() if value]


def _own_options(entry: Entry) -> dict[str, Any]:
    """The options that are not the method's defaults; all where it has none."""
    try:
        defaults = attention.config_from_dict({"method": entry.method}).to_dict()
    except attention.ConfigError:
        defaults = {}
    return {
        name: value
        for name, value in entry.options.items()
        if name not in defaults or option_text(defaults[name]) != option_text(value)
    }


def how_it_was_made(card: ModelCard) -> str:
    """The card's words on it, without its options and command, and without a commit that nobody else has."""
    made = plain_section(card, MADE)
    lines = [line for line in made.splitlines() if not line.startswith(LAUNCHERS)]
    text = re.sub(r"Method options: .*?\. Text: ", "Text: ", "\n".join(lines))
    return re.sub(r",? code at \w+-dirty", "", text).strip()


def commands(card: ModelCard) -> list[str]:
    """Commands for a clone of the repository: those of the runs that it went on from, then the card's own.

    Of the card's own, what names files outside the repository is left out: another text is named with --data.train,
    and without one the trainer samples it from the base.
    """
    made = plain_section(card, MADE)
    own = next((line for line in made.splitlines() if line.startswith(LAUNCHERS)), "")
    if not own:
        return []
    parts = reversed(made.split(BEFORE)[1:])  # each goes on from the next
    earlier = dict.fromkeys(recipe for part in parts for recipe in re.findall(r"trainer/recipes/[\w.-]+\.yaml", part))
    return [*(f"accelerate launch trainer/train.py --config {recipe}" for recipe in earlier), _for_a_clone(own)]


def _for_a_clone(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote
        return command
    first = next((i for i, word in enumerate(words) if word.startswith("--") and "." in word), len(words))
    kept, options, place = words[:first], words[first:], 0
    while place < len(options):
        name = options[place]
        stop = next((i for i in range(place + 1, len(options)) if options[i].startswith("--")), len(options))
        values = options[place + 1 : stop]
        outside = any(value.startswith(("/", "~", "..")) for value in values)
        if not (outside or name.startswith("--card.") or name == "--resume"):
            kept += options[place:stop]
        place = stop
    return shlex.join(word for word in kept if word != "--resume")


def _measured(card: ModelCard, known: bool) -> dict[str, str]:
    """What the card says was measured; what it says of validation text is left out where that is known."""
    results, texts = {}, []
    for result in card.data.eval_results or []:
        name, split = MEASURES.get(result.metric_type, result.metric_name), result.dataset_split
        if known and split == "validation":
            continue
        show = _percent if result.metric_type == "top1_agreement" else _value
        shown = show(result.metric_value)
        label = f"{name}, {split or result.dataset_name}"
        results[f"{name}, {result.dataset_name}" if label in results else label] = shown
        texts += [result.dataset_name] if split == "test" else []
    return {**results, **({"Test text": "; ".join(dict.fromkeys(texts))} if texts else {})}


def measured_figures(card: ModelCard) -> dict[str, float]:
    """What a card says was measured, by metric; of a text that guided nothing where there is one."""
    results = [each for each in card.data.eval_results or [] if _number(each.metric_value) is not None]
    ordered = sorted(results, key=lambda each: each.dataset_split == "test")
    return {each.metric_type: float(each.metric_value) for each in ordered}


def _names(names: Any) -> str:
    names = [names] if isinstance(names, str) else names
    return ", ".join(map(str, names)) if isinstance(names, list) else ""


def _count(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.0f}"


def _value(value: Any, unit: str = "") -> str:
    number = _number(value)
    return "" if number is None else f"{number:.4g}{unit}"


def _percent(value: Any) -> str:
    number = _number(value)
    return "" if number is None else f"{number:.1%} of tokens"


def _perplexity(row: Row) -> str:
    own, base = _value(row.get("perplexity"), ""), _value(row.get("base_perplexity"), "")
    return f"{own} (base {base})" if own and base else own


def _duration(value: Any) -> str:
    seconds = _number(value)
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def curves(rows: list[Row], card: ModelCard | None = None) -> list[Chart]:
    """Loss, KL, perplexity and learning rate over the steps, and where stages change; what has no rows is left out."""
    train, evals = of_kind(rows, "train"), of_kind(rows, "eval")
    charts = [
        _chart("Training loss", "Mean over the steps since the point before.", "", _by_stage(train, "loss"), log=True),
        *_terms(train),
        _chart(
            "KL to the base",
            "On validation text; 0 is the base itself.",
            "nats",
            [_series("KL", evals, "kl", 1, dots=True)],
            log=True,
        ),
        _chart(
            "Perplexity",
            "On validation text; lower is better.",
            "",
            [
                _series("this model", evals, "perplexity", 1, dots=True),
                {**_series("base", evals, "base_perplexity", 0), "dashed": True},
            ],
            log=True,
        ),
        _chart(
            "Same first choice as the base",
            "Share of the validation tokens.",
            "",
            [_series("agreement", evals, "top1_agreement", 1, dots=True)],
        ),
        _chart(
            "Learning rate",
            "Of the base's weights and of the mechanisms' own.",
            "",
            [_series("weights", train, "lr", 1), _series("mechanisms", train, "mechanism_lr", 2)],
            log=True,
        ),
        _chart("Tokens a second", "While training.", "", [_series("speed", train, "tokens_per_second", 1)]),
    ]
    events = stage_changes(train or evals, 0 if card is None else own_and_before(card)[0].steps)
    return [{**chart, "events": events} for chart in charts if chart["series"]]


def stage_changes(rows: list[Row], own_steps: float = 0) -> list[Event]:
    """Where one stage ends and another begins, labelled with the one that begins.

    Args:
        own_steps: of the last run, as the card says them, where earlier runs are on record too.
    """
    events: list[Event] = []
    begins = rows[-1]["step"] - own_steps if rows and own_steps else 0
    for before, row in pairwise(rows):
        stage = str(row.get("stage", ""))
        if before["step"] <= begins < row["step"] and begins > 0:
            events.append({"x": begins, "label": f"{stage}, last run"})
        elif stage != str(before.get("stage", "")):
            events.append({"x": before["step"], "label": stage or "next stage"})
    return events


def _terms(train: list[Row]) -> list[Chart]:
    """The loss taken apart, where it has more than one term."""
    terms = [_series(name, train, name, index) for index, name in enumerate(SHARES, 1)]
    terms = [series for series in terms if series["points"]]
    return [_chart("Terms of the loss", "", "nats", terms, log=True)] if len(terms) > 1 else []


def _by_stage(train: list[Row], name: str) -> list[Series]:
    stages = dict.fromkeys(str(row.get("stage", "")) for row in train)
    return [
        _series(stage or name, [row for row in train if str(row.get("stage", "")) == stage], name, index)
        for index, stage in enumerate(stages, 1)
    ]


def _series(label: str, rows: list[Row], name: str, color: int, dots: bool = False) -> Series:
    points = [[row["step"], _number(row.get(name))] for row in rows if _number(row.get(name)) is not None]
    return {"name": label, "color": color, "dots": dots and len(points) <= 60, "points": thin(points)}


def _chart(title: str, note: str, unit: str, series: list[Series], log: bool = False) -> Chart:
    series = [each for each in series if each["points"]]
    values = [y for each in series for _, y in each["points"]]
    return {
        "title": title,
        "note": note,
        "x": {"label": "step"},
        "y": {"label": unit, "unit": unit, "log": log and bool(values) and min(values) > 0},
        "series": series,
    }


def thin(points: list[list[float]], most: int = CURVE_POINTS) -> list[list[float]]:
    """At most `most` points, evenly taken, the last one among them."""
    every = math.ceil(len(points) / most) if points else 1
    return points[::-1][::every][::-1]


def learned(rows: list[Row]) -> list[Chart]:
    """What the mechanisms learned, over the steps: a chart a quantity, a curve a layer, heads averaged.

    Gates that were recorded on the validation text stand before the same at an input of zero, which no text has.
    """
    evals = of_kind(rows, "eval")
    charts = [*_learned(evals, "means", MEAN_NOTE), *_learned(evals, "mechanisms", "")]
    for chart in charts:
        if chart["title"].endswith("_gate"):
            chart["note"] = chart["note"] or ZERO_NOTE
            chart["title"] = chart["title"].replace("_", " ")
    return charts


MEAN_NOTE = "Mean over the validation text."
ZERO_NOTE = "At an input of zero, which no text has; on a text it may be far from that."


def _learned(evals: list[Row], kind: str, note: str) -> list[Chart]:
    evals = [row for row in evals if isinstance(row.get(kind), list)]
    layers = max((len(row[kind]) for row in evals), default=0)
    names = dict.fromkeys(name for row in evals for layer in row[kind] if isinstance(layer, dict) for name in layer)
    charts = []
    for name in names:
        series = [_layer_series(evals, kind, name, index, layers) for index in range(layers)]
        charts.append(_chart(name, note, "", series))
        charts[-1]["height"] = 150
        if all(0 <= y <= 1 for each in series for _, y in each["points"]):
            charts[-1]["y"].update(min=0, max=1)
    return [chart for chart in charts if chart["series"]]


def _layer_series(evals: list[Row], kind: str, name: str, layer: int, layers: int) -> Series:
    """A layer's curve; without points where it does not have the place of masks, whose weight is then 0."""
    points = []
    for row in evals:
        summary = row[kind][layer] if layer < len(row[kind]) else {}
        mean = _mean(summary.get(name)) if isinstance(summary, dict) else None
        if mean is not None and not (mean == 0 and "(" in name):
            points.append([row["step"], mean])
    return {"name": f"layer {layer}", "shade": layer / max(layers - 1, 1), "points": thin(points)}


def _mean(value: Any) -> float | None:
    """Mean of a number, or of lists of numbers."""
    if isinstance(value, list):
        means = [mean for each in value if (mean := _mean(each)) is not None]
        return math.fsum(means) / len(means) if means else None
    return _number(value)


def samples(rows: list[Row]) -> list[SamplesView]:
    """Texts that were written on the way, by step."""
    views: list[SamplesView] = []
    for row in of_kind(rows, "samples"):
        texts = [
            {
                "prompt": str(text.get("prompt") or ""),
                "base": None if text.get("base") is None else str(text["base"]),
                "variant": text["variant"],
            }
            for text in row.get("texts") or []
            if isinstance(text, dict) and isinstance(text.get("variant"), str)
        ]
        if texts:
            views.append({"step": row["step"], "texts": texts})
    return views
