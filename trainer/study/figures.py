"""The figures of the study's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attention.masks_plan import CONTENT, Candidate
from attention.reference import effective_mask

from .results import Result

COLOURS = {"kl": "tab:blue", "kl+ce": "tab:orange", "kl+l1": "tab:green"}
LINES = {"corpus": "-", "sampled": "--"}
LAYERS = 6  # shown at most
ABREAST = 3  # panels of a row
SHOWN = 96  # tokens of a mask that are drawn


@contextmanager
def drawn(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[np.ndarray]:
    """The axes (rows, columns) of a figure that is saved when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(results: Sequence[Result], path: Path) -> None:
    """KL on the validation text over tokens trained on, a panel a method, a line a seed; faint, the KL in training."""
    methods = list(dict.fromkeys(result.cell.method for result in results))
    columns = min(ABREAST, len(methods))
    rows = -(-len(methods) // columns)
    with drawn(path, rows, columns, (3.1 * columns + 0.6, 3.2 * rows)) as axes:
        panels, spare = axes.flat[: len(methods)], axes.flat[len(methods) :]
        for panel in spare:
            panel.set_axis_off()
        for panel, method in zip(panels, methods, strict=True):
            for result in results:
                if result.cell.method == method:
                    _draw_curve(panel, result)
            panel.set(title=method, xlabel="tokens", yscale="log")
            panel.grid(alpha=0.3, which="both")
            _label_thousands(panel)
        for first in axes[:, 0]:
            first.set_ylabel("KL, nats per token")
        axes[0, 0].legend(frameon=False, fontsize=7)


def _draw_curve(panel: Any, result: Result) -> None:
    colour, line = COLOURS[result.cell.objective], LINES[result.cell.text]
    measured, trained = result.rows("eval"), [row for row in result.rows("train") if "kl" in row]
    label = None if result.cell.seed else f"{result.cell.objective}, {result.cell.text}"
    panel.plot(*_over_tokens(measured), color=colour, linestyle=line, label=label)
    panel.plot(*_over_tokens(trained), color=colour, linestyle=line, linewidth=0.6, alpha=0.4)


def _over_tokens(rows: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    return [row["tokens"] for row in rows], [row["kl"] for row in rows]


def draw_weights(results: Sequence[Result], path: Path) -> None:
    """The weight of every mask through training, mean over heads: a row a result, a column a layer."""
    layers = _shown_layers(results[0])
    size = (2.0 * len(layers) + 1.6, 2.1 * len(results) + 0.3)
    with drawn(path, len(results), len(layers), size, sharex=True, sharey=True) as axes:
        for row, result in zip(axes, results, strict=True):
            for panel, layer in zip(row, layers, strict=True):
                _draw_layer(panel, result.rows("eval"), layer)
            row[0].set_ylabel(f"{result.cell.objective}\nweight σ(α)")
        for panel, layer in zip(axes[0], layers, strict=True):
            panel.set_title(f"layer {layer}", fontsize=9)
        axes[0, -1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axes[-1, 0].set_xlabel("tokens")


def _draw_layer(panel: Any, rows: list[dict[str, Any]], layer: int) -> None:
    import matplotlib

    colours = matplotlib.colormaps["tab20"].colors
    tokens = [row["tokens"] for row in rows]
    for place, name in enumerate(rows[0]["mechanisms"][layer]):
        means = [float(np.mean(row["mechanisms"][layer][name])) for row in rows]
        if not means[0]:  # a mask that this layer does not have: a line in the legend alone
            means = [np.nan] * len(rows)
        panel.plot(tokens, means, color=colours[place % len(colours)], linewidth=1.2, label=name)
    _label_thousands(panel)
    panel.grid(alpha=0.3)


def _label_thousands(panel: Any) -> None:
    """Labels an axis of tokens as 0, 50k, 100k."""
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_masks(results: Sequence[Result], path: Path) -> int:
    """The final masks M, mean over heads, the largest entry of each as 1: a row a result, a column a layer.

    Returns:
        How many positions are shown.
    """
    layers = _shown_layers(results[0])
    size = (1.6 * len(layers) + 1.0, 1.75 * len(results) + 0.3)
    with drawn(path, len(results), len(layers), size, sharex=True, sharey=True) as axes:
        for row, result in zip(axes, results, strict=True):
            for panel, layer in zip(row, layers, strict=True):
                mask = final_mask(result, layer)
                image = panel.imshow(mask / mask.max(), cmap="magma", vmin=0, vmax=1)
            row[0].set_ylabel(f"{result.cell.objective}\nquery")
        for panel, layer in zip(axes[0], layers, strict=True):
            panel.set_title(f"layer {layer}", fontsize=9)
        axes[-1, 0].set_xlabel("key")
        axes[0, 0].figure.colorbar(image, ax=axes, shrink=0.8)
    return SHOWN


def final_mask(result: Result, layer: int) -> np.ndarray:
    """(T, T) the mask of a layer at the end of the run, mean over its heads; without keys that depend on the text."""
    weights = result.rows("eval")[-1]["mechanisms"][layer]
    candidates = {name: Candidate.parse(name) for name in weights}
    fixed = {name: (one.kind, one.numbers) for name, one in candidates.items() if one.kind not in CONTENT}
    heads = torch.tensor([weights[name] for name in fixed]).reshape(len(fixed), -1).T
    return effective_mask(list(fixed.values()), heads, SHOWN)[0].mean(0).numpy()


def draw_pruning(results: Sequence[Result], path: Path) -> None:
    """KL over the share of masks that was dropped, and over the keys that are then read."""
    with drawn(path, 1, 2, (7.6, 3.0), sharey=True) as axes:
        for result in results:
            style = {"color": COLOURS[result.cell.objective], "linestyle": LINES[result.cell.text], "marker": "."}
            label = None if result.cell.seed else f"{result.cell.objective}, {result.cell.text}"
            kl = [row["kl"] for row in result.pruning]
            axes[0, 0].plot([100 * row["dropped"] for row in result.pruning], kl, label=label, **style)
            axes[0, 1].plot([row["keys_read"] for row in result.pruning], kl, label=label, **style)
        axes[0, 0].set(xlabel="masks dropped, %", ylabel="KL, nats per token", yscale="log")
        axes[0, 1].set(xlabel="keys read by a query, mean over layers")
        axes[0, 0].legend(frameon=False, fontsize=7)
        for panel in axes[0]:
            panel.grid(alpha=0.3, which="both")


def _shown_layers(result: Result) -> list[int]:
    """All layers, or as many as fit, evenly spread."""
    count = len(result.rows("eval")[-1]["mechanisms"])
    return np.unique(np.linspace(0, count - 1, min(count, LAYERS)).round().astype(int)).tolist()
