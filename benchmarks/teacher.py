"""A step of distillation that takes what the base expects from a cache, against one that has the base compute it.

    python benchmarks/teacher.py --text FILE

Both take turns on the same batches of the text; the cache holds them already, and the first fit, which fills it, is
slower than one without. Then what is lost by keeping the likeliest tokens alone: KL(base ‖ variant) with all others as
one event, of the bundled variants on the same text, beside the true one; and the same from what is stored, rounded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import attention
from benchmarks import measure
from trainer.config import load_config
from trainer.data import StageBatches
from trainer.loop import Loop
from trainer.losses import last_hidden, output_matrix, vocabulary_loss
from trainer.optim import build_optimizers
from trainer.setup import Setup, build
from trainer.stages import build_learner
from trainer.teacher_cache import TeacherCache

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("masks", "nsa", "performer-window", "performer")


def prepare(recipe: str, text: str, folder: str, error: float) -> Setup:
    """A recipe's run on a text, with the cache in a folder."""
    options = {
        "base": ROOT / "checkpoints/base",
        "data.train": text,
        "data.cache": folder,
        "data.teacher_cache": "true",
        "data.teacher_error": error,
        "output": f"{folder}/run",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return build(load_config(ROOT / f"trainer/recipes/{recipe}.yaml", words))


def stepper(setup: Setup, batches: list[Tensor], cache: TeacherCache | None) -> Callable[[], Any]:
    """A step of the recipe's last stage, on the next of the batches."""
    stage, loop, turn = setup.config.stages[-1], Loop(setup), cycle(batches)
    built = build_learner(stage, setup.model, setup.base, cache).train()
    learner, *optimizers = setup.accelerator.prepare(built, *build_optimizers(stage, built))
    return lambda: loop.train_step(stage, learner, optimizers, next(turn), 0)


def measure_recipe(recipe: str, text: str, error: float, rounds: int) -> dict[str, Any]:
    """Tokens a second with and without a full cache (medians), and their ratio in the same rounds."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(recipe, text, folder, error)
        stage, cache = setup.config.stages[-1], setup.teacher_cache
        drawn = StageBatches(setup.train, stage, (0, 0))
        batches = [drawn(step)[0] for step in range(2)]
        with setup.accelerator.autocast():
            for batch in batches:
                cache(batch)
        cache.store()
        steps = {"cached": stepper(setup, batches, cache), "computed": stepper(setup, batches, None)}
        times = measure.times_in_turn(steps, budget=0, min_rounds=rounds)
        stored = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    tokens = batches[0].numel()
    return {
        "recipe": recipe,
        "k": cache.k,
        "bytes_per_token": stored / (tokens * len(batches)),
        **{f"{name}_tok_s": tokens / statistics.median(times[name]) for name in steps},
        "speedup": measure.median_ratio(times["computed"], times["cached"]),
    }


@torch.no_grad()
def measure_error(variant: str, text: str, error: float, blocks: int, length: int) -> dict[str, Any]:
    """KL(base ‖ variant) in nats a token: true, and with what the cache gives; and the share of it that is lost."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare("masks", text, folder, error)
        base, cache = setup.base, setup.teacher_cache
        model, _ = attention.load(ROOT / "checkpoints" / variant, base=base)
        ids = torch.from_numpy(setup.train[: blocks * length].astype("int64")).reshape(blocks, length)
        top = cache(ids)
    hidden, teacher = (last_hidden(each, ids)[:, :-1].flatten(0, 1) for each in (model, base))
    loss = partial(vocabulary_loss, hidden, output_matrix(model), {"kl": 1.0})
    true = loss(teacher_hidden=teacher, teacher_weight=output_matrix(base))[0].item() / len(hidden)
    kept = loss(teacher_top=top)[0].item() / len(hidden)
    return {
        "variant": variant,
        "k": cache.k,
        "rest": top.log_rest.exp().mean().item(),
        "kl": true,
        "kl_cached": kept,
        "lost": 1 - kept / true,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--recipes", nargs="+", default=["masks", "performer", "nsa"])
    parser.add_argument("--error", type=float, default=0.05, help="data.teacher_error (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=16, help="of 512 tokens, to measure what is lost on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)
    measure.keep_freed_memory()
    report = {
        "machine": measure.machine(),
        "speed": [measure_recipe(name, args.text, args.error, args.rounds) for name in args.recipes],
        "error": [measure_error(name, args.text, args.error, args.blocks, 512) for name in VARIANTS],
    }
    measure.print_report(report, "speed", "error", as_json=args.json)


if __name__ == "__main__":
    main()
