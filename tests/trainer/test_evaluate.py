"""The command that measures variants."""

import copy
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import attention
from attention import loading
from trainer.data import read_files
from trainer.evaluate import evaluate, load, main, parse
from trainer.fidelity import Fidelity, Reader, measure, predicted, read_each
from trainer.hits import PairTable, hit_distances, load_pairs, pair_codes, save_pairs
from trainer.recall import measure_recall
from trainer.samples import draw_prompts, measure_writing
from trainer.slices import by_position, by_recall, slice_by

from .conftest import OTHER

FIGURES = ("sample_perplexity", "distinct_1", "distinct_2", "distinct_3", "repetition", "new_names")


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


@pytest.fixture
def pairs(valid, tokenizer, tmp_path):
    """A file with a table of a third of the pairs of the text."""
    codes = np.unique(pair_codes(read_files([valid], tokenizer)))[::3]
    save_pairs(PairTable(codes, 3_000_000, "train.txt"), tmp_path / "pairs.safetensors", tokenizer)
    return tmp_path / "pairs.safetensors"


def test_slices_are_those_of_what_was_read(variants, valid, base, tokenizer, pairs):
    options = ["--variant", variants["masks"], "--text", valid, "--context", "32", "--pairs", str(pairs)]
    (row,) = evaluate(parse(options))
    tokens = read_files([valid], tokenizer)
    (reading,) = read_each([Reader(attention.load(variants["masks"], base=base)[0])], base, tokens, 32)
    places = predicted(len(tokens), 32)
    distances = hit_distances(tokens, load_pairs(pairs, tokenizer), 32)[places]
    assert row["rare"] == "it comes at most 60 times in 3,000,000 tokens of train.txt"
    assert row["slices"]["all"]["kl"] == pytest.approx(row["kl"], rel=1e-5)
    assert row["slices"]["all"]["tokens"] == row["tokens"] == len(places)
    assert row["slices"]["hits"]["tokens"] > 5
    for name, choices in (("slices", by_recall(distances, 32)), ("positions", by_position(places % 32, 32))):
        expected = slice_by(reading, choices, places // 32)
        assert list(row[name]) == list(expected)
        for one, figures in expected.items():
            found = {key: value for key, value in row[name][one].items() if value is not None}
            assert found == pytest.approx(
                {key: value for key, value in figures.to_dict().items() if value is not None}, rel=1e-3, abs=1e-6
            )


def test_what_is_rare_is_said(variants, valid, pairs, tokenizer, base, capsys):
    command = ["--variant", variants["masks"], "--text", valid, "--context", "32"]
    (without,) = evaluate(parse(command))
    assert without["rare"] == (
        "it comes at most 20 times in a million tokens of the text's other blocks (the base has no pairs.safetensors)"
    )
    table = Path(base.name_or_path) / "pairs.safetensors"
    table.write_bytes(pairs.read_bytes())
    try:
        (beside,) = evaluate(parse(command))
    finally:
        table.unlink()
    (given,) = evaluate(parse([*command, "--pairs", str(pairs)]))
    assert beside["slices"] == given["slices"] != without["slices"]
    assert main([*command, "--pairs", str(Path(valid))]) == 2
    assert "valid.txt is no table of pairs" in capsys.readouterr().err


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
        assert row["ablated_tokens"] == row["tokens"]
        for figures in row["ablations"].values():
            assert figures["kl_change"] == pytest.approx(figures["kl"] - row["kl"])
            assert not figures["does_nothing"]
    (start,) = evaluate(parse(["--variant", variants["masks"], *options, "--ablate_tokens", "64"]))
    assert (start["ablated_tokens"], start["kl"]) == (62, masks["kl"])
    for name, figures in start["ablations"].items():
        assert figures["kl"] != masks["ablations"][name]["kl"]
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
    own = measure_writing(base, base, tokenizer, prompts, 8, 3)
    other = measure_writing(attention.load(variants["masks"], base=base)[0], base, tokenizer, prompts, 8, 3)
    for name in FIGURES:
        figures = masks["samples"][name]
        assert figures["base"] == pytest.approx(getattr(own, name), rel=1e-4)
        assert figures["variant"] == pytest.approx(getattr(other, name), rel=1e-4)
        assert plain["samples"][name]["difference"] in (0, None)
        assert plain["samples"][name]["error"] in (0, None)
    assert masks["samples"]["sample_perplexity"]["error"] > 0
    assert plain["drafting"] == {"tokens_a_round": 5.0, "error": 0.0, "draft": 4, "prompts": 5, "length": 8}
    assert 1 <= masks["drafting"]["tokens_a_round"] <= 5
    assert {name: masks["samples"][name] for name in ("samples", "length", "prompt_length", "seed")} == {
        **{"samples": 5, "length": 8, "prompt_length": 4, "seed": 3}
    }


def test_tables_have_a_line_for_everything(variants, valid, capsys):
    both = [variants["masks"], variants["performer-window"]]
    options = ["--text", valid, "--context", "32", "--samples", "4", "--length", "8", "--ablate", "--tolerance", "100"]
    assert main(["--variant", *both, *options]) == 0
    fidelity, *sliced, writing, ablations, rare = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in fidelity.splitlines()] == ["method", "masks", "performer"]
    starts = ["cross-entropy above the base's  all  ", "KL  ", "cross-entropy above the base's  0 to 31", "KL  "]
    assert len(sliced) == len(starts)
    for block, start in zip(sliced, starts, strict=True):
        header, tokens, own, *lines = block.splitlines()
        assert re.sub("  +", "  ", header).startswith(start)
        assert tokens.startswith("(tokens)  ")
        assert own.startswith("(the base's cross-entropy)  ")
        assert [line.split()[0] for line in lines] == both
        assert "±" in lines[0]
    assert [line.split()[0] for line in writing.splitlines()] == ["variant", *both]
    assert set(FIGURES) <= set(writing.splitlines()[0].split())
    assert len(ablations.splitlines()) == 1 + 3 + 2
    assert ablations.count("does nothing (changes KL by less than 100)") == 5
    assert rare.startswith("A hit's pair is rare: it comes at most 20 times in a million tokens")


