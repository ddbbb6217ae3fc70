"""The training tab's data: histories and cards as they are, broken ones included."""

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.models import Entry
from demo.tabs.training import Handlers
from demo.training import (
    NO_SLICES,
    commands,
    curves,
    facts,
    hits_excess,
    learned,
    own_and_before,
    read_card,
    read_history,
    samples,
    slices,
    thin,
)
from trainer.card import with_measurement
from trainer.config import load_config

from .conftest import Visit

REPOSITORY = Path(__file__).parents[2]
BUNDLED = REPOSITORY / "checkpoints"
ROWS = [
    {"kind": "eval", "step": 0, "stage": "transfer", "kl": 2.5, "perplexity": 90.0, "base_perplexity": 20.0,
     "top1_agreement": 0.2, "mechanisms": [{"last(0)": [0.5, 0.5]}, {"last(0)": [0.5, 0.5]}]},
    {"kind": "train", "step": 10, "stage": "transfer", "loss": 0.8, "lr": 1e-3, "mechanism_lr": 1e-2,
     "tokens": 1000, "seconds": 5.0, "tokens_per_second": 200.0},
    {"kind": "samples", "step": 10, "stage": "transfer",
     "texts": [{"prompt": "Once", "base": " upon a time", "variant": " the the"}]},
    {"kind": "train", "step": 20, "stage": "distil", "loss": 1.5, "kl": 1.2, "ce": 0.3, "lr": 5e-4,
     "tokens": 2000, "seconds": 3725.4, "tokens_per_second": 210.0},
    {"kind": "eval", "step": 20, "stage": "distil", "kl": 0.25, "perplexity": 25.0, "base_perplexity": 20.0,
     "top1_agreement": 0.8, "mechanisms": [{"last(0)": [0.25, 0.75]}, {"last(0)": [0.9, 1.0]}]},
]  # fmt: skip
CARD = """---
base_model: some/base
datasets:
- Salesforce/wikitext
model-index:
- name: masks
  results:
  - task: {type: text-generation}
    dataset: {type: text, name: test.txt, split: test}
    metrics:
    - {type: kl, name: KL to the base, value: 0.0712}
    - {type: perplexity, name: Perplexity, value: "not a number"}
    - {type: top1_agreement, name: share, value: 0.75}
  - task: {type: text-generation}
    dataset: {type: text, name: validation text, split: validation}
    metrics:
    - {type: kl, name: KL to the base, value: 0.06}
---
# A card

## How it was made

Fitted on **many** books with `train.py`.

## Limits

Many.
"""
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "training.jsonl").write_text(LINES, encoding="utf-8")
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    return tmp_path


@pytest.fixture
def entry(folder):
    return Entry("masks", str(folder), folder, "masks", "…", 2_500_000, False, "base", {"candidates": ["a", "b"]})


def chart(charts: list[dict], title: str) -> dict[str, list]:
    """The points of a chart's curves, by name."""
    found = next(each for each in charts if each["title"] == title)
    return {series["name"]: series["points"] for series in found["series"]}


def test_a_history_is_read_as_it_is(folder):
    assert read_history(folder) == ROWS


def test_lines_that_are_no_rows_are_left_out(folder):
    junk = ["", "not json", "[1]", "3", '{"kind": "eval"}', '{"kind": 3, "step": 1}', '{"kind": "eval", "step": "x"}']
    (folder / "training.jsonl").write_text("\n".join([*junk, LINES, '{"kind": "ev']), encoding="utf-8")
    assert read_history(folder) == ROWS
    (folder / "training.jsonl").write_bytes(b"\xff\xfe\x00" * 10)
    assert read_history(folder) == []


def test_what_was_not_recorded_is_left_out(tmp_path):
    assert read_history(tmp_path) == []
    assert curves([]) == learned([]) == samples([]) == []
    titles = [each["title"] for each in curves([{"kind": "train", "step": 1, "loss": 2.0}])]
    assert titles == ["Training loss"]


def test_curves(folder):
    charts = curves(read_history(folder))
    assert chart(charts, "Training loss") == {"transfer": [[10, 0.8]], "distil": [[20, 1.5]]}
    assert chart(charts, "KL to the base") == {"KL": [[0, 2.5], [20, 0.25]]}
    assert chart(charts, "Perplexity") == {"this model": [[0, 90.0], [20, 25.0]], "base": [[0, 20.0], [20, 20.0]]}
    assert chart(charts, "Learning rate") == {"weights": [[10, 1e-3], [20, 5e-4]], "mechanisms": [[10, 1e-2]]}
    assert chart(charts, "Terms of the loss") == {"kl": [[20, 1.2]], "ce": [[20, 0.3]]}


