"""Speed in one table: for each model what it costs and how near it is to the base."""

from __future__ import annotations

from typing import Any

from .counting import Counted
from .ratios import round_length
from .training import hits_excess, measured_figures, read_card

CHOSEN = (1024, 8192, 131072)  # lengths for which memory is counted
HELP = (
    "From where on a method is no worse than its base, for reading a text and for one more token; what it takes at "
    "some lengths; how near its predictions are, from its card: on all tokens, and on hits, which it must look up. "
    "“?”: too noisy to tell; –: not measured, or not so far."
)


def costs_table(counted: Counted, results: dict[str, Any] | None) -> dict[str, Any]:
    """What `TextTable` shows.

    Args:
        results: `measured.report` of a measurement of the same models, if there is one.
    """
    results = results or {"samples": [], "break_even": {}}
    lengths = _measured_lengths(results["samples"])
    bases = dict(counted.comparisons)
    rows = []
    for loaded in counted.models:
        name, base = loaded.name, bases.get(loaded.name)
        card = read_card(loaded.entry.folder)
        figures = measured_figures(card)
        even = results["break_even"].get(name, {})
        row = {
            "Model": name,
            "KL, nats": _figure(figures.get("kl")),
            "Perplexity": _figure(figures.get("perplexity")),
            "Hits: nats above the base": hits_excess(card),
            "Reading: fewer operations from": _counted_even(counted, name, base, "operations"),
            "Reading: faster from": _measured_even(base, even.get("prefill_ms")),
            "A token: fewer keys from": _counted_even(counted, name, base, "keys"),
            "A token: faster from": _measured_even(base, even.get("token_ms")),
        }
        own = {sample["length"]: sample for sample in results["samples"] if sample["model"] == name}
        for length in lengths:
            row[f"Reading {length:,}, ms"] = _time(own.get(length), "prefill")
            row[f"A token after {length:,}, ms"] = _time(own.get(length), "token")
        counts = {count.length: count for count in counted.of(name)}
        for length in CHOSEN:
            row[f"Kept after {length:,}, MB"] = _megabytes(counts[length].state_bytes) if length in counts else "–"
        rows.append(row)
    return {"headers": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _measured_lengths(samples: list[dict[str, Any]]) -> list[int]:
    """Of the lengths that were measured one in the middle and the longest."""
    known = sorted({sample["length"] for sample in samples})
    return sorted({known[len(known) // 2], known[-1]}) if known else []


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _counted_even(counted: Counted, name: str, base: str | None, quantity: str) -> str:
    if base is None:
        return ""
    even = counted.break_even(name, base, quantity)
    return "–" if even is None else "any length" if even <= 1 else f"{even:,}"


def _megabytes(size: int) -> str:
    """Three digits, or all before the point."""
    megabytes = size / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.3g}"


def _measured_even(base: str | None, even: dict[str, Any] | None) -> str:
    """Where the times cross, in words."""
    if base is None:
        return ""
    if even is None:
        return "–"
    if even["slower_to"] is None and even["faster_from"] is None:
        return "?"
    if even["faster_from"] is None:
        return f"not up to {even['slower_to']:,}"
    if even["slower_to"] is None:
        return f"{even['faster_from']:,} or less"
    return f"about {round_length(even['length']):,}" if even["length"] else "?"


def _time(sample: dict[str, Any] | None, what: str) -> str:
    if sample is None:
        return "–"
    low, high = sample[f"{what}_spread"]
    return f"{sample[f'{what}_ms']:.3g} ({low:.3g} to {high:.3g})"
