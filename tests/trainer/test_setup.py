"""What a run is made from is looked at before the first step."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import recipe, write_recipe
from trainer.train import main


def spoil(folder: Path, name: str, value: float) -> None:
    """Sets one number of a tensor in a model's file."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["fit", "pretrain"])
def test_a_base_that_is_not_finite_is_refused_with_its_tensors_named(
    kind: str, value: float, workplace: Path, tmp_path: Path
):
    base = Path(shutil.copytree(workplace / "base", tmp_path / "base"))
    names = ("transformer.h.1.mlp.c_proj.bias", "transformer.wpe.weight")
    for name in names:
        spoil(base, name, value)
    options = recipe(workplace, base=str(base), output=str(tmp_path / "run"))
    if kind == "pretrain":
        options |= {"attention": None, "stages": [{"stage": "pretrain", "steps": 1, "context": 32}]}
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"{base} is damaged" in log
    assert "numbers that are infinite or none" in log
    assert all(name in log for name in names)
    assert not (tmp_path / "run" / "training.jsonl").exists()


def test_of_many_tensors_that_are_not_finite_some_are_named_and_the_rest_counted(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "initializer_range": 3e38}
    options |= {"base": None, "attention": None, "stages": [{"stage": "pretrain", "steps": 1, "context": 32}]}
    options |= {"new": {"family": "gpt2", "tokenizer": str(workplace / "base"), "config": sizes}}
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert "the new model has weights that are NaN or infinite: transformer.wte.weight, " in log
    assert "and 3 more; what does new.config ask for?" in log


def test_all_texts_that_there_are_not_are_named_before_a_model_is_loaded(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), base="nowhere")
    options["data"] |= {"train": ["none.txt", "*.none"], "valid": ["no.jsonl"]}
    options["eval"] |= {"text": "nothing.txt"}
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert "no file matches none.txt, *.none, no.jsonl, nothing.txt (looked in " in log


@pytest.mark.parametrize(("words", "code"), [(12, 0), (200, 2)])
def test_a_prompt_that_leaves_no_room_is_refused_before_the_first_step(
    words: int, code: int, workplace: Path, tmp_path: Path
):
    options = recipe(workplace, output=str(tmp_path / "run"), max_steps=2)
    options["samples"]["prompts"] = ["The old man", " ".join(["sea"] * words)]
    assert main(["--config", str(write_recipe(tmp_path, options))]) == code
    log = (tmp_path / "run" / "train.log").read_text()
    assert ("the model holds 64 tokens, prompt and continuation together, but samples.prompts.1 has" in log) == bool(
        code
    )
    assert (tmp_path / "run" / "training.jsonl").exists() != bool(code)


@pytest.mark.parametrize("name", ["base", "variant"])
def test_a_run_does_not_write_over_what_it_starts_from(name: str, workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"))
    start = tmp_path / "run" / ("model" if name == "base" else "variant")
    shutil.copytree(workplace / "base", start)
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    (tmp_path / "link").symlink_to(start)
    options[name] = str(tmp_path / "link")
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 2
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"{name} would be replaced by the run's own result: choose another --output" in log
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
