"""Speed and memory of every mechanism against PyTorch's softmax attention and the peer libraries.

    python benchmarks/attention.py --lengths 256 512 1024 2048 4096 8192 16384 --peers

Every row's ratio is against `scaled_dot_product_attention(is_causal=True)` timed in the same rounds; for the
`layer` rows, which include the projections, against the same layer with softmax.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel

import attention
from attention.mechanism import LayerShape
from attention.registry import config_from_dict
from attention.variant import attention_modules
from benchmarks import measure

HEADS, WIDTH, VOCABULARY = 12, 64, 50_257
SHAPE = LayerShape(num_heads=HEADS, num_kv_heads=HEADS, head_dim=WIDTH, hidden_size=HEADS * WIDTH, max_length=1 << 20)

CHOOSING = "masks, 20 places + 52 chosen"  # as in the last layer of checkpoints/masks
MECHANISMS: dict[str, dict[str, Any]] = {
    "masks, 5 offsets": {"method": "masks", "candidates": [f"last({i})" for i in range(5)]},
    "masks, window 64 + 4 first": {"method": "masks", "candidates": ["window(64)", "first(4)"]},
    CHOOSING: {
        "method": "masks",
        "candidates": ["window(16)", "first(4)", "top(44)", "induction(8)"],
    },
    "performer, favor m=64": {"method": "performer", "feature_map": "favor", "num_features": 64},
    "performer, learned m=64": {"method": "performer", "feature_map": "learned", "num_features": 64},
    "nsa": {"method": "nsa"},
}
LAYERS = {"layer, softmax": {"method": "softmax"}, "layer, nsa": {"method": "nsa"}}
PEER_PERFORMER, PEER_NSA = "performer-pytorch m=64", "layer, native-sparse-attention-pytorch"
PEER_WINDOW = "FlexAttention, window 64 + 4 first"  # compiled, which is not timed; on a CPU it has no backward


def make(name: str, length: int, backward: bool) -> Callable[[], Any]:
    """What is measured under `name`: a forward, or a forward and backward, on seeded random inputs."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name.startswith("layer, "):
        module = (_peer_nsa() if name == PEER_NSA else _layer(LAYERS[name])).to(device, dtype)
        inputs = [torch.randn(1, length, SHAPE.hidden_size, device=device, dtype=dtype)]
    else:
        inputs = [torch.randn(1, HEADS, length, WIDTH, device=device, dtype=dtype) for _ in range(3)]
        x = torch.randn(1, length, SHAPE.hidden_size, device=device, dtype=dtype)
        module = _mechanism(name, x, torch.randint(VOCABULARY, (1, length), device=device))
    if not backward:
        return partial(_forward, module, inputs)
    return partial(_forward_backward, module, [tensor.requires_grad_() for tensor in inputs])


