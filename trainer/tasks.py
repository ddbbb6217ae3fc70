"""Puts variants to tasks of lm_eval, beside their base: `python trainer/tasks.py --variant DIR ... --tasks NAME ...`.

lm_eval is EleutherAI's evaluation harness (`pip install -r requirements-bench.txt`). Variants are loaded from their
folders or from the Hub, without a push and without running code of theirs. A task is one that lm_eval has, or one from
YAML files in the folder `--include_path`; lm_eval runs functions that such files name. Figures are lm_eval's own, with
its standard errors over examples. With `--card` they go into the cards of the variants, in place of those of earlier
tasks.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file from a clone that is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError:  # `run` says so
    lm_eval = HFLM = TaskManager = None

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trainer.card import task_cells, with_tasks
from trainer.evaluate import find_cards, load
from trainer.tables import table

Row = dict[str, Any]
ERROR = "_stderr"  # of a metric's name, at its end


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", required=True, nargs="+", metavar="SPEC", help="folders or Hub ids; a base is measured alone")
    add("--tasks", required=True, nargs="+", metavar="NAME", help="names of tasks, or patterns such as 'blimp*'")
    add("--include_path", type=Path, metavar="DIR", help="folder with YAML files of further tasks")
    add("--base", metavar="SPEC", help="the base, if not the one that a variant names")
    add("--num_fewshot", type=int, metavar="N", help="examples shown before each question (default: the task's own)")
    add("--limit", type=int, metavar="N", help="only the first N examples of a task: to try, not to quote")
    add("--batch_size", type=int, default=8, help="texts of a forward pass (default: %(default)s)")
    add("--device", default="cpu", help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the examples shown (default: %(default)s)")
    add("--card", action="store_true", help="also write the figures into README.md of each variant, a folder")
    add("--json", action="store_true", help="print one JSON object a variant instead of a table")
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """What each variant reaches, by name; the order is that of `options.variant`.

    Returns:
        For each variant: `variant`, `method`, `limit`, `lm_eval` (its version), and by task and metric under `tasks`:
        `variant` and `base`, their standard errors `error` and `base_error` (None where lm_eval has none), and how many
        `examples` and `shots`.

    Raises:
        attention.CheckpointError, ValueError: saying what is missing or wrong.
    """
    if lm_eval is None:
        raise ValueError("tasks need lm_eval: pip install -r requirements-bench.txt")
    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    names = match_tasks(manager, options.tasks)
    rows = []
    for family in load(options):
        if family.tokenizer is None:
            raise ValueError(f"the base {family.base.name_or_path} has no tokenizer, which is needed to read text")
        known: dict[PreTrainedModel, Row] = {}
        for model in [family.base, *(subject.model for subject in family.subjects)]:
            if model not in known:
                known[model] = put_to(model, family.tokenizer, names, manager, options)
        rows += [
            {
                "variant": subject.spec,
                "method": subject.method,
                "limit": options.limit,
                "lm_eval": lm_eval.__version__,
                "tasks": beside(known[subject.model], known[family.base]),
            }
            for subject in family.subjects
        ]
    return sorted(rows, key=lambda row: options.variant.index(row["variant"]))


def match_tasks(manager: Any, patterns: list[str]) -> list[str]:
    """The tasks that lm_eval knows by these names or patterns.

    Raises:
        ValueError: naming all that match nothing.
    """
    found = {pattern: manager.match_tasks([pattern]) for pattern in patterns}
    if missing := [pattern for pattern, names in found.items() if not names]:
        raise ValueError(
            f"lm_eval has no task {', '.join(missing)}; `lm_eval ls tasks` lists those it has, and --include_path DIR "
            "takes a folder with YAML files of others"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def put_to(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    manager: Any,
    options: argparse.Namespace,
) -> Row:
    """What lm_eval says of a model in evaluation mode.

    Raises:
        ValueError: if lm_eval fails, for example for want of a task's data.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is loaded already
    try:
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size),
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=False,
            fewshot_random_seed=options.seed,
        )
    except Exception as error:  # tasks, and data sets behind them, raise what they like
        raise ValueError(
            f"lm_eval could not run {', '.join(names)}: {error or type(error).__name__}. If data are missing, run once "
            "where there is a network"
        ) from error


def beside(variant: Row, base: Row) -> dict[str, dict[str, Row]]:
    """Figures of `simple_evaluate`, by task and metric, with those of the base; see `run`."""
    found: dict[str, dict[str, Row]] = {}
    for task, metrics in variant["results"].items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith(ERROR) or _number(value) is None:  # what is no metric has no filter
                continue
            error = f"{metric}{ERROR},{filtered}"
            own = base["results"][task]
            found.setdefault(task, {})[metric if filtered == "none" else f"{metric}, {filtered}"] = {
                "variant": value,
                "error": _number(metrics.get(error)),
                "base": own[name],
                "base_error": _number(own.get(error)),
                "examples": variant["n-samples"].get(task, {}).get("effective"),
                "shots": variant["n-shot"].get(task),
            }
    return found


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def main(arguments: list[str] | None = None) -> int:
    """Prints the figures; 2 for what is missing or cannot be run."""
    options = parse(arguments)
    transformers_logging.disable_progress_bar()
    try:
        cards = find_cards(options.variant) if options.card else []
        rows = run(options)
        sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows) if options.json else tables(rows))
        for card, row in zip(cards, rows, strict=False):
            card.write_text(with_tasks(card.read_text(encoding="utf-8"), row), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def tables(rows: list[Row]) -> str:
    """Rows as one aligned table, a line for each variant, task and metric."""
    names = ("task", "examples", "shots", "metric", "value", "base's")
    return table(
        [
            {"variant": row["variant"], **dict(zip(names, cells, strict=True))}
            for row in rows
            for cells in task_cells(row["tasks"])
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
