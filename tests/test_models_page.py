"""docs/models.md: the families that must convert do, and keep all parts of the contract, on the page and now."""

import re
from pathlib import Path

import pytest

import attention
from attention.families import TESTED
from benchmarks.contracts import broken
from benchmarks.families import CHECKS, METHODS, family
from benchmarks.tiny_models import families, tiny_model

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
MUST = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "opt", "phi3", "olmo2", "smollm3")


def test_the_families_that_must_convert_are_those_that_are_tested():
    assert TESTED == MUST


@pytest.mark.parametrize("name", MUST)
def test_the_page_has_each_with_all_that_is_tried(name):
    (row,) = re.findall(rf"^\| \*\*`{name}`\*\* \|.*$", PAGE, re.MULTILINE)
    held = f"{1 + len(CHECKS)} of {1 + len(CHECKS)}"  # how rounding moves the outputs comes first
    assert [cell.strip() for cell in row.split("|")[4:-1]] == [held] * len(METHODS)


@pytest.mark.parametrize(
    "name", ["opt", *(pytest.param(name, marks=pytest.mark.long) for name in MUST if name != "opt")]
)
def test_what_the_page_says_is_so(name):
    report = family(name, 32)
    assert report["seam"] < 2e-6
    assert not broken(report)
    assert len(report["results"]) == len(METHODS) * (1 + len(CHECKS))


REFUSED = {"jetmoe": "heads of keys", "roberta": "something else besides", "nemotron": "which tokens it reads"}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_does_not_fit_is_refused(name, reason):
    with pytest.raises(attention.UnsupportedModelError, match=reason):
        attention.convert(tiny_model(families()[name], plain=True), attention.SoftmaxConfig())
