"""Counts the pairs of tokens in a base's training text: `python -m trainer.pairs --base DIR --text FILE`.

Those that are not rare (see `trainer/hits.py`) go into `pairs.safetensors` in the base's folder, and a section about
them into its card. `trainer/evaluate.py` reads them there, to tell which tokens of a text must be looked up in it. For
a base without such a file it counts pairs in the other blocks of the text that is measured, which is another slice:
there a name that goes through the whole text is not rare.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from attention.files import CARD, PAIRS
from attention.stored import open_stored

from .card import with_pairs
from .data import DataError, read_files
from .hits import PairTable, count_pairs, save_pairs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, metavar="SPEC", help="folder or Hub id of the base, whose tokenizer reads the text")
    add("--text", required=True, nargs="+", metavar="FILE", help="files or patterns of the text it was trained on")
    add("--tokens", type=int, default=3_000_000, help="how many to count, from the beginning (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help=f"where to write (default: {PAIRS} in the base's folder)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Makes a table; 2 for what cannot be loaded, read or written."""
    options = parse(arguments)
    try:
        folder, tokenizer = _base(options)
        name = ", ".join(Path(text).name for text in options.text)
        table = count_pairs(read_files(options.text, tokenizer)[: max(0, options.tokens)], name)
        path = options.output or folder / PAIRS
        save_pairs(table, path, tokenizer)
        said = describe(table)
        if options.output is None and (card := folder / CARD).is_file():
            card.write_text(with_pairs(card.read_text(encoding="utf-8"), said), encoding="utf-8")
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{path}: {path.stat().st_size / 1000:,.0f} kB, {said}\n")
    return 0


def _base(options: argparse.Namespace) -> tuple[Path, PreTrainedTokenizerBase]:
    """Folder and tokenizer of the base."""
    found = open_stored(options.base)
    if found.is_variant:
        raise ValueError(f"{options.base} is a variant; pairs lie with its base")
    if options.output is None and not Path(options.base).is_dir():
        raise ValueError(f"{options.base} is on the Hub; say with --output where to write the table")
    tokenizer = found.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{options.base} has no tokenizer, which is needed to read text")
    return found.folder, tokenizer


def describe(table: PairTable) -> str:
    """What is in a table."""
    return (
        f"the {len(table.codes):,} pairs of tokens that come more than {table.at_most} times in {table.tokens:,} "
        f"tokens of {table.source}; all others are rare"
    )


if __name__ == "__main__":
    sys.exit(main())
