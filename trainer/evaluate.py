"""Measures variants against their base on a text: `python trainer/evaluate.py --variant DIR --text FILE`.

Tokens are counted like this. The text's documents (parts between empty lines; objects of JSON lines) are each ended by
eos and joined into one stream, which is cut into blocks of `--context` tokens. Every token of a block but its first is
predicted exactly once, from the tokens before it in its block; the last block may be short. All figures are means over
these predictions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file from a clone that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import attention
from trainer.data import DataError, read_files
from trainer.fidelity import measure


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
    add("--json", action="store_true", help="one JSON object a variant on stdout")
    return parser.parse_args(arguments)


def evaluate(spec: str, options: argparse.Namespace) -> dict[str, object]:
    """What is measured of one variant, by name."""
    found = attention.describe(spec)
    base = base_tokenizer = None
    if found.is_variant:
        if (base_spec := options.base or found.base) is None:
            raise ValueError(f"{spec} names no base to compare it with; give one with --base")
        base, base_tokenizer = attention.load(base_spec, device=options.device)
    model, tokenizer = attention.load(spec, device=options.device if base is None else None, base=base)
    tokenizer = tokenizer or base_tokenizer
    if tokenizer is None:
        raise ValueError(f"{spec} has no tokenizer, which is needed to read text")
    tokens = read_files(options.text, tokenizer)
    figures = measure(model, base, tokens, options.context, options.batch_size, description=spec)
    return {"method": found.method, **figures.to_dict(), "context": options.context, "variant": spec}


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 2 for what cannot be loaded or read."""
    options = parse(arguments)
    try:
        rows = [evaluate(spec, options) for spec in options.variant]
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows) if options.json else table(rows))
    return 0


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as aligned columns."""
    cells = [list(rows[0]), *([f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join("  ".join(map(str.ljust, row, widths)).rstrip() + "\n" for row in cells)


if __name__ == "__main__":
    sys.exit(main())
