"""Files of a run, cut short or with a bit flipped: none is used without a word, and nothing crashes."""

import shutil
from pathlib import Path

import pytest

import attention
from demo.models import ModelStore
from demo.training import facts, read_card, read_history
from tests.attention.checkpoints import damage
from tests.trainer.conftest import recipe, write_recipe
from trainer import checkpointing
from trainer.train import main

pytestmark = [pytest.mark.long, pytest.mark.parametrize("seed", range(200))]
UNCHECKED = ("README.md", "curves.png")  # for people, who may edit them


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `run`."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(workplace / "base", folder / "base")
    options = recipe(workplace, base=str(folder / "base"), output=str(folder / "run"))
    assert main(["--config", str(write_recipe(folder, options))]) == 0
    return folder


def test_a_variant(seed: int, finished: Path, tmp_path: Path):
    shutil.copytree(finished / "base", tmp_path / "base")
    variant = Path(shutil.copytree(finished / "run" / "variant", tmp_path / "run" / "variant"))
    name = damage(variant, seed).name
    store = ModelStore([tmp_path / "base", variant])
    if name in UNCHECKED:
        attention.load(variant)
        facts(store.entry("run"), read_history(variant), read_card(variant))
        return
    with pytest.raises(attention.CheckpointError, match=r"damaged|neither a variant"):
        attention.load(variant)
    assert store.names() == ["base"]
    assert str(variant) in store.problems[str(variant)]


def test_a_checkpoint(seed: int, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = Path(shutil.copytree(finished / "run" / "checkpoints", tmp_path / "checkpoints"))
    newest = sorted(folder.iterdir())[-1]
    damage(newest, seed)
    assert checkpointing.read_newest(folder).state["step"] == 6
    assert f"skipping a broken checkpoint: {newest} is damaged" in caplog.text
