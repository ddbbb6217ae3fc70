"""Which layers need softmax: `python -m trainer.sensitivity --variant DIR --text FILE`.

One layer of a variant at a time is given back to softmax attention, with nothing refitted, and the KL to the base is
measured on the text. The layers whose KL falls most are those that a mix should spend its keys on; with `--budget`, the
recipe of the best mix within a mean number of keys read a layer is printed, layers taken greedily by KL per key.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import attention
from attention.variant import attention_modules

from .data import DataError, read_files
from .fidelity import measure

Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sensitivity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--variant", required=True, metavar="SPEC", help="a folder or Hub id")
    add("--text", required=True, nargs="+", metavar="FILE", help="files or patterns; not what is measured in the end")
    add("--context", type=int, default=512, help="tokens of a block (default: %(default)s)")
    add("--tokens", type=int, default=32_768, help="tokens from the beginning of the text (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="blocks of a forward pass (default: %(default)s)")
    add("--budget", type=float, metavar="KEYS", help="also print the best mix with so many keys, mean over layers")
    add("--figure", type=Path, metavar="PNG", help="also draw the KL by layer")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


@contextmanager
def given_back(model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Inside the block, a layer of a variant has softmax attention."""
    module = list(attention_modules(model).values())[layer]
    own = module.mechanism
    module.mechanism = attention.SoftmaxConfig().build(own.layer).train(own.training)
    try:
        yield
    finally:
        module.mechanism = own


def sensitivity(options: argparse.Namespace) -> list[Row]:
    """A row for the variant as it is (`layer` None), and one for each layer given back to softmax.

    Raises:
        attention.CheckpointError, DataError, ValueError: saying what is missing or wrong.
    """
    found = attention.describe(options.variant)
    if not found.is_variant or found.base is None:
        raise ValueError(f"{options.variant} is no variant with a base of its own: there is nothing to give back")
    base, tokenizer = attention.load(found.base)
    model, _ = attention.load(options.variant, base=base)
    tokens = read_files(options.text, tokenizer)[: options.tokens]
    rows: list[Row] = [_row(model, base, tokens, options, None)]
    for layer in range(len(model.mechanisms)):
        with given_back(model, layer):
            rows.append(_row(model, base, tokens, options, layer))
        rows[-1]["gain"] = rows[0]["kl"] - rows[-1]["kl"]
    return rows


def _row(model: PreTrainedModel, base: PreTrainedModel, tokens: Any, options: argparse.Namespace, layer: int | None):
    what = "as it is" if layer is None else f"layer {layer}"
    figures = measure(model, base, tokens, options.context, options.batch_size, description=what)
    keys = [mechanism.keys_read(options.context - 1) for mechanism in model.mechanisms]
    return {"layer": layer, "kl": figures.kl, "perplexity": figures.perplexity, "keys_read": sum(keys) / len(keys)}


def best_mix(model: PreTrainedModel, rows: list[Row], budget: float) -> dict[str, Any] | None:
    """The mix with most KL gained within a budget of keys read (mean over layers), by gain per key; None if none fits.

    Args:
        rows: what `sensitivity` gives for the model.
    """
    whole, *layers = rows
    left, chosen = budget - whole["keys_read"], []
    for row in sorted(layers, key=lambda row: -row["gain"] / max(1e-9, row["keys_read"] - whole["keys_read"])):
        if row["gain"] > 0 and (cost := row["keys_read"] - whole["keys_read"]) <= left:
            left -= cost
            chosen.append(row["layer"])
    if not chosen:
        return None
    softmax = {"layers": sorted(chosen), **attention.SoftmaxConfig().to_dict()}
    others = [
        {"layers": [number], **mechanism.config.to_dict()}
        for number, mechanism in enumerate(model.mechanisms)
        if number not in chosen
    ]
    return {"method": "layers", "layers": [softmax, *others]}


def draw(rows: list[Row], path: Path) -> None:
    """Bars of the KL with each layer given back, and a line where the variant is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    whole, *layers = rows
    figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
    panel.bar([str(row["layer"]) for row in layers], [row["kl"] for row in layers])
    panel.axhline(whole["kl"], color="grey", linestyle="--", label="as it is")
    panel.set(xlabel="layer given back to softmax", ylabel="KL to the base, nats/token")
    panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = ["layer given back       KL    gained  perplexity  keys read"]
    for row in rows:
        name = "none" if row["layer"] is None else str(row["layer"])
        gain = f"{row['gain']:+.4f}" if "gain" in row else ""
        lines.append(f"{name:>16}  {row['kl']:.4f}  {gain:>8}  {row['perplexity']:10.2f}  {row['keys_read']:9.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 2 for what cannot be measured."""
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    try:
        rows = sensitivity(options)
        mix = None
        if options.budget is not None:
            base, _ = attention.load(attention.describe(options.variant).base)
            mix = best_mix(attention.load(options.variant, base=base)[0], rows, options.budget)
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.figure is not None:
        draw(rows, options.figure)
    sys.stdout.write((json.dumps(rows, indent=2) if options.json else table(rows)) + "\n")
    if options.budget is not None and not options.json:
        nothing = f"# no layer can be given back within {options.budget:g} keys\n"
        sys.stdout.write(nothing if mix is None else yaml.safe_dump({"attention": _plain(mix)}, sort_keys=False))
    return 0


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
