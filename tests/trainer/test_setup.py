"""What a run is made from is looked at before the first step."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
from tests.trainer.conftest import recipe, write_recipe
from trainer.config import load_config
from trainer.positions import extend_positions
from trainer.setup import moved
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


@pytest.mark.parametrize("method", ["masks", "performer"])
def test_a_variant_moves_to_a_base_that_was_trained_further(workplace, tmp_path, method):
    """To its mechanisms, and to the base's weights with what its own fit changed added."""
    base, _ = attention.load(workplace / "base")
    options = {"method": "masks", "candidates": ["window(4)"]} if method == "masks" else {"method": "performer"}
    old = attention.convert(base, attention.config_from_dict(options))
    with torch.no_grad():
        for parameter in old.mechanisms[0].parameters():
            parameter.add_(torch.randn_like(parameter))
        old.transformer.h[1].attn.c_attn.weight.mul_(1.5)
    attention.save(old, tmp_path / "old", dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1)
    extend_positions(base, 96, "repeat")
    new = moved(str(tmp_path / "old"), base)
    before, now, given = old.state_dict(), new.state_dict(), base.state_dict()
    own = set(new.new_parameters)
    assert own == set(old.new_parameters)
    assert all(torch.equal(now[name], before[name]) for name in own)
    changed = {name for name in given if not torch.equal(now[name], given[name])}
    assert changed == {"transformer.h.1.attn.c_attn.weight"}
    name = changed.pop()
    torch.testing.assert_close(now[name], given[name] + before[name] / 3)
    assert not torch.equal(now["lm_head.weight"], before["lm_head.weight"])


def test_what_cannot_move_is_said(workplace, tmp_path):
    base, _ = attention.load(workplace / "base")
    with pytest.raises(ValueError, match="move needs a variant that names its base"):
        moved(str(workplace / "base"), base)
    old = attention.convert(base, attention.MasksConfig(candidates=["window(4)"]))
    with torch.no_grad():
        old.transformer.wpe.weight.mul_(2)
    attention.save(old, tmp_path / "old", dtype=torch.float32)
    extend_positions(base, 96, "repeat")
    with pytest.raises(ValueError, match=r"cannot be moved to the base given.*transformer\.wpe\.weight"):
        moved(str(tmp_path / "old"), base)
    with pytest.raises(attention.ConfigError, match="move takes a variant over"):
        load_config(write_recipe(tmp_path, recipe(workplace, move=True, output="o")))
