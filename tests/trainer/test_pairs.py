"""The command that counts the pairs of tokens in a base's training text."""

import re
import shutil

import numpy as np
import pytest

import attention
from trainer.card import with_pairs
from trainer.data import read_files
from trainer.hits import find_pairs, pair_codes
from trainer.pairs import main


@pytest.fixture
def base(workplace, tmp_path):
    """The folder of a base of its own."""
    return shutil.copytree(workplace / "base", tmp_path / "base")


@pytest.fixture(scope="module")
def long_text(workplace, text):
    """A text of more than 100,000 tokens in which some pairs are rare."""
    path = workplace / "long.txt"
    path.write_text(text * 120 + "Upon dark ships.\n")
    return str(path)


def test_the_table_lies_with_the_base_and_its_card_says_so(base, long_text, tokenizer, capsys):
    (base / "README.md").write_text("# A base\n\n## Limits\n\nMany.\n")
    assert main(["--base", str(base), "--text", long_text, "--tokens", "100000"]) == 0
    table, tokens = find_pairs(base, tokenizer), read_files([long_text], tokenizer)[:100_000]
    codes, counts = np.unique(pair_codes(tokens), return_counts=True)
    assert table.codes.tolist() == codes[counts > 2].tolist()
    assert (table.tokens, table.at_most, table.source) == (100_000, 2, "long.txt")
    said = f"the {len(table.codes):,} pairs of tokens that come more than 2 times in 100,000 tokens of long.txt"
    assert said in capsys.readouterr().out
    card = (base / "README.md").read_text()
    assert "\n## Frequent pairs of tokens\n\n`pairs.safetensors`, made by `python -m trainer.pairs`" in card
    assert f", holds {said}; all others are rare. " in card
    attention.load(base)


def test_the_card_says_what_was_counted_last():
    card = with_pairs("# A base\n\nText.\n\n## Limits\n\nMany.\n", "the first")
    again = with_pairs(card, "the second")
    assert re.findall("^#.*$", again, re.M) == ["# A base", "## Limits", "## Frequent pairs of tokens"]
    assert again == card.replace("the first", "the second")
    moved = with_pairs(card + "\n## More\n\nYes.\n", "the third")
    assert re.findall("^#.*$", moved, re.M) == ["# A base", "## Limits", "## More", "## Frequent pairs of tokens"]
    assert "the first" not in moved
    assert "Many.\n\n## More\n\nYes.\n" in moved


def test_another_place_leaves_the_base_as_it_is(base, long_text, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert main(["--base", str(base), "--text", long_text, "--output", str(tmp_path / "table.safetensors")]) == 0
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}
    assert (tmp_path / "table.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--text": "valid.txt"}, r"valid.txt has [\d,]+ tokens; at least 50,000 show what is rare"),
        ({"--tokens": "-5"}, "has 0 tokens; at least 50,000"),
        ({"--text": "nothing.txt"}, "no file matches .*nothing.txt"),
        ({"--base": "nothing"}, "nothing"),
        ({"--base": "variant"}, "is a variant; pairs lie with its base"),
        ({"--base": "bare"}, "has no tokenizer, which is needed to read text"),
        ({"--output": "nowhere/pairs.safetensors"}, "nowhere"),
    ],
)
def test_what_the_command_cannot_use_is_named(workplace, base, long_text, capsys, options, message):
    if options.get("--base") == "variant":
        attention.save(attention.convert(attention.load(base)[0], attention.MasksConfig()), workplace / "variant")
    elif options.get("--base") == "bare":
        shutil.copytree(base, workplace / "bare", ignore=shutil.ignore_patterns("tokenizer*"), dirs_exist_ok=True)
    given = {"--base": str(base), "--text": long_text}
    given |= {name: value if name == "--tokens" else str(workplace / value) for name, value in options.items()}
    assert main([word for option in given.items() for word in option]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (base / "pairs.safetensors").exists()
