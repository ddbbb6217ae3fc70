"""Speed of whole models: generation, prefill, and how the time of a token grows with what came before it.

    python benchmarks/generate.py
    python benchmarks/generate.py --positions 512 2048 8192 --family gpt2

Every ratio is against softmax attention measured in the same rounds. Four tables: the bundled checkpoints writing
`--tokens` tokens with their caches, and `--batch_tokens` for eight rows at once, padded on the left; one token of a
mechanism after 100 and after 8,000 tokens; and the prefill of a model of GPT-2 small's size with random weights.
`--compiled` adds decoding by compiled graphs, with masks of fixed places among the models. With `--positions` instead a
table of whole models of that size at these lengths (`benchmarks/lengths.py`).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import attention
from benchmarks import measure
from benchmarks.attention import MECHANISMS, SHAPE, VOCABULARY
from benchmarks.lengths import at_lengths, figure

ROOT = Path(__file__).resolve().parents[1]


def compare(functions: dict[str, Any], peer: str, seconds: float) -> list[dict[str, Any]]:
    """Rows with each function's milliseconds (median) and its speed over the peer's, timed in turn."""
    times = measure.times_in_turn(functions, budget=seconds, min_rounds=3)
    return [
        {"method": name, "ms": 1e3 * statistics.median(t), "ratio": measure.median_ratio(times[peer], t)}
        for name, t in times.items()
    ]


def checkpoints(folder: Path) -> dict[str, PreTrainedModel]:
    """The bundled models by name, the base first; variants share its tensors."""
    base, _ = attention.load(str(folder / "base"))
    names = sorted(path.parent.name for path in folder.glob("*/config.json") if path.parent.name != "base")
    return {"base": base} | {name: attention.load(str(folder / name), base=base)[0] for name in names}


def generation(folder: Path, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """`generate` of `tokens` tokens after one, greedy, with each model's own cache."""
    runs = {name: writer(model, tokens) for name, model in checkpoints(folder).items()}
    return compare(runs, "base", seconds)


def greedy(tokens: int) -> dict[str, Any]:
    """Options of `generate` for so many tokens, the likeliest ones."""
    return {"do_sample": False, "pad_token_id": 0, "min_new_tokens": tokens, "max_new_tokens": tokens}


def writer(model: PreTrainedModel, tokens: int, **options: Any) -> Callable[[], Any]:
    """`generate` of `tokens` tokens after one."""
    start = torch.zeros(1, 1, dtype=torch.long)
    options = {"attention_mask": torch.ones_like(start), **greedy(tokens), **options}
    return partial(model.eval().generate, start, **options)


def compiled(folder: Path, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """`generation`, of models whose states keep their size, with and without a compiled graph.

    The base's peer is transformers' own: a static cache, and its forward compiled.
    """
    models = checkpoints(folder)
    base = models["base"]
    places = attention.MasksConfig(candidates=("window(64)", "first(4)"))
    models["masks of 68 places"] = attention.convert(base, places, share=True)
    everywhere = CompileConfig()
    everywhere._compile_all_devices = True  # else transformers compiles on accelerators alone
    static = {"cache_implementation": "static", "compile_config": everywhere}
    runs = {"base": writer(base, tokens), "base, static cache, compiled": writer(base, tokens, **static)}
    for name, model in models.items():
        if name != "base" and not any(mechanism.grows() for mechanism in model.mechanisms):
            runs[name] = writer(model, tokens)
            runs[f"{name}, compiled"] = writer(attention.compile_decoding(copy.deepcopy(model)), tokens)
    return compare(runs, "base", seconds)


def batches(folder: Path, tokens: int, seconds: float, sizes: tuple[int, ...] = (64, 5, 33, 48, 20, 64, 9, 56)):
    """`generate` of `tokens` tokens after prompts of several lengths in one batch, greedy, padded on the left."""
    real = torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]
    models = checkpoints(folder)
    torch.manual_seed(0)
    ids = torch.randint(1, models["base"].config.vocab_size, real.shape) * real
    runs = {
        name: partial(model.eval().generate, ids, attention_mask=real.long(), **greedy(tokens))
        for name, model in models.items()
    }
    return compare(runs, "base", seconds)


