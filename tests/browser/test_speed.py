"""The speed tab in a browser: curves that grow, words, Stop."""

import re

from playwright.sync_api import Page, expect


def open_tab(page: Page, longest: str) -> None:
    page.get_by_role("tab", name="Speed").click()
    page.locator("#speed-longest input").click()
    page.get_by_role("option", name=longest, exact=True).click()


def test_curves_and_words(page: Page):
    open_tab(page, "512")
    expect(page.locator("#speed-measured")).to_contain_text("Press Measure")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator("#speed-meter")).to_contain_text("Done")
    for part in ("#speed-measured", "#speed-counted"):
        charts = page.locator(part).locator(".chart")
        expect(charts).to_have_count(3)
        for chart in charts.all():
            expect(chart.locator("path.series")).to_have_count(2)
            expect(chart.locator("circle")).to_have_count(2 * 4)  # 64, 128, 256 and 512 tokens
    expect(page.locator("#speed-verdict")).to_contain_text(re.compile("masks, reading a text: (slower|no slower)"))


def test_a_chart_is_read_by_pointer_and_keyboard(page: Page, store):
    open_tab(page, "512")
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.locator("#speed-meter")).to_contain_text("Done")
    chart = page.locator("#speed-counted .chart").filter(has_text="Keys read")
    drawing = chart.locator("svg")
    drawing.press("ArrowLeft")
    expect(chart.locator(".keys")).to_contain_text("tokens 512")
    expect(chart.locator(".keys")).to_contain_text("base512")
    expect(chart.locator(".keys")).to_contain_text(f"masks{store.get('masks').model.mechanisms[0].keys_read(511)}")
    drawing.press("ArrowLeft")
    expect(chart.locator(".keys")).to_contain_text("tokens 256")
    box = drawing.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 60)
    expect(chart.locator(".keys")).to_contain_text("tokens 64")
    page.mouse.move(0, 0)
    expect(chart.locator(".keys")).not_to_contain_text("tokens")


def test_stop_keeps_what_was_measured(page: Page, monkeypatch):
    monkeypatch.setattr("demo.speed.ROUND_SECONDS", 2)  # for each length
    monkeypatch.setattr("demo.speed.MAX_ROUNDS", 10**6)
    open_tab(page, "8192")
    page.get_by_role("button", name="Measure", exact=True).click()
    circles = page.locator("#speed-counted circle")
    expect(circles.first).to_be_visible()
    page.locator("#speed-stop").click()
    expect(page.locator("#speed-meter")).to_contain_text("Stopped")
    measured = circles.count()
    assert 0 < measured < 3 * 2 * 8
    page.wait_for_timeout(3000)  # longer than one length takes
    expect(page.locator("#speed-meter")).to_contain_text("Stopped")
    assert circles.count() == measured


def test_nothing_chosen_is_said(page: Page):
    page.get_by_role("tab", name="Speed").click()
    for box in page.locator("#speed-models").get_by_role("checkbox").all():
        box.uncheck()
    page.get_by_role("button", name="Measure", exact=True).click()
    expect(page.get_by_text("Choose 1 to").first).to_be_visible()
