"""One layer at a time given back to softmax, and the mix that follows."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

import attention
from attention.variant import attention_modules
from trainer.sensitivity import best_mix, give_back, main, parse, sensitivity


@pytest.fixture(scope="module")
def variant(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    base, _ = attention.load(workplace / "base")
    folder = tmp_path_factory.mktemp("sensitivity") / "variant"
    attention.save(attention.convert(base, attention.MasksConfig(candidates=("window(2)",))), folder)
    return str(folder)


def arguments(variant: str, workplace: Path, *more: str) -> list[str]:
    text = str(workplace / "valid.txt")
    return ["--variant", variant, "--text", text, "--context", "32", "--tokens", "256", *more]


def test_a_layer_given_back_is_the_base_s_there_and_the_rest_stays(variant, workplace):
    base, _ = attention.load(workplace / "base")
    model, ids = attention.load(variant, base=base)[0], torch.arange(20)[None] % 9
    with torch.no_grad():
        for module in attention_modules(model).values():
            for parameter in module.parameters():
                parameter.add_(0.1)  # as if the layers had been fitted
    given, before = copy.deepcopy(model), model(ids).logits
    give_back(given, base, 0)
    assert [mechanism.config.method for mechanism in given.mechanisms] == ["softmax", "masks"]
    give_back(given, base, 1)
    torch.testing.assert_close(given(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids).logits, before)


def test_a_fit_brings_each_row_nearer_and_leaves_the_variant(variant, workplace):
    fitting = arguments(variant, workplace, "--fit", "8", "--fit_text", str(workplace / "train.txt"))
    rows, fitted = sensitivity(parse(arguments(variant, workplace))), sensitivity(parse(fitting))
    assert all(after["kl"] < before["kl"] for before, after in zip(rows, fitted, strict=True))
    assert sensitivity(parse(fitting)) == fitted
    assert [row["kl"] for row in sensitivity(parse(arguments(variant, workplace)))] == [row["kl"] for row in rows]


def test_rows_and_the_best_mix(variant, workplace):
    rows = sensitivity(parse(arguments(variant, workplace)))
    assert [row["layer"] for row in rows] == [None, 0, 1]
    for row in rows[1:]:
        assert row["gain"] == pytest.approx(rows[0]["kl"] - row["kl"])
        assert row["keys_read"] == pytest.approx((2 + 32) / 2)
    model, _ = attention.load(variant)
    best = max(rows[1:], key=lambda row: row["gain"])
    mix = best_mix(model, rows, 17)
    assert [choice["layers"] for choice in mix["layers"] if choice["method"] == "softmax"] == [[best["layer"]]]
    assert best_mix(model, rows, 3) is None
    attention.convert(model, attention.config_from_dict(mix))


def test_layers_that_are_alike_are_named_together(workplace):
    base, _ = attention.load(workplace / "base")
    far = attention.MasksConfig(candidates=("window(3)",), first_layers=(("window(2)",),))
    model = attention.convert(base, far)
    rows = [{"layer": None, "kl": 1.0, "hits": None, "keys_read": 3.0}]
    rows += [{"layer": layer, "kl": kl, "hits": None, "keys_read": 9.0} for layer, kl in enumerate((2.0, 0.5))]
    assert best_mix(model, rows, 12)["layers"] == [
        {"layers": [0], **attention.MasksConfig(candidates=("window(2)",)).to_dict()},
        {"layers": [1], **attention.SoftmaxConfig().to_dict()},
    ]
    rows[1]["kl"], rows[2]["kl"] = 0.5, 2.0
    model = attention.convert(base, attention.PerformerConfig(num_features=(4, 8)))
    assert [choice.get("num_features") for choice in best_mix(model, rows, 12)["layers"]] == [None, 8]


def test_the_command(variant, workplace, tmp_path, capsys):
    figure = tmp_path / "layers.png"
    assert main(arguments(variant, workplace, "--budget", "40", "--figure", str(figure))) == 0
    printed = capsys.readouterr().out
    assert "layer given back" in printed
    assert attention.config_from_dict(yaml.safe_load(printed[printed.index("attention:") :])["attention"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(arguments(str(workplace / "base"), workplace)) == 2
    assert "nothing to give back" in capsys.readouterr().err
    assert main(arguments(variant, workplace, "--fit", "2", "--batch_size", "0")) == 2
    assert capsys.readouterr().err == (
        "--batch_size is 0; it must be at least 1; --fit needs --fit_text, a text other than the one that is measured\n"
    )
