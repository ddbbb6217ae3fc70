"""The command that puts variants to tasks of lm_eval, with a stand-in for it; see also `local_task`."""

import fnmatch
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import attention
from trainer import tasks
from trainer.tasks import main, parse, run

from .local_task import FOLDER, NAME, accuracy


class StandInManager:
    """Finds tasks in a folder of YAML files."""

    def __init__(self, include_path: str | None = None):
        files = sorted(Path(include_path).glob("*.yaml")) if include_path else []
        self.names = [yaml.safe_load(path.read_text())["task"] for path in files] + ["lambada_openai", "lambada_cloze"]

    def match_tasks(self, patterns: list[str]) -> list[str]:
        return sorted(name for name in self.names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))


class StandInModel:
    """What lm_eval takes as a model."""

    def __init__(self, pretrained, tokenizer, batch_size):
        assert not pretrained.training
        self.pretrained, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size


class StandIn:
    """Runs the local task, and gives what lm_eval documents that it gives."""

    __version__ = "0.0"

    def __init__(self):
        self.calls = []

    def simple_evaluate(self, *, model, tasks, **options):
        self.calls.append(SimpleNamespace(model=model, tasks=tasks, **options))
        found = accuracy(model.pretrained, model.tokenizer)
        metrics = {
            "alias": NAME, "sample_len": 12, "acc,none": found, "acc_stderr,none": 0.125,
            "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A",
        }  # fmt: skip
        return {
            "results": {NAME: metrics},
            "n-samples": {NAME: {"original": 12, "effective": 12}},
            "n-shot": {NAME: 0},
        }


@pytest.fixture
def harness(monkeypatch):
    stand_in = StandIn()
    for name, value in {"lm_eval": stand_in, "HFLM": StandInModel, "TaskManager": StandInManager}.items():
        monkeypatch.setattr(tasks, name, value)
    return stand_in


@pytest.fixture
def variant(names_base):
    folder = names_base.with_name("tasked")
    if not folder.is_dir():
        base = attention.load(names_base)[0]
        attention.save(attention.convert(base, attention.MasksConfig(candidates=("window(2)", "first(1)"))), folder)
    (folder / "README.md").write_text(
        "# masks\n\n## Measured further\n\n### Context 16\n\nSo.\n\n## Use\n\nLike this.\n"
    )
    return str(folder)


COMMAND = ["--tasks", NAME, "--include_path", str(FOLDER)]


def test_variants_are_loaded_and_put_to_a_local_task_beside_their_base(harness, variant, names_base, names_tokenizer):
    base = str(names_base)
    rows = run(parse(["--variant", base, variant, *COMMAND, "--limit", "9", "--num_fewshot", "2", "--batch_size", "3"]))
    assert [row["variant"] for row in rows] == [base, variant]
    assert [row["method"] for row in rows] == ["softmax", "masks"]
    loaded = [attention.load(spec)[0] for spec in (base, variant)]
    own, other = (accuracy(model, names_tokenizer) for model in loaded)
    for row, value in zip(rows, (own, other), strict=True):
        assert row["tasks"] == {
            NAME: {
                "acc": {
                    **{"variant": value, "error": 0.125, "base": own, "base_error": 0.125},
                    **{"examples": 12, "shots": 0},
                },
                "exact_match, strict": {
                    **{"variant": 0.5, "error": None, "base": 0.5, "base_error": None},
                    **{"examples": 12, "shots": 0},
                },
            }
        }
        assert (row["limit"], row["lm_eval"]) == (9, "0.0")
    assert len(harness.calls) == 2  # the base once
    call = harness.calls[1]
    assert (call.tasks, call.limit, call.num_fewshot, call.model.batch_size) == ([NAME], 9, 2, 3)
    assert call.task_manager.names[0] == NAME
    assert type(call.model.pretrained) is type(loaded[1])


def test_a_table_or_an_object_a_line(harness, variant, capsys):
    assert main(["--variant", variant, *COMMAND, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["variant"] == variant
    assert main(["--variant", variant, *COMMAND]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "task", "examples", "shots", "metric", "value", "base's"]
    assert [line.split()[4] for line in lines] == ["acc", "exact_match,"]
    assert "0.5000" in lines[1]
    assert "± 0.1250" in lines[0]


def test_the_card_takes_up_the_figures(harness, variant):
    for options in ([], ["--limit", "5"]):
        assert main(["--variant", variant, *COMMAND, "--card", *options]) == 0
    card = (Path(variant) / "README.md").read_text()
    assert re.findall("^#.*$", card, re.M) == [
        "# masks",
        "## Measured further",
        "### Context 16",
        "### Tasks",
        "## Use",
    ]
    assert "tasks of lm_eval 0.0, on the first 5 examples of each" in card
    assert re.search(rf"^\| {NAME} \| 12 \| 0 \| acc \| \d\.\d{{4}} ± 0.1250 \| ", card, re.M)
    assert "\n\nSo.\n\n" in card


def test_patterns_name_tasks(harness, variant):
    run(parse(["--variant", variant, "--tasks", "lambada*", NAME, "lambada_cloze", "--include_path", str(FOLDER)]))
    assert harness.calls[0].tasks == ["lambada_cloze", "lambada_openai", NAME]


def test_tasks_that_there_are_not_are_all_named(harness, variant, capsys):
    assert main(["--variant", variant, "--tasks", NAME, "lambada_openai", "nothing*"]) == 2
    assert f"lm_eval has no task {NAME}, nothing*; " in capsys.readouterr().err
    assert not harness.calls


def test_what_lm_eval_cannot_run_is_said(harness, variant, monkeypatch, capsys):
    monkeypatch.setattr(harness, "simple_evaluate", lambda **_: 1 / 0)
    assert main(["--variant", variant, *COMMAND]) == 2
    assert f"lm_eval could not run {NAME}: division by zero" in capsys.readouterr().err


def test_without_lm_eval_the_command_says_how_to_get_it(variant, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "lm_eval", None)
    assert main(["--variant", variant, *COMMAND]) == 2
    assert "tasks need lm_eval: pip install -r requirements-bench.txt" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--limit", "--batch_size"])
def test_numbers_below_1_are_refused(variant, option, capsys):
    with pytest.raises(SystemExit):
        parse(["--variant", variant, *COMMAND, option, "0"])
    assert f"{option} must be at least 1; got 0" in capsys.readouterr().err
