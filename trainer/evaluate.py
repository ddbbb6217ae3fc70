"""Measures variants against their base on a text: `python trainer/evaluate.py --variant DIR ... --text FILE`.

Tokens are counted like this. The text's documents (parts between empty lines; rows of JSON or Parquet) are each ended
by eos and joined into one stream, which is cut into blocks of `--context` tokens. Every token of a block but its first
is predicted exactly once, from the tokens before it in its block; the last block may be short. All figures are means
over these predictions. Variants of one base are measured together, so that the base reads the text once.

A mean hides recall, so beside the means come slices (`trainer/slices.py`): tokens that must be looked up in their
block, called hits, by how far back they stand, and all others; and tokens by their position in the block. What is
looked up is rare in the text that the base was trained on, by the table of pairs that lies with the base
(`trainer/hits.py`, `trainer/pairs.py`); where there is none, rare in the other blocks of this text. In each slice: how
many tokens, cross-entropy of the base, that of the variant above it, and KL, with standard errors over blocks.

With `--recall N`, base and variant answer questions about N texts a task and distance, whose answers stand in them (see
`trainer/recall.py`).

With `--samples N`, variant and base each continue the same N passages of the text, with the same random numbers at
temperature 1; the base judges both, and sequences of tokens and new names are counted (see `trainer/samples.py`). A
difference comes with its standard error over the passages, which tells whether N is large enough. After the first 64 of
the passages the variant also drafts for the base, greedily: how many tokens a round of speculative decoding would give
(see `trainer/drafting.py`).

With `--ablate`, each part of the mechanism is switched off in turn, in all layers, on the text's first
`--ablate_tokens`: a part without which the KL changes by less than `--tolerance` does nothing. With `--card`, the
figures go into the cards of the variants, one section a context.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file from a clone that is not installed; `python -P` puts no folder in front
    sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import attention
from attention.files import CARD, expanded, write_file
from trainer.card import with_measurement
from trainer.card_words import USE
from trainer.data import DataError, check_vocabulary, read_files
from trainer.drafting import DRAFT, measure_drafting
from trainer.fidelity import Fidelity, Reader, Reading, measure_each, predicted, read_each
from trainer.hits import distances_in
from trainer.recall import measure_recall
from trainer.samples import Writing, draw_prompts, measure_writing
from trainer.slices import Slice, by_position, by_recall, slice_by
from trainer.tables import tables

Row = dict[str, Any]


def count(text: str) -> int:
    """A whole number from a command line, 0 or more."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", required=True, nargs="+", metavar="SPEC", help="folders or Hub ids; a base is measured alone")
    add(
        "--text", required=True, nargs="+", metavar="FILE", help="files, or patterns of files, of text, JSON or Parquet"
    )
    add("--base", metavar="SPEC", help="the base, if not the one that a variant names")
    add("--context", type=int, default=512, help="tokens of a block (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="blocks of a forward pass (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--ablate", action="store_true", help="also measure with each part switched off")
    add("--ablate_tokens", type=int, default=32_768, metavar="N", help="of the text, for that (default: %(default)s)")
    add("--tolerance", type=float, default=1e-3, help="change in KL that is nothing, nats/token (default: %(default)s)")
    add("--pairs", type=Path, metavar="FILE", help="table of frequent pairs, if not the one that lies with the base")
    add("--recall", type=count, default=0, metavar="N", help="also ask about N texts for each task and distance")
    add("--samples", type=count, default=0, metavar="N", help="also have variant and base continue N passages")
    add("--prompt_length", type=int, default=16, help="tokens of a passage (default: %(default)s)")
    add("--length", type=int, default=200, help="tokens to write after it (default: %(default)s)")
    add("--seed", type=int, default=0, help="of passages, samples and questions (default: %(default)s)")
    add("--card", action="store_true", help="also write the figures into README.md of each variant, a folder")
    add("--json", action="store_true", help="print one JSON object a variant instead of tables")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Checks what can be checked before anything is loaded.

    Raises:
        ValueError: naming all options that have no meaning.
    """
    least = {
        "context": 2,
        "batch_size": 1,
        "samples": 0,
        "prompt_length": 1,
        "length": DRAFT + 1,
        "seed": 0,
        "tolerance": 0,
        "ablate_tokens": 2,
    }
    problems = [
        f"--{name} must be at least {value}, not {getattr(options, name)}"
        for name, value in least.items()
        if not value <= getattr(options, name) < 2**63
    ]
    try:
        torch.empty(1, device=options.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problems.append(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}")
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Subject:
    """A variant, or a base itself, that is measured."""

    spec: str
    method: str
    model: PreTrainedModel

    def keys_read(self, context: int) -> int:
        """The most keys, or what takes as long, that the last query of a context reads in any layer."""
        mechanisms = getattr(self.model, "mechanisms", [])
        return max((mechanism.keys_read(context - 1) for mechanism in mechanisms), default=context)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that can be switched off with something left; none for a mechanism of a single part."""
        mechanisms = getattr(self.model, "mechanisms", [])
        names = tuple(dict.fromkeys(name for mechanism in mechanisms for name in mechanism.branches))
        return names if len(names) > 1 else ()


@dataclass(frozen=True)
class Family:
    """A base, what loads it, and what is measured against it."""

    spec: str
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    subjects: list[Subject] = field(default_factory=list)


def evaluate(options: argparse.Namespace) -> list[Row]:
    """What is measured of each variant, by name; the order is that of `options.variant`.

    Raises:
        attention.CheckpointError, DataError, ValueError: saying what is missing or wrong.
    """
    check(options)
    rows = [row for family in load(options) for row in _measure(family, options)]
    for row in rows:
        if wrong := _not_finite(row):
            raise ValueError(f"{row['variant']}, or its base, is damaged: not finite are {', '.join(wrong)}")
    return sorted(rows, key=lambda row: options.variant.index(row["variant"]))


def _not_finite(row: Row) -> list[str]:
    """The names of figures that are no numbers, which JSON cannot hold."""
    inner = [
        f"{name} {inner}" for name, value in row.items() if isinstance(value, dict) for inner in _not_finite(value)
    ]
    return [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)] + inner


def load(options: argparse.Namespace) -> list[Family]:
    """Loads what is to be measured, each base once."""
    families: dict[str, Family] = {}
    for spec in options.variant:
        found = attention.describe(spec)
        place = (options.base or found.base) if found.is_variant else str(found.folder)
        if place is None:
            raise ValueError(f"{spec} names no base to compare it with; give one with --base")
        if place not in families:
            families[place] = Family(place, *attention.load(place, device=options.device))
        base = families[place].base
        model = attention.load(spec, base=base, dtype=base.dtype)[0] if found.is_variant else base
        families[place].subjects.append(Subject(spec, found.method, model))
    return list(families.values())


def _measure(family: Family, options: argparse.Namespace) -> list[Row]:
    if family.tokenizer is None:
        raise ValueError(f"the base {family.base.name_or_path} has no tokenizer, which is needed to read text")
    check_vocabulary(family.tokenizer, family.base)
    tokens = read_files(options.text, family.tokenizer)
    readers = [Reader(subject.model) for subject in family.subjects]
    readings = read_each(readers, family.base, tokens, options.context, options.batch_size, description="reading")
    rows = _fidelity(family, tokens, readings, options)
    if options.ablate:
        for row, figures in zip(rows, _ablations(family, tokens, readings, options), strict=True):
            row |= figures
    if options.recall:
        for row, figures in zip(rows, _recall(family, tokens, options), strict=True):
            row["recall"] = figures
    if options.samples:
        for row, figures in zip(rows, _writing(family, tokens, options), strict=True):
            row["samples"], row["drafting"] = figures
    return rows


def _fidelity(family: Family, tokens: np.ndarray, readings: list[Reading], options: argparse.Namespace) -> list[Row]:
    """A row for each subject, from what it made of the tokens."""
    distances, rare = distances_in(tokens, family.spec, family.tokenizer, options.context, options.pairs)
    places = predicted(len(tokens), options.context)
    blocks = places // options.context
    recall = by_recall(distances[places], options.context)
    positions = by_position(places % options.context, options.context)
    return [
        {
            "method": subject.method,
            **reading.means.to_dict(),
            "context": options.context,
            "keys_read": subject.keys_read(options.context),
            "text": options.text,
            "variant": subject.spec,
            "rare": rare,
            "slices": _to_dicts(slice_by(reading, recall, blocks)),
            "positions": _to_dicts(slice_by(reading, positions, blocks)),
        }
        for subject, reading in zip(family.subjects, readings, strict=True)
    ]


def _ablations(family: Family, tokens: np.ndarray, readings: list[Reading], options: argparse.Namespace) -> list[Row]:
    """For each subject, what is measured without each of its parts, beside what the whole made of the same tokens."""
    tokens, size = tokens[: options.ablate_tokens], (options.context, options.batch_size)
    readers = [Reader(subject.model, (name,)) for subject in family.subjects for name in subject.parts]
    means = iter(measure_each(readers, family.base, tokens, *size, description="ablating") if readers else [])
    found = []
    for subject, reading in zip(family.subjects, readings, strict=True):
        whole = reading.first(len(predicted(len(tokens), options.context))).means
        parts = {name: _ablation(next(means), whole.kl, options.tolerance) for name in subject.parts}
        found.append({"tolerance": options.tolerance, "ablated_tokens": whole.tokens, "ablations": parts})
    return found


def _to_dicts(slices: dict[str, Slice]) -> dict[str, Row]:
    return {name: one.to_dict() for name, one in slices.items()}


def _recall(family: Family, tokens: np.ndarray, options: argparse.Namespace) -> list[Row]:
    """For each subject, what it and the base answered; see `measure_recall`."""
    models = [subject.model for subject in family.subjects]
    found = measure_recall(
        models,
        family.base,
        family.tokenizer,
        tokens,
        options.recall,
        options.context,
        options.seed,
        description="answering",
    )
    return [{"recall": options.recall, "seed": options.seed, "tasks": tasks} for tasks in found]


def _ablation(figures: Fidelity, whole_kl: float, tolerance: float) -> Row:
    change = figures.kl - whole_kl
    return {**figures.to_dict(), "kl_change": change, "does_nothing": abs(change) < tolerance}


def _writing(family: Family, tokens: np.ndarray, options: argparse.Namespace) -> list[tuple[Row, Row]]:
    """For each subject, figures of its texts beside those of the base's, and what its drafts are worth.

    See `Writing.beside` and `Drafting`.
    """
    prompts = draw_prompts(tokens, options.samples, options.prompt_length, options.seed)
    known: dict[PreTrainedModel, Writing] = {}
    names = {subject.model: subject.spec for subject in family.subjects}
    for model, name in {**names, family.base: "base"}.items():
        known[model] = measure_writing(
            model, family.base, family.tokenizer, prompts, options.length, options.seed, description=f"{name} writing"
        )
    setting = {name: getattr(options, name) for name in ("samples", "prompt_length", "length", "seed")}
    models = [subject.model for subject in family.subjects]
    drafted = measure_drafting(models, family.base, prompts, options.length, description="drafting")
    return [
        ({**setting, **known[model].beside(known[family.base])}, drafting.to_dict())
        for model, drafting in zip(models, drafted, strict=True)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 2 for what cannot be loaded or read."""
    options = parse(arguments)
    transformers_logging.disable_progress_bar()
    try:
        cards = find_cards(options.variant) if options.card else []
        rows = evaluate(options)
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows) if options.json else tables(rows))
        for card, row in zip(cards, rows, strict=False):
            write_file(card, with_measurement(card.read_text(encoding="utf-8"), row).encode())
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def find_cards(specs: list[str]) -> list[Path]:
    """The cards of variants.

    Raises:
        ValueError: naming those that have none in a folder here, or one that figures cannot go into.
    """
    cards = [expanded(spec) / CARD for spec in specs]
    if missing := [str(card) for card in cards if not card.is_file()]:
        raise ValueError(f"--card writes into cards of folders here, but there is no {', '.join(missing)}")
    if other := [str(card) for card in cards if f"\n## {USE}\n" not in card.read_text(encoding="utf-8")]:
        raise ValueError(f"--card writes before a card's section '## {USE}', which there is not in {', '.join(other)}")
    return cards


if __name__ == "__main__":
    sys.exit(main())
