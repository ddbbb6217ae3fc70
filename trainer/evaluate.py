"""Measures variants against their base on a text: `python trainer/evaluate.py --variant DIR --text FILE`.

Tokens are counted like this. The text's documents (parts between empty lines; objects of JSON lines) are each ended by
eos and joined into one stream, which is cut into blocks of `--context` tokens. Every token of a block but its first is
predicted exactly once, from the tokens before it in its block; the last block may be short. All figures are means over
these predictions. With `--ablate`, each branch of the mechanism is switched off in turn, in all layers. With
`--samples`, the model writes, and its texts are judged by the base; see `trainer/writing.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file from a clone that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import attention
from trainer.data import DataError, read_files
from trainer.fidelity import Fidelity, measure
from trainer.writing import measure_writing

Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", required=True, nargs="+", metavar="SPEC", help="folders or Hub ids; a base is measured alone")
    add("--text", required=True, nargs="+", metavar="FILE", help="files or patterns of text or JSON lines")
    add("--base", metavar="SPEC", help="the base, if not the one that the variant names")
    add("--context", type=int, default=512, help="tokens of a block (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="blocks of a forward pass (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--ablate", action="store_true", help="also measure with each branch switched off")
    add("--samples", type=int, default=0, metavar="N", help="also have it write N texts")
    add("--length", type=int, default=200, help="tokens of such a text (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the texts (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object a variant instead of a table")
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Subject:
    """What is measured; `base` is None for a base itself."""

    spec: str
    method: str
    model: PreTrainedModel
    base: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase


def load(spec: str, options: argparse.Namespace) -> Subject:
    """Loads a variant with its base, or a base.

    Raises:
        attention.CheckpointError, ValueError: saying what is missing or wrong.
    """
    found = attention.describe(spec)
    base = base_tokenizer = None
    if found.is_variant:
        if (base_spec := options.base or found.base) is None:
            raise ValueError(f"{spec} names no base to compare it with; give one with --base")
        base, base_tokenizer = attention.load(base_spec, device=options.device)
    model, tokenizer = attention.load(spec, device=options.device if base is None else None, base=base)
    if (tokenizer := tokenizer or base_tokenizer) is None:
        raise ValueError(f"{spec} has no tokenizer, which is needed to read text")
    return Subject(spec, found.method, model, base, tokenizer)


def evaluate(spec: str, options: argparse.Namespace) -> Row:
    """What is measured of one variant, by name."""
    subject = load(spec, options)
    tokens = read_files(options.text, subject.tokenizer)
    figures = _measure(subject, tokens, options, spec)
    row: Row = {"method": subject.method, **figures.to_dict(), "context": options.context, "variant": spec}
    if options.samples:
        judge = subject.base or subject.model
        row |= asdict(measure_writing(subject.model, judge, options.samples, options.length, options.seed))
    if options.ablate:
        row["ablations"] = {name: _without(subject, name, tokens, options).to_dict() for name in branches(subject)}
    return row


def branches(subject: Subject) -> tuple[str, ...]:
    """The parts that can be switched off, of which there are at least two."""
    names = () if subject.base is None else subject.model.mechanisms[0].branches
    return names if len(names) > 1 else ()


def _without(subject: Subject, branch: str, tokens: np.ndarray, options: argparse.Namespace) -> Fidelity:
    for mechanism in subject.model.mechanisms:
        mechanism.disable(branch)
    figures = _measure(subject, tokens, options, f"{subject.spec} without {branch}")
    for mechanism in subject.model.mechanisms:
        mechanism.disable()
    return figures


def _measure(subject: Subject, tokens: np.ndarray, options: argparse.Namespace, description: str) -> Fidelity:
    model, base = subject.model, subject.base
    return measure(model, base, tokens, options.context, options.batch_size, description=description)


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 2 for what cannot be loaded or read."""
    options = parse(arguments)
    transformers_logging.disable_progress_bar()
    try:
        rows = [evaluate(spec, options) for spec in options.variant]
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows) if options.json else table(rows))
    return 0


def table(rows: list[Row]) -> str:
    """Rows as aligned columns; ablations below the row that they belong to."""
    lines = []
    for row in rows:
        lines.append({name: value for name, value in row.items() if name != "ablations"})
        for name, figures in row.get("ablations", {}).items():
            lines.append({"method": f"{row['method']} − {name}", **figures})
    header = list(dict.fromkeys(name for line in lines for name in line))
    cells = [header, *([_cell(line.get(name, "")) for name in header] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
