"""Launched as the configs in trainer/accelerate say, on one process and on two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.attention.families import tiny
from tests.trainer.conftest import recipe, write_recipe

CONFIGS = sorted(Path("trainer/accelerate").glob("*.yaml"))


def launch(config: str, recipe_path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"trainer/accelerate/{config}.yaml"]
    command += ["trainer/train.py", "--config", str(recipe_path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a test can signal all of it, as a terminal does
    )


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def assert_same_curves(one: list[dict], two: list[dict]) -> None:
    """To 1e-4 of each figure: sums are taken in another order."""
    assert [row["kind"] for row in one] == [row["kind"] for row in two]
    for first, second in zip(one, two, strict=True):
        for name in {"loss", "grad_norm", "kl", "perplexity", "tokens"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


def test_two_ranks_train_as_one_process_does(workplace: Path, tmp_path: Path):
    options = recipe(workplace)
    options["stages"][1] |= {"batch_size": 5, "final_context": None}  # one rank gets 3 sequences, the other 2
    path = write_recipe(tmp_path, {**options, "output": "unused"})
    runs = {}
    for config in ("one-cpu", "two-cpu-ranks"):
        run = launch(config, path, "--output", str(tmp_path / config))
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        runs[config] = rows(tmp_path / config)
        command = json.loads((tmp_path / config / "environment.json").read_text())["command"]
        assert command.startswith(f"accelerate launch --config_file trainer/accelerate/{config}.yaml trainer/train.py")
    assert_same_curves(runs["one-cpu"], runs["two-cpu-ranks"])


@pytest.mark.long
def test_two_ranks_write_by_random_numbers_of_their_own_and_go_on_bit_for_bit(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), checkpoint={"every": 2})
    stage = {"stage": "on_policy", "steps": 4, "batch_size": 4, "context": 32, "prompt": 8, "beta": 0.5, "lr": 0.01}
    path = write_recipe(tmp_path, {**options, "stages": [stage]})

    def end(*more: str) -> bytes:
        run = launch("two-cpu-ranks", path, *more)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        return (tmp_path / "run" / "variant" / "model.safetensors").read_bytes()

    whole, saved = end(), tmp_path / "run" / "checkpoints"
    states = load_file(saved / "step-00000002" / "model.safetensors")
    assert not torch.equal(states["rng/0.cpu"], states["rng/1.cpu"])
    shutil.rmtree(saved / "step-00000004")
    assert end("--resume") == whole


def to_the_launcher(run: subprocess.Popen) -> None:
    run.send_signal(signal.SIGTERM)


def from_a_terminal(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGINT)


def to_one_rank(run: subprocess.Popen) -> None:
    ranks = [child for child in psutil.Process(run.pid).children() if "trainer/train.py" in child.cmdline()]
    ranks[-1].send_signal(signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize("config", ["one-cpu", "two-cpu-ranks"])
@pytest.mark.parametrize("send", [to_the_launcher, from_a_terminal, to_one_rank])
def test_a_signal_stops_all_of_a_run_which_goes_on_with_more_or_fewer(
    config: str, send: Callable[[subprocess.Popen], None], workplace: Path, tmp_path: Path
):
    options = recipe(workplace, output=str(tmp_path / "run"), checkpoint={"every": None})
    options["stages"] = [options["stages"][1] | {"steps": 100_000}]
    options |= {"eval": {"every": None, "context": 32}, "samples": {"every": None}}
    path = write_recipe(tmp_path, options)
    run = launch(config, path)
    history = tmp_path / "run" / "training.jsonl"
    while not (history.exists() and len(rows(tmp_path / "run")) > 3):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.1)
    send(run)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "stopped after step" in output
    saved = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(saved.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)
    (folder,) = saved.iterdir()
    done = int(folder.name.removeprefix("step-"))
    other = {"one-cpu": "two-cpu-ranks", "two-cpu-ranks": "one-cpu"}[config]
    resumed = launch(other, path, "--resume", "--stages.0.steps", str(done + 2))
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert f"resuming after step {done}" in output


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sharded_weights_train_measure_save_and_resume_as_whole_ones_do(family: str, workplace: Path, tmp_path: Path):
    options = recipe(workplace, output="unused")
    if family != "gpt2":
        tokenizer = AutoTokenizer.from_pretrained(workplace / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        tiny(family, vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "base")
        options["base"] = str(tmp_path / "base")
    options["stages"] = [options["stages"][1] | {"train": "all", "objective": {"kl": 1, "l1": 0.1}}]
    path = str(write_recipe(tmp_path, options))
    sharded = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    commands = {"whole": ["trainer.train"], "sharded": [*sharded, "-m", "tests.trainer.sharded"]}

    def run(name: str, command: list[str], *more: str, code: int = 0) -> str:
        arguments = ["--config", path, "--output", str(tmp_path / name), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [sys.executable, "-m", *command, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    for name, command in commands.items():
        run(name, command)
        run(name, command, "--resume", "--stages.0.steps", "7")
    assert_same_curves(rows(tmp_path / "whole"), rows(tmp_path / "sharded"))
    for name, command in zip(commands, reversed(commands.values()), strict=True):  # each by the other's command
        changed = ["--resume", "--stages.0.steps", "9", "--stages.0.train", "attention"]
        said = run(name, command, *changed, code=2 if command == commands["whole"] else 1)  # the launcher's is 1
        assert 'stages.0.train "all" -> "attention": the stage has begun' in said
        run(name, command, "--resume", "--stages.0.steps", "9")
    assert_same_curves(rows(tmp_path / "whole"), rows(tmp_path / "sharded"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_says_how_it_is_launched(path: Path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert f"accelerate launch --config_file {path} trainer/train.py --config" in path.read_text()