def _mechanism(name: str, x: Tensor, tokens: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "sdpa":
        return partial(scaled_dot_product_attention, is_causal=True)
    if name == PEER_WINDOW:
        return _peer_window(x.shape[1], x.device)
    if name == PEER_PERFORMER:
        from performer_pytorch import FastAttention

        with contextlib.redirect_stdout(sys.stderr):  # it has something to say, which is no JSON
            return FastAttention(WIDTH, nb_features=64, causal=True).to(x.device, x.dtype)
    mechanism = config_from_dict(MECHANISMS[name]).build(SHAPE).to(x.device, x.dtype).eval()
    for parameter in mechanism.choosing_parameters():
        torch.nn.init.normal_(parameter)  # at their start they choose the first keys
    return lambda q, k, v: mechanism(q, k, v, x, tokens=tokens)


def _layer(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A layer of a one-layer model with the sizes of `SHAPE`, from hidden states to hidden states."""
    sizes = {"n_embd": SHAPE.hidden_size, "n_head": HEADS, "n_positions": 1, "n_layer": 1}  # no position is looked up
    base = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=2, resid_pdrop=0.0))
    variant = attention.convert(base, config_from_dict(options)).eval()
    (layer,) = attention_modules(variant).values()
    return layer


def _peer_window(length: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What a user would pick for the masks of that name: PyTorch's own attention that skips blocks, compiled."""

    def reads(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < 64) | (key < 4))

    mask = create_block_mask(reads, None, None, length, length, device=device)
    return partial(torch.compile(flex_attention), block_mask=mask)


def _peer_nsa() -> torch.nn.Module:
    """The peer with the sizes of our default NSA; it adds one forced block to those that it selects."""
    from native_sparse_attention_pytorch import SparseAttention

    ours = config_from_dict(LAYERS["layer, nsa"])
    return SparseAttention(
        dim=SHAPE.hidden_size,
        dim_head=WIDTH,
        heads=HEADS,
        sliding_window_size=ours.window,
        compress_block_size=ours.compress_block,
        compress_block_sliding_stride=ours.compress_stride,
        selection_block_size=ours.select_block,
        num_selected_blocks=ours.num_selected - 1,
        causal=True,
    ).eval()


@torch.no_grad()
def _forward(module: Callable, inputs: list[Tensor]) -> Any:
    return module(*inputs)


def _forward_backward(module: Callable, inputs: list[Tensor]) -> Any:
    output = module(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    return torch.autograd.grad(output, inputs, torch.ones_like(output))


def measure_length(names: list[str], length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a name: milliseconds (median), ratio, peak memory, and operations a second.

    What needs more memory than there is has a peak of infinity and no times.
    """
    peaks = {
        name: measure.peak_memory_mb(make, name, length, args.backward)
        for name in names
        if args.memory or name in (PEER_PERFORMER, PEER_NSA)
    }
    fitting = [name for name in names if peaks.get(name) != math.inf]
    times = measure.times_in_turn({name: make(name, length, args.backward) for name in fitting}, budget=args.seconds)
    return [_row(name, length, times, peaks.get(name), args.backward) for name in names]


def _row(
    name: str, length: int, times: dict[str, list[float]], peak_mb: float | None, backward: bool
) -> dict[str, Any]:
    row = dict.fromkeys(("method", "length", "ms", "ratio", "peak_mb", "gflops"))
    row |= {"method": name, "length": length, "peak_mb": peak_mb}
    if name in times:
        seconds, operations = statistics.median(times[name]), _operations(name, length)
        peer = times["layer, softmax" if name.startswith("layer") else "sdpa"]
        row |= {"ms": 1e3 * seconds, "ratio": measure.median_ratio(peer, times[name])}
        row["gflops"] = operations / seconds / 1e9 if operations and not backward else None
    return row


def _operations(name: str, length: int) -> int | None:
    options = {"sdpa": {"method": "softmax"}, **MECHANISMS}.get(name)
    return None if options is None else config_from_dict(options).build(SHAPE).operations(length)


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth of time with length, as the log-log slope from 4,096 (or the shortest longer) to the longest length."""
    result = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        points = [point for point in _points(rows, name) if point[0] >= 4096]
        if len(points) > 1:
            (n0, t0), (n1, t1) = points[0], points[-1]
            result[name] = math.log(t1 / t0) / math.log(n1 / n0)
    return result


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return sorted((row["length"], row["ms"]) for row in rows if row["method"] == name and row["ms"] is not None)


def break_even(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """The shortest measured length from which on a method is at least as fast as softmax; None if it never is."""
    result: dict[str, int | None] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        result[name] = None
        for row in sorted((r for r in rows if r["method"] == name), key=lambda r: -r["length"]):
            if row["ratio"] is None or row["ratio"] < 1:
                break
            result[name] = row["length"]
    return result


def figure(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Draws time against length, both logarithmic, into an image file."""
    from matplotlib.figure import Figure

    axes = (drawing := Figure(figsize=(9, 4.6), layout="constrained")).subplots()
    for name in dict.fromkeys(row["method"] for row in rows):
        style = "--" if name in (PEER_WINDOW, PEER_PERFORMER, PEER_NSA) else ":" if name in LAYERS else "-"
        axes.loglog(*zip(*_points(rows, name), strict=True), style, marker="o", markersize=3, label=name)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens", ylabel="milliseconds", title=title)
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize="small", frameon=False)
    drawing.savefig(path, dpi=130)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    usual = [name for name in MECHANISMS if name != CHOOSING]
    parser.add_argument("--methods", nargs="+", choices=list(MECHANISMS), default=usual, help=f"all but {CHOOSING!r}")
    parser.add_argument("--backward", action="store_true", help="measure forward and backward together")
    parser.add_argument("--peers", action="store_true", help="measure the peer libraries too (requirements-bench.txt)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak-memory processes")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the rounds of one length, after five")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--figure", metavar="FILE", help="draw time against length into an image file")
    args = parser.parse_args(argv)
    if args.peers and (
        missing := [
            m for m in ("performer_pytorch", "native_sparse_attention_pytorch") if not importlib.util.find_spec(m)
        ]
    ):
        parser.error(f"--peers needs {', '.join(missing)}: pip install -r requirements-bench.txt")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    measure.keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ["sdpa", *args.methods]
    if args.peers:
        windows = [] if args.backward and not torch.cuda.is_available() else [PEER_WINDOW]
        names += [*windows, PEER_PERFORMER, *LAYERS, PEER_NSA]
    report: dict[str, Any] = {"machine": measure.machine(), "backward": args.backward, "rows": []}
    for length in args.lengths:
        print(f"measuring length {length} ...", file=sys.stderr)
        report["rows"] += measure_length(names, length, args)
    report["slope"], report["break_even"] = slopes(report["rows"]), break_even(report["rows"])
    if args.figure:
        kind = "forward + backward" if args.backward else "forward"
        figure(report["rows"], args.figure, f"{kind}, 1 x {HEADS} heads x {WIDTH}, {report['machine']['device']}")
    print(json.dumps(_finite(report), indent=1) if args.json else render(report))


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """The report with null for a peak that does not fit, as JSON has no infinity."""
    rows = [row | {"peak_mb": None if row["peak_mb"] == math.inf else row["peak_mb"]} for row in report["rows"]]
    return report | {"rows": rows}


def render(report: dict[str, Any]) -> str:
    """The report as text: the machine, the rows, and a row a method with slope and break-even."""
    rate = report["machine"]["matmul_gflops"]
    for row in report["rows"]:
        row["% of matmul"] = None if row["gflops"] is None else 100 * row["gflops"] / rate
    summary = [
        {"method": name, "break-even": length, "slope": report["slope"].get(name)}
        for name, length in report["break_even"].items()
    ]
    return "\n\n".join(
        [
            json.dumps(report["machine"]),
            measure.table(report["rows"], ["method", "length", "ms", "ratio", "peak_mb", "% of matmul"]),
            measure.table(summary, ["method", "break-even", "slope"]),
        ]
    )


if __name__ == "__main__":
    main()
