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


def test_folders_below_a_home_folder_mean_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base: b, attention: {method: nsa}, stages: [{stage: distil, steps: 1}], output: ~/run}")
    config = load_config(recipe, ["--data.cache", "~/cache"])
    assert (config.output, config.data.cache) == ("/home/me/run", "/home/me/cache")
    assert load_config(recipe, ["--output", "~no-such-user/x"]).output == "~no-such-user/x"


TEXTS = [
    "runs/x/try #2",
    "A: B",
    "my book: part 1.txt",
    "'quoted'",
    '"quoted"',
    "- dash",
    "&anchor",
    "*star.txt",
    "!tag",
    "{brace}",
    "[final] book.txt",
    "a, b",
    "007",
    "1e3",
    "yes",
    "true",
    " spaces ",
    "%TAG",
    "@user",
    "`tick`",
    "? key",
    "| bar",
    "> fold",
    "C:\\new\\table",
    "naïve – 日本.txt",
    "-",
]


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.yaml"
    stages = [{"stage": kind, "steps": 9} for kind in ("transfer", "distil", "distil")]
    path.write_text(yaml.safe_dump({"base": "b", "attention": {"method": "masks"}, "output": "o", "stages": stages}))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is(text: str, short: Path):
    options = ["base", "variant", "output", "card.name", "card.train_data", "eval.text", "data.cache", "data.column"]
    words = [word for name in options for word in (f"--{name}", text)]
    for arguments in (words, [f"--{name}={text}" for name in options]):
        config = load_config(short, arguments)
        found = [config.base, config.variant, config.output, config.card.name, config.card.train_data]
        assert [*found, config.eval.text, config.data.cache, config.data.column] == [text] * len(options)


@pytest.mark.parametrize("text", TEXTS)
def test_lists_of_text_are_words_as_they_are(text: str, short: Path):
    assert load_config(short, ["--data.train", text]).data.train == [text]
    assert load_config(short, ["--data.train", text, "b.txt", text, "--seed", "1"]).data.train == [text, "b.txt", text]
    assert load_config(short, [f"--samples.prompts={text}", "--seed", "1"]).samples.prompts == [text]


def test_a_list_may_be_yaml_unless_it_is_a_file(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(short, ["--data.train", '["a.txt", "b #2.txt"]']).data.train == ["a.txt", "b #2.txt"]
    assert load_config(short, ["--data.train", "[a.txt]"]).data.train == ["a.txt"]
    Path("[a.txt]").touch()
    assert load_config(short, ["--data.train", "[a.txt]"]).data.train == ["[a.txt]"]
    assert load_config(short, ["--data.train", "null"]).data.train is None


def test_nothing_is_said_by_null(short: Path):
    arguments = ["--variant", "null", "--card.name=null", "--data.documents", "null", "--data.valid_split", "null"]
    config = load_config(short, arguments)
    assert [config.variant, config.card.name, config.data.documents, config.data.valid_split] == [None] * 4
    assert load_config(short, ["--output", "null"]).output == "null"  # which cannot be nothing


def test_options_of_a_method_are_yaml_and_text_in_them_is_whole(short: Path):
    config = load_config(short, ["--attention", "{method: masks, candidates: [window(4)]}"])
    assert config.attention == {"method": "masks", "candidates": ["window(4)"]}
    config = load_config(short, ["--attention.method", "performer", "--attention.feature_map", "relu"])
    assert config.attention == {"method": "performer", "feature_map": "relu"}
    values = {"attention": {}}
    assert apply_overrides(values, ["--attention.x", "a #b", "--attention.y", "'a'", "--attention.z", "1e-3"]) == []
    assert values["attention"] == {"x": "a #b", "y": "a", "z": 1e-3}


def test_a_kind_names_all_stages_of_that_kind(short: Path):
    config = load_config(short, ["--stages.distil.micro_batch_size", "2", "--stages.distil.objective.ce", "0.5"])
    assert [stage.micro_batch_size for stage in config.stages] == [None, 2, 2]
    assert [stage.objective.ce for stage in config.stages[1:]] == [0.5, 0.5]
    config = load_config(short, ["--stages.2.micro_batch_size", "2", "--stages.1.train", "all"])
    assert [stage.micro_batch_size for stage in config.stages] == [None, None, 2]
    assert [stage.train for stage in config.stages[1:]] == ["all", "attention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output"], "--output: needs a value"),
        (["--max_steps"], "--max_steps: needs a value"),
        (["--stages.distil.lr", "--seed", "1"], "--stages.distil.lr: needs a value"),
        (["--data.train", "--seed", "1"], "--data.train: needs a value"),
        (["--output="], "output: "),
        (["--output", "o", "p"], "'p' is not an option"),
        (["--data.train=a.txt", "b.txt"], "'b.txt' is not an option"),
        (["--stages.pretrain.lr", "1"], "there is no 'pretrain' among 0 (transfer), 1 (distil), 2 (distil)"),
        (["--data.train", "[]", "--data.valid", "[]"], "data: train and valid must name a file, or be null"),
        (["--eval.context", "[" * 5000], "the value is not YAML"),
        (["--stages.3.lr", "1"], "--stages.3.lr has no place in the recipe"),
        (["--base.x", "1"], "--base.x has no place in the recipe"),
        (["--eval.context", "[1"], "--eval.context [1: the value is not YAML"),
        (["--eval.context", "many"], "eval.context: "),
        (["--dta.train", "x"], "dta: is not an option"),
        (["--data.trian", "x: y"], "data.trian: the value is not YAML|data.trian: is not an option"),
    ],
)
def test_what_cannot_be_set_is_said(arguments: list[str], message: str, short: Path):
    with pytest.raises(ConfigError) as caught:
        load_config(short, arguments)
    assert any(part in str(caught.value) for part in message.split("|"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{n_layers: 2}", "new.config: 'n_layers' is not an option of GPT2Config; is n_layer meant?"),
        ("{n_layer: 2, heads: 2, depth: 1}", "new.config: 'depth' is not an option of GPT2Config"),
        ("{n_layer: two}", "new.config: Field 'n_layer' expected int, got str"),
        ("{n_layer: 1.5}", "new.config: Field 'n_layer' expected int, got float"),
        ("{n_layer: 0}", "new.config: n_layer must be at least 1 (got 0)"),
        ("{activation_function: gelu_newer}", "activation_function 'gelu_newer' is not one"),
        ("small", "new.config: "),
    ],
)
def test_options_that_a_new_model_has_not_are_named(options: str, message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "{new: {tokenizer: t, family: gpt2}, data: {train: a}, stages: [{stage: pretrain, steps: 1}], output: o}"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--new.config", options])
    assert message in str(caught.value)
    config = load_config(path, ["--new.config", "{n_layer: 2, hidden_size: 64}", "--new.config.n_head", "2"])
    assert config.new.config == {"n_layer": 2, "hidden_size": 64, "n_head": 2}


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
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("base: caf\u00e9".encode("latin-1"), "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("\ufeff- a", "must be a mapping"),
    ],
)
def test_what_is_no_recipe(content: str | bytes | None, message: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
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