def test_a_logarithmic_axis_only_where_there_is_a_logarithm(folder):
    rows = [{"kind": "eval", "step": step, "kl": kl} for step, kl in ((0, 1.0), (1, 0.0))]
    assert curves(rows)[0]["y"]["log"] is False
    assert curves(rows[:1])[0]["y"]["log"] is True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, True, [1.0], {"a": "b"}])
def test_values_that_are_no_numbers_are_no_points(value):
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 2, "loss": value}]
    assert curves(rows)[0]["series"][0]["points"] == [[1, 2.0]]
    assert learned([{"kind": "eval", "step": 1, "mechanisms": value}]) == []
    assert learned([{"kind": "eval", "step": 1, "mechanisms": [value]}]) == []
    assert samples([{"kind": "samples", "step": 1, "texts": [value]}]) == []


def test_what_the_layers_learned(folder):
    (one,) = learned(read_history(folder))
    assert one["note"] == ""
    assert one["title"] == "last(0)"
    assert one["y"]["max"] == 1
    points = {series["name"]: [[x, round(y, 6)] for x, y in series["points"]] for series in one["series"]}
    assert points == {"layer 0": [[0, 0.5], [20, 0.5]], "layer 1": [[0, 0.5], [20, 0.95]]}
    assert [series["shade"] for series in one["series"]] == [0, 1]


def test_a_layer_without_a_place_has_no_curve():
    layers = [{"last(0)": [0.0, 0.0], "window(8)": [0.0, 0.5]}, {"last(0)": [0.4, 0.6]}]
    rows = [{"kind": "eval", "step": step, "mechanisms": layers} for step in (0, 10)]
    charts = learned(rows)
    assert chart(charts, "last(0)") == {"layer 1": [[0, 0.5], [10, 0.5]]}
    assert chart(charts, "window(8)") == {"layer 0": [[0, 0.25], [10, 0.25]]}


def test_gates_on_the_text_stand_before_those_at_an_input_of_zero():
    zero, text = [{"window_gate": [0.54, 0.54]}], [{"window_gate": [0.01, 0.03]}]
    rows = [{"kind": "eval", "step": 10, "mechanisms": zero, "means": text}]
    first, second = learned(rows)
    assert (first["title"], first["note"]) == ("window gate", "Mean over the validation text.")
    assert first["series"][0]["points"] == [[10, 0.02]]
    assert second["series"][0]["points"] == [[10, 0.54]]
    assert "input of zero, which no text has" in second["note"]


MADE = """---
tags: [a]
---
# A card

## How it was made

```
accelerate launch trainer/train.py --config trainer/recipes/performer-last.yaml --max_steps 20 --data.train ../s/a.txt /b.txt --data.rename true --card.name 'two words' --resume
```

- **distil**: 20 steps of 4 × 1024 tokens

Method options: `a=(1, 2), b='x. y'`. Text: 175 books. In all 20 steps, 2,000 tokens, 3,725 s on a machine, seed 0; torch 2.13.0, code at d506df5a-dirty.

Before it, the variant was made by `trainer/recipes/performer-gpu.yaml` (1,000 steps, 50,000 tokens of the same text with names, 376 s on one GPU) and `trainer/recipes/masks.yaml`: 30 steps, 700 tokens, 4 s.
"""  # noqa: E501


@pytest.fixture
def made(tmp_path):
    (tmp_path / "README.md").write_text(MADE, encoding="utf-8")
    return read_card(tmp_path)


def test_totals_are_over_all_stages_whether_the_history_has_them_or_not(entry, made):
    last_alone = [{"kind": "train", "step": 20, "tokens": 2000, "seconds": 3725.0}]
    everything = [{"kind": "train", "step": 1050, "tokens": 52_700, "seconds": 4105.0}]
    for rows in (last_alone, everything, []):
        said = dict(facts(entry, rows, made))
        assert (said["Steps"], said["Tokens"], said["Time"]) == ("1,050", "52,700", "1:08:25")
    assert dict(facts(entry, last_alone, made))["Before the curves"] == "1,030 steps, 50,700 tokens"
    assert "Before the curves" not in dict(facts(entry, everything, made))


