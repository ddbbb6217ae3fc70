"""Two builds of this project side by side: what a token and a prefill of the bundled models cost in each.

    git worktree add ../before REVISION
    python benchmarks/builds.py --against ../before

Each build runs in a process of its own, from its own checkout, on the checkpoints of this one; rounds alternate, and
the first of a round changes places. Above 1 the other build is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure

ROOT = Path(__file__).resolve().parents[1]
# Runs in either build, and so asks no more than what all of them have: for each line "kind name" it gives seconds.
WORKER = """\
import sys, time, torch, attention
folder, tokens, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
base = attention.load(f"{folder}/base")[0].eval()
models = {name: attention.load(f"{folder}/{name}", base=base)[0].eval() for name in sys.argv[4:] if name != "base"}
models["base"] = base
start = torch.zeros(1, 1, dtype=torch.long)
text = torch.randint(5, 4000, (1, length), generator=torch.Generator().manual_seed(0))
options = {"attention_mask": torch.ones_like(start), "do_sample": False, "pad_token_id": 0,
           "min_new_tokens": tokens, "max_new_tokens": tokens}
print("ready", flush=True)
with torch.no_grad():
    for line in sys.stdin:
        kind, name = line.split()
        began = time.perf_counter()
        if kind == "token":
            models[name].generate(start, **options)
        else:
            models[name](text, use_cache=True, logits_to_keep=1)
        print((time.perf_counter() - began) / (tokens if kind == "token" else 1), flush=True)
"""


class Build:
    """A process that runs the models with the code of one checkout."""

    def __init__(self, checkout: Path, arguments: list[str]):
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # or the one that waits would take time of the other
        command = [sys.executable, "-W", "ignore", "-c", WORKER, *arguments]
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{checkout} cannot load the checkpoints; its own words are above")

    def seconds(self, kind: str, name: str) -> float:
        print(kind, name, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(builds: list[Build], kind: str, name: str, rounds: int) -> dict[str, Any]:
    """A row: milliseconds in both builds (medians), and the quartiles over rounds of the first's over the second's."""
    times: list[list[float]] = [[], []]
    for build in builds:
        build.seconds(kind, name)
    for turn in range(rounds):
        for number in (0, 1) if turn % 2 else (1, 0):
            times[number].append(builds[number].seconds(kind, name))
    ratios = [here / there for here, there in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "what": kind,
        "model": name,
        "ms": 1e3 * statistics.median(times[0]),
        "other_ms": 1e3 * statistics.median(times[1]),
        "ratio": middle,
        "spread": f"{low:.3f} to {high:.3f}",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="the checkout of the other build")
    parser.add_argument("--tokens", type=int, default=100, help="tokens that are written after one")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens that are read at once")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    if not (args.against / "attention" / "__init__.py").is_file():
        parser.error(f"--against is the folder of a checkout; {args.against} has no attention/__init__.py")
    folder = ROOT / "checkpoints"
    names = ["base", *sorted(path.parent.name for path in folder.glob("*/config.json") if path.parent.name != "base")]
    report: dict[str, Any] = {"machine": measure.machine()}
    builds = [
        Build(place, [str(folder), str(args.tokens), str(args.prefill), *names]) for place in (ROOT, args.against)
    ]
    report["rows"] = [compare(builds, kind, name, args.rounds) for kind in ("token", "prefill") for name in names]
    for build in builds:
        build.close()
    measure.print_report(report, "rows", as_json=args.json)


if __name__ == "__main__":
    main()
