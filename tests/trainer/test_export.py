"""Pushing while training and at the end: it never stands in the way."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import attention
from attention import PushError
from tests.hub_server import HubServer
from tests.trainer.conftest import recipe, write_recipe
from trainer.data import read_files
from trainer.export import Publisher
from trainer.fidelity import measure
from trainer.observer import Observer
from trainer.train import main


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield server


def pushing(workplace: Path, tmp_path: Path, **options: object) -> str:
    made = recipe(workplace, output=str(tmp_path / "run"), push_to="me/fitted/masks", push_every=4, **options)
    return str(write_recipe(tmp_path, made))


def test_a_run_pushes_its_variant_with_card_history_and_curves(server, workplace: Path, tmp_path: Path):
    assert main(["--config", pushing(workplace, tmp_path)]) == 0
    files = server.repos["me/fitted"].files()
    for name in ("README.md", "training.jsonl", "config.json", "model.safetensors", "curves.png"):
        assert f"masks/{name}" in files
    assert server.count("POST .*/commit/") == 2
    last = json.loads(files["masks/training.jsonl"].decode().splitlines()[-1])
    assert last["step"] == 8
    assert "pushed   me/fitted/masks@" in (tmp_path / "run" / "train.log").read_text()
    here, anywhere = re.findall(r"```python\n(.*?)```", files["masks/README.md"].decode(), re.DOTALL)
    assert 'attention.load("me/fitted/masks")' in here
    assert run_elsewhere(anywhere, server, tmp_path).startswith("The old man looked at the sea and")


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_card_has_figures_of_the_weights_beside_it(keep: str, workplace: Path, tmp_path: Path, monkeypatch):
    """On the way, too, where nothing was due to be measured, and where other weights were better."""
    pushed: list[Path] = []

    def push(self: Publisher, folder: Path, **_: object) -> None:
        pushed.append(Path(shutil.copytree(folder, folder.with_name(f"pushed-{len(pushed)}"))))

    monkeypatch.setattr(Publisher, "push_behind", push)
    monkeypatch.setattr(Publisher, "push", push)
    path = pushing(workplace, tmp_path, eval={"every": 4, "tokens": 128, "context": 32, "keep": keep})
    worse = ["--stages.distil.lr", "0.3", "--stages.distil.train", "all", "--stages.distil.clip", "null"]
    assert main(["--config", path, "--push_every", "2", *worse]) == 0
    assert len(pushed) == 4
    base, tokenizer = attention.load(workplace / "base")
    tokens = read_files([str(workplace / "valid.txt")], tokenizer)[:128]
    stated, measured = [], []
    for folder in pushed:
        card = ModelCard.load(folder / "README.md")
        stated.append(next(result.metric_value for result in card.data.eval_results if result.metric_type == "kl"))
        measured.append(measure(attention.load(folder, base=base)[0], base, tokens, 32).kl)
    assert stated == pytest.approx(measured, rel=0.01)
    assert (stated[-1] <= min(stated)) == (keep == "best")


def test_a_run_that_died_on_its_way_to_a_push_has_the_same_history(workplace: Path, tmp_path: Path, monkeypatch):
    """The push's own validation is owed by a run that goes on after it, since the step's checkpoint came first."""
    monkeypatch.setattr(Publisher, "push_behind", lambda *_: None)
    monkeypatch.setattr(Publisher, "push", lambda *_, **__: None)
    options = ["--push_every", "2", "--checkpoint.every", "2", "--eval.every", "8"]
    command = ["--config", pushing(workplace, tmp_path), *options]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0

    def dies(self: Observer, step: int, stage: object) -> None:
        if step == 2:
            raise KilledError
        validate(self, step, stage)

    validate = Observer.validate
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "validate", dies)
        with pytest.raises(KilledError):
            main([*command, "--output", str(tmp_path / "run")])
    assert main([*command, "--output", str(tmp_path / "run"), "--resume"]) == 0
    steps = [[row["step"] for row in rows(tmp_path / name) if row["kind"] == "eval"] for name in ("whole", "run")]
    assert steps[0] == steps[1]
    assert 2 in steps[0]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


class KilledError(BaseException):
    """Ends a run where it stands; like a signal, it passes all handlers of errors."""


def run_elsewhere(code: str, server: HubServer, folder: Path) -> str:
    """What code prints in a folder from which this project cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_push_that_fails_is_no_failure_of_the_run(server, workplace: Path, tmp_path: Path):
    server.fail("POST /api/repos/create", 401, times=99)
    assert main(["--config", pushing(workplace, tmp_path)]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "not pushed" in log
    assert f"attention.checkpoint push {tmp_path / 'run' / 'variant'}" in log
    assert (tmp_path / "run" / "variant" / "model.safetensors").exists()


def test_a_dry_run_says_what_would_be_pushed(server, workplace: Path, tmp_path: Path):
    assert main(["--config", pushing(workplace, tmp_path), "--dry_run"]) == 0
    assert server.requests == []
    log = (tmp_path / "run" / "dry-run" / "train.log").read_text()
    assert "would be pushed to me/fitted/masks" in log
    assert "masks/model.safetensors" in log
    assert "pushed   " not in log


def test_a_slow_push_does_not_hold_training_up(tmp_path: Path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    release, pushed = threading.Event(), []

    def push(folder: Path, to: str, *, private: bool, dry_run: bool) -> attention.Push:
        release.wait(10)
        pushed.append(folder)
        return attention.Push(to, {}, "url")

    monkeypatch.setattr(attention, "push", push)
    publisher = Publisher("me/repo", private=False)
    publisher.push_behind(tmp_path / "1")
    publisher.push_behind(tmp_path / "2")
    assert "still goes on" in caplog.text
    release.set()
    assert publisher.push(tmp_path / "3") == "me/repo"
    assert pushed == [tmp_path / "1", tmp_path / "3"]


@pytest.mark.parametrize("error", [PushError("no.", retry=True, command="push it"), OSError("gone"), ValueError("bad")])
def test_errors_are_logged(error: Exception, tmp_path: Path, monkeypatch, caplog):
    def push(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(attention, "push", push)
    assert Publisher("me/repo", private=False).push(tmp_path) is None
    assert str(error) in caplog.text