@torch.no_grad()
def decode_growth(near: int = 100, far: int = 8000, rounds: int = 50) -> list[dict[str, Any]]:
    """Time of one token after `far` tokens over after `near`, and the bytes of the state at both."""
    rows = []
    for name, options in {"softmax": {"method": "softmax"}, **MECHANISMS}.items():
        mechanism = attention.config_from_dict(options).build(SHAPE).eval()
        states = {length: mechanism.new_state() for length in (near, far)}
        for length, state in states.items():
            mechanism(**_random_inputs(length), state=state)
        token = _random_inputs(1)
        steps = {str(length): partial(mechanism, **token, state=state) for length, state in states.items()}
        times = measure.times_in_turn(steps, budget=0, min_rounds=rounds)
        rows.append(
            {
                "method": name,
                "ms": 1e3 * statistics.median(times[str(far)]),
                "growth": measure.median_ratio(times[str(far)], times[str(near)]),
                "state_kb_near": states[near].nbytes() / 1024,
                "state_kb_far": states[far].nbytes() / 1024,
            }
        )
    return rows


def _random_inputs(length: int) -> dict[str, torch.Tensor]:
    heads = (1, SHAPE.num_heads, length, SHAPE.head_dim)
    return {
        **{name: torch.randn(heads) for name in "qkv"},
        "x": torch.randn(1, length, SHAPE.hidden_size),
        "tokens": torch.randint(VOCABULARY, (1, length)),
    }


@torch.no_grad()
def prefill(length: int, seconds: float) -> list[dict[str, Any]]:
    """A forward of `length` tokens through a model of GPT-2 small's size, with random weights."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config()).eval()
    models = {"softmax": base} | {
        name: attention.convert(base, attention.config_from_dict(options), share=True)
        for name, options in MECHANISMS.items()
    }
    ids = torch.randint(0, base.config.vocab_size, (1, length))
    runs = {name: partial(model, ids, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    return compare(runs, "softmax", seconds)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="folder of the models to time")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens to generate")
    parser.add_argument("--batch_tokens", type=int, default=200, help="tokens to generate for eight rows")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prefill")
    parser.add_argument("--positions", type=int, nargs="+", help="time whole models of random weights at these lengths")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2", help="of the models with --positions")
    parser.add_argument("--methods", nargs="+", choices=list(MECHANISMS), default=list(MECHANISMS))
    parser.add_argument("--memory", action="store_true", help="with --positions: also the peak memory of reading")
    parser.add_argument("--figure", metavar="FILE", help="with --positions: draw tokens a second against length")
    parser.add_argument("--compiled", action="store_true", help="also write by compiled graphs; needs a C++ compiler")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of a table, after three")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)
    if args.positions and min(args.positions) < 1:
        parser.error(f"--positions are numbers of tokens from 1; given were {args.positions}")
    return args


TABLES = {
    "generate": ["method", "ms", "ratio"],
    "batches of 8 rows": ["method", "ms", "ratio"],
    "compiled": ["method", "ms", "ratio"],
    "decode": ["method", "ms", "growth", "state_kb_near", "state_kb_far"],
    "prefill": ["method", "ms", "ratio"],
    "lengths": [
        *("method", "length", "read_ms", "read_ratio", "read_spread", "token_ms", "token_ratio", "token_spread"),
        *("cache_mb", "cache_ratio", "peak_mb"),
    ],
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    measure.keep_freed_memory()
    report: dict[str, Any] = {"machine": measure.machine()}
    if args.positions:
        lengths = sorted(set(args.positions))
        report["family"] = args.family
        report["lengths"] = at_lengths(args.family, lengths, args.methods, args.seconds, args.memory)
        if args.figure:
            title = f"{args.family}, 12 layers, 768 wide, {report['machine']['device']}"
            figure(report["lengths"], args.figure, title)
    else:
        report["generate"] = generation(args.checkpoints, args.tokens, args.seconds)
        report["batches of 8 rows"] = batches(args.checkpoints, args.batch_tokens, args.seconds)
        if args.compiled:
            report["compiled"] = compiled(args.checkpoints, args.tokens, args.seconds)
        report["decode"] = decode_growth()
        report["prefill"] = prefill(args.prefill, args.seconds)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(json.dumps(report["machine"]))
    for title, columns in TABLES.items():
        if title in report:
            print(f"\n{title}\n" + measure.table(report[title], columns))


if __name__ == "__main__":
    main()
