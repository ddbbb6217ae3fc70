"""What a card says of where a variant comes from: only what the Hub knows, and nothing of this machine."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from attention import MasksConfig, config_from_dict
from trainer.card import Making, hub_id, write_card
from trainer.card_words import BEFORE
from trainer.config import RunConfig
from trainer.fidelity import Fidelity

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
ENVIRONMENT = dict.fromkeys(("command", "torch", "transformers", "accelerate", "python", "device", "threads"), "1")


def card(base: str, output: str = "o", **data: object) -> ModelCard:
    """The card of a variant of a base, made on some data."""
    stages = [{"stage": "distil", "steps": 1}]
    values = {"base": base, "attention": {"method": "masks"}, "stages": stages, "output": output, "data": data}
    config = RunConfig.model_validate(values)
    making = Making(config, MasksConfig(), "llama", {**ENVIRONMENT, "commit": None}, 1, 1, 1.0)
    return write_card(making, Fidelity(1, 0.1, 2.0, 2.0, 0.9), None)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gpt2", "gpt2"),
        (f"gpt2@{COMMIT}", "gpt2"),
        ("user/base", "user/base"),
        ("user/base@main", "user/base"),
        ("user/repo/sub/folder", "user/repo"),
        (f"user/repo/sub@{COMMIT}", "user/repo"),
        ("~/base", None),
        ("~someone/base", None),
        ("./folder", None),
        ("../base", None),
        ("/data/base", None),
        ("here", None),
        ("runs/mine/model", None),
        ("C:\\models\\base", None),
        ("a folder/base", None),
        ("user/base--odd", None),
        ("x" * 100, None),
        ("", None),
        (None, None),
    ],
)
def test_what_the_hub_knows(spec: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here", "runs/mine/model"):
        Path(name).mkdir(parents=True)
    assert hub_id(spec) == expected


def test_a_folder_in_the_hubs_cache_is_of_the_hub(tmp_path: Path):
    folder = tmp_path / "hub" / "models--user--base" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert hub_id(str(folder)) == "user/base"
    (tmp_path / "link").symlink_to(folder)
    assert hub_id(str(tmp_path / "link")) == "user/base"


@pytest.mark.parametrize(
    ("base", "base_model", "title"),
    [
        (f"gpt2@{COMMIT}", "gpt2", "masks-gpt2"),
        ("user/base@main", "user/base", "masks-base"),
        ("~/secret/base", None, "masks-base"),
        ("./folder/", None, "masks-folder"),
    ],
)
def test_a_card_names_its_base(base: str, base_model: str | None, title: str):
    made = card(base)
    assert made.data.base_model == base_model
    assert ("base_model" in made.data.to_dict()) == (base_model is not None)
    assert made.data.model_name == title
    assert f"# {title}\n" in made.text
    assert "secret" not in made.text
    assert ModelCard(str(made), ignore_metadata_errors=False).data.to_dict() == made.data.to_dict()


@pytest.mark.parametrize(
    ("data", "datasets", "text"),
    [
        ({"dataset": "Salesforce/wikitext"}, ["Salesforce/wikitext"], "Text: Salesforce/wikitext."),
        ({"dataset": "./my texts"}, None, "Text: my texts."),
        ({"dataset": "~/texts"}, None, "Text: texts."),
        ({"train": ["/data/books/a.txt", "b.txt"]}, None, "Text: a.txt, b.txt."),
        ({}, None, "Text: sampled from the base itself at temperature 1."),
    ],
)
def test_a_card_names_its_data(data: dict, datasets: list[str] | None, text: str):
    made = card("gpt2", **data)
    assert made.data.datasets == datasets
    assert text in made.text


@pytest.mark.parametrize("output", ["runs/mine", "runs/try #2", 'a "quoted" one', "back\\slash", "日本"])
def test_the_snippet_of_a_card_is_python(output: str):
    code = re.search(r"```python\n(.*?)```", card("gpt2", output=output).text, re.DOTALL)[1]
    (call,) = (
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and "load" in ast.dump(node.func)
    )
    assert ast.literal_eval(call.args[0]) == f"{output}/variant"


def test_a_card_says_which_layers_have_which_method():
    mix = [{"layers": [0, 2], "method": "masks", "candidates": ["window(4)"]}, {"layers": [1], "method": "softmax"}]
    method = {"method": "layers", "layers": mix}
    values = {"base": "b", "attention": method, "stages": [{"stage": "distil", "steps": 1}], "output": "o"}
    config, environment = RunConfig.model_validate(values), {**ENVIRONMENT, "commit": None}
    making = Making(config, config_from_dict(method), "llama", environment, 1, 1, 1.0)
    text = write_card(making, Fidelity(1, 0.1, 2.0, 2.0, 0.9), None).text
    assert "Method options: `layers 0, 2: masks(candidates=('window(4)',)); layers 1: softmax()`." in text


def test_a_card_says_what_was_changed_on_the_way_and_how_its_sequences_were_read():
    first = {
        "stage": "distil",
        "steps": 3,
        "batch_size": 8,
        "context": 512,
        "final_context": 1024,
        "final_fraction": 0.2,
    }
    second = {
        "stage": "distil",
        "steps": 2,
        "batch_size": 2,
        "context": 4096,
        "short_context": 512,
        "short_share": 0.25,
    }
    config = RunConfig.model_validate({"base": "b", "variant": "v", "stages": [first, second], "output": "o"})
    changes = {2: ["stages.0.lr 0.1 -> 0.2", "seed 0 -> 1"], 1000: ["precision no -> bf16"]}
    making = Making(config, MasksConfig(), "llama", {**ENVIRONMENT, "commit": None}, 1, 1, 1.0, changes=changes)
    text = write_card(making, Fidelity(1, 0.1, 2.0, 2.0, 0.9), None).text
    assert "3 steps of 8 × 512 tokens, the last 20% of 4 × 1024, objective 1 kl" in text
    assert "2 steps of 2 × 4096 tokens, 25% of the sequences in pieces of 512, objective 1 kl" in text
    assert "Changed from step 2 on: stages.0.lr 0.1 -> 0.2; seed 0 -> 1. Changed from step 1,000 on: precision" in text


def test_a_card_says_how_the_variant_was_made_that_its_run_went_on_from():
    first = card("gpt2").text
    values = {"base": "b", "variant": "v", "move": True, "stages": [{"stage": "distil", "steps": 1}], "output": "o"}
    config, environment = RunConfig.model_validate(values), {**ENVIRONMENT, "command": "python second", "commit": None}
    making = Making(config, MasksConfig(), "llama", environment, 1, 1, 1.0, earlier=first)
    measured = Fidelity(1, 0.1, 2.0, 2.0, 0.9)
    second = write_card(making, measured, None).text
    start = second.index(f"{BEFORE}, the variant that it goes on from was made, on another base, like this:")
    earlier = re.search(r"## How it was made\n\n(.*?)\n\n## Limits", first, re.DOTALL)[1]
    assert second.index("## How it was made") < start < second.index(earlier) < second.index("## Limits")
    assert second.count("## How it was made") == 1

    third = write_card(replace(making, earlier=second), measured, None).text
    assert third.count(f"{BEFORE}, the variant") == 2
    assert third.count(earlier) == 1
    silent = write_card(replace(making, earlier="# A card of another kind\n"), measured, None).text
    assert BEFORE not in silent
