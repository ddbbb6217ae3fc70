"""Many visitors at once: does each get its text or a clear "busy", and does memory stay bounded?

    python benchmarks/load.py --clients 50 --output load.json

starts the app on the loopback interface, lets the clients in, and reports as JSON; the exit status is 1 if a client
got neither its text nor a reason, or if the app does not answer as before when all are gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles

import httpx
import psutil

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "<script>alert(1)</script>",
    "${alert(1)} {{x}}",
    "\x00\x1b[31m\u202e",
    "half \ud800 a pair",
    "x" * 1_000_000,
    "",
)
JSON = {"Content-Type": "application/json"}
PROMPTS = ("The old house stood at the end of the lane, and", "Once upon a time", "It was a dark night when")


@dataclass
class Visit:
    """One client's call of /generate.

    Attributes:
        kind: "reader" reads to the end, "leaver" hangs up at the first token, "attacker" sends what is hostile.
        outcome: "done", "left", "busy", "refused" (a reason was given), or what went wrong.
        first, total: seconds until the first token and until the end.
    """

    kind: str
    outcome: str = ""
    first: float | None = None
    total: float | None = None


async def visit(client: httpx.AsyncClient, url: str, kind: str, tokens: int, seed: int) -> Visit:
    """Calls /generate once, the way `kind` behaves."""
    result = Visit(kind)
    draw = random.Random(seed)
    prompt = draw.choice(HOSTILE if kind == "attacker" else PROMPTS)
    body = json.dumps({"data": [prompt, None, 0.8, 40, 0.95, 1.1, tokens, seed, False]})
    start = time.monotonic()
    try:
        posted = await client.post(f"{url}/gradio_api/call/generate", content=body, headers=JSON)
        if posted.status_code != 200:
            result.outcome = "busy" if "full" in posted.text else f"status {posted.status_code}: {posted.text[:200]}"
            return result
        stream = f"{url}/gradio_api/call/generate/{posted.json()['event_id']}"
        async with client.stream("GET", stream) as answer:
            result.outcome = await read(answer, result, start)
    except httpx.HTTPError as error:
        result.outcome = f"{type(error).__name__}: {error}"
    result.total = time.monotonic() - start
    return result


async def read(answer: httpx.Response, result: Visit, start: float) -> str:
    """Follows a stream of events to its end, or to where a leaver hangs up."""
    event = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            event = line.removeprefix("event: ")
        elif line.startswith("data: ") and event in ("generating", "complete"):
            run = json.loads(line.removeprefix("data: "))[0]
            if result.first is None and any(column["text"] for column in run["columns"]):
                result.first = time.monotonic() - start
                if result.kind == "leaver":
                    return "left"
            if event == "complete":
                stages = {column["stage"] for column in run["columns"]}
                return "done" if stages == {"done"} else f"ended as {sorted(stages)}"
        elif line.startswith("data: ") and event == "error":
            reason = json.loads(line.removeprefix("data: "))["error"]
            return "refused" if reason else "an error without a reason"
    return "the stream broke off"


async def crowd(url: str, clients: int, tokens: int, seed: int) -> list[Visit]:
    """Lets all clients in at once: of ten, one hangs up and two are hostile."""
    kinds = [("leaver" if i % 10 == 0 else "attacker" if i % 10 in (3, 7) else "reader") for i in range(clients)]
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        calls = [visit(client, url, kind, tokens, seed + i) for i, kind in enumerate(kinds)]
        return await asyncio.gather(*calls)


class Memory:
    """Resident memory of a process and its children, in MB."""

    def __init__(self, pid: int):
        self.process = psutil.Process(pid)
        self.peak = 0.0

    def now(self) -> float:
        family = [self.process, *self.process.children(recursive=True)]
        size = sum(process.memory_info().rss for process in family) / 1e6
        self.peak = max(self.peak, size)
        return size

    async def watch(self) -> None:
        """Takes the peak until it is cancelled."""
        while True:
            self.now()
            await asyncio.sleep(0.2)


async def measure(url: str, pid: int, options: argparse.Namespace) -> dict[str, object]:
    """One visitor alone, the crowd, one visitor alone again."""
    memory = Memory(pid)
    before = (await crowd_of_one(url, options))[0]
    start_mb, watcher = memory.now(), asyncio.create_task(memory.watch())
    rounds, visits = [], []
    for number in range(options.rounds):
        visits += await crowd(url, options.clients, options.tokens, 1000 * number)
        rounds.append(round(memory.now(), 1))
    watcher.cancel()
    after = (await crowd_of_one(url, options))[0]
    return {
        "clients": options.clients,
        "rounds": options.rounds,
        "tokens": options.tokens,
        "outcomes": {kind: count(visits, kind) for kind in ("reader", "leaver", "attacker")},
        "first_token_seconds": spread([v.first for v in visits if v.first is not None]),
        "total_seconds": spread([v.total for v in visits if v.outcome == "done"]),
        "memory_mb": {"start": round(start_mb, 1), "after_each_round": rounds, "peak": round(memory.peak, 1)},
        "alone_before": asdict(before),
        "alone_after": asdict(after),
        "ok": after.outcome == "done" and all(v.outcome in ("done", "left", "busy", "refused") for v in visits),
    }


async def crowd_of_one(url: str, options: argparse.Namespace) -> list[Visit]:
    async with httpx.AsyncClient(timeout=600) as client:
        return [await visit(client, url, "reader", options.tokens, seed=0)]


def count(visits: list[Visit], kind: str) -> dict[str, int]:
    return dict(Counter(visit.outcome for visit in visits if visit.kind == kind))


def spread(seconds: list[float]) -> dict[str, float] | None:
    """Median, 95th percentile and maximum."""
    if len(seconds) < 2:
        return None
    cuts = quantiles(seconds, n=20)
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2), "max": round(max(seconds), 2)}


def serve() -> tuple[subprocess.Popen, str]:
    """Starts the app; waits until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"the app ended with status {process.returncode}")
        try:
            httpx.get(url, timeout=5)
            return process, url
        except httpx.HTTPError:
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"{url} did not answer in two minutes")


def main() -> int:
    """Runs the load and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50, help="visitors at once")
    parser.add_argument("--rounds", type=int, default=2, help="how often they come")
    parser.add_argument("--tokens", type=int, default=20, help="tokens that each asks for")
    parser.add_argument("--output", type=Path, help="where to write the report; default: standard output")
    options = parser.parse_args()
    process, url = serve()
    try:
        report = asyncio.run(measure(url, process.pid, options))
    finally:
        process.terminate()
        process.wait(30)
    text = json.dumps(report, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