def test_variants_of_two_bases_do_not_share_a_table(variants, valid, workplace, tmp_path, capsys):
    other = tmp_path / "other-base"
    shutil.copytree(workplace / "base", other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.transformer.wte.weight.data.mul_(0.5)
    model.save_pretrained(other)
    assert main(["--variant", str(other), variants["masks"], "--text", valid, "--context", "32"]) == 0
    _, *sliced, _ = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[-1].split()[0] for block in sliced] == [str(other)] * 4 + [variants["masks"]] * 4


@pytest.fixture(scope="module")
def reciter(names_base, names_tokenizer):
    """The folder of a variant of a base whose vocabulary has names, a text, and the tokenizer."""
    variant, text = names_base.with_name("variant"), names_base.with_name("text.txt")
    attention.save(attention.convert(attention.load(names_base)[0], attention.MasksConfig()), variant)
    text.write_text(" ".join([OTHER] * 30))
    return str(variant), str(text), names_tokenizer


def test_answers_are_beside_the_bases_own(reciter, capsys):
    variant, text, tokenizer = reciter
    base = str(Path(variant).with_name("base"))
    command = ["--variant", variant, base, "--text", text, "--context", "256", "--recall", "5", "--seed", "3"]
    row, itself = evaluate(parse(command))
    loaded = attention.load(base)[0]
    models = [attention.load(variant, base=loaded)[0]]
    (expected,) = measure_recall(models, loaded, tokenizer, read_files([text], tokenizer), 5, 256, 3)
    assert (row["recall"]["recall"], row["recall"]["seed"]) == (5, 3)
    for task, by_distance in row["recall"]["tasks"].items():
        assert list(by_distance) == list(expected[task]) == ["0", "64"]
        for between, found in by_distance.items():
            assert found["difference"] == pytest.approx(expected[task][between]["difference"], abs=1e-5)
            assert itself["recall"]["tasks"][task][between]["difference"] == 0
    assert main(command) == 0
    tables = {block.split(":")[0]: block.splitlines() for block in capsys.readouterr().out.split("\n\n")}
    for task in ("associative", "needle"):
        header, own, *lines = tables[task]
        assert header.split()[-2:] == ["0", "64"]
        assert own.startswith("(the base's)  ")
        assert ", chance: 12%)" in own
        assert [line.split()[0] for line in lines] == [variant, base]


