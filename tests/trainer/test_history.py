"""Rows for files, trackers and pictures."""

from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from tests.trainer.conftest import recipe, write_recipe
from trainer.history import History, plot
from trainer.observer import tracked
from trainer.train import main


def test_a_history_is_its_file(tmp_path: Path):
    path = tmp_path / "run" / "training.jsonl"
    history = History(path, [{"kind": "train", "step": 1}])
    history.add({"kind": "eval", "step": 1, "text": "ü\n"})
    assert (
        path.read_text(encoding="utf-8")
        == '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1, "text": "ü\\n"}\n'
    )
    assert History(path, history.rows).of_kind("eval") == history.rows[1:]


def test_trackers_get_numbers_means_of_weights_and_samples():
    row = {
        "kind": "eval",
        "step": 3,
        "stage": "distil",
        "kl": 0.5,
        "tokens": 9,
        "mechanisms": [{"window(4)": [0.25, 0.75]}, {"gates": [[1.0, 0.0], [1.0, 0.0]]}],
    }
    assert tracked(row) == {"eval/kl": 0.5, "layer 0/window(4)": 0.5, "layer 1/gates": 0.5}
    texts = [{"prompt": "A", "base": "b", "variant": "v"}]
    assert tracked({"kind": "samples", "step": 3, "stage": "distil", "texts": texts}) == {"samples/0": "Av"}


class Memory(GeneralTracker):
    """A tracker of Accelerate's own kind."""

    name = "memory"
    requires_logging_directory = True
    config: ClassVar[dict] = {}
    logged: ClassVar[dict[int, dict]] = {}
    finished = False

    def __init__(self, project: str, folder: str):
        super().__init__()
        self.folder = folder

    @property
    def tracker(self) -> str:
        return self.folder

    def store_init_configuration(self, values: dict) -> None:
        self.config.update(values)

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.logged.setdefault(step, {}).update(values)

    def finish(self) -> None:
        type(self).finished = True


@pytest.mark.parametrize("name", ["tensorboard", "memory"])
def test_a_run_reports_to_its_trackers(name, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To one that is installed, in whose place another is put here, and to one of the user's own."""
    if name == "memory" and not hasattr(tracking, "register_tracker_class"):
        pytest.skip("this Accelerate knows none of the user's own")
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Memory)
    monkeypatch.setattr(Memory, "logged", {})
    monkeypatch.setattr(Memory, "finished", False)
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run")))
    assert main(["--config", str(path), "--trackers", name]) == 0
    assert yaml.safe_load(Memory.config["config"])["output"] == str(tmp_path / "run")
    assert Memory.finished
    logged = Memory.logged
    assert {"train/loss", "train/tokens_per_second", "train/peak_memory_mb", "eval/kl", "eval/perplexity"} <= set(
        logged[8]
    )
    assert "layer 1/window(4)" in logged[8]
    assert logged[8]["samples/1"].startswith("The old man")


@pytest.mark.parametrize("kinds", [["train", "eval"], ["eval"], []])
def test_curves_of_any_history(kinds: list[str], tmp_path: Path):
    rows = [
        {"kind": kind, "step": step, "stage": "distil", "loss": 0.0, "kl": 0.1, "perplexity": 3.0}
        for step in range(3)
        for kind in kinds
    ]
    plot(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
