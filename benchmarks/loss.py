"""The distillation loss in chunks against the plain formula: time, peak memory, and that both give the same.

    python benchmarks/loss.py

At GPT-2's vocabulary, 50,257, and the hidden size of GPT-2 small; forward and backward, to the student's hidden states
and output matrix.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks import measure
from trainer.losses import vocabulary_loss

Gradients = tuple[Tensor, Tensor, Tensor]


def plain(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Gradients:
    """KL(teacher ‖ student) summed over tokens from whole logits, and its gradients."""
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.t()).log_softmax(-1)
    student = (hidden @ weight.t()).log_softmax(-1)
    loss = kl_div(student, teacher, log_target=True, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def chunked(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Gradients:
    """The same through `trainer.losses`."""
    loss, _ = vocabulary_loss(hidden, weight, {"kl": 1.0}, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


VARIANTS = {"plain": plain, "chunked": chunked}


def make(name: str, tokens: int, vocabulary: int, hidden_size: int) -> Callable[[], Gradients]:
    """The named formula on seeded random inputs."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(tokens, hidden_size), (vocabulary, hidden_size)] * 2
    inputs = [torch.randn(size, generator=generator).mul_(hidden_size**-0.25).to(device) for size in sizes]
    return partial(VARIANTS[name], *(tensor.requires_grad_() for tensor in inputs[:2]), *inputs[2:])


def largest_difference(a: Gradients, b: Gradients) -> float:
    """The largest difference of value or gradient, relative to the largest entry of each."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    measure.keep_freed_memory()
    sizes = (args.batch * args.length, args.vocabulary, args.hidden)
    functions = {name: make(name, *sizes) for name in VARIANTS}
    difference = largest_difference(*(function() for function in functions.values()))
    times = measure.times_in_turn(functions, budget=0, min_rounds=args.rounds)
    rows = [
        {
            "method": name,
            "ms": 1e3 * statistics.median(times[name]),
            "time_over_plain": measure.median_ratio(times[name], times["plain"]),
            "peak_mb": measure.peak_memory_mb(make, name, *sizes),
        }
        for name in VARIANTS
    ]
    for row in rows:
        row["memory_over_plain"] = row["peak_mb"] / rows[0]["peak_mb"] if row["peak_mb"] else None
    report = {"machine": measure.machine(), "rows": rows, "largest_relative_difference": difference}
    measure.print_report(report, "rows", as_json=args.json)
    if not args.json:
        print(f"largest relative difference of value and gradients: {difference:.1e}")


if __name__ == "__main__":
    main()
