"""One layer at a time given back to softmax, and the mix that follows."""

from pathlib import Path

import pytest
import torch
import yaml

import attention
from trainer.sensitivity import best_mix, given_back, main, parse, sensitivity


@pytest.fixture(scope="module")
def variant(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    base, _ = attention.load(workplace / "base")
    folder = tmp_path_factory.mktemp("sensitivity") / "variant"
    attention.save(attention.convert(base, attention.MasksConfig(candidates=("window(2)",))), folder)
    return str(folder)


def arguments(variant: str, workplace: Path, *more: str) -> list[str]:
    text = str(workplace / "valid.txt")
    return ["--variant", variant, "--text", text, "--context", "32", "--tokens", "256", *more]


def test_a_layer_given_back_is_softmax_there_and_the_rest_stays(variant, workplace):
    base, _ = attention.load(workplace / "base")
    model, ids = attention.load(variant, base=base)[0], torch.arange(20)[None] % 9
    before = model(ids).logits
    with given_back(model, 0):
        assert [mechanism.config.method for mechanism in model.mechanisms] == ["softmax", "masks"]
        with given_back(model, 1):
            torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids).logits, before)


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


def test_the_command(variant, workplace, tmp_path, capsys):
    figure = tmp_path / "layers.png"
    assert main(arguments(variant, workplace, "--budget", "40", "--figure", str(figure))) == 0
    printed = capsys.readouterr().out
    assert "layer given back" in printed
    assert attention.config_from_dict(yaml.safe_load(printed[printed.index("attention:") :])["attention"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(arguments(str(workplace / "base"), workplace)) == 2
    assert "nothing to give back" in capsys.readouterr().err
