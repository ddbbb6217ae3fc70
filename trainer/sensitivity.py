"""Which layers need softmax: `python -m trainer.sensitivity --variant DIR --text FILE`.

One layer of a variant at a time is given back to the base's own attention, and KL and what is lost on tokens that must
be looked up (`trainer/hits.py`) are measured on the text. The other layers have been fitted to the layer as it was; so
with `--fit STEPS`, the variant and each of its neighbours are fitted for as many steps first. With `--budget`, the
recipe of the best mix within a mean number of keys read a layer is printed, layers taken greedily by what a key gains.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import attention
from attention.variant import attention_modules

from .config import DistilConfig
from .data import DataError, StageBatches, read_files
from .fidelity import Reader, predicted, read_each
from .hits import distances_in
from .optim import build_optimizers, lr_factor, set_lr
from .slices import NEAR, slice_tokens
from .stages import build_learner

Row = dict[str, Any]
HITS = f"CE excess on hits over {NEAR} tokens back"


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
    add("--fit", type=int, default=0, metavar="STEPS", help="steps of distillation before each (default: none)")
    add("--fit_text", nargs="+", metavar="FILE", help="files or patterns of the text to fit on")
    add("--fit_batch_size", type=int, default=2, help="blocks of a step (default: %(default)s)")
    add("--lr", type=float, default=5e-4, help="of the attention layers' weights in a fit (default: %(default)s)")
    add("--mechanism_lr", type=float, default=0.01, help="of the mechanisms' own parameters (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the text to fit on (default: %(default)s)")
    add("--budget", type=float, metavar="KEYS", help="also print the best mix with so many keys, mean over layers")
    add("--by", choices=("kl", "hits"), default="kl", help="what the best mix gains most of (default: %(default)s)")
    add("--figure", type=Path, metavar="PNG", help="also draw the rows by layer")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Looks for what cannot be measured before anything is loaded.

    Raises:
        ValueError: naming all of it.
    """
    problems = [
        f"--{name} is {value}; it must be at least {least}"
        for name, least in (("context", 2), ("tokens", 2), ("batch_size", 1), ("fit", 0), ("fit_batch_size", 1))
        if (value := getattr(options, name)) < least
    ]
    if options.fit and not options.fit_text:
        problems.append("--fit needs --fit_text, a text other than the one that is measured")
    if problems:
        raise ValueError("; ".join(problems))


def give_back(model: PreTrainedModel, base: PreTrainedModel, layer: int) -> None:
    """Makes a layer of a variant what it is in the base: softmax attention with the base's weights."""
    module, own = (list(attention_modules(each).values())[layer] for each in (model, base))
    for name, parameter in own.named_parameters():
        part, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(part), leaf, nn.Parameter(parameter.detach().clone()))
    module.mechanism = attention.SoftmaxConfig().build(module.mechanism.layer).train(module.mechanism.training)


