"""A task of lm_eval's in local files, and what a model makes of it, worked out without lm_eval.

`python -m tests.trainer.local_task SPEC ...`, where lm_eval is installed, says whether `trainer/tasks.py` gets the same
from it; the test suite runs without lm_eval.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import attention
from trainer import tasks

FOLDER = Path(__file__).parent / "tasks"
NAME = "lives_in"


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of questions whose right answer has the highest log-probability after the text."""
    examples = [json.loads(line) for line in (FOLDER / f"{NAME}.jsonl").read_text(encoding="utf-8").splitlines()]
    right = 0
    for example in examples:
        scores = [log_likelihood(model, tokenizer, example["text"], f" {one}") for one in example["choices"]]
        right += scores.index(max(scores)) == example["answer"]
    return right / len(examples)


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, answer: str) -> float:
    """The log-probability of an answer after a text."""
    before, whole = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text + answer))
    logs = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return logs.gather(1, torch.tensor(whole[len(before) :])[:, None]).sum().item()


def main(specs: list[str]) -> int:
    options = ["--variant", *specs, "--tasks", NAME, "--include_path", str(FOLDER)]
    same = True
    for row in tasks.run(tasks.parse(options)):
        model, tokenizer = attention.load(row["variant"])
        found, expected = row["tasks"][NAME]["acc"]["variant"], accuracy(model, tokenizer)
        sys.stdout.write(f"{row['variant']}: lm_eval {found:.4f}, without it {expected:.4f}\n")
        same &= abs(found - expected) < 1e-6
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
