"""A distillation step of the trainer against the least that it must compute.

    python benchmarks/step.py

The peer is a bare loop: the base's logits, the variant's logits, their KL divergence by PyTorch, backward. The
trainer's step also clips, updates the weights, checks that all is finite and counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks import measure
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["masks", "performer", "nsa"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    measure.keep_freed_memory()
    report = {"machine": measure.machine(), "rows": [measure_recipe(name, args.rounds) for name in args.recipes]}
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(json.dumps(report["machine"]))
        print(measure.table(report["rows"], list(report["rows"][0])))


if __name__ == "__main__":
    main()
