"""The speed tab in a browser: curves that grow, words, Stop."""

import csv
import io
import re
import threading
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from demo.speed import SpeedRun, Subject
from demo.tabs import speed


def open_tab(page: Page, longest: str) -> None:
    page.get_by_role("tab", name="Speed").click()
    page.locator("#speed-longest input").click()
    page.get_by_role("option", name=longest, exact=True).click()


def test_curves_and_words(page: Page):
    open_tab(page, "512")
    expect(page.locator("#speed-measured")).to_contain_text("Press Measure")
    expect(page.locator("#speed-stop")).to_be_disabled()
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator("#speed-meter")).to_contain_text("Done")
    charts = page.locator("#speed-measured .chart")
    expect(charts).to_have_count(3)
    for index, chart in enumerate(charts.all()):
        expect(chart.locator("path.series")).to_have_count(2)
        expect(chart.locator("circle")).to_have_count(2 * 4)  # 64, 128, 256 and 512 tokens
        expect(chart.locator("path.spread")).to_have_count(2 * 4 * (index < 2))
    expect(page.locator("#speed-verdict")).to_contain_text(
        re.compile("masks, reading a text: (slower|faster|too noisy to tell)")
    )
    table = page.locator("#speed-table table")
    expect(table).to_contain_text("Reading 512, ms")
    with page.expect_download() as download:
        page.locator("#speed-table .csv").click()
    rows = list(csv.reader(io.StringIO(download.value.path().read_text(encoding="utf-8-sig"))))
    assert rows[0][0] == "Model"
    assert [row[0] for row in rows[1:]] == ["base", "masks"]


def test_a_measurement_asked_for_just_after_one_is_not_lost(page: Page, hold_end, gate: threading.Event):
    hold_end(speed, "_ended", "measure")
    open_tab(page, "512")
    measure = page.get_by_role("button", name="Measure", exact=True)
    measure.click()
    expect(page.locator("#speed-meter")).to_contain_text("Done")
    expect(measure).to_be_disabled()
    gate.set()
    measure.click()
    expect(page.locator("#speed-meter")).not_to_contain_text("Done")
    expect(page.locator("#speed-meter")).to_contain_text("Done")


def test_counted_needs_no_measurement_and_reaches_a_million_tokens(page: Page, store):
    page.get_by_role("tab", name="Speed").click()
    expect(page.locator("#speed-counted-verdict")).to_contain_text("masks, counted: reading a text takes")
    chart = page.locator("#speed-counted .chart").filter(has_text="Keys read and scored")
    expect(chart).to_contain_text("All layers.")
    drawing = chart.locator("svg")
    drawing.press("ArrowLeft")
    expect(chart.locator(".keys")).to_contain_text("tokens 1.05M")
    keys = sum(mechanism.keys_read(2**20 - 1) for mechanism in store.get("masks").model.mechanisms)
    expect(chart.locator(".keys")).to_contain_text(f"masks{keys}")
    drawing.press("ArrowLeft")
    expect(chart.locator(".keys")).to_contain_text("tokens 524k")
    page.mouse.move(0, 0)
    page.locator("#speed-layer input").click()
    page.get_by_role("option", name="1", exact=True).click()
    one = store.get("masks").model.mechanisms[1].keys_read(2**20 - 1)
    expect(chart).to_contain_text("Layer 1 alone.")
    drawing.press("ArrowLeft")
    expect(chart.locator(".keys")).to_contain_text(f"masks{one}")


