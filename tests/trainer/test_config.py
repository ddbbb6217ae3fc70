"""Recipes and overrides: what is accepted, and that all mistakes are named together."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from attention import ConfigError
from trainer.config import CardConfig, DataConfig, apply_overrides, load_config, share_steps

RECIPES = sorted(Path("trainer/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_its_own_folder(path: Path):
    config = load_config(path)
    assert config.output == f"runs/{path.stem}"
    assert f"--config {path}" in path.read_text()


def test_the_study_is_there_for_each_method():
    names = {path.stem for path in RECIPES}
    assert {f"gpt2-wikitext2-{method}" for method in ("masks", "performer", "nsa")} <= names


def test_overrides_reach_any_place(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "base": "b",
                "attention": {"method": "masks"},
                "output": "o",
                "stages": [{"stage": "transfer", "steps": 9}, {"stage": "distil", "steps": 9}],
            }
        )
    )
    arguments = "--data.train book.txt --stages.distil.lr 1e-3 --stages.0.steps=4 --resume --eval.every null"
    config = load_config(recipe, [*arguments.split(), "--samples.prompts", '["", "--x"]'])
    assert config.data.train == ["book.txt"]
    assert config.stages[1].lr == 1e-3
    assert config.stages[0].steps == 4
    assert config.resume is True
    assert config.eval.every is None
    assert config.samples.prompts == ["", "--x"]


@pytest.mark.parametrize(
    ("option", "place", "value"),
    [
        ("--precision no", "precision", "no"),
        ("--card.license no", "card", CardConfig(license="no")),
        ("--output 2026", "output", "2026"),
        ("--output 2026-01-31", "output", "2026-01-31"),
        ("--variant null", "variant", None),
        ("--trackers tensorboard", "trackers", ["tensorboard"]),
        ("--cpu on", "cpu", True),
        ("--resume false", "resume", False),
        ("--data.revision 0123456", "data", DataConfig(revision="0123456")),
        ("--attention.num_features 16", "attention", {"method": "performer", "num_features": 16}),
    ],
)
def test_values_are_what_they_look_like(option: str, place: str, value: object, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base: b, attention: {method: performer}, stages: [{stage: distil, steps: 1e0}], output: o}")
    assert getattr(load_config(recipe, option.split()), place) == value


def test_all_mistakes_are_named_at_once(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "base": "b",
                "attention": {"method": "masks", "colour": 1, "init": "warm"},
                "variant": "v",
                "stages": [{"stage": "distil", "steps": 0, "objective": {"kl": 0}}, {"stage": "pretrain", "steps": 1}],
                "data": {"train": "a", "dataset": "b", "trian": 1},
                "output": "o",
                "push_to": "no repository",
            }
        )
    )
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, ["--stages.7.steps", "3", "stray", "--max_steps", "1"])
    text = str(caught.value)
    for part in (
        "--stages.7.steps",
        "'stray' is not an option",
        "'colour' is not an option; masks has",
        "init",
        "attention and variant have no meaning there",
        "stages.0.steps",
        "there is nothing to learn",
        "pretrain cannot be mixed",
        "push_to: must be user/repo[/subfolder][@revision] (got 'no repository')",
        "data.trian: is not an option",
        "max_steps: 2 stages need",
    ):
        assert part in text
    assert len(caught.value.problems) == len(set(caught.value.problems))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("a: [", "is not YAML"), ("- a", "must be a mapping")]
)
def test_what_is_no_recipe(content: str | None, message: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(recipe)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(5, 3000))
def test_shares_add_up_and_leave_no_stage_out(steps: list[int], total: int):
    shares = share_steps(steps, total)
    assert sum(shares) == total
    assert min(shares) >= 1
    for part, share in zip(steps, shares, strict=True):
        assert abs(share - total * part / sum(steps)) <= len(steps)


@pytest.mark.parametrize("word", ["--a.b.c", "--s.x.y", "--s.other.y"])
def test_an_override_of_no_place_is_a_problem_and_changes_nothing(word: str):
    values = {"a": {"b": 1}, "s": [{"stage": "x"}]}
    assert apply_overrides(values, [word.replace("--s.x.y", "--s.9.y"), "1"])
    assert values == {"a": {"b": 1}, "s": [{"stage": "x"}]}