@pytest.mark.parametrize("option", ["--recall", "--samples"])
def test_numbers_below_0_are_refused(reciter, option, capsys):
    with pytest.raises(SystemExit):
        parse(["--variant", reciter[0], "--text", reciter[1], option, "-1"])
    assert f"argument {option}: must be 0 or more; got -1" in capsys.readouterr().err


def test_questions_that_do_not_fit_are_refused(reciter, capsys):
    variant, text, _ = reciter
    assert main(["--variant", variant, "--text", text, "--context", "32", "--recall", "5"]) == 2
    assert "the tasks of --recall need a context of" in capsys.readouterr().err


def test_cards_take_up_the_figures_of_each_context(variants, valid, capsys):
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
    assert re.search(r"drafts 4 tokens at a time for the base.* gives \d\.\d\d ± \d\.\d\d tokens a round", card)
    assert card.count("| tokens that are | how many | cross-entropy of the base | above it | KL |") == 2
    assert re.findall(r"^\| (0 to \d+) \| [\d,]+ \| \d\.\d{3} \| [+-]\d\.\d{3} ± ", card, re.M) == [
        "0 to 15",
        "0 to 31",
    ]
    assert card.count("a million tokens of the text's other blocks") == 2
    assert "without" not in card  # the first figures at 32 had ablations
    (folder / "README.md").write_text("# masks\n")
    capsys.readouterr()
    assert main([*command, "--context", "32"]) == 2
    said = capsys.readouterr()
    assert f"before a card's section '## Use', which there is not in {folder / 'README.md'}" in said.err
    assert not said.out  # said before the text is read


def test_a_card_takes_up_answers(reciter):
    variant, text, _ = reciter
    (Path(variant) / "README.md").write_text("# masks\n\n## Use\n\nLike this.\n")
    command = ["--variant", variant, "--text", text, "--context", "256", "--recall", "5", "--card"]
    assert main(command) == 0
    card = (Path(variant) / "README.md").read_text()
    lines = re.findall(
        r"^\| (associative|needle) \| (0|64) \| -\d\.\d\d, \d+% \| .* \| the base is at chance \|$", card, re.M
    )
    assert ("associative", "64") in lines
    assert "by chance 12.5%" in card


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
        ("--samples 2 --prompt_length 0", "--prompt_length must be at least 1, not 0"),
        ("--samples 2 --length 4", "--length must be at least 5, not 4"),
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
    monkeypatch.setattr("trainer.fidelity.Reading.means", property(lambda _: Fidelity(9, value, 1.0, 1.0, 1.0)))
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


def test_a_variant_with_all_weights_is_measured_in_the_dtype_of_its_base(base, workplace, valid, tmp_path, monkeypatch):
    attention.save(attention.convert(base, attention.SoftmaxConfig()), tmp_path / "whole", self_contained=True)
    dtypes = {"gpt2": torch.float32}
    monkeypatch.setattr(  # as on a GPU, where each is loaded in the dtype that its own config names
        loading, "_default_dtype", lambda device, config: dtypes.get(config["model_type"], torch.float64)
    )
    assert attention.load(tmp_path / "whole")[0].dtype == torch.float64
    (family,) = load(parse(["--variant", str(tmp_path / "whole"), "--base", base.name_or_path, "--text", valid]))
    assert family.subjects[0].model.dtype == family.base.dtype == torch.float32