def test_stop_keeps_what_was_measured(page: Page, monkeypatch: pytest.MonkeyPatch):
    measure = SpeedRun._length

    def held(run: SpeedRun, subjects: list[Subject], length: int) -> Iterator[float]:
        while length > 64:  # until Stop
            time.sleep(0.02)
            yield 0.0
        yield from measure(run, subjects, length)

    monkeypatch.setattr(SpeedRun, "_length", held)
    open_tab(page, "8192")
    page.get_by_role("button", name="Measure", exact=True).click()
    circles = page.locator("#speed-measured circle")
    expect(circles).to_have_count(3 * 2)
    expect(page.locator("#speed-start")).to_be_disabled()
    page.locator("#speed-stop").click()
    expect(page.locator("#speed-meter")).to_contain_text("Stopped")
    expect(page.locator("#speed-verdict")).to_contain_text("8,192 tokens were asked for, 64 reached: it was stopped")
    expect(page.locator("#speed-start")).to_be_enabled()
    expect(page.locator("#speed-stop")).to_be_disabled()
    expect(page.locator("#speed-table")).to_contain_text("Reading 64, ms")
    expect(circles).to_have_count(3 * 2)
    expect(page).to_have_url(re.compile("speed_results="))


def test_nothing_chosen_is_said(page: Page):
    page.get_by_role("tab", name="Speed").click()
    for box in page.locator("#speed-models").get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.get_by_text("Choose 1 to").first).to_be_visible()


def shown(page: Page) -> list[str]:
    """What the tab says of a measurement."""
    expect(page.locator("#speed-verdict")).to_contain_text("Measured on")
    expect(page.locator("#speed-table")).to_contain_text("Reading 512, ms")
    expect(page.locator("#speed-table")).not_to_contain_text("processing")  # Gradio's own, over what is about to change
    return [page.locator(f"#speed-{part}").inner_text() for part in ("verdict", "measured", "table")]


def test_what_was_measured_survives_reload_and_back_and_goes_into_a_link(page: Page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_tab(page, "512")
    page.locator("#speed-models").get_by_role("checkbox", name="base").uncheck()
    page.locator("#speed-layer input").click()
    page.get_by_role("option", name="1", exact=True).click()
    page.wait_for_url("**speed_layer=1**")
    page.get_by_role("button", name="Measure", exact=True).click()
    page.wait_for_url("**speed_results=**")
    first = shown(page)
    table = first[2]
    page.reload()
    expect(page.locator("#speed-table")).to_have_text(table, use_inner_text=True)  # first it is that of all layers
    assert shown(page) == first
    expect(page.locator("#speed-counted .chart").first).to_contain_text("Layer 1 alone.")
    expect(page.locator("#speed-models").get_by_role("checkbox", name="base")).not_to_be_checked()
    expect(page.locator("#speed-longest input")).to_have_value("512")
    page.locator("#speed-link").click()
    expect(page.locator("#speed-said")).to_contain_text("The link is copied")
    assert "speed_results=" in page.evaluate("navigator.clipboard.readText()")

    page.locator("#speed-layer input").click()
    page.get_by_role("option", name="0", exact=True).click()
    page.wait_for_url("**speed_layer=0**")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator("#speed-meter")).to_contain_text("Done")
    page.wait_for_function("old => document.querySelector('#speed-table').innerText !== old", arg=table)
    page.go_back()
    expect(page.locator("#speed-models").get_by_role("checkbox", name="base")).not_to_be_checked()
    expect(page.locator("#speed-table")).to_have_text(table, use_inner_text=True)
    assert shown(page) == first


def test_a_link_with_mistakes_says_which(page: Page, url: str):
    page.goto(f"{url}?tab=speed&speed_models=gone&speed_longest=7&speed_results=x")
    for part in ("'gone'", "not '7'", "The results in the link cannot be read"):
        expect(page.locator("#speed-said")).to_contain_text(part)
    expect(page.locator("#speed-measured")).to_contain_text("Press Measure")


def test_a_table_becomes_lists_where_it_is_too_wide(page: Page):
    table = page.locator("#speed-table table")
    page.get_by_role("tab", name="Speed").click()
    expect(table).to_be_visible()
    expect(table).not_to_have_class(re.compile("listed"))
    for width in (768, 380):
        page.set_viewport_size({"width": width, "height": 900})
        expect(table).to_have_class(re.compile("listed"))
        label = table.locator("td").first.evaluate("cell => getComputedStyle(cell, '::before').content")
        assert "KL, nats" in label
    page.set_viewport_size({"width": 1440, "height": 900})
    expect(table).not_to_have_class(re.compile("listed"))
