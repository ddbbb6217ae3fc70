"""Redoes the study that this project began with, and writes it up: `python -m trainer.study --data.train FILE ...`.

Every method is fitted with every objective on every kind of text, with equal budgets of tokens and several seeds; then
all variants are measured on one text that none saw, and `docs/study.md` says what came out, with figures and
conclusions that are computed from the table. A cell of the grid is an ordinary run of the recipe of its method, in a
folder of its own under `--runs`: finished cells are kept, interrupted ones resumed. Options that are not listed below
go to every recipe, as with `trainer/train.py`, for example `--base USER/MODEL`.

Exit codes are those of `trainer/train.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attention
from attention.files import write_json

from .. import evaluate
from ..config import RunConfig, load_config, share_steps
from ..data import DataError, read_files
from ..fidelity import Reader, measure_each
from ..train import run
from .report import write_report
from .results import MEASURED, Cell, Result

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = ("masks", "masks-content", "performer", "performer-window", "nsa", "hybrid")
OBJECTIVES = ("kl", "kl+ce", "kl+l1")
TEXTS = ("corpus", "sampled")
TRANSFER = 0.2  # share of a cell's steps; in long recipes it is less, too little for a short run
PRUNE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)  # shares of a layer's largest weight; lighter masks are dropped


class StudyError(Exception):
    """A cell that did not finish.

    Attributes:
        code: its exit code.
    """

    def __init__(self, message: str, code: int):
        self.code = code
        super().__init__(message)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; what is meant for the recipes is in `overrides`."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data.train", dest="train", metavar="FILE", help="the corpus; sampled cells do not see it")
    add("--data.valid", dest="valid", metavar="FILE", help="text to validate on while training, for every cell")
    add("--eval.text", dest="text", metavar="FILE", help="text to measure the finished variants on")
    add("--tokens", type=int, default=250_000, help="tokens that a cell trains on (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="(default: all)")
    add("--seeds", type=int, default=3, help="fits of each kind, which differ in the seed (default: %(default)s)")
    add("--context", type=int, default=512, help="tokens of a block, trained on and measured (default: %(default)s)")
    add("--batch", type=int, default=4, help="blocks of a step (default: %(default)s)")
    add("--precision", choices=("no", "bf16", "fp16"), default="no", help="of the fits (default: %(default)s)")
    add("--l1", type=float, default=1e-3, help="weight of the masks' weights in kl+l1 (default: %(default)s)")
    add("--samples", type=int, default=64, help="texts that each variant writes to be measured (default: %(default)s)")
    add("--length", type=int, default=200, help="tokens of such a text (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/study"), help="folder of the cells (default: %(default)s)")
    add("--output", type=Path, default=Path("docs"), help="folder of the page (default: %(default)s)")
    add("--report-only", action="store_true", help="write the page from the cells that are finished and measured")
    options, options.overrides = parser.parse_known_args(arguments)
    needed = {"--data.train": options.train, "--data.valid": options.valid, "--eval.text": options.text}
    if not options.report_only and (missing := [name for name, value in needed.items() if value is None]):
        parser.error(f"give {', '.join(missing)}: a fair comparison validates and measures every cell on one text")
    if wrong := [name for name in ("seeds", "context", "batch", "samples") if getattr(options, name) < 1]:
        parser.error(f"--{' and --'.join(wrong)} must be at least 1")
    return options


def grid(methods: Sequence[str], seeds: int) -> list[Cell]:
    """The cells, those that answer most first, and all of one seed before the next."""
    return [
        Cell(method, objective, text, seed)
        for seed in range(seeds)
        for objective in OBJECTIVES
        for text in TEXTS
        for method in methods
        if objective != "kl+l1" or method == "masks"
    ]


def cell_config(cell: Cell, options: argparse.Namespace) -> RunConfig:
    """A cell's run: the recipe of its method, shortened to the budget, with the cell's objective and text.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    recipe = RECIPES / f"{cell.method}.yaml"
    whole = load_config(recipe, [*options.overrides, *_flags(_own_options(cell, options))])
    stages = _stages(cell, whole, options)
    steps = sum(stage["steps"] for stage in stages)
    schedule = {
        "eval.every": max(1, steps // 5),
        "eval.tokens": 8_192,
        "checkpoint.every": max(1, steps // 4),
        "log_every": max(1, steps // 40),
        "samples.length": 80,
    }
    own = _own_options(cell, options) | {"stages": stages}
    return load_config(recipe, [*_flags(schedule), *options.overrides, *_flags(own)])


def _flags(values: dict[str, Any]) -> list[str]:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def _own_options(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """What makes the cell, by name of an option."""
    return {
        "data.train": options.train if cell.text == "corpus" else None,
        "data.valid": options.valid,
        "data.sampled_tokens": max(1024, options.tokens),
        "eval.context": options.context,
        "precision": options.precision,
        "seed": cell.seed,
        "output": str(options.runs / cell.name),
        "resume": True,
    }


def _stages(cell: Cell, whole: RunConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A cell's stages: the recipe's first of each kind, with the steps of all cells and the cell's objective."""
    l1 = options.l1 if "l1" in cell.objective else 0.0
    firsts = {stage.stage: stage for stage in reversed(whole.stages)}
    transfer, distil = (firsts[kind].model_dump(mode="json") for kind in ("transfer", "distil"))
    distil["objective"] = {"kl": 1.0, "ce": float("ce" in cell.objective), "l1": l1}
    for stage in (transfer, distil):
        stage |= {"context": options.context, "batch_size": options.batch, "micro_batch_size": None}
    steps = max(2, options.tokens // (options.batch * options.context))
    transfer["steps"], distil["steps"] = share_steps([TRANSFER, 1 - TRANSFER], steps)
    return [transfer, distil]


def plan(options: argparse.Namespace) -> dict[Cell, RunConfig]:
    """The runs of all cells, checked before the first one starts.

    Raises:
        ConfigError: if a folder holds a run with other options.
    """
    configs = {cell: cell_config(cell, options) for cell in grid(options.methods, options.seeds)}
    problems = []
    for config in configs.values():
        record = Path(config.output) / "config.yaml"
        if record.is_file() and load_config(record) != config:
            problems.append(f"{config.output} holds a run with other options; delete it, or choose another --runs")
    if problems:
        raise attention.ConfigError("the study", problems)
    return configs


def train(configs: dict[Cell, RunConfig]) -> None:
    """Runs the cells that are not finished.

    Raises:
        StudyError: when one was stopped or failed.
    """
    for place, (cell, config) in enumerate(configs.items(), 1):
        if (Path(config.output) / "variant").is_dir():
            continue
        sys.stderr.write(f"cell {place} of {len(configs)}: {cell.name}\n")
        if code := run(config):
            raise StudyError(f"{cell.name} did not finish; the same command goes on from there", code)


def measure(configs: dict[Cell, RunConfig], options: argparse.Namespace) -> None:
    """Measures what was not yet measured like this, and leaves the figures with the runs.

    The cells of a seed are measured together, so that the base reads the text once for all of them, and what was
    measured is kept if the next ones are not reached.
    """
    setting = {"text": options.text, "context": options.context, "samples": options.samples, "length": options.length}
    for seed in range(options.seeds):
        missing = {
            cell: str(Path(config.output) / "variant")
            for cell, config in configs.items()
            if cell.seed == seed and _measured(Path(config.output)).get("setting") != setting
        }
        if missing:
            _measure_together(missing, configs, setting)


def _measure_together(places: dict[Cell, str], configs: dict[Cell, RunConfig], setting: dict[str, Any]) -> None:
    flags = [word for name, value in setting.items() for word in (f"--{name}", str(value))]
    rows = evaluate.evaluate(evaluate.parse(["--variant", *places.values(), *flags]))
    for (cell, place), row in zip(places.items(), rows, strict=True):
        prunes = cell.method == "masks" and cell.objective in ("kl", "kl+l1")
        pruning = prune_sweep(place, configs[cell], setting["text"]) if prunes else []
        write_json(Path(place).parent / MEASURED, {"setting": setting, "row": row, "pruning": pruning})


def _measured(folder: Path) -> dict[str, Any]:
    path = folder / MEASURED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def prune_sweep(place: str, config: RunConfig, text: str) -> list[dict[str, float]]:
    """What dropping light masks costs, on the beginning of a text, as long as that which the run was validated on.

    A factor common to all masks of a head cancels in the softmax, so that weights mean something only beside each
    other: a mask is light if its weight is less than a share of the layer's largest.

    Returns:
        For each share of `PRUNE`: `threshold`, the `dropped` share of the masks of all heads and layers, the
        `keys_read` by a query at the end of the context (mean over layers), `kl`, `perplexity`.
    """
    base, tokenizer = attention.load(config.base)
    tokens = read_files([text], tokenizer)[: config.eval.tokens]
    variants = [attention.load(place, base=base)[0] for _ in PRUNE]
    whole = _masks(variants[0])
    for variant, share in zip(variants, PRUNE, strict=True):
        for mechanism in variant.mechanisms:
            mechanism.prune(share * mechanism.weights().max().item())
    readers = [Reader(variant) for variant in variants]
    found = measure_each(readers, base, tokens, config.eval.context, config.eval.batch_size, description="pruning")
    return [
        {
            "threshold": share,
            "dropped": 1 - _masks(variant) / whole,
            "keys_read": _keys_read(variant, config.eval.context),
            "kl": one.kl,
            "perplexity": one.perplexity,
        }
        for share, variant, one in zip(PRUNE, variants, found, strict=True)
    ]


def _masks(variant: Any) -> int:
    """How many masks its heads combine, in all layers."""
    return sum(int(mechanism.active.sum()) for mechanism in variant.mechanisms)


def _keys_read(variant: Any, context: int) -> float:
    keys = [mechanism.keys_read(context - 1) for mechanism in variant.mechanisms]
    return sum(keys) / len(keys)


def collect(options: argparse.Namespace) -> list[Result]:
    """The cells that are finished and measured."""
    found = {cell: _measured(options.runs / cell.name) for cell in grid(options.methods, options.seeds)}
    return [
        Result(cell, options.runs / cell.name, content["row"], content["pruning"])
        for cell, content in found.items()
        if content
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, and writes the page."""
    options = parse(arguments)
    try:
        if not options.report_only:
            configs = plan(options)
            train(configs)
            measure(configs, options)
        if not (results := collect(options)):
            raise ValueError(f"no cell in {options.runs} is finished and measured; run without --report-only first")
        page = write_report(results, options.output)
    except StudyError as error:
        sys.stderr.write(f"{error}\n")
        return error.code
    except (DataError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stderr.write(f"{page}\n")
    return 0
