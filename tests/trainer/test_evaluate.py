"""The command that measures variants."""

import copy
import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

import attention
from trainer.data import read_files
from trainer.evaluate import evaluate, main, parse
from trainer.fidelity import Fidelity, measure
from trainer.samples import draw_prompts, measure_writing

FIGURES = ("sample_perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition")


@pytest.fixture(scope="module")
def base(workplace):
    return attention.load(workplace / "base")[0]


@pytest.fixture(scope="module")
def variants(workplace, base):
    """Folders of a variant by method."""
    configs = {
        "masks": attention.MasksConfig(candidates=("window(3)", "first(1)", "last(2)")),
        "performer": attention.PerformerConfig(num_features=4),
        "performer-window": attention.PerformerConfig(num_features=4, window=4),
    }
    for name, config in configs.items():
        attention.save(attention.convert(base, config), workplace / "measured" / name)
    return {name: str(workplace / "measured" / name) for name in configs}


@pytest.fixture(scope="module")
def valid(workplace):
    return str(workplace / "valid.txt")


def test_one_variant_is_one_object(variants, valid, base, tokenizer, capsys):
    assert main(["--variant", variants["masks"], "--text", valid, "--context", "16", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    figures = measure(attention.load(variants["masks"], base=base)[0], base, read_files([valid], tokenizer), 16)
    assert {name: row[name] for name in figures.to_dict()} == pytest.approx(figures.to_dict(), rel=1e-3)
    assert (row["method"], row["context"], row["variant"]) == ("masks", 16, variants["masks"])
    assert row["keys_read"] == 4
    assert "samples" not in row
    assert "ablations" not in row


def test_several_share_a_base_and_keep_their_order(variants, workplace, valid, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "attention.load", lambda spec, load=attention.load, **o: loaded.append(str(spec)) or load(spec, **o)
    )
    specs = [variants["performer"], str(workplace / "base"), variants["masks"]]
    rows = evaluate(parse(["--variant", *specs, "--text", valid, "--context", "32"]))
    assert [row["method"] for row in rows] == ["performer", "softmax", "masks"]
    assert len({row["base_perplexity"] for row in rows}) == 1
    assert rows[1]["kl"] == 0
    assert rows[1]["keys_read"] == 32
    assert len(loaded) == len(set(loaded)) == 3


def test_ablations_name_every_part_and_what_does_nothing(variants, valid):
    options = ["--text", valid, "--context", "32", "--ablate"]
    both = [variants["masks"], variants["performer-window"]]
    masks, performer = evaluate(parse(["--variant", *both, *options, "--tolerance", "1e-9"]))
    assert list(masks["ablations"]) == ["window(3)", "first(1)", "last(2)"]
    assert list(performer["ablations"]) == ["linear", "window"]
    for row in (masks, performer):
        for figures in row["ablations"].values():
            assert figures["kl_change"] == pytest.approx(figures["kl"] - row["kl"])
            assert not figures["does_nothing"]
    (tolerant,) = evaluate(parse(["--variant", variants["masks"], *options, "--tolerance", "100"]))
    assert all(figures["does_nothing"] for figures in tolerant["ablations"].values())


def test_a_mechanism_of_one_part_has_nothing_to_switch_off(variants, valid, capsys):
    options = ["--variant", variants["performer"], "--text", valid, "--context", "32", "--ablate"]
    (row,) = evaluate(parse(options))
    assert row["ablations"] == {}
    assert main(options) == 0
    assert "has no part that can be switched off" in capsys.readouterr().out


def test_samples_are_beside_the_bases_own(variants, valid, base, tokenizer):
    options = ["--context", "32", "--samples", "5", "--length", "8", "--prompt_length", "4", "--seed", "3"]
    masks, plain = evaluate(parse(["--variant", variants["masks"], base.name_or_path, "--text", valid, *options]))
    prompts = draw_prompts(read_files([valid], tokenizer), 5, 4, 3)
    own = measure_writing(base, base, prompts, 8, 3)
    other = measure_writing(attention.load(variants["masks"], base=base)[0], base, prompts, 8, 3)
    for name in FIGURES:
        figures = masks["samples"][name]
        assert figures["base"] == pytest.approx(getattr(own, name), rel=1e-4)
        assert figures["variant"] == pytest.approx(getattr(other, name), rel=1e-4)
        assert plain["samples"][name]["difference"] in (0, None)
        assert plain["samples"][name]["error"] in (0, None)
    assert masks["samples"]["sample_perplexity"]["error"] > 0
    assert {name: masks["samples"][name] for name in ("samples", "length", "prompt_length", "seed")} == {
        **{"samples": 5, "length": 8, "prompt_length": 4, "seed": 3}
    }


def test_tables_have_a_line_for_everything(variants, valid, capsys):
    both = [variants["masks"], variants["performer-window"]]
    options = ["--text", valid, "--context", "32", "--samples", "4", "--length", "8", "--ablate", "--tolerance", "100"]
    assert main(["--variant", *both, *options]) == 0
    fidelity, writing, ablations = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in fidelity.splitlines()] == ["method", "masks", "performer"]
    assert [line.split()[0] for line in writing.splitlines()] == ["variant", *both]
    assert set(FIGURES) <= set(writing.splitlines()[0].split())
    assert len(ablations.splitlines()) == 1 + 3 + 2
    assert ablations.count("does nothing (changes KL by less than 100)") == 5


def test_cards_take_up_the_figures_of_each_context(variants, valid):
    folder = Path(variants["masks"])
    (folder / "README.md").write_text("# masks\n\n## Use\n\nLike this.\n")
    command = ["--variant", str(folder), "--text", valid, "--card", "--json"]
    for options in (["--context", "32", "--ablate"], ["--context", "16"], ["--context", "32", "--samples", "2"]):
        assert main([*command, *options, "--length", "8"]) == 0
    card = (folder / "README.md").read_text()
    assert re.findall(r"^##+ .*$", card, re.M) == ["## Measured further", "### Context 16", "### Context 32", "## Use"]
    assert card.startswith("# masks\n\n## Measured")
    assert card.endswith("\n\n## Use\n\nLike this.\n")
    assert "| distinct 2 |" in card
    assert "without" not in card  # the first figures at 32 had ablations
    (folder / "README.md").write_text("# masks\n")
    assert main([*command, "--context", "32"]) == 2


def test_a_card_needs_a_folder(variants, valid, capsys):
    (Path(variants["performer"]) / "README.md").unlink(missing_ok=True)
    assert main(["--variant", variants["performer"], "--text", valid, "--card"]) == 2
    assert str(Path(variants["performer"]) / "README.md") in capsys.readouterr().err


def test_what_the_command_cannot_use_is_named(variants, workplace, valid, capsys):
    assert main(["--variant", str(workplace / "nothing"), "--text", valid]) == 2
    assert "nothing" in capsys.readouterr().err
    assert main(["--variant", variants["masks"], "--text", valid, "--context", "65"]) == 2
    assert "holds 64 tokens" in capsys.readouterr().err
    assert main(["--variant", variants["masks"], "--text", valid, "--context", "8", "--samples", "2"]) == 2
    assert "must have 4 to 48, not 200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--context 0", "--context must be at least 2, not 0"),
        ("--context 1", "--context must be at least 2, not 1"),
        ("--context -5", "--context must be at least 2, not -5"),
        ("--batch_size 0", "--batch_size must be at least 1, not 0"),
        ("--samples -1", "--samples must be at least 0, not -1"),
        ("--samples 2 --prompt_length 0", "--prompt_length must be at least 1, not 0"),
        ("--samples 2 --length 3", "--length must be at least 4, not 3"),
        ("--seed -1", "--seed must be at least 0, not -1"),
        ("--seed 99999999999999999999", "--seed must be at least 0, not 99999999999999999999"),
        ("--tolerance nan", "--tolerance must be at least 0, not nan"),
        ("--tolerance -1", "--tolerance must be at least 0, not -1.0"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("--device meta", "--device meta cannot be used"),
        ("--device cuda:99", "--device cuda:99 cannot be used"),
    ],
)
def test_options_without_a_meaning_are_refused_before_anything_is_loaded(options, message, monkeypatch, capsys):
    monkeypatch.setattr("attention.describe", None)
    assert main(["--variant", "v", "--text", "t", "--json", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert main(["--variant", "v", "--text", "t", *options.split(), "--context", "1"]) == 2
    assert "--context must be at least 2, not 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_are_numbers(value, variants, valid, monkeypatch, capsys):
    monkeypatch.setattr("trainer.evaluate.measure_each", lambda *_, **__: [Fidelity(9, value, 1.0, 1.0, 1.0)] * 4)
    for options, named in ([], "kl"), (["--ablate"], "ablations window(3) kl"):
        assert main(["--variant", variants["masks"], "--text", valid, "--context", "32", "--json", *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{variants['masks']}, or its base, is damaged: not finite are kl" in err
        assert named in err


def test_a_tokenizer_that_knows_more_than_the_base_is_refused(workplace, valid, tokenizer, tmp_path, capsys):
    shutil.copytree(workplace / "base", tmp_path / "base")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path / "base")
    assert main(["--variant", str(tmp_path / "base"), "--text", valid, "--context", "32"]) == 2
    assert "no embedding: '<new>'" in capsys.readouterr().err


def test_texts_are_read_as_in_training(variants, valid, tmp_path, capsys):
    text = Path(valid).read_text()
    (tmp_path / "it [1].jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text.strip()}).encode()))
    command = ["--variant", variants["masks"], "--context", "32", "--json", "--text"]
    rows = []
    for name in (valid, str(tmp_path / "it [1].jsonl.gz")):
        assert main([*command, name]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0] | {"text": None} == rows[1] | {"text": None}


def test_a_full_disk_leaves_the_card_as_it_was(variants, valid, tmp_path, monkeypatch, capsys):
    (Path(variants["masks"]) / "README.md").write_text(card := "# masks\n\n## Use\n\nLike this.\n")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["--variant", variants["masks"], "--text", valid, "--context", "32", "--card"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (Path(variants["masks"]) / "README.md").read_text() == card
