"""Killed, stopped or out of space at any point, a run goes on as if nothing had happened."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import recipe, write_recipe
from trainer import checkpointing, train
from trainer.checkpointing import Snapshot
from trainer.history import History
from trainer.loop import Loop
from trainer.signals import EXIT_STOPPED

PROCESSES = multiprocessing.get_context("forkserver")  # forks of a clean process that has imported the trainer
PROCESSES.set_forkserver_preload(["trainer.train"])


def fit(workplace: Path) -> dict[str, Any]:
    """Both stages, the best weights kept."""
    options = recipe(workplace)
    options["eval"]["keep"] = "best"
    return options


def pretrain(workplace: Path) -> dict[str, Any]:
    """Pretraining with two optimisers and dropout, which is random, and rows of the history between checkpoints."""
    stage = {"stage": "pretrain", "steps": 8, "batch_size": 4, "context": 32, "muon": True}
    return recipe(workplace, stages=[stage], attention=None, log_every=3, checkpoint={"every": 2})


RECIPES = {"fit": fit, "pretrain": pretrain}


def outcome(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights of a finished run, and its history without what the clock decides."""
    (weights,) = [*folder.glob("variant/model.safetensors"), *folder.glob("model/model.safetensors")]
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    return weights.read_bytes(), [{k: v for k, v in row.items() if k not in History.TIMES} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each recipe a folder with it and its run."""
    folders = {}
    for name, make in RECIPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        path = write_recipe(folders[name], {**make(workplace), "output": str(folders[name] / "run")})
        assert train.main(["--config", str(path)]) == 0
    return folders


class Killed(BaseException):
    """Ends a run where it stands; like a signal, it passes all handlers of errors."""


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("method", "step"), [("train_step", 1), ("train_step", 4), ("_after_step", 3), ("_after_step", 7)]
)
def test_a_run_that_died_ends_the_same(
    name: str, method: str, step: int, uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--config", str(uninterrupted[name] / "recipe.yaml"), "--output", str(tmp_path / "run")]
    original = getattr(Loop, method)

    def dies(self: Loop, *given: object) -> None:
        original(self, *given)
        if self.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, method, dies)
        with pytest.raises(Killed):
            train.main(arguments)
    assert train.main([*arguments, "--resume"]) == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted[name] / "run")


def run_apart(arguments: list[str], held_step: int | None = None, file_limit: int | None = None) -> None:
    """What a process of its own runs: the command.

    Args:
        held_step: a step that goes on only after a signal.
        file_limit: bytes that a file may have after the first checkpoint, as if the disk were full.
    """
    torch.set_num_threads(1)
    step, save = Loop.train_step, Loop._save_checkpoint

    def hold(self: Loop, *given: object) -> None:
        while self.step + 1 == held_step and not self.stop.asked:
            time.sleep(0.02)
        step(self, *given)

    def save_once(self: Loop, *given: object) -> None:
        save(self, *given)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    Loop.train_step, Loop._save_checkpoint = hold, save_once
    raise SystemExit(train.main(arguments))


def start_apart(*arguments: object) -> multiprocessing.Process:
    process = PROCESSES.Process(target=run_apart, args=arguments)
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    while not condition():
        assert process.is_alive(), f"the run ended early, with {process.exitcode}"
        time.sleep(0.02)


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoints/step-*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals, uninterrupted: dict[str, Path], tmp_path: Path):
    output = tmp_path / "run"
    arguments = ["--config", str(uninterrupted["fit"] / "recipe.yaml"), "--output", str(output)]
    process = start_apart(arguments, 4)
    wait_for(lambda: bool(checkpoints(output)), process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (-number if number == signal.SIGKILL else EXIT_STOPPED)
    assert not (output / "variant").exists()
    assert train.main([*arguments, "--resume"]) == 0
    assert outcome(output) == outcome(uninterrupted["fit"] / "run")


def test_a_run_that_still_goes_on_is_left_alone(uninterrupted: dict[str, Path], tmp_path: Path):
    arguments = ["--config", str(uninterrupted["fit"] / "recipe.yaml"), "--output", str(tmp_path / "run"), "--resume"]
    process = start_apart(arguments, 4)
    wait_for(lambda: bool(checkpoints(tmp_path / "run")), process)
    assert train.main(arguments) == 2
    assert "belongs to a run that still goes on" in (tmp_path / "run" / "train.log").read_text()
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == EXIT_STOPPED


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_twenty_points_a_run_ends_the_same(name: str, uninterrupted: dict[str, Path], tmp_path: Path):
    """Each time after a random while, whatever it does then: a step, a checkpoint, a validation, its very end."""
    rng = random.Random(name)
    arguments = ["--config", str(uninterrupted[name] / "recipe.yaml"), "--resume", "--checkpoint.every", "1"]
    for place in range(20):
        output = tmp_path / str(place)
        process = start_apart([*arguments, "--output", str(output)])
        history, rows = output / "training.jsonl", rng.randint(1, 10)
        while process.is_alive() and not (history.exists() and len(history.read_text().splitlines()) >= rows):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        assert train.main([*arguments, "--output", str(output)]) == 0
        assert outcome(output) == outcome(uninterrupted[name] / "run")


def test_a_full_disk_ends_with_a_clear_error_and_the_checkpoint_before_intact(
    uninterrupted: dict[str, Path], tmp_path: Path
):
    output = tmp_path / "run"
    arguments = ["--config", str(uninterrupted["fit"] / "recipe.yaml"), "--output", str(output)]
    process = start_apart(arguments, None, 12_000)
    process.join()
    assert process.exitcode == 1
    assert "File too large" in (output / "train.log").read_text()
    assert "Traceback" not in (output / "train.log").read_text()
    assert checkpoints(output) == ["step-00000002"]
    assert train.main([*arguments, "--resume"]) == 0
    assert outcome(output) == outcome(uninterrupted["fit"] / "run")


def snapshot(step: int) -> Snapshot:
    weights, memory = ({"a": torch.full((3,), value)} for value in (float(step), 0.0))
    return Snapshot(weights, memory, {}, {"0.cpu": torch.get_rng_state()}, {"step": step})


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (1, 2, 3):
        checkpointing.write(tmp_path, snapshot(step), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    monkeypatch.setattr(checkpointing, "write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpointing.write(tmp_path, snapshot(4), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpointing.write(folder, snapshot(step), keep=2)
    return folder


@given(data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    data: st.DataObject, two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.rmtree(tmp_path)
    shutil.copytree(two_checkpoints, tmp_path)
    path = data.draw(st.sampled_from(sorted((tmp_path / "step-00000002").iterdir())))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut short"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    caplog.clear()
    assert checkpointing.read_newest(tmp_path).state["step"] == 1
    assert "step-00000002" in caplog.text


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    uninterrupted: dict[str, Path], tmp_path: Path
):
    shutil.copytree(uninterrupted["fit"] / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / checkpoints(tmp_path / "run")[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    arguments = ["--config", str(uninterrupted["fit"] / "recipe.yaml"), "--output", str(tmp_path / "run"), "--resume"]
    assert train.main(arguments) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"skipping a broken checkpoint: {newest.parent} is damaged" in log
    assert "resuming after step 6" in log
    assert outcome(tmp_path / "run") == outcome(uninterrupted["fit"] / "run")


def test_a_skipped_checkpoint_does_not_outlive_the_one_written_after_it(two_checkpoints: Path, tmp_path: Path):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "step-00000001")
    checkpointing.write(tmp_path, snapshot(1), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpointing.read_newest(tmp_path).state["step"] == 1


def test_an_unfinished_run_is_not_overwritten(
    uninterrupted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--config", str(uninterrupted["pretrain"] / "recipe.yaml"), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_stop_asked", lambda self: self.step == 3)
        assert train.main(arguments) == EXIT_STOPPED
    assert train.main(arguments) == 2
    assert "stopped after step 3: go on with it by --resume" in (tmp_path / "train.log").read_text()
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000003"]


def test_no_checkpoint_is_no_error(tmp_path: Path):
    assert checkpointing.read_newest(tmp_path) is None
