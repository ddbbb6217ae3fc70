"""A run goes on under another config, base or text: what changed is said, and what makes no sense is refused."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import made_text, recipe, write_recipe
from trainer import resume, train
from trainer.config import AnyStage, DistilConfig, PretrainConfig, RunConfig, TransferConfig
from trainer.history import History
from trainer.loop import Loop
from trainer.observer import Observer
from trainer.resume import KINDS, Kind, Place, compare
from trainer.signals import EXIT_STOPPED

Recipe = dict[str, Any]


def options_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options of a section and of the sections in it."""
    for name, info in model.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", [])]
        (section,) = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)] or [None]
        if name == "stages":
            for stage in get_args(get_args(AnyStage)[0]):
                yield from options_of(stage, "stages.")
        elif section is not None:
            yield from options_of(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_option_is_classified():
    assert set(options_of(RunConfig)) == set(KINDS)
    assert len(KINDS) == sum(len(options.split()) for options in resume.OPTIONS.values())
    assert {name.split(".")[-2] for name in KINDS if "." in name} - {"stages"} == set(resume.SECTIONS)


# What a run is told in place of what `fit` or `pretrain` says.
OTHER = {
    "base": "other-base",
    "variant": "other-variant",
    "attention": {"method": "masks", "candidates": ["window(4)", "first(1)"]},
    "output": None,
    "resume": None,
    "max_steps": 12,
    "seed": 1,
    "precision": "bf16",
    "cpu": False,
    "gradient_checkpointing": True,
    "push_to": "user/repo",
    "push_every": 100,
    "private": True,
    "trackers": [],
    "dry_run": None,
    "log_every": 2,
    "new.tokenizer": None,
    "new.config": None,
    "data.train": "other.txt",
    "data.valid": "other.txt",
    "data.dataset": None,
    "data.name": None,
    "data.revision": None,
    "data.train_split": None,
    "data.valid_split": None,
    "data.test_split": None,
    "data.column": "words",
    "data.rename": None,
    "data.documents": "line",
    "data.sampled_tokens": 2048,
    "data.sample_batch": 32,
    "data.valid_fraction": 0.1,
    "data.cache": "other-cache",
    "stages.stage": None,
    "stages.steps": 7,
    "stages.batch_size": 8,
    "stages.micro_batch_size": 1,
    "stages.context": 48,
    "stages.final_context": 64,
    "stages.final_fraction": 0.4,
    "stages.lr": 1e-4,
    "stages.mechanism_lr": 1e-4,
    "stages.weight_decay": 0.1,
    "stages.betas": [0.8, 0.9],
    "stages.clip": 0.5,
    "stages.schedule.warmup": 0.5,
    "stages.schedule.constant": 0.5,
    "stages.schedule.decay": "linear",
    "stages.schedule.final": 0.5,
    "stages.muon": False,
    "stages.muon_lr": 0.01,
    "stages.muon_momentum": 0.9,
    "stages.layers": [1],
    "stages.output": 0.5,
    "stages.weights": 0.5,
    "stages.selection": 0.5,
    "stages.train": "all",
    "stages.objective.kl": 0.5,
    "stages.objective.ce": 0.5,
    "stages.objective.reverse_kl": 0.5,
    "stages.objective.jsd": 0.5,
    "stages.objective.l1": 0.5,
    "eval.every": 3,
    "eval.tokens": 64,
    "eval.context": 16,
    "eval.batch_size": 2,
    "eval.text": "other.txt",
    "eval.keep": "best",
    "samples.prompts": ["A ship"],
    "samples.length": 4,
    "samples.temperature": 0.0,
    "samples.every": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "card.name": "name",
    "card.license": "apache-2.0",
    "card.language": "de",
    "card.train_data": "words",
    "card.eval_data": "words",
}


def fit(workplace: Path) -> Recipe:
    return recipe(workplace)


def pretrain(workplace: Path) -> Recipe:
    stage = {"stage": "pretrain", "steps": 8, "batch_size": 4, "context": 32, "muon": True}
    return recipe(workplace, stages=[stage], attention=None)


RECIPES = {"fit": fit, "pretrain": pretrain}
STOPS = {"transfer": ("fit", 2), "distil": ("fit", 6), "pretrain": ("pretrain", 3)}  # a stage, and a step inside it


@pytest.fixture(scope="module")
def place(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace of this file's own, with another base, text and variant beside."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(workplace, folder, dirs_exist_ok=True)
    shutil.copytree(folder / "base", folder / "other-base")
    change_weights(folder / "other-base")
    (folder / "other.txt").write_text(made_text(seed=2))
    for name, seed in (("variant", 0), ("other-variant", 1)):
        options = recipe(folder, output=str(folder / f"run-{name}"), seed=seed)
        assert run(folder, options) == 0
        shutil.copytree(folder / f"run-{name}" / "variant", folder / name)
    return folder


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def run(folder: Path, options: Recipe, *arguments: str, stop: int | None = None) -> int:
    """Runs a recipe; stops it after a step."""
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            patch.setattr(Loop, "_stop_asked", lambda self: self.step == stop)
        return train.main(["--config", str(write_recipe(folder, options)), *arguments])


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Path]:
    """Runs that nobody stopped."""
    for name, make in RECIPES.items():
        assert run(place, {**make(place), "output": str(place / f"whole-{name}")}) == 0
    return {name: place / f"whole-{name}" for name in RECIPES}


@pytest.fixture(scope="module")
def stopped(place: Path) -> dict[str, Path]:
    """Runs that were stopped, by the stage they are in."""
    for stage, (name, step) in STOPS.items():
        options = {**RECIPES[name](place), "output": str(place / f"in-{stage}")}
        assert run(place, options, stop=step) == EXIT_STOPPED
    return {stage: place / f"in-{stage}" for stage in STOPS}


def result(folder: Path) -> bytes:
    (weights,) = [*folder.glob("variant/model.safetensors"), *folder.glob("model/model.safetensors")]
    return weights.read_bytes()


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "training.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def content(folder: Path) -> dict[Path, bytes]:
    """All of a run's folder but its log."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("train.log", ".lock")]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def stages_of(options: Recipe, stage: str) -> Recipe:
    return next(one for one in options["stages"] if one["stage"] == stage)


def put(options: Recipe, name: str, value: Any, stage: str, place: Path) -> None:
    """Sets an option of that dotted name; of a stage, in that one."""
    *parents, last = name.split(".")
    section = options
    for parent in parents:
        section = stages_of(options, stage) if parent == "stages" else section.setdefault(parent, {})
    is_path = isinstance(value, str) and value.startswith("other")
    section[last] = str(place / value) if is_path else value


def goes_on(source: Path, target: Path, options: Recipe) -> tuple[int, str]:
    """Copies a stopped run and resumes it; the exit code and what was logged since."""
    shutil.copytree(source, target / "run")
    (target / "run" / "train.log").unlink(missing_ok=True)
    code = run(target, {**options, "output": str(target / "run")}, "--resume")
    return code, (target / "run" / "train.log").read_text()


def is_refused(source: Path, target: Path, options: Recipe, *sentences: str) -> None:
    """Checks that a run does not go on, says why, and is as it was."""
    code, log = goes_on(source, target, options)
    assert code == 2, log
    assert "cannot go on like this" in log
    for sentence in sentences:
        assert sentence in log
    assert content(target / "run") == content(source)


def is_noted(source: Path, target: Path, options: Recipe, *changes: str) -> dict[str, Any]:
    """Checks that a run goes on to its end, and that log and history say what changed; gives the row."""
    code, log = goes_on(source, target, options)
    assert code == 0, log
    (row,) = rows(target / "run", "change")
    assert row["step"] == int(sorted(path.name for path in source.glob("checkpoints/*"))[-1].removeprefix("step-"))
    for change in changes:
        assert any(change in line for line in row["changes"])
        assert change in log
    (weights,) = [*(target / "run").glob("variant/model.s*"), *(target / "run").glob("model/model.s*")]
    assert all(tensor.isfinite().all() for tensor in load_file(weights).values())
    return row


ISSUE = {
    "train all": ("distil", {"stages.train": "all"}, 'stages.1.train "attention" -> "all"'),
    "train mechanism": ("distil", {"stages.train": "mechanism"}, 'stages.1.train "attention" -> "mechanism"'),
    "layers": ("distil", {"stages.layers": [1]}, "stages.1.layers null -> [1]"),
    "layers in transfer": ("transfer", {"stages.layers": [0]}, "stages.0.layers null -> [0]"),
    "muon": ("pretrain", {"stages.muon": False}, "stages.0.muon true -> false"),
    "context": ("distil", {"stages.context": 32}, "stages.1.context 16 -> 32"),
    "fewer steps": ("distil", {"stages.steps": 2}, "stages.1.steps 5 -> 2: it has made 3 already"),
    "attention": ("distil", {"attention": OTHER["attention"]}, "attention.candidates ["),
    "method": ("distil", {"attention": {"method": "performer"}}, 'attention.method "masks" -> "performer"'),
    "base": ("distil", {"base": "other-base"}, "base: its weights are others (SHA-256"),
    "base of pretraining": ("pretrain", {"base": "other-base"}, "base: its weights are others (SHA-256"),
    "variant": ("distil", {"variant": "other-variant"}, "variant: its weights are others (SHA-256 none ->"),
}


@pytest.mark.parametrize("name", ISSUE)
def test_what_makes_no_sense_is_refused_and_the_run_stays_as_it_was(
    name: str, place: Path, stopped: dict[str, Path], tmp_path: Path
):
    stage, changes, sentence = ISSUE[name]
    options = RECIPES[STOPS[stage][0]](place)
    for option, value in changes.items():
        put(options, option, value, stage, place)
    is_refused(stopped[stage], tmp_path, options, sentence)


def test_stages_that_have_begun_stay(place: Path, stopped: dict[str, Path], tmp_path: Path):
    options = fit(place)
    transfer, distil = options["stages"]
    cases = {
        "swapped": ([distil, transfer], "stages.0 is now what stages.1 was"),
        "first out": ([distil], "the run is in stages.1, which is not there any more"),
        "last out": ([transfer], "the run is in stages.1, which is not there any more"),
        "one put in": ([transfer, transfer, distil], "stages.2 is now what stages.1 was"),
        "other kind": ([{**distil, "lr": 1e-3}, distil], 'stages.0.stage "transfer" -> "distil"'),
        "an option of one that is over": ([{**transfer, "lr": 0.5}, distil], "stages.0.lr 0.0005 -> 0.5: the stage is"),
        "fewer steps of one that is over": ([{**transfer, "steps": 2}, distil], "stages.0.steps 3 -> 2: it has made 3"),
    }
    for name, (stages, sentence) in cases.items():
        is_refused(stopped["distil"], tmp_path / name, {**options, "stages": stages}, sentence)


def test_two_stages_of_one_kind_cannot_be_swapped_or_cut(place: Path, tmp_path: Path):
    options = fit(place)
    one, two = ({**options["stages"][1], "steps": steps, "lr": lr} for steps, lr in ((3, 1e-3), (4, 1e-4)))
    three = {**one, "steps": 5}
    options["stages"] = [one, two, three]
    assert run(place, {**options, "output": str(tmp_path / "source")}, stop=5) == EXIT_STOPPED
    for name, stages in {"swapped": [two, one, three], "cut": [two, three], "rotated": [three, one, two]}.items():
        is_refused(tmp_path / "source", tmp_path / name, {**options, "stages": stages}, "is now what stages.")
    is_noted(
        tmp_path / "source", tmp_path / "later", {**options, "stages": [one, two]}, "stages distil, distil, distil ->"
    )


NOTED = {
    "rate, batch, seed, loss": (
        "distil",
        {"stages.lr": 1e-4, "stages.batch_size": 2, "seed": 1, "stages.objective.jsd": 0.5},
        (
            "stages.1.lr 0.0005 -> 0.0001",
            "stages.1.batch_size 4 -> 2",
            "seed 0 -> 1",
            "stages.1.objective.jsd 0.0 -> 0.5",
        ),
    ),
    "more steps, a final context to come": (
        "distil",
        {"stages.steps": 9, "stages.final_context": 64},
        ("stages.1.steps 5 -> 9", "stages.1.final_context 32 -> 64"),
    ),
    "fewer steps, more than made": ("distil", {"stages.steps": 4}, ("stages.1.steps 5 -> 4",)),
    "steps of a coming stage": ("transfer", {"max_steps": 12}, ("stages.0.steps 3 -> 4", "stages.1.steps 5 -> 8")),
    "text, validation": (
        "distil",
        {"data.train": "other.txt", "eval.tokens": 64},
        ("training text ", "data.train [", "eval.tokens 128 -> 64"),
    ),
    "muon's rate": ("pretrain", {"stages.muon_lr": 0.01}, ("stages.0.muon_lr 0.02 -> 0.01",)),
}


@pytest.mark.parametrize("name", NOTED)
def test_other_changes_are_in_the_log_and_the_history(name: str, place: Path, stopped: dict[str, Path], tmp_path: Path):
    stage, changes, sentences = NOTED[name]
    options = RECIPES[STOPS[stage][0]](place)
    for option, value in changes.items():
        put(options, option, value, stage, place)
    is_noted(stopped[stage], tmp_path, options, *sentences)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["resume"] is True


def test_a_text_that_was_edited_is_noted_and_one_that_moved_is_not(
    place: Path, stopped: dict[str, Path], whole: dict[str, Path], tmp_path: Path
):
    options = fit(place)
    for name in ("moved", "edited"):
        (tmp_path / name).mkdir()
        shutil.copyfile(place / "train.txt", tmp_path / name / "text.txt")
    with (tmp_path / "edited" / "text.txt").open("a") as file:
        file.write("One line more.\n")
    options["data"]["train"] = str(tmp_path / "moved" / "text.txt")
    code, log = goes_on(stopped["distil"], tmp_path / "moved", options)
    assert code == 0
    assert "changed without effect on the training: data.train" in log
    assert not rows(tmp_path / "moved" / "run", "change")
    assert result(tmp_path / "moved" / "run") == result(whole["fit"])
    options["data"]["train"] = str(tmp_path / "edited" / "text.txt")
    row = is_noted(stopped["distil"], tmp_path / "edited", options)
    assert [change.split()[0] for change in row["changes"]] == ["training", "data.train"]


def test_a_base_whose_weights_or_config_were_replaced_is_refused_and_one_that_moved_is_not(place: Path, tmp_path: Path):
    shutil.copytree(place / "base", tmp_path / "base")
    options = {**fit(place), "base": str(tmp_path / "base")}
    source = tmp_path / "source"
    assert run(tmp_path, {**options, "output": str(source)}, stop=6) == EXIT_STOPPED
    assert goes_on(source, tmp_path / "moved", {**options, "base": str(place / "base")})[0] == 0
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))
    is_refused(source, tmp_path / "config", options, "base: layer_norm_epsilon 1e-05 -> 0.1 in its config")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    change_weights(tmp_path / "base")
    is_refused(source, tmp_path / "weights", options, "base: its weights are others")


def test_a_variant_that_is_continued_must_stay_the_same(place: Path, tmp_path: Path):
    shutil.copytree(place / "variant", tmp_path / "variant")
    stages = fit(place)["stages"][1:]
    options = {**fit(place), "variant": str(tmp_path / "variant"), "attention": None, "stages": stages}
    options["base"] = str(place / "base")
    source = tmp_path / "source"
    assert run(tmp_path, {**options, "output": str(source)}, stop=2) == EXIT_STOPPED
    assert run(tmp_path, {**options, "output": str(tmp_path / "whole")}) == 0
    assert goes_on(source, tmp_path / "same", options)[0] == 0
    assert result(tmp_path / "same" / "run") == result(tmp_path / "whole")
    own = fit(place)["attention"]
    assert goes_on(source, tmp_path / "named", {**options, "attention": own})[0] == 0  # its own options, spelt out
    is_refused(source, tmp_path / "fresh", {**options, "variant": None, "attention": own}, "variant: its weights")
    shutil.rmtree(tmp_path / "variant")
    shutil.copytree(place / "other-variant", tmp_path / "variant")
    is_refused(source, tmp_path / "other", options, "variant: its weights are others (SHA-256 ")


@pytest.fixture(scope="module")
def best(place: Path) -> Path:
    """A finished run whose weights were best after three steps, and which kept them."""
    options = fit(place)
    options["eval"] |= {"keep": "best", "every": 1}
    options["stages"][1] |= {"lr": 0.1, "clip": None, "train": "all"}
    assert run(place, {**options, "output": str(place / "best")}) == 0
    measured = [row["kl"] for row in rows(place / "best", "eval")]
    assert min(measured) < measured[-1]
    return place / "best"


def test_the_best_weights_are_forgotten_when_they_are_no_longer_wanted(best: Path, tmp_path: Path):
    options = yaml.safe_load((best / "config.yaml").read_text())
    options["eval"]["keep"] = "last"
    row = is_noted(best, tmp_path, options, 'eval.keep "best" -> "last"')
    assert row["step"] == 8
    saved = load_file(tmp_path / "run" / "variant" / "model.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    kept = load_file(best / "variant" / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(saved[name], last[f"weights/{name}"].half())
    assert name not in kept  # the best ones had the base's own there
    card = (tmp_path / "run" / "variant" / "README.md").read_text()
    assert f"{rows(best, 'eval')[-1]['kl']:.4f}" in card


def test_figures_that_would_not_compare_are_refused_where_the_best_weights_are_kept(
    best: Path, place: Path, tmp_path: Path
):
    options = yaml.safe_load((best / "config.yaml").read_text())
    for option, value in (("tokens", 64), ("context", 16)):
        changed = {**options, "eval": {**options["eval"], option: value}}
        is_refused(best, tmp_path / option, changed, "with eval.keep best, figures before and after would not compare")
    changed = {**options, "data": {**options["data"], "valid": [str(place / "other.txt")]}}
    is_refused(best, tmp_path / "text", changed, "validation text: with eval.keep best")


def test_the_best_weights_are_whole_when_a_coming_stage_trains_more(place: Path, tmp_path: Path):
    options = fit(place)
    options["eval"] |= {"keep": "best", "every": 1}
    options["stages"] = [{**options["stages"][1], "train": "mechanism"}, {**options["stages"][1], "train": "attention"}]
    source = tmp_path / "source"
    assert run(tmp_path, {**options, "output": str(source)}, stop=3) == EXIT_STOPPED
    options["stages"][1] |= {"train": "all", "lr": 0.5, "clip": None}
    is_noted(source, tmp_path, options, 'stages.1.train "attention" -> "all"')
    measured = rows(tmp_path / "run", "eval")
    assert min(measured, key=lambda row: row["kl"])["step"] <= 5  # so that what is saved has the base's own weights
    assert set(load_file(tmp_path / "run" / "variant" / "model.safetensors")) == {
        f"transformer.h.{layer}.attn.mechanism.{name}" for layer in range(2) for name in ("active", "alpha")
    }


def test_a_finished_run_goes_on_with_more_and_refuses_less(place: Path, whole: dict[str, Path], tmp_path: Path):
    options = fit(place)
    transfer, distil = options["stages"]
    refused = {
        "fewer": ([transfer, {**distil, "steps": 4}], "stages.1.steps 5 -> 4: it has made 5 already"),
        "max": ([{**transfer, "steps": 2}, {**distil, "steps": 4}], "stages.0.steps 3 -> 2: it has made 3 already"),
        "first out": ([distil], "the run is in stages.1, which is not there any more"),
        "another rate": ([transfer, {**distil, "lr": 1e-4}], "stages.1.lr 0.0005 -> 0.0001: the stage is over"),
    }
    for name, (stages, sentence) in refused.items():
        is_refused(whole["fit"], tmp_path / name, {**options, "stages": stages}, sentence)
    more = [{**transfer, "steps": 4}, {**distil, "steps": 7}]
    is_noted(
        whole["fit"],
        tmp_path / "more",
        {**options, "stages": more},
        "stages.0.steps 3 -> 4 (without effect: it ended after 3)",
        "stages.1.steps 5 -> 7",
    )
    assert rows(tmp_path / "more" / "run", "train")[-1]["step"] == 10
    is_noted(
        whole["fit"],
        tmp_path / "added",
        {**options, "stages": [transfer, distil, distil]},
        "stages transfer, distil ->",
    )
    code, log = goes_on(whole["fit"], tmp_path / "same", options)
    assert code == 0
    assert "changed from" not in log
    assert content(tmp_path / "same" / "run").keys() == content(whole["fit"]).keys()
    assert result(tmp_path / "same" / "run") == result(whole["fit"])
    assert len(rows(tmp_path / "same" / "run", "eval")) == len(rows(whole["fit"], "eval"))


def test_more_steps_in_all_go_on_too(place: Path, whole: dict[str, Path], tmp_path: Path):
    is_noted(whole["fit"], tmp_path, {**fit(place), "max_steps": 16}, "stages.1.steps 5 -> 10")
    assert rows(tmp_path / "run", "train")[-1]["step"] == 13


def test_a_run_that_changed_twice_says_so_twice(place: Path, stopped: dict[str, Path], tmp_path: Path):
    shutil.copytree(stopped["pretrain"], tmp_path / "run")
    options = {**pretrain(place), "output": str(tmp_path / "run")}
    options["stages"][0]["lr"] = 1e-4
    assert run(tmp_path, options, "--resume", stop=5) == EXIT_STOPPED
    options["stages"][0]["lr"] = 1e-5
    assert run(tmp_path, options, "--resume") == 0
    changes = [(row["step"], row["changes"]) for row in rows(tmp_path / "run", "change")]
    assert changes == [(3, ["stages.0.lr 0.0005 -> 0.0001"]), (5, ["stages.0.lr 0.0001 -> 1e-05"])]
    by_step = {row["step"]: row["lr"] for row in rows(tmp_path / "run", "train")}
    assert by_step[3] > 1e-4 >= by_step[4] > 1e-5 >= by_step[6]


def test_means_of_terms_count_the_steps_that_had_them(place: Path, tmp_path: Path):
    options = fit(place)
    options["stages"] = [{**options["stages"][1], "steps": 4, "final_context": None}]
    options |= {"log_every": 4, "output": str(tmp_path / "run")}
    assert run(tmp_path, options, stop=2) == EXIT_STOPPED
    options["stages"][0]["objective"] = {"kl": 1.0, "jsd": 1.0}
    assert run(tmp_path, options, "--resume", "--log_every", "4") == 0
    (row,) = rows(tmp_path / "run", "train")
    options |= {"log_every": 1, "output": str(tmp_path / "each")}
    del options["stages"][0]["objective"]
    assert run(tmp_path, options, stop=2) == EXIT_STOPPED
    options["stages"][0]["objective"] = {"kl": 1.0, "jsd": 1.0}
    assert run(tmp_path, options, "--resume") == 0
    each = rows(tmp_path / "each", "train")
    assert row["kl"] == pytest.approx(sum(one["kl"] for one in each) / 4)
    assert row["jsd"] == pytest.approx(sum(one["jsd"] for one in each[2:]) / 2)


def test_parameters_that_a_weight_of_the_loss_takes_out_are_named(place: Path, tmp_path: Path):
    """Without its loss, what chooses keys is not trained, though every option of what is trained is the same."""
    options = fit(place)
    options["attention"] = {"method": "masks", "candidates": ["window(4)", "top(2)"]}
    options["stages"] = [options["stages"][0]]
    source = tmp_path / "source"
    assert run(place, {**options, "output": str(source)}, stop=2) == EXIT_STOPPED
    options["stages"][0]["selection"] = 0.5
    is_noted(source, tmp_path / "less", options, "stages.0.selection 1.0 -> 0.5")
    options["stages"][0]["selection"] = 0.0
    name = "AdamW/transformer.h.0.attn.mechanism.to_scores"
    is_refused(source, tmp_path / "none", options, f"no longer trained in the middle of the stage: {name}")


def test_a_checkpoint_of_an_earlier_version_is_refused(
    place: Path, stopped: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(stopped["distil"], tmp_path / "run")
    options = {**fit(place), "output": str(tmp_path / "run")}
    read = Loop._changes

    def without_record(self: Loop, snapshot: Any) -> list[str]:
        del snapshot.state["record"]
        return read(self, snapshot)

    monkeypatch.setattr(Loop, "_changes", without_record)
    assert run(tmp_path, options, "--resume") == 2
    assert "are of an earlier version" in (tmp_path / "run" / "train.log").read_text()


def has(stage: str, option: str) -> bool:
    kinds = {"pretrain": PretrainConfig, "transfer": TransferConfig, "distil": DistilConfig}
    return option in options_of(kinds[stage], "stages.")


CLOSE = ("stages.micro_batch_size", "gradient_checkpointing")  # sums, and draws of dropout, have another order
CASES = [
    (option, stage)
    for option, value in OTHER.items()
    for stage in (STOPS if option.startswith("stages.") else ["distil"])
    if value is not None and option != "max_steps" and (not option.startswith("stages.") or has(stage, option))
]


@pytest.mark.long
@pytest.mark.parametrize(("option", "stage"), CASES, ids=str)
def test_each_option_does_what_its_kind_says(
    option: str, stage: str, place: Path, whole: dict[str, Path], stopped: dict[str, Path], tmp_path: Path
):
    name, _ = STOPS[stage]
    options = RECIPES[name](place)
    put(options, option, OTHER[option], stage, place)
    kind, source = KINDS[option], stopped[stage]
    if kind is Kind.STAGE or kind is Kind.MODEL:
        is_refused(source, tmp_path, options)
        return
    if option in ("cpu", "push_to", "push_every"):
        pytest.skip("needs another machine")
    code, log = goes_on(source, tmp_path, options)
    if code == 2:  # a value that does not go with the rest is a mistake of its own
        assert content(tmp_path / "run") == content(source)
        assert kind is not Kind.FREE, log
        return
    assert code == 0, log
    changes = [line for row in rows(tmp_path / "run", "change") for line in row["changes"]]
    if kind in (Kind.NOTED, Kind.FIGURE):
        assert any(option.removeprefix("stages.") in change for change in changes)
    elif kind is Kind.FREE:
        assert changes == []
        assert option in CLOSE or result(tmp_path / "run") == result(whole[name])


def tensors(folder: Path) -> list[torch.Tensor]:
    (weights,) = [*folder.glob("variant/model.safetensors"), *folder.glob("model/model.safetensors")]
    return list(load_file(weights).values())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_pairs_of_changes_go_on_or_are_refused_but_never_break(
    seed: int, place: Path, stopped: dict[str, Path], tmp_path: Path
):
    rng = random.Random(seed)
    stage = rng.choice(list(STOPS))
    name, _ = STOPS[stage]
    options = RECIPES[name](place)
    for option in rng.sample([option for option, value in OTHER.items() if value is not None], 2):
        if option != "push_to" and (not option.startswith("stages.") or has(stage, option)):
            put(options, option, OTHER[option], stage, place)
    if name == "pretrain":
        options |= {"attention": None, "variant": None}
    code, log = goes_on(stopped[stage], tmp_path, options)
    assert code in (0, 2), log
    assert "Traceback" not in log
    if code == 2:
        assert content(tmp_path / "run") == content(stopped[stage])
    else:
        assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run"))


@pytest.fixture(scope="module")
def records(workplace: Path) -> dict[str, resume.Record]:
    """What a record of each recipe looks like."""
    made = {}
    for name, make in RECIPES.items():
        config = RunConfig.model_validate({**make(workplace), "output": "run"}).model_dump(mode="json")
        texts = {"train": [100, "a"], "valid": [10, "b"]}
        made[name] = {
            "config": json.loads(json.dumps(config)),
            **{"base": "c", "base_config": {"n_layer": 2}, "variant": None, "attention": config["attention"]},
            "texts": texts,
        }
    return made


def changed(record: resume.Record, stage: str, options: list[str]) -> resume.Record:
    record = copy.deepcopy(record)
    for option in options:
        put(record["config"], option, OTHER[option], stage, Path("folder"))
        if KINDS[option] is Kind.TEXT:
            record["texts"]["test" if option == "eval.text" else "train"] = [50, option]
        if option == "attention":
            record["attention"] = OTHER["attention"]
        if option in ("base", "variant"):
            record[option] = "other"
    return record


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_changes_is_named_and_two_changes_are_as_bad_as_each(
    data: st.DataObject, records: dict[str, resume.Record]
):
    name = data.draw(st.sampled_from(list(RECIPES)))
    kinds = [stage["stage"] for stage in records[name]["config"]["stages"]]
    stage = data.draw(st.sampled_from(kinds))
    number = data.draw(st.integers(0, len(kinds) - 1))
    place = Place(number, data.draw(st.integers(1, records[name]["config"]["stages"][number]["steps"])))
    candidates = [
        option
        for option, value in OTHER.items()
        if value not in (None, [])
        and option not in ("max_steps", "cpu", "data.column")
        and (not option.startswith("stages.") or has(stage, option))
    ]
    options = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=2, unique=True))
    then = records[name]
    both = compare(then, changed(then, stage, options), place)
    said = "\n".join([*both.refused, *both.noted, *both.harmless])
    for option in options:
        own = compare(then, changed(then, stage, [option]), place)
        assert set(own.refused) <= set(both.refused)
        last = option.removeprefix("stages.") if option.startswith("stages.") else option
        assert last in said
        if KINDS[option] is not Kind.FREE:
            assert own.refused or own.noted
        else:
            assert [*own.refused, *own.noted] == []
    assert compare(then, then, place) == resume.Verdict()


def refusal(then: list[Recipe], now: list[Recipe], place: Place) -> list[str]:
    """What is said of a list of stages alone."""
    verdict = resume.Verdict()
    resume._compare_stages(then, now, place, verdict)
    return verdict.refused


@given(
    order=st.permutations(range(4)),
    cut=st.integers(0, 4),
    number=st.integers(0, 3),
    kinds=st.lists(st.sampled_from(["transfer", "distil"]), min_size=4, max_size=4),
)
def test_stages_before_the_current_one_are_neither_moved_nor_cut(order, cut, number, kinds):
    """Whatever the kinds: stages that differ in one option alone are told apart."""
    options = {"steps": 4, "final_context": None, "final_fraction": 0.15}
    then = [{"stage": kind, "lr": place, **options} for place, kind in enumerate(kinds)]
    now = [then[place] for place in order][:cut]
    stays = now[: number + 1] == then[: number + 1]
    assert bool(refusal(then, now, Place(number, 2))) == (not stays)


@pytest.mark.parametrize("method", ["validate", "write_samples"])
@pytest.mark.parametrize(("step", "every"), [(4, None), (8, 2)])
def test_whatever_fails_in_measuring_the_step_was_saved_before(
    method: str, step: int, every: int | None, place: Path, whole: dict[str, Path], tmp_path: Path
):
    options = {**fit(place), "output": str(tmp_path / "run"), "checkpoint": {"every": every}}
    original = getattr(Observer, method)

    def breaks(self: Observer, at: int, *rest: Any) -> None:
        if at == step:
            raise RuntimeError("out of memory")
        original(self, at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, method, breaks)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(place, options)
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == f"step-{step:08d}"
    assert run(place, options) == 2  # it is not taken for a finished run, in whose place another may begin
    assert run(place, options, "--resume") == 0
    assert result(tmp_path / "run") == result(whole["fit"])
    for kind in ("train", "eval", "samples"):
        assert timeless(rows(tmp_path / "run", kind)) == timeless(rows(whole["fit"], kind))
    assert run(place, options, "--max_steps", "2") == 0


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in History.TIMES} for row in found]