def test_stages_are_marked_and_where_the_last_run_goes_on(made):
    stages = [(10, "transfer"), (20, "distil"), (30, "distil"), (40, "distil"), (50, "distil")]
    rows = [{"kind": "train", "step": step, "stage": stage, "loss": 1.0} for step, stage in stages]
    assert curves(rows)[0]["events"] == [{"x": 10, "label": "distil"}]
    assert curves(rows, made)[0]["events"] == [{"x": 10, "label": "distil"}, {"x": 30, "label": "distil, last run"}]


def test_commands_name_nothing_outside_a_clone_and_no_commit_that_nobody_has(entry, made):
    said = dict(facts(entry, [], made))
    assert said["On a clone"].splitlines() == [
        "accelerate launch trainer/train.py --config trainer/recipes/performer-gpu.yaml",
        "accelerate launch trainer/train.py --config trainer/recipes/masks.yaml",
        "accelerate launch trainer/train.py --config trainer/recipes/performer-last.yaml --max_steps 20 "
        "--data.rename true",
    ]
    assert "dirty" not in said["How it was made"]
    assert "Text: 175 books." in said["How it was made"]
    assert "a=(1, 2)" not in said["How it was made"]


def test_commands_begin_with_the_oldest_of_runs_that_go_on_from_each_other(tmp_path):
    made = "\n\nBefore it, from here:\n\n".join(
        f"```\npython trainer/train.py --config trainer/recipes/{name}.yaml\n```\n\nIn all 2 steps, 3 tokens, 4 s on b."
        for name in ("third", "second", "first")
    )
    (tmp_path / "README.md").write_text(f"# A card\n\n## How it was made\n\n{made}\n", encoding="utf-8")
    card = read_card(tmp_path)
    shown = [command.rpartition("/")[2] for command in commands(card)]
    assert shown == ["first.yaml", "second.yaml", "third.yaml"]
    assert [spent.tokens for spent in own_and_before(card)] == [3, 6]


@pytest.mark.parametrize("name", ["hybrid", "masks", "nsa", "performer", "performer-window"])
def test_commands_of_the_bundled_checkpoints_run_on_a_clone(name):
    made = set()
    for command in commands(read_card(BUNDLED / name)):
        words = shlex.split(command)
        script = words.index("trainer/train.py")
        for word in words[:script]:
            assert "/" not in word or (REPOSITORY / word).is_file()
        config = load_config(REPOSITORY / words[script + 2], words[script + 3 :])
        assert config.variant is None or config.variant in made
        made.add(f"{config.output}/variant")


def test_totals_of_the_bundled_performer_have_its_earlier_stages():
    entry = Entry("p", "", BUNDLED / "performer", "performer", "", 1, False, "base")
    said = dict(facts(entry, read_history(entry.folder), read_card(entry.folder)))
    assert (said["Steps"], said["Tokens"]) == ("2,485", "55,296,000")


def test_samples(folder):
    texts = [{"prompt": "Once", "base": " upon a time", "variant": " the the"}]
    assert samples(read_history(folder)) == [{"step": 10, "texts": texts}]
    alone = samples([{"kind": "samples", "step": 1, "texts": [{"prompt": "", "base": None, "variant": "x"}]}])
    assert alone[0]["texts"][0]["base"] is None


def test_facts_say_on_what_for_how_long_and_how_close(entry, folder):
    said = dict(facts(entry, read_history(folder), read_card(folder)))
    assert said["Fitted on"] == "Salesforce/wikitext"
    assert said["Stages"] == "transfer, distil"
    assert (said["Steps"], said["Tokens"], said["Time"]) == ("20", "2,000", "1:02:05")
    assert said["KL, validation"] == "0.25 nats/token"
    assert said["Perplexity, validation"] == "25 (base 20)"
    assert said["Same choice, validation"] == "80.0% of tokens"
    assert said["KL, test"] == "0.0712"
    assert said["Test text"] == "test.txt"
    assert said["Options"] == "candidates a, b"
    assert said["On disk"] == "2.5 MB"
    assert said["Same choice, test"] == "75.0% of tokens"
    assert said["How it was made"] == "Fitted on many books with train.py."
    assert "Perplexity, test" not in said
    assert "Before the curves" not in said
    assert dict(facts(entry, [], read_card(folder)))["KL, validation"] == "0.06"


