"""Which causal language models and attention libraries keep the contract of `attention.contract`?

    python -m benchmarks.contracts

asks every family of the installed transformers that has more than softmax attention over all earlier tokens, each as a
tiny random model with every kind of layer that it has, and the installed ones of the libraries in `benchmarks.peers`.
It writes docs/contract.md. What cannot be made or run, or needs longer than its limit, is recorded with the reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from attention.contract import LENGTH as USUAL_LENGTH
from attention.contract import MODEL_CHECKS, check
from attention.contract_checks import FLAT, MARGIN, Result, describe_error, precision
from benchmarks.peers import PEERS, installed_version, keeps
from benchmarks.tiny_models import families, tiny_model, unusual

ROOT = Path(__file__).resolve().parents[1]
LENGTH, PEER_LENGTH = 64, 256  # eight windows of the tiny models; enough for a mean to differ from softmax
MEMORY = 6 << 30  # bytes that one of them may take
Report = dict[str, Any]
"""name, version, what is asked, and either results (by check: holds, difference, sentence) or a problem, a sentence."""

FROM_ZERO = "a cached block of several tokens starts its scan from a state of zeros"
NO_FLOOR = "a single token's step has no floor (`time_step_min`), a longer text's has"
CAUSES = {  # what the code of a version does, found by reading it; printed beside a failure of that version alone
    "MambaForCausalLM 5.24.0": FROM_ZERO,
    "FalconMambaForCausalLM 5.24.0": FROM_ZERO,
    "JambaForCausalLM 5.24.0": FROM_ZERO,
    "ZambaForCausalLM 5.24.0": FROM_ZERO,
    "Zamba2ForCausalLM 5.24.0": NO_FLOOR,
    "NemotronHForCausalLM 5.24.0": NO_FLOOR,
    "BambaForCausalLM 5.24.0": "its own positions start at 0 whatever the cache holds",
    "MoshiForCausalLM 5.24.0": "the cache keeps `sliding_window` tokens; the mask of a forward lets all be read",
    "MiniMaxForCausalLM 5.24.0": "its cache reorders the layers of softmax attention alone",
    "MiniMaxM3VLForCausalLM 5.24.0": "blocks lie at places in the cache, so that padding before a row shifts them",
    "RecurrentGemmaForCausalLM 5.24.0": "its convolution reads padding; its state is kept in the layers, out of reach",
    "RwkvForCausalLM 5.24.0": "`attention_mask` is not read, and the state cannot be reordered",
    "xLSTMForCausalLM 5.24.0": "it takes no `attention_mask`, and the state cannot be reordered",
    "ReformerModelWithLMHead 5.24.0": "its hashes are drawn anew at every call unless `hash_seed` is set",
    "performer-pytorch 1.1.4": "keys are scaled by a maximum over all positions, then floored at 1e-4, where most lie",
    "native-sparse-attention-pytorch 0.2.3": "a cache takes single tokens, without `compress_mem_kv`, zero when new",
    "tptt 0.12.1": "its chunk is the largest divisor of the length; its state is kept in the model, out of reach",
}


def family(name: str, length: int) -> Report:
    """What a tiny random model of a family of transformers keeps."""
    model = families()[name]
    what = ", ".join(unusual(model)).replace("_attention", "").replace("_", " ")
    report = {"name": model.__name__, "version": transformers.__version__, "what": what}
    return report | {"results": plain(check(tiny_model(model), length=length))}


def peer(name: str, length: int) -> Report:
    """What a library keeps."""
    asked = PEERS[name]
    report = {"name": name, "version": installed_version(name), "what": asked.what}
    return report | {"results": plain(keeps(asked, length))}


def plain(results: Mapping[str, Result]) -> dict[str, Any]:
    """Results as plain data."""
    return {name: result._asdict() for name, result in results.items()}


def ask(function: Callable[..., Report], name: str, length: int, limit: float) -> Report:
    """What `function` reports of one subject, in a process of its own that ends after `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, name, length))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else problem(name, f"not done after {limit:.0f} seconds")
    except EOFError:
        return problem(name, "its process ended without an answer")
    finally:
        process.kill()
        process.join()


def _answer(sender: Any, function: Callable[..., Report], name: str, length: int) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # so that it fails, before the system ends something
    os.dup2(2, 1)  # what others print is no part of the report
    try:
        sender.send(function(name, length))
    except Exception as error:  # what others' code raises is what is to be reported
        sender.send(problem(name, f"raises {describe_error(error)}"))


def problem(name: str, sentence: str) -> Report:
    """A report of what could not be asked."""
    return {"name": name, "problem": sentence}


def reports(
    function: Callable[..., Report], names: Iterable[str], length: int, options: argparse.Namespace, log: Path
) -> list[Report]:
    """A report for each name; those that the log holds are not asked again, new ones are added to it at once."""
    done = {}
    if log.exists():
        done = {entry["asked"]: entry["report"] for entry in map(json.loads, log.read_text().splitlines())}
    log.parent.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> Report:
        if name not in done:
            done[name] = ask(function, name, length, options.limit)
            with log.open("a") as file:
                file.write(json.dumps({"asked": name, "report": done[name]}) + "\n")
            short = done[name].get("problem") or done[name].get("refused") or ", ".join(broken(done[name])) or "holds"
            print(f"{name}: {short}", file=sys.stderr)
        return done[name]

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(one, names))


def broken(report: Report) -> dict[str, Any]:
    """The results that do not hold, by check."""
    return {name: found for name, found in report.get("results", {}).items() if found["holds"] is False}


# The page


def page(models: list[Report], peers: list[Report], options: argparse.Namespace) -> str:
    """docs/contract.md."""
    asked = [report for report in models if "results" in report]
    kept = [report for report in asked if not broken(report)]
    texts = [
        "# A contract that any causal language model can be asked",
        "Written by `python -m benchmarks.contracts`; nothing here was typed by hand.",
        INTRODUCTION,
        "## What is tried",
        checks_table(),
        f"## Families of transformers {transformers.__version__}",
        f"Those that have more than softmax attention over all earlier tokens, each as a tiny random model with every "
        f"kind of layer that it has, on texts of {options.length} tokens; torch {torch.__version__}, on the CPU. "
        f"{len(kept)} of {len(asked)} keep all that they can be asked.",
        results_table(asked, "layers"),
        "## Other libraries",
        f"Tiny and random, with options under which they should be causal, on texts of {options.peer_length} tokens.",
        results_table([report for report in peers if "results" in report], "asked"),
    ]
    failed = [report for report in [*models, *peers] if "problem" in report]
    if failed:
        texts += ["## Not asked", "\n".join(f"- {report['name']}: {cell(report['problem'])}" for report in failed)]
    return "\n\n".join([*texts, "## In words", words([*asked, *peers])]) + "\n"


INTRODUCTION = f"""\
`python -m attention.contract SPEC` asks a folder, a name on the Hub, or `module:function`; `--json` gives its answer as
data; the exit status is 1 where something does not hold, 2 for what cannot be loaded. It knows no family: it uses
`forward`, `generate` and the config. Texts are random, of {USUAL_LENGTH} tokens if the model holds them.

Parameters that are zero throughout hold random values meanwhile, since what starts as zero hides what it is used for.
Two computations of one output may differ by {MARGIN} times what rounding does to a text, which is measured against
float64; what differs by more is computed again in float64, which tells rounding from logic. `running_mean`
fails where attention departs from the mean of its values less than {FLAT} times as far as softmax does with the same
queries and keys. Nothing is said of a check that a model cannot be asked, such as one of a cache where it has none."""


def checks_table() -> str:
    """Each check with the first sentence on it."""
    checks = {"precision": precision, **MODEL_CHECKS}
    lines = [f"| `{name}` | {(function.__doc__ or '').splitlines()[0]} |" for name, function in checks.items()]
    return "\n".join(["| check | |", "|---|---|", *lines])


def results_table(found: list[Report], what: str) -> str:
    """One row a subject; the cause where it is known."""
    rows = [
        f"| name | version | {what} | holds | does not hold, and by how much | cause, where known |",
        "|---|" + "---|" * 5,
    ]
    for report in found:
        held = [one["holds"] for one in report["results"].values()]
        wrong = "; ".join(f"`{name}` {_amount(one)}".strip() for name, one in broken(report).items())
        cause = CAUSES.get(f"{report['name']} {report['version']}", "") if wrong else ""
        counts = f"{held.count(True)} of {held.count(True) + held.count(False)}"
        rows.append(f"| {report['name']} | {report['version']} | {report['what']} | {counts} | {wrong} | {cause} |")
    return "\n".join(rows)


def _amount(found: Mapping[str, Any]) -> str:
    return "" if found["difference"] is None else f"{found['difference']:.1e}"


def words(found: list[Report]) -> str:
    """What does not hold, and what some do not read, in the words of the checks."""
    lines = []
    for report in found:
        wrong = [f"`{name}`: {cell(one['sentence'])}" for name, one in broken(report).items()]
        sight = report.get("results", {}).get("sight")
        if sight and sight["holds"] and "100%" not in sight["sentence"]:
            wrong.append(f"(`sight`: {sight['sentence']})")
        if wrong:
            lines.append("\n".join([f"- {report['name']} {report['version']}", *(f"  - {line}" for line in wrong)]))
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text as it stands in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def add_running(parser: argparse.ArgumentParser, one: str, limit: float, log: str, page: str) -> None:
    """Adds the options of a command that asks many and writes a page.

    Args:
        one: what is asked.
        limit: seconds for it.
        log: where answers are kept, in `runs`.
        page: what is written, in `docs`.
    """
    parser.add_argument("--limit", type=float, default=limit, help=f"seconds for one {one}")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / log, help="answers, to go on from")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / page, help="the page to write")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a text for families")
    parser.add_argument("--peer_length", type=int, default=PEER_LENGTH, help="tokens of a text for libraries")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families and libraries; all by default")
    add_running(parser, "model", 600, "contracts", "contract.md")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    chosen = [name for name, model in families().items() if unusual(model)]
    installed = [name for name in PEERS if installed_version(name)]
    if options.only:
        chosen, installed = ([name for name in names if name in options.only] for names in (chosen, installed))
    models = reports(family, chosen, options.length, options, options.log / "families.jsonl")
    peers = reports(peer, installed, options.peer_length, options, options.log / "peers.jsonl")
    options.output.write_text(page(models, peers, options))
    print(options.output)


if __name__ == "__main__":
    main()
