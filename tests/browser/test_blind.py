"""The blind test in a browser: no names before the vote, no vote before reading, a count that stays."""

import json

import pytest
from playwright.sync_api import Page, expect

from demo.tabs import blind

from .test_generate import choose, set_length

NAMES = ("base", "masks", "softmax", "window(6)")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes a second or two."""
    monkeypatch.setattr(blind, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(blind, "reading_seconds", lambda texts: 1.5)


def write_two(page: Page) -> None:
    page.get_by_label("Prompt").fill("Two captains met")
    choose(page, "base", "masks")
    set_length(page, 20)
    page.get_by_role("button", name="Blind test").click()
    page.locator("#blind-start").click()
    expect(page.locator("#blind-texts section")).to_have_count(2)
    expect(page.locator("#blind-texts .status").first).to_contain_text("tokens")


def vote(page: Page) -> None:
    expect(page.locator("#blind-answer")).to_be_enabled()
    page.locator("#blind-base").get_by_role("radio", name="A", exact=True).check()
    page.locator("#blind-better").get_by_role("radio", name="They are equal").check()
    page.locator("#blind-answer").click()
    expect(page.locator("#blind-tally tbody tr")).to_have_count(1)


def test_no_name_reaches_the_page_before_the_vote(page: Page):
    write_two(page)
    expect(page.locator("#blind-answer")).to_be_enabled()
    shown = page.locator("#blind").evaluate("node => node.outerHTML")
    assert "Two captains met" in shown
    hints = page.locator("#blind-texts .columns").inner_html() + page.locator("#blind-said .view").inner_html()
    for name in NAMES:
        assert name not in hints
    kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
    assert not [name for name in NAMES if name in kept]
    vote(page)
    said = page.locator("#blind-said")
    for text in ("A is by", "B is by", "base", "masks", "KL to the base", "perplexity"):
        expect(said).to_contain_text(text)
    expect(page.locator("#blind-texts h3").first).to_contain_text("A: ")


def test_an_answer_before_reading_does_not_count(page: Page, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blind, "reading_seconds", lambda texts: 3600.0)
    write_two(page)
    expect(page.locator("#blind-answer")).to_be_disabled()
    expect(page.locator("#blind-said")).to_contain_text("An answer counts after 3600 s")


def test_votes_stay_are_counted_and_can_be_taken_home(page: Page):
    page.get_by_role("button", name="Blind test").click()
    page.locator("#blind-forget").click()
    page.get_by_role("button", name="Blind test").click()
    write_two(page)
    vote(page)
    expect(page.locator("#blind-tally tbody tr")).to_contain_text("masks")
    page.wait_for_function("(localStorage.getItem('attention-votes') ?? '').length > 100")
    page.reload()
    page.get_by_role("button", name="Blind test").click()
    expect(page.locator("#blind-tally tbody tr")).to_contain_text("1")
    with page.expect_download() as download:
        page.locator("#blind-save").click()
    (line,) = download.value.path().read_text(encoding="utf-8").splitlines()
    kept = json.loads(line)
    assert {kept["first"]["model"], kept["second"]["model"]} == {"base", "masks"}
    assert (kept["prompt"], kept["base"], kept["better"]) == ("Two captains met", "first", "tie")
    page.locator("#blind-forget").click()
    expect(page.locator("#blind-tally tbody tr")).to_have_count(0)
