"""Which causal language models of transformers convert, and which parts of the contract hold for each method then?

    python -m benchmarks.families

makes a tiny random model of every causal language model of the installed transformers, with softmax attention over all
earlier tokens in every layer where the family lets it, and converts it. It writes docs/models.md. What cannot be made,
or needs longer than its limit, is recorded with the reason.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

import attention
from attention.contract import check
from attention.families import TESTED, seam_difference
from benchmarks.contracts import Report, add_running, broken, cell, plain, reports
from benchmarks.tiny_models import families, tiny_model

LENGTH = 48  # tokens of a text; six windows of the tiny models
METHODS: dict[str, dict[str, Any]] = {  # with windows and blocks shorter than a text
    "masks": {"candidates": ["window(5)", "first(1)", "top(4)"]},
    "performer": {"num_features": 8},
    "nsa": {
        "compress_block": 4,
        "compress_stride": 2,
        "select_block": 4,
        "num_selected": 3,
        "window": 5,
        "select_every": 2,
    },
}
CHECKS = (
    "prefixes",
    "cached_in_blocks",
    "cached_without_position_ids",
    "padded_left",
    "padded_right",
    "generate_padded",
)


def family(name: str, length: int) -> Report:
    """Whether a family converts, and what its variants keep.

    Returns:
        A report as in `benchmarks.contracts`, with the results of all methods in one ("masks prefixes" and so on),
        "seam", the difference of softmax through it, or "refused", the reason.
    """
    model = tiny_model(families()[name], plain=True)
    report = {"name": name, "class": type(model).__name__}
    try:
        variants = {
            method: attention.convert(model, attention.config_from_dict({"method": method, **options}))
            for method, options in METHODS.items()
        }
    except attention.UnsupportedModelError as error:
        return report | {"refused": str(error).partition(" cannot be swapped: ")[2]}
    results: dict[str, Any] = {}
    for method, variant in variants.items():
        found = plain(check(variant, length=length, only=CHECKS))
        results |= {f"{method} {name}": result for name, result in found.items()}
    return report | {"seam": seam_difference(model), "results": results}


# The page


def page(found: list[Report], length: int) -> str:
    """docs/models.md."""
    converted = [report for report in found if "results" in report]
    kept = [report for report in converted if not broken(report)]
    refused = [report for report in found if "refused" in report]
    failed = [report for report in found if "problem" in report]
    texts = [
        "# Which models convert",
        "Written by `python -m benchmarks.families`; nothing here was typed by hand.",
        f"Every causal language model of transformers {transformers.__version__} that reads text alone, each as a tiny "
        "random model with softmax attention over all earlier tokens in every layer where its options allow that; "
        f"torch {torch.__version__}, on the CPU. {len(converted)} of {len(found)} convert, and {len(kept)} of these "
        "keep all that is tried.",
        INTRODUCTION.format(length=length, checks=", ".join(f"`{name}`" for name in CHECKS)),
        "## Those that convert",
        converted_table(converted),
        "## Those that are refused",
        "What `attention.convert` says:",
        "\n".join(
            ["| type | reason |", "|---|---|", *(f"| `{one['name']}` | {cell(one['refused'])} |" for one in refused)]
        ),
    ]
    if failed:
        texts += ["## Not tried", "\n".join(f"- `{report['name']}`: {cell(report['problem'])}" for report in failed)]
    return "\n\n".join(texts) + "\n"


INTRODUCTION = """\
*Seam* is the largest difference of logits between the model and softmax attention put into it, over the largest \
logit: `convert` measures it on every model that is not of a tested family (in bold), and refuses where it is not \
small. Each method is then asked parts of the contract (docs/contract.md) on texts of {length} tokens, with random \
values for what starts as zero: {checks}. Where one does not hold, the largest difference is given."""


def converted_table(found: list[Report]) -> str:
    """A row for each family that converts."""
    rows = [f"| type | class | seam | {' | '.join(METHODS)} |", "|---|" + "---|" * (2 + len(METHODS))]
    for report in found:
        name = f"**`{report['name']}`**" if report["name"] in TESTED else f"`{report['name']}`"
        cells = [name, report["class"], f"{report['seam']:.1e}", *(_kept(report, method) for method in METHODS)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _kept(report: Report, method: str) -> str:
    """How many checks hold for a method, and which do not, by how much."""
    own = {name.removeprefix(f"{method} "): one for name, one in report["results"].items() if name.startswith(method)}
    asked = [one["holds"] for one in own.values() if one["holds"] is not None]
    wrong = [
        f"`{name}` " + (cell(one["sentence"]) if one["difference"] is None else f"{one['difference']:.1e}")
        for name, one in own.items()
        if one["holds"] is False
    ]
    return "; ".join([f"{sum(asked)} of {len(asked)}", *wrong])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a text")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="families; all by default")
    add_running(parser, "family", 300, "families.jsonl", "models.md")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    chosen = [name for name in families() if options.only is None or name in options.only]
    found = reports(family, chosen, options.length, options, options.log)
    options.output.write_text(page(found, options.length), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
