"""Whole models at length: what reading a text costs, what the next token costs after it, and what is kept meanwhile.

    python benchmarks/generate.py --positions 512 2048 8192 --family gpt2

Models of about GPT-2 small's size with random weights, whose cost does not depend on what they have learned. Each
method is timed in the same rounds as the same model with softmax attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

import attention
from attention.variant import cache_name
from benchmarks import measure
from benchmarks.attention import MECHANISMS
from demo.engine import cache_bytes

SOFTMAX = "softmax"
STEPS = 20  # tokens timed after each length, and one that is not counted


def config(family: str, positions: int) -> PretrainedConfig:
    """A model of 12 layers of 12 heads, 768 wide, that holds so many tokens.

    Args:
        family: "gpt2", or "llama", whose keys and values are shared by three heads each.
    """
    if family == "gpt2":
        return GPT2Config(n_positions=positions)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=50_257, max_position_embeddings=positions)


def build(family: str, positions: int, names: list[str]) -> dict[str, PreTrainedModel]:
    """Models by name, which share all weights but those of their mechanisms; first the one with softmax."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config(family, positions)).eval()
    variants = {
        name: attention.convert(base, attention.config_from_dict(MECHANISMS[name]), share=True).eval() for name in names
    }
    for variant in variants.values():
        for mechanism in variant.mechanisms:
            for parameter in mechanism.choosing_parameters():
                torch.nn.init.normal_(parameter)  # at their start they choose the first keys
    return {SOFTMAX: base} | variants


@torch.no_grad()
def at_lengths(family: str, lengths: list[int], names: list[str], seconds: float, memory: bool) -> list[dict[str, Any]]:
    """A row for each length and method.

    Args:
        family: see `config`.
        lengths: tokens read at once, before the tokens that follow one by one.
        names: of `MECHANISMS`.
        seconds: time for the rounds of each measurement, after three.
        memory: also measure the peak of reading, in a process for each.

    Returns:
        Rows of `at_length`, with `peak_mb`, the memory of reading beyond the model's, None where it was not measured.
    """
    models = build(family, max(lengths) + 4 * STEPS, names)
    rows = []
    for length in lengths:
        for row in at_length(models, length, seconds):
            peak = measure.peak_memory_mb(_reader, family, length, row["method"]) if memory else None
            rows.append({**row, "peak_mb": peak})
    return rows


@torch.no_grad()
def at_length(models: dict[str, PreTrainedModel], length: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each model, one of which is `SOFTMAX`, the others' peer; all are timed in the same rounds.

    Args:
        length: tokens read at once, before the tokens that follow one by one.
        seconds: time for the rounds of reading, after three.

    Returns:
        Rows with `read_ms` and `token_ms` (medians), `read_ratio` and `token_ratio` (how many times as fast as softmax,
        median over rounds) with the quartiles over rounds in `..._spread`, `cache_mb` and `cache_ratio` (of softmax's).
    """
    ids = torch.randint(models[SOFTMAX].config.vocab_size, (1, length))
    reads = {name: partial(_read, model, ids) for name, model in models.items()}
    reading = measure.times_in_turn(reads, budget=seconds, min_rounds=3)
    caches = {name: read()[cache_name(type(models[name]))] for name, read in reads.items()}
    sizes = {name: cache_bytes(cache) / 2**20 for name, cache in caches.items()}
    steps = {name: partial(_step, model, caches[name]) for name, model in models.items()}
    writing = measure.times_in_turn(steps, budget=0, min_rounds=STEPS)
    return [
        {
            "method": name,
            "length": length,
            **_compared("read", reading, name),
            **_compared("token", writing, name),
            "cache_mb": sizes[name],
            "cache_ratio": sizes[name] / sizes[SOFTMAX],
        }
        for name in models
    ]


def _read(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1)


def _step(model: PreTrainedModel, cache: Any) -> Any:
    return model(torch.ones(1, 1, dtype=torch.long), **{cache_name(type(model)): cache}, use_cache=True)


def _reader(family: str, length: int, name: str) -> Callable[[], Any]:
    """What a process of its own measures the memory of."""
    torch.set_grad_enabled(False)
    model = build(family, length, [] if name == SOFTMAX else [name])[name]
    return partial(_read, model, torch.randint(model.config.vocab_size, (1, length)))


def _compared(what: str, times: dict[str, list[float]], name: str) -> dict[str, float]:
    ratios = [slow / fast for slow, fast in zip(times[SOFTMAX], times[name], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        f"{what}_ms": 1e3 * statistics.median(times[name]),
        f"{what}_ratio": middle,
        f"{what}_spread": f"{low:.2f} to {high:.2f}",
    }


def figure(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Draws the tokens a second that each method writes against what came before, and reads, into an image file."""
    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (what, label) in zip(
        drawing.subplots(1, 2), (("read", "reading, tokens/s"), ("token", "writing, tokens/s")), strict=True
    ):
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]
            speeds = [1e3 * (row["length"] if what == "read" else 1) / row[f"{what}_ms"] for row in own]
            style = "--" if name == SOFTMAX else "-"
            axes.plot([row["length"] for row in own], speeds, style, marker="o", markersize=3, label=name)
        lengths = sorted({row["length"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(xlabel="tokens before", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    drawing.suptitle(title)
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    drawing.savefig(path, dpi=130)