def fit(model: PreTrainedModel, base: PreTrainedModel, tokens: np.ndarray, options: argparse.Namespace) -> None:
    """Distils the base into a variant's attention layers for `options.fit` steps; the rest stays as it is."""
    rates = {"lr": options.lr, "mechanism_lr": options.mechanism_lr}
    stage = DistilConfig(steps=options.fit, batch_size=options.fit_batch_size, context=options.context, **rates)
    learner = build_learner(stage, model, base).train()
    optimizers, batches = build_optimizers(stage, learner), StageBatches(tokens, stage, (options.seed, 0))
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    for step in tqdm(range(options.fit), unit="step", leave=False):
        batch, _ = batches(step)
        set_lr(optimizers, lr_factor(stage.schedule, step, stage.steps))
        (learner(batch).loss / (len(batch) * stage.predicted(batch.shape[1]))).backward()
        nn.utils.clip_grad_norm_(trained, stage.clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    learner.close()
    model.eval()


def sensitivity(options: argparse.Namespace) -> list[Row]:
    """A row for the variant as it is (`layer` None), and one for each layer given back to softmax.

    Raises:
        attention.CheckpointError, DataError, ValueError: saying what is missing or wrong.
    """
    check(options)
    base, tokenizer, model = load(options.variant)
    if tokenizer is None:
        raise ValueError(f"the base of {options.variant} has no tokenizer, which is needed to read text")
    text = _Text(options, tokenizer)
    lessons = read_files(options.fit_text, tokenizer) if options.fit else None
    rows: list[Row] = []
    for layer in (None, *range(len(model.mechanisms))):
        candidate = model if layer is None and not options.fit else copy.deepcopy(model)
        if layer is not None:
            give_back(candidate, base, layer)
        if lessons is not None:
            fit(candidate, base, lessons, options)
        rows.append(
            {"layer": layer, **text.figures(candidate, base, "as it is" if layer is None else f"layer {layer}")}
        )
        if layer is not None:
            rows[-1]["gain"] = rows[0]["kl"] - rows[-1]["kl"]
    return rows


class _Text:
    """What is read, and which of its tokens must be looked up far back."""

    def __init__(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase):
        self.options = options
        self.tokens = read_files(options.text, tokenizer)[: options.tokens]
        where = attention.describe(options.variant).base
        distances, _ = distances_in(self.tokens, where, tokenizer, options.context)
        places = predicted(len(self.tokens), options.context)
        self.far, self.blocks = distances[places] > NEAR, places // options.context

    def figures(self, model: PreTrainedModel, base: PreTrainedModel, name: str) -> Row:
        """KL, perplexity, what far hits lose, and the keys that the last token of a block reads, mean over layers."""
        context, size = self.options.context, self.options.batch_size
        (reading,) = read_each([Reader(model)], base, self.tokens, context, size, description=name)
        hits = slice_tokens(reading, self.far, self.blocks)
        keys = [mechanism.keys_read(context - 1) for mechanism in model.mechanisms]
        return {
            "kl": reading.means.kl,
            "perplexity": reading.means.perplexity,
            "hits": hits.ce_excess,
            "hits_error": hits.ce_excess_error,
            "keys_read": sum(keys) / len(keys),
        }


def load(spec: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, PreTrainedModel]:
    """Base, tokenizer and variant.

    Raises:
        attention.CheckpointError: if there is no such model.
        ValueError: if it is no variant, or has no base.
    """
    found = attention.describe(spec)
    if not found.is_variant or found.base is None:
        raise ValueError(f"{spec} is no variant with a base of its own: there is nothing to give back")
    base, tokenizer = attention.load(found.base)
    return base, tokenizer, attention.load(spec, base=base)[0]


def best_mix(
    model: PreTrainedModel, rows: list[Row], budget: float, by: Literal["kl", "hits"] = "kl"
) -> dict[str, Any] | None:
    """The mix that gains most within a budget of keys read (mean over layers), by gain per key; None if none fits.

    Args:
        rows: what `sensitivity` gives for the model.
        by: the figure to gain in.
    """
    whole, *layers = rows
    costs = {row["layer"]: row["keys_read"] - whole["keys_read"] for row in layers}
    gains = {row["layer"]: (whole[by] or 0) - (row[by] or 0) for row in layers}
    left, chosen = budget - whole["keys_read"], []
    for layer in sorted(gains, key=lambda layer: -gains[layer] / max(1e-9, costs[layer])):
        if gains[layer] > 0 and costs[layer] <= left:
            left -= costs[layer]
            chosen.append(layer)
    if not chosen:
        return None
    choices: list[dict[str, Any]] = []
    for layer, mechanism in enumerate(model.mechanisms):
        config = attention.SoftmaxConfig() if layer in chosen else mechanism.config.alone(layer)
        same = next((choice for choice in choices if choice["config"] == config), None)
        if same is None:
            choices.append(same := {"config": config, "layers": []})
        same["layers"].append(layer)
    mix = [{"layers": choice["layers"], **choice["config"].to_dict()} for choice in choices]
    return {"method": "layers", "layers": mix}


def draw(rows: list[Row], path: Path) -> None:
    """Bars of KL, and of what hits lose, with each layer given back, and lines where the variant is."""
    whole, *layers = rows
    panels = {"kl": "KL to the base, nats/token", "hits": f"{HITS},\nnats/token"}
    panels = {name: label for name, label in panels.items() if whole[name] is not None}
    figure = Figure(figsize=(6, 2.6 * len(panels)), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        axes.bar([str(row["layer"]) for row in layers], [row[name] for row in layers])
        axes.axhline(whole[name], color="grey", linestyle="--", label="as it is")
        axes.set(xlabel="layer given back to softmax", ylabel=label)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"layer given back       KL    gained  perplexity  keys read  {HITS}"]
    for row in rows:
        name = "none" if row["layer"] is None else str(row["layer"])
        gain = f"{row['gain']:+.4f}" if "gain" in row else ""
        error = "" if row["hits_error"] is None else f" ± {row['hits_error']:.3f}"
        hits = "–" if row["hits"] is None else f"{row['hits']:+.3f}{error}"
        lines.append(
            f"{name:>16}  {row['kl']:.4f}  {gain:>8}  {row['perplexity']:10.2f}  {row['keys_read']:9.0f}  {hits}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; 2 for what cannot be measured."""
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    try:
        rows = sensitivity(options)
        mix = None if options.budget is None else best_mix(load(options.variant)[2], rows, options.budget, options.by)
        if options.figure is not None:
            draw(rows, options.figure)
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
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
