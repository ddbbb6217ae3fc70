"""Scoring a text in a browser."""

import csv
import io
import json
import re

from playwright.sync_api import Page, expect

TEXT = "The old house stood at the end of the lane. " * 20


def score(page: Page, text: str) -> None:
    page.get_by_role("tab", name="Score").click()
    page.get_by_label("Passage").fill(text)
    expect(page.locator("#score-chosen")).to_have_count(0)  # no frame without models in it
    page.get_by_role("button", name="Score", exact=True).click()
    expect_scored(page)


def expect_scored(page: Page) -> None:
    """Waits until every model has scored every token; the full stop is said only then."""
    expect(page.locator("#score-said")).to_have_text(re.compile(r"Scored ([\d,]+) of \1 tokens\."))
    expect(page.locator("#score-columns .token.scored").first).to_be_attached()


def test_a_text_is_scored_coloured_and_taken_home(page: Page):
    score(page, TEXT)
    rows = page.locator("#score-means tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("masks")
    expect(page.locator("#score-places tbody tr")).to_have_count(20)
    expect(page.locator("#score-positions svg")).to_be_visible()
    page.locator("#score-columns .token").nth(30).hover()
    card = page.locator("#score-columns .card")
    for part in ("Parting", "base", "masks", "rank"):
        expect(card).to_contain_text(part)
    page.locator("#score-chosen").get_by_role("radio", name="base").check()
    expect(page.locator("#score-columns h3")).to_have_text("base")
    with page.expect_download() as download:
        page.locator("#score-csv").click()
    lines = list(csv.DictReader(io.StringIO(download.value.path().read_text(encoding="utf-8"))))
    assert TEXT.endswith("".join(line["token"] for line in lines))
    with page.expect_download() as download:
        page.locator("#score-json").click()
    assert len(json.loads(download.value.path().read_text(encoding="utf-8"))["rows"]) == len(lines)


def test_a_file_is_read_and_what_is_wrong_is_said(page: Page, tmp_path):
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("button", name="Score", exact=True).wait_for()
    page.get_by_label("Passage").fill("")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#score-said")).to_contain_text("The text is empty")
    (tmp_path / "mine.txt").write_text("My own words.")
    page.locator("#score-tab input[type=file]").set_input_files(tmp_path / "mine.txt")
    expect(page.get_by_label("Passage")).to_have_value("My own words.")


def test_a_link_scores_the_same_text_again(page: Page):
    score(page, "A & b = c? The old house.")
    page.wait_for_url("**score_text=A+%26+b+%3D+c%3F**")
    means = page.locator("#score-means").inner_text()
    page.reload()
    expect(page.get_by_label("Passage")).to_have_value("A & b = c? The old house.")
    expect_scored(page)
    expect(page.locator("#score-means")).to_have_text(means, use_inner_text=True)
