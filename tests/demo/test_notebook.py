"""Attention maps in a notebook."""

import html
import json
import re

import pytest

import attention
from demo.attention import ViewError
from demo.notebook import attention_view

TEXT = "The old house </script><b>stood ${x} at the end of the lane."


def value_of(page: str) -> dict:
    """The view inside a page."""
    return json.loads(re.search(r'<script type="application/json" id="value">(.*?)</script>', page, re.DOTALL)[1])


def test_a_model_by_its_folder_is_shown_beside_its_base(checkpoints):
    shown = attention_view(str(checkpoints / "masks"), TEXT, layer=1, head=1)
    view = value_of(shown.page)
    assert "".join(view["tokens"]) == TEXT
    assert view["title"] == "masks · layer 1 · head 1"
    assert [each["key"] for each in view["maps"]] == ["model", "base", "difference"]
    frame = shown._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == shown.page


def test_a_model_in_memory(checkpoints, tmp_path):
    base, tokenizer = attention.load(checkpoints / "base")
    variant = attention.convert(base, attention.NSAConfig())
    alone = value_of(attention_view(variant, TEXT, tokenizer=tokenizer).page)
    assert [each["key"] for each in alone["maps"]] == ["model"]
    both = value_of(attention_view(variant, TEXT, tokenizer=tokenizer, base=base).page)
    assert [each["key"] for each in both["maps"]] == ["model", "base", "difference"]
    plain = attention_view(base, TEXT, dark=True)
    assert value_of(plain.page)["maps"][0]["title"] == "base"
    assert 'class="dark"' in plain.save(tmp_path / "view.html").read_text(encoding="utf-8")


def test_pages_fetch_nothing(checkpoints):
    page = attention_view(checkpoints / "base", TEXT).page
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:|@import|url\((?!#)", page)
    assert page.count("<script") == 2


def test_what_is_wrong_is_said(checkpoints):
    with pytest.raises(ViewError, match="layer 9"):
        attention_view(checkpoints / "masks", TEXT, layer=9)
    with pytest.raises(ViewError, match="empty"):
        attention_view(checkpoints / "masks", "")
    with pytest.raises((OSError, ValueError), match="nowhere"):
        attention_view("./nowhere", TEXT)
