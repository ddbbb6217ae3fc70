"""A distillation step of the trainer against the least that it must compute, and against one of a softmax student.

    python benchmarks/step.py
    python benchmarks/step.py --contexts 1024 4096

The peer is a bare loop: the base's logits, the variant's logits, their KL divergence by PyTorch, backward. The
trainer's step also clips, updates the weights, checks that all is finite and counts. With `--contexts` the peer is the
same step of a student that has softmax attention, too, with a base of the bundled one's size and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure
from benchmarks.attention import MECHANISMS
from trainer.config import load_config
from trainer.loop import Loop
from trainer.optim import build_optimizers
from trainer.setup import Setup, build
from trainer.stages import build_learner

ROOT = Path(__file__).resolve().parents[1]
TEXT = "It was a fine day, and they went down to the sea.\n" * 2000


def trainer_step(setup: Setup, batch: Tensor) -> Callable[[], Any]:
    """A step of the recipe's last stage."""
    stage, loop = setup.config.stages[-1], Loop(setup)
    built = build_learner(stage, setup.model, setup.base).train()
    learner, *optimizers = setup.accelerator.prepare(built, *build_optimizers(stage, built))
    return lambda: loop.train_step(stage, learner, optimizers, batch, 0)


def bare_step(setup: Setup, batch: Tensor) -> Callable[[], Any]:
    """Forward of both models from whole logits, and backward to the same parameters."""
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]

    def step() -> Any:
        with torch.no_grad():
            teacher = setup.base(batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        student = setup.model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        return torch.autograd.grad(kl_div(student, teacher, log_target=True, reduction="batchmean"), trained)

    return step


def measure_recipe(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of both steps (medians), and the trainer's over the bare one's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(TEXT)
        options = [
            "--data.train",
            f"{folder}/text.txt",
            "--output",
            f"{folder}/run",
            "--base",
            str(ROOT / "checkpoints/base"),
        ]
        setup = build(load_config(ROOT / f"trainer/recipes/{name}.yaml", options))
        stage = setup.config.stages[-1]
        batch = torch.randint(0, setup.model.config.vocab_size, (stage.batch_size, stage.context))
        steps = {"trainer": trainer_step(setup, batch), "bare": bare_step(setup, batch)}
        times = measure.times_in_turn(steps, budget=0, min_rounds=rounds)
    return {
        "recipe": name,
        "trainer_ms": 1e3 * statistics.median(times["trainer"]),
        "bare_ms": 1e3 * statistics.median(times["bare"]),
        "trainer_over_bare": measure.median_ratio(times["trainer"], times["bare"]),
        "tokens_per_second": batch.numel() / statistics.median(times["trainer"]),
    }


def measure_context(context: int, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each method: tokens a second of a step with one text of so many tokens, over those with softmax."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "text.txt").write_text(TEXT * (1 + context // 4096))
        save_base(place / "base", context)
        steps = {}
        for name in ("softmax", *names):
            recipe = {
                "base": str(place / "base"),
                "attention": MECHANISMS.get(name, {"method": name}),
                "data": {"train": str(place / "text.txt")},
                "stages": [{"stage": "distil", "steps": 10, "batch_size": 1, "context": context, "train": "attention"}],
                "output": str(place / "run"),
            }
            path = place / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe))
            setup = build(load_config(path, []))
            steps[name] = trainer_step(setup, torch.randint(0, setup.model.config.vocab_size, (1, context)))
        times = measure.times_in_turn(steps, budget=0, min_rounds=rounds)
    return [
        {
            "method": name,
            "context": context,
            "ms": 1e3 * statistics.median(own),
            "tokens_per_second": context / statistics.median(own),
            "over_softmax": measure.median_ratio(times["softmax"], own),
        }
        for name, own in times.items()
    ]


def save_base(folder: Path, positions: int) -> None:
    """The bundled base with random weights and so many positions, and its tokenizer."""
    bundled = ROOT / "checkpoints/base"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bundled, n_positions=positions))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["masks", "performer", "nsa"])
    parser.add_argument("--contexts", nargs="+", type=int, help="tokens of a text; softmax is the peer then")
    parser.add_argument(
        "--methods", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS), help="of --contexts"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    measure.keep_freed_memory()
    if args.contexts:
        rows = [row for context in args.contexts for row in measure_context(context, args.methods, args.rounds)]
    else:
        rows = [measure_recipe(name, args.rounds) for name in args.recipes]
    report = {"machine": measure.machine(), "rows": rows}
    measure.print_report(report, "rows", as_json=args.json)


if __name__ == "__main__":
    main()
