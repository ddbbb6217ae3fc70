"""The command, from a recipe to a variant that can be loaded."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import attention
from tests.trainer.conftest import recipe, write_recipe
from trainer.train import main


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    options = recipe(workplace, output=str(folder / "run"))
    options["eval"]["text"] = str(workplace / "valid.txt")
    assert main(["--config", str(write_recipe(folder, options))]) == 0
    return folder / "run"


def test_a_run_leaves_all_that_it_should(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "train.log", "training.jsonl", "curves.png", "checkpoints", "variant"),
        ".lock",
    }


def test_history_has_every_step_and_what_is_on_schedule(finished: Path):
    history = rows(finished)
    train = [row for row in history if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert [row["stage"] for row in train] == ["transfer"] * 3 + ["distil"] * 5
    assert [row["step"] for row in history if row["kind"] == "eval"] == [0, 3, 4, 8]
    assert [row["step"] for row in history if row["kind"] == "samples"] == [4, 8]
    assert train[-1]["tokens"] == 3 * 2 * 32 + 5 * 4 * 16
    assert all(row["mechanisms"] for row in history if row["kind"] == "eval")


def test_the_variant_is_better_than_before_and_carries_its_history(finished: Path):
    measured = [row for row in rows(finished) if row["kind"] == "eval"]
    assert measured[-1]["kl"] < measured[0]["kl"]
    assert (finished / "variant" / "training.jsonl").read_text() == (finished / "training.jsonl").read_text()
    variant, tokenizer = attention.load(finished / "variant")
    assert variant.config.attention["method"] == "masks"
    assert variant(torch.tensor([tokenizer("The sea")["input_ids"]])).logits.isfinite().all()


def test_the_config_as_run_can_be_run_again(finished: Path, tmp_path: Path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert [stage["steps"] for stage in config["stages"]] == [3, 5]
    again = tmp_path / "again"
    assert main(["--config", str(finished / "config.yaml"), "--output", str(again)]) == 0
    assert (again / "variant" / "model.safetensors").read_bytes() == (
        finished / "variant" / "model.safetensors"
    ).read_bytes()


def test_the_card_has_what_the_hub_wants(finished: Path):
    card = ModelCard.load(finished / "variant" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    measured = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    last = [row for row in rows(finished) if row["kind"] == "eval"][-1]
    assert measured["validation text", "kl"] == pytest.approx(last["kl"], abs=1e-5)
    assert ("valid.txt", "perplexity") in measured
    for part in ("## How it was made\n\n```\npython ", "attention.load", "## Limits", "curves.png"):
        assert part in card.content


def test_the_snippet_on_the_card_runs(finished: Path, capsys: pytest.CaptureFixture):
    content = (finished / "variant" / "README.md").read_text()
    exec(re.search(r"```python\n(.*?)```", content, re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith("The old man looked at the sea and")


def test_pretraining_lowers_the_loss_and_leaves_a_plain_model(workplace: Path, tmp_path: Path):
    stage = {"stage": "pretrain", "steps": 12, "batch_size": 4, "context": 32, "muon": True, "lr": 1e-2}
    options = recipe(workplace, output=str(tmp_path / "run"), stages=[stage], attention=None)
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run") if row["kind"] == "train"]
    assert losses[-1] < losses[0] - 1
    model, tokenizer = attention.load(tmp_path / "run" / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert tokenizer is not None


def test_without_data_it_trains_on_text_of_the_base_which_is_sampled_once(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"))
    options["data"] = {"sampled_tokens": 1024, "sample_batch": 8, "cache": str(tmp_path / "cache")}
    path = str(write_recipe(tmp_path, options))
    assert main(["--config", path, "--max_steps", "2"]) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    written = cached.stat().st_mtime_ns
    assert main(["--config", path, "--max_steps", "2"]) == 0
    assert [file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()] == [written]


def test_max_steps_is_shared_among_the_stages(workplace: Path, tmp_path: Path):
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run")))
    assert main(["--config", str(path), "--max_steps", "2"]) == 0
    assert [row["stage"] for row in rows(tmp_path / "run") if row["kind"] == "train"] == ["transfer", "distil"]


def test_dry_run_does_a_step_of_each_stage_and_estimates(workplace: Path, tmp_path: Path):
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run")))
    assert main(["--config", str(path), "--dry_run"]) == 0
    folder = tmp_path / "run" / "dry-run"
    assert [row["step"] for row in rows(folder) if row["kind"] == "train"] == [1, 2]
    assert "the whole run: 8 steps" in (folder / "train.log").read_text()
    assert (folder / "variant" / "model.safetensors").exists()


def test_a_variant_can_be_continued(finished: Path, workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), attention=None, variant=str(finished / "variant"))
    options["stages"] = options["stages"][1:]
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 0
    before = [row for row in rows(finished) if row["kind"] == "eval"][-1]["kl"]
    first = next(row for row in rows(tmp_path / "run") if row["kind"] == "eval")
    assert first["kl"] == pytest.approx(before, rel=0.05)


def test_a_variant_can_be_continued_with_other_options(finished: Path, workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), variant=str(finished / "variant"))
    options["stages"] = options["stages"][1:]
    options["attention"] = {**options["attention"], "scale": 2.0}  # of a fresh start, so it changes nothing here
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 0
    before = [row for row in rows(finished) if row["kind"] == "eval"][-1]["kl"]
    first = next(row for row in rows(tmp_path / "run") if row["kind"] == "eval")
    assert first["kl"] == pytest.approx(before, rel=0.05)
    assert json.loads((tmp_path / "run" / "variant" / "config.json").read_text())["attention"]["scale"] == 2.0


def test_a_variant_goes_on_with_more_features(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "few"))
    options["attention"] = {"method": "performer", "num_features": 8, "window": 4}
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 0
    options["attention"]["num_features"] = [8, 24]
    options |= {"output": str(tmp_path / "more"), "variant": str(tmp_path / "few" / "variant")}
    options["stages"] = [{**options["stages"][1], "layers": [1]}]
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 0
    before = [row for row in rows(tmp_path / "few") if row["kind"] == "eval"][-1]["kl"]
    first = next(row["kl"] for row in rows(tmp_path / "more") if row["kind"] == "eval")
    assert first == pytest.approx(before, rel=0.2)
    few, more = (attention.load(tmp_path / name / "variant")[0].state_dict() for name in ("few", "more"))
    assert all(torch.equal(few[name], tensor) for name, tensor in more.items() if ".h.0." in name)
    assert more["transformer.h.1.attn.mechanism.features.weight"].shape[-1] == 24


def test_options_that_a_variant_does_not_fit_are_refused(finished: Path, workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), variant=str(finished / "variant"))
    options["attention"] = {"method": "masks", "candidates": ["window(4)"]}
    assert main(["--config", str(write_recipe(tmp_path, options))]) == 2
    assert "weights do not fit the options in attention" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "nowhere/at-all/x/y"}, "nowhere"),
        ({"data": {"train": "missing-*.txt"}}, "no file matches missing-*.txt"),
        ({"trackers": ["no-such"]}, "trackers: ['no-such'] are not installed"),
        ({"eval": {"text": "missing.txt", "context": 32}}, "no file matches missing.txt"),
        ({"eval": {"context": 65}}, "the model holds 64 tokens, but eval.context is 65"),
        (
            {"stages": [{"stage": "distil", "steps": 1, "layers": [1, 2]}]},
            "layers are 0 to 1, but stages.0.layers has 2",
        ),
    ],
)
def test_what_cannot_be_used_is_named(change: dict, message: str, workplace: Path, tmp_path: Path):
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run"), **change))
    assert main(["--config", str(path)]) == 2
    assert message in (tmp_path / "run" / "train.log").read_text()


def refused(workplace: Path, tmp_path: Path, *arguments: str, **options: object) -> str:
    """Runs what must be refused before its first step; returns the log."""
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run"), **options))
    assert main(["--config", str(path), *arguments]) == 2
    assert not (tmp_path / "run" / "training.jsonl").exists()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" not in log
    return log


@pytest.mark.parametrize(("words", "named"), [(20, "stages.1.context is 32"), (3, "stages.0.context is 16, stages.1")])
def test_a_text_shorter_than_a_block_of_any_stage_is_refused(words: int, named: str, workplace: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("sea " * words)
    stages = [{"stage": "transfer", "steps": 1, "context": context} for context in (16, 32)]
    data = {"train": str(tmp_path / "a.txt"), "valid": str(workplace / "valid.txt")}
    assert f"but {named}" in refused(workplace, tmp_path, stages=stages, data=data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": 5}\n', "a.jsonl, line 2: the field 'text' is a number, not text"),
        ('{"text": ["one", "two"]}\n', "a.jsonl, line 1: the field 'text' is a list, not text"),
        ('{"messages": []}\n', "a.jsonl has no field 'text'; it has ['messages']"),
    ],
)
@pytest.mark.parametrize("option", ["--data.train", "--data.valid", "--eval.text"])
def test_rows_of_something_else_are_refused(content: str, message: str, option: str, workplace: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(content)
    assert message in refused(workplace, tmp_path, option, str(tmp_path / "a.jsonl"))


def changed_base(workplace: Path, folder: Path, **changes: object) -> str:
    """A base with another config, beside its weights as they are."""
    shutil.copytree(workplace / "base", folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize("eos", [50256, [0, 5], None])
def test_sampled_text_begins_with_the_tokenizers_eos(eos: object, workplace: Path, tmp_path: Path):
    base = changed_base(workplace, tmp_path / "base", eos_token_id=eos)
    data = {"sampled_tokens": 1024, "sample_batch": 8, "cache": str(tmp_path / "cache")}
    for name in (base, str(workplace / "base")):
        options = recipe(workplace, output=str(tmp_path / "run"), base=name, data=data)
        assert main(["--config", str(write_recipe(tmp_path, options)), "--max_steps", "2"]) == 0
        (cached,) = (tmp_path / "cache").iterdir()  # the same text from both
    tokens = load_file(cached)["tokens"].reshape(-1, 32)
    assert (tokens[:, 0] == 0).all()


def test_tokens_that_the_base_has_not_are_refused(workplace: Path, tmp_path: Path):
    base = changed_base(workplace, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    assert "knows 1 tokens for which the model has no embedding: '<new>'" in refused(workplace, tmp_path, base=base)


def test_a_new_model_of_too_few_tokens_is_refused(workplace: Path, tmp_path: Path):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 64, "vocab_size": 300}
    new = {"tokenizer": str(workplace / "base"), "family": "gpt2", "config": sizes}
    stages = [{"stage": "pretrain", "steps": 1, "context": 32}]
    log = refused(workplace, tmp_path, base=None, new=new, attention=None, stages=stages)
    assert "knows 20 tokens for which the model has no embedding" in log


def test_a_cache_that_cannot_be_written_is_found_before_sampling(workplace: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("trainer.data.sample_texts", None)
    log = refused(workplace, tmp_path, data={"cache": str(tmp_path / "file" / "cache")})
    assert f"sampled text is kept in {tmp_path / 'file' / 'cache'}, which cannot be written" in log


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_full_disk_leaves_the_record_of_the_run_before(name: str, finished: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if name not in path.name:
            return write(path, content)
        write(path, content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    config = str(finished / "config.yaml")
    assert main(["--config", config, "--output", str(tmp_path / "run"), "--seed", "7"]) == 2
    assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    assert "No space left on device" in (tmp_path / "run" / "train.log").read_text()
    assert not any(name in path.name for path in (tmp_path / "run").iterdir() if path.name != name)


def test_a_variant_that_is_a_link_stays_one_and_commands_are_quoted(workplace: Path, tmp_path: Path):
    run, disk = tmp_path / "my run #2 [a]", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (run / "variant").symlink_to(disk / "variant")
    (run / "checkpoints").symlink_to(disk)
    path = str(write_recipe(tmp_path, recipe(workplace)))
    assert main(["--config", path, "--output", str(run), "--max_steps", "2"]) == 0
    assert (run / "variant").is_symlink()
    assert (run / "checkpoints").is_symlink()
    assert attention.load(run / "variant")[0].config.attention["method"] == "masks"
    command = re.search(r"see it   (.*)", (run / "train.log").read_text())[1]
    assert shlex.split(command) == ["python", "app.py", "--checkpoints", str(run / "variant")]


@pytest.mark.parametrize("options", [["-P"], ["-I"], []])
@pytest.mark.parametrize("program", ["trainer/train.py", "trainer/evaluate.py"])
def test_programs_find_their_parts(options: list[str], program: str, tmp_path: Path):
    command = [sys.executable, *options, str(Path(program).absolute()), "--help"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.startswith("usage: ")
    assert found.returncode == 0


def test_options_are_written_in_full(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = str(write_recipe(tmp_path, recipe(workplace)))
    with pytest.raises(SystemExit):
        main(["--conf", path])
    assert "required: --config" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "run"
    assert main(["--config", str(write_recipe(tmp_path, recipe(workplace, output=str(output))))]) == 2
    assert f"{output} cannot be written" in capsys.readouterr().err


class NoLocks(FileLock):
    def acquire(self, *_: object, **__: object) -> None:
        raise OSError("No locks available")


def test_where_there_are_no_locks_a_run_goes_on(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.train.FileLock", NoLocks)
    path = write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run")))
    assert main(["--config", str(path), "--max_steps", "2"]) == 0
    assert "cannot be locked against other runs: No locks available" in (tmp_path / "run" / "train.log").read_text()


def final_kl(folder: Path) -> float:
    return [row for row in rows(folder) if row["kind"] == "eval"][-1]["kl"]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(["--gradient_checkpointing"], 1e-5), (["--precision", "no"], 1e-5), (["--precision", "bf16"], 2e-2)],
)
def test_activations_can_be_recomputed_and_precision_be_lower(
    options: list[str], tolerance: float, finished: Path, workplace: Path, tmp_path: Path
):
    path = str(write_recipe(tmp_path, recipe(workplace, output=str(tmp_path / "run"))))
    assert main(["--config", path, *options]) == 0
    assert final_kl(tmp_path / "run") == pytest.approx(final_kl(finished), rel=tolerance)


def test_what_is_not_finite_stops_the_run_with_the_step_named_and_keeps_the_checkpoint(workplace: Path, tmp_path: Path):
    options = recipe(workplace, output=str(tmp_path / "run"), log_every=8, eval={"every": None, "context": 32})
    options |= {"samples": {"every": None}, "checkpoint": {"every": 5}}
    options["stages"][1] |= {"lr": 1e30, "clip": None, "train": "all", "schedule": {"warmup": 0}}
    path = str(write_recipe(tmp_path, options))
    assert main(["--config", path]) == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"step \d \(stage distil.*(nan|not finite)", log)
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000003"]
    assert main(["--config", path, "--resume", "--stages.distil.lr", "1e-4"]) == 0