def measured(context: int, kl: float) -> dict[str, object]:
    """A row of `trainer/evaluate.py`."""
    one = {"tokens": 1234, "base_loss": 3.0, "ce_excess": 0.5, "ce_excess_error": 0.25, "kl": kl, "kl_error": None}
    none = dict.fromkeys(one) | {"tokens": 0}
    return {
        **{"text": ["test.txt"], "tokens": 1234, "kl": kl, "perplexity": 21.0, "base_perplexity": 20.0},
        **{"top1_agreement": 0.9, "keys_read": 64, "rare": "it comes seldom", "context": context},
        **{"slices": {"all": one, "hits, over 256 back": none}, "positions": {"0 to 127": one}},
        "ablations": {"window": {"kl": 1.0, "kl_change": 0.5, "does_nothing": False}},
        "ablated_tokens": 1,
    }


def test_the_slices_of_a_card_are_a_table(folder):
    assert slices(read_card(folder)) == {"headers": [NO_SLICES], "rows": []}
    card = f"{CARD}\n## Use\n\nSo.\n"
    for context, kl in ((1024, 0.25), (512, 0.125)):
        card = with_measurement(card, measured(context, kl))
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert slices(read_card(folder)) == {
        "headers": ["tokens", "context", "how many", "cross-entropy of the base", "above it", "KL"],
        "rows": [
            [name, context, *figures]
            for context, kl in (("512", "0.1250"), ("1024", "0.2500"))
            for name, *figures in (
                ["all", "1,234", "3.000", "+0.500 ± 0.250", kl],
                ["hits, over 256 back", "0", "", "", ""],
                ["0 to 127", "1,234", "3.000", "+0.500 ± 0.250", kl],
            )
        ],
    }


def test_hits_are_those_of_the_longest_context(folder):
    assert hits_excess(read_card(folder)) == "–"
    card = f"{CARD}\n## Use\n\nSo.\n"
    for context in (1024, 512):
        row = measured(context, 0.25)
        row["slices"]["hits"] = row["slices"]["all"]
        card = with_measurement(card, row)
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert hits_excess(read_card(folder)) == "+0.500 ± 0.250 (at 1,024)"


@pytest.mark.parametrize(
    "table", ["| tokens that are |", "| tokens that are | KL |\n| --- | --- |\n| all |\n|", "| x |"]
)
def test_broken_tables_of_a_card_have_no_lines(folder, table):
    (folder / "README.md").write_text(f"{CARD}\n## Measured further\n\n### Context 9\n\n{table}\n", encoding="utf-8")
    assert slices(read_card(folder))["rows"] == []


@pytest.mark.parametrize(
    "card", ["", "---\n: [\n---\n", "---\n- 1\n---\n", "no front matter", "---\nmodel-index: 3\n---\n", "\x00\xff"]
)
def test_broken_cards_are_no_reason_to_fail(entry, folder, card):
    (folder / "README.md").write_text(card, encoding="utf-8")
    said = dict(facts(entry, [], read_card(folder)))
    assert said["Method"] == "masks"
    assert "Fitted on" not in said


@given(st.integers(0, 3000), st.integers(1, 500))
def test_thin_keeps_the_last_point(count, most):
    points = [[i, i * i] for i in range(count)]
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept == sorted(kept)
    assert kept[-1:] == points[-1:]
    if count <= most:
        assert kept == points


def test_the_tab_shows_what_the_store_has(store):
    handlers = Handlers(store)
    about, history, texts, inside, *frames, lookups = handlers.show("masks")
    assert ["Method", "masks"] in about
    assert (history, texts, inside) == ([], [], [])
    assert [frame.visible for frame in frames] == [False] * 3
    assert handlers.show("../etc")[:4] == ([], [], [], [])
    assert lookups == {"headers": [NO_SLICES], "rows": []}


def test_a_checkpoint_in_the_address_is_shown_or_said_to_be_missing(store):
    handlers = Handlers(store)
    assert handlers.open_link(Visit("training_model=masks")) == ("masks", [])
    assert handlers.open_link(Visit("tab=training"))[1] == []
    _, said = handlers.open_link(Visit("training_model=gone"))
    assert "'gone'; there are: base, masks" in said[0]["text"]
