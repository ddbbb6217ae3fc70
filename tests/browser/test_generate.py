"""Generating in a browser: text, costs, links, Stop, hostile prompts."""

import json
import re
import threading
from itertools import pairwise

import pytest
from playwright.sync_api import Page, expect

from demo import engine
from demo.engine import Decoder, Generation
from demo.runs import Run
from demo.tabs.generate import Handlers

from .conftest import Watched

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x` \u202e \u0007 </script>"


def column(page: Page, name: str):
    return page.locator("#generate-columns section").filter(has=page.get_by_role("heading", name=name, exact=True))


def choose(page: Page, *names: str) -> None:
    for box in page.locator("#generate-models").get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("name") in names)


def set_length(page: Page, tokens: int) -> None:
    page.get_by_role("button", name="Sampling").click()
    field = page.get_by_role("spinbutton", name="number input for Length")
    expect(field).to_be_visible()
    # Gradio sets what an accordion holds once more in the frame after it is first opened.
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    field.fill(str(tokens))
    field.press("Tab")
    expect(page.get_by_role("slider", name="range slider for Length")).to_have_value(str(tokens))


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()


def expect_written(page: Page, name: str, tokens: int, *, scored: bool = False) -> None:
    """Waits until a model has written so many tokens and is done: one that writes says "3 of 9 tokens …"."""
    ending = " · KL" if scored else "( ·|$)"
    expect(column(page, name).locator(".status")).to_have_text(re.compile(rf"^{tokens} tokens{ending}"))


def test_a_finished_example_is_there_before_anything_is_pressed(page: Page):
    expect_written(page, "base", 60)
    expect_written(page, "masks", 60, scored=True)
    expect(page.locator("#generate-costs tbody tr")).to_have_count(2)


def test_two_methods_write_side_by_side(page: Page):
    page.get_by_label("Prompt").fill("Once upon a time")
    choose(page, "base", "masks")
    set_length(page, 12)
    generate(page)
    for name in ("base", "masks"):
        expect_written(page, name, 12)
        expect(column(page, name)).to_contain_text("Once upon a time")
        expect(column(page, name).locator(".token")).to_have_count(12)
    row = page.locator("#generate-costs tbody tr").nth(1)
    expect(row.get_by_role("rowheader")).to_have_text("masks")
    *others, scored = row.get_by_role("cell").all()
    for cell in others:
        expect(cell).to_contain_text("×")
    expect(scored).to_have_text("0")
    expect(column(page, "masks").locator(".parts")).to_have_count(1)
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#attention-text textarea")).to_have_value(re.compile("^Once upon a time"))
    expect(page.locator("#attention-maps canvas").first).to_be_visible()


def test_a_token_explains_itself(page: Page):
    expect(column(page, "masks").locator(".scored")).to_have_count(60)
    column(page, "masks").locator(".scored").first.hover()
    card = page.locator("#generate-columns .card")
    for text in ("KL to the base", "Probability", "Rank", "This model", "Base"):
        expect(card).to_contain_text(text)


def test_a_link_reproduces_the_page(page: Page, url: str):
    page.get_by_label("Prompt").fill("A & b = c?")
    choose(page, "masks")
    set_length(page, 9)
    generate(page)
    expect_written(page, "masks", 9)
    text = column(page, "masks").locator(".text").inner_text()
    assert "max_new_tokens=9" in page.url
    again = page.context.new_page()
    again.goto(page.url)
    expect_written(again, "masks", 9)
    assert column(again, "masks").locator(".text").inner_text() == text
    expect(again.get_by_label("Prompt")).to_have_value("A & b = c?")
    expect(column(again, "base")).to_have_count(0)


def hold(monkeypatch: pytest.MonkeyPatch, gate: threading.Event, tokens: int) -> None:
    """Shows every token of a run, and lets no model write more than `tokens` before the gate is open."""
    step = Decoder.step

    def held(decoder: Decoder) -> None:
        if decoder.column.generated == tokens:
            gate.wait()
        step(decoder)

    monkeypatch.setattr(Decoder, "step", held)
    monkeypatch.setattr(engine, "FRAME_SECONDS", 0)


def test_stop_keeps_and_compares_what_is_written(page: Page, monkeypatch: pytest.MonkeyPatch, gate: threading.Event):
    expect_written(page, "base", 60)
    finish = Generation.finish

    def stopped(generation: Generation) -> Run:
        gate.set()  # Stop has arrived
        return finish(generation)

    hold(monkeypatch, gate, 5)
    monkeypatch.setattr(Generation, "finish", stopped)
    page.get_by_label("Prompt").fill("Stop me")
    generate(page)
    expect(column(page, "masks")).to_contain_text("5 of 60 tokens …")
    page.get_by_role("button", name="Stop").click()
    for name in ("base", "masks"):
        expect(column(page, name)).to_contain_text(re.compile(r"\d tokens?, stopped"))
        expect(column(page, name)).to_contain_text("Stop me")
        expect(column(page, name).locator(".token:not(.scored)")).to_have_count(0)


def test_a_closed_page_frees_the_worker(page: Page, url: str, monkeypatch: pytest.MonkeyPatch, gate: threading.Event):
    step = Decoder.step

    def endless(decoder: Decoder) -> None:
        if decoder.settings.prompt == "Left behind" and decoder.column.generated == 3 and not gate.wait(0.05):
            return
        step(decoder)

    monkeypatch.setattr(Decoder, "step", endless)
    other = page.context.new_page()
    other.goto(url)
    other.get_by_label("Prompt").fill("Left behind")
    generate(other)
    expect(column(other, "base")).to_contain_text("tokens …")
    other.close()
    page.get_by_label("Prompt").fill("Next")
    generate(page)
    expect(column(page, "base")).to_contain_text("Next")
    expect_written(page, "base", 60)


def test_the_keyboard_is_enough(page: Page):
    page.get_by_label("Prompt").fill("By keyboard")
    page.get_by_label("Prompt").press("Shift+Enter")
    expect(column(page, "base")).to_contain_text("By keyboard")
    expect_written(page, "base", 60)


def test_bad_input_is_said_where_it_is(watched: Watched):
    page, watched.may_refuse = watched.page, True
    page.get_by_label("Prompt").fill("")
    generate(page)
    expect(page.get_by_text("The prompt is empty").first).to_be_visible()
    page.get_by_label("Prompt").fill("x" * 5001)
    generate(page)
    expect(page.get_by_text("5,001 characters").first).to_be_visible()
    page.get_by_label("Prompt").fill("a " * 500)
    generate(page)
    expect(page.locator("#generate-notes")).to_contain_text("the last 68 are used")
    expect(column(page, "base")).to_contain_text("a a a")
    expect_written(page, "base", 60)


def test_hostile_text_is_text(page: Page):
    page.get_by_label("Prompt").fill(HOSTILE)
    set_length(page, 3)
    generate(page)
    expect(column(page, "base")).to_contain_text("<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x`")
    expect_written(page, "base", 3)
    assert page.locator("#generate-columns img").count() == 0


def test_history_and_download(page: Page):
    set_length(page, 5)
    for prompt in ("First one", "Second one"):
        page.get_by_label("Prompt").fill(prompt)
        generate(page)
        expect(column(page, "masks")).to_contain_text(prompt)
        expect_written(page, "masks", 5, scored=True)
    page.get_by_role("button", name="Earlier runs").click()
    page.get_by_role("radio", name="First one").check()
    expect(page.locator("#generate-earlier-columns")).to_contain_text("First one")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    runs = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [run["settings"]["prompt"] for run in runs[:2]] == ["Second one", "First one"]


def test_a_model_is_added_from_a_folder(page: Page, checkpoints, tmp_path):
    page.get_by_role("tab", name="Models").click()
    source = page.get_by_label("Add a model")
    source.fill("/etc")
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#models-news")).to_contain_text("may not be read")
    source.fill(str(checkpoints / "masks"))
    page.get_by_role("button", name="Add", exact=True).click()
    expect(page.locator("#models-news")).to_contain_text("masks can be chosen now")


@pytest.mark.parametrize("width", [380, 768, 2560])
def test_nothing_is_wider_than_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    expect_written(page, "base", 60)
    for name, last in TABS.items():
        page.get_by_role("tab", name=name).click()
        expect(page.locator(last).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def buttons(page: Page):
    return [page.locator(f"#generate-{name}") for name in ("start", "stop", "link")]


def test_buttons_tell_what_can_be_done(page: Page, monkeypatch: pytest.MonkeyPatch, gate: threading.Event):
    start, stop, link = buttons(page)
    expect(stop).to_be_disabled()
    expect(link).to_be_disabled()
    hold(monkeypatch, gate, 9)
    page.get_by_label("Prompt").fill("Wait")
    generate(page)
    expect(start).to_be_disabled()
    expect(column(page, "base")).to_contain_text("9 of 60 tokens …")
    expect(start).to_have_text("Writing …")
    expect(stop).to_be_enabled()
    page.get_by_label("Prompt").press("Shift+Enter")  # a second run has to wait for the end of the first
    expect(page.get_by_text("A run is under way")).to_be_visible()
    gate.set()
    expect(start).to_have_text("Generate")
    expect(start).to_be_enabled()
    expect(stop).to_be_disabled()
    expect(link).to_be_enabled()
    expect(page.locator("#generate-columns .unseen")).to_contain_text("The run has ended. base: 60 tokens")


def test_a_run_asked_for_just_after_one_is_not_lost(page: Page, hold_end, gate: threading.Event):
    hold_end(Handlers, "_finished", "stream")
    set_length(page, 5)
    page.get_by_label("Prompt").fill("The first")
    generate(page)
    expect(column(page, "masks")).to_contain_text("The first")
    expect_written(page, "masks", 5, scored=True)
    expect(page.locator("#generate-start")).to_be_disabled()
    gate.set()
    page.get_by_label("Prompt").fill("The second")
    generate(page)  # as soon as it can be pressed
    expect(column(page, "masks")).to_contain_text("The second")


def test_a_run_that_is_refused_changes_neither_address_nor_buttons(watched: Watched):
    page, watched.may_refuse = watched.page, True
    before = page.url
    page.get_by_label("Prompt").fill("")
    generate(page)
    expect(page.get_by_text("The prompt is empty").first).to_be_visible()
    start, stop, link = buttons(page)
    expect(start).to_be_enabled()
    expect(stop).to_be_disabled()
    expect(link).to_be_disabled()
    assert page.url == before


def test_a_copied_link_is_said_to_be(page: Page, url: str):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("Prompt").fill("Copy me")
    generate(page)
    link = buttons(page)[2]
    expect(link).to_be_enabled()
    link.click()
    expect(page.locator("#generate-said")).to_contain_text("The link is copied")
    assert "prompt=Copy+me" in page.evaluate("navigator.clipboard.readText()")
    assert page.evaluate("navigator.clipboard.readText()") == page.url


def test_a_link_with_mistakes_says_which_and_runs_nothing(page: Page, url: str):
    page.goto(f"{url}?prompt=&seed=-3&temperature=abc&models=gone&top_k=7&tab=nowhere")
    expect(page.get_by_text("In the link tab is 'nowhere'; it must be one of generate, score, ")).to_be_visible()
    said = page.locator("#generate-said")
    for part in ("Nothing was run", "prompt is empty", "Seed", "Temperature", "No model gone"):
        expect(said).to_contain_text(part)
    expect_written(page, "base", 60)  # the example, not boxes that wait for ever
    expect(page.locator("#generate-start")).to_be_enabled()


def test_back_and_reload_keep_what_was_there(page: Page):
    set_length(page, 5)
    for prompt in ("The first", "The second"):
        page.get_by_label("Prompt").fill(prompt)
        generate(page)
        expect(column(page, "masks")).to_contain_text(prompt)
        expect_written(page, "masks", 5, scored=True)
    page.get_by_role("tab", name="Models").click()
    expect(page).to_have_url(re.compile("prompt=The\\+second.*tab=models"))
    page.reload()
    expect(page.get_by_role("tab", name="Models")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Generate").click()
    expect(column(page, "masks")).to_contain_text("The second")
    expect_written(page, "masks", 5, scored=True)
    page.go_back()
    expect(column(page, "masks")).to_contain_text("The first")
    expect_written(page, "masks", 5, scored=True)


def test_back_while_a_run_starts_leads_to_the_run_before(
    page: Page, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
):
    set_length(page, 5)
    page.get_by_label("Prompt").fill("The first")
    generate(page)
    expect_written(page, "masks", 5, scored=True)
    hold(monkeypatch, gate, 0)
    page.get_by_label("Prompt").fill("The second")
    generate(page)
    page.wait_for_url("**prompt=The+second**")
    page.go_back()
    expect(page).to_have_url(re.compile("prompt=The\\+first"))
    expect(page.get_by_label("Prompt")).to_have_value("The first")
    gate.set()
    expect_written(page, "masks", 5, scored=True)
    expect(column(page, "masks")).to_contain_text("The first")
    expect(page.locator("#generate-start")).to_have_text("Generate")
    assert "The+first" in page.url


def test_a_run_that_an_address_asks_for_leaves_it_as_it_is(page: Page):
    """Whatever the order of its parameters; another order would be a page of its own to go back from."""
    set_length(page, 5)
    page.get_by_label("Prompt").fill("Once more")
    generate(page)
    expect_written(page, "masks", 5, scored=True)
    asked = f"{page.url}&tab=models"
    page.goto(asked)
    expect(page.get_by_role("tab", name="Models")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#generate-columns section").last).to_contain_text("5 tokens · KL")
    assert page.url == asked


def test_another_token_is_taken_and_the_text_goes_on_from_there(page: Page):
    set_length(page, 8)
    page.get_by_label("Prompt").fill("The old house")
    generate(page)
    masks = column(page, "masks")
    expect_written(page, "masks", 8, scored=True)
    expect(page.locator("#generate-start")).to_be_enabled()
    kept = masks.locator(".token").nth(0).inner_text() + masks.locator(".token").nth(1).inner_text()
    masks.locator(".token").nth(2).click()
    choice = page.locator("#generate-columns .card button").nth(3)
    choice.click()
    expect(page.get_by_label("Prompt")).to_have_value(re.compile(re.escape("The old house" + kept.rstrip("\n↵")[:3])))
    expect(column(page, "base").locator(".prompt")).not_to_have_text("The old house")
    expect_written(page, "base", 8)


def test_a_model_that_cannot_be_loaded_has_a_column_that_says_why(page: Page, monkeypatch: pytest.MonkeyPatch, store):
    get = type(store).get

    def failing(self, name):
        if name == "masks":
            raise RuntimeError("its file is broken")
        return get(self, name)

    monkeypatch.setattr(type(store), "get", failing)
    page.get_by_label("Prompt").fill("One fails")
    generate(page)
    expect(column(page, "masks")).to_contain_text("The model failed: its file is broken")
    expect_written(page, "base", 60)


TABS = {  # with something that is there last
    "Generate": "#generate-costs tbody tr",
    "Score": "#score-start",
    "Attention": "#attention-maps .title",
    "Speed": "#speed-table tbody tr",
    "Training": "#training-facts .view > *",
    "Models": "#models-table tbody tr",
}


def test_headings_are_in_order_and_every_button_has_a_name(page: Page):
    for name, last in TABS.items():
        page.get_by_role("tab", name=name).click()
        expect(page.locator(last).first).to_be_visible()
        if name == "Score":
            page.locator(last).click()
            expect(page.locator("#score-positions .chart")).to_be_visible()
        levels = page.locator("h1, h2, h3, h4, h5").evaluate_all(
            "all => all.filter(h => h.checkVisibility()).map(h => Number(h.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels)), f"{name}: {levels}"
        nameless = page.locator("button").evaluate_all(
            "all => all.filter(b => !(b.textContent.trim() || b.ariaLabel || b.title)).map(b => b.outerHTML)"
        )
        assert nameless == [], name


def test_eight_lines_of_the_results_are_seen_on_a_laptop(page: Page):
    page.set_viewport_size({"width": 1440, "height": 900})
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#generate-columns .text").first
    expect(box.locator(".token").nth(59)).to_be_attached()
    place = box.bounding_box()
    line = box.evaluate("node => parseFloat(getComputedStyle(node).lineHeight)")
    seen = min(place["y"] + place["height"], 900) - place["y"]
    assert seen / line >= 8


def test_the_main_button_can_be_read(page: Page):
    for theme in ("light", "dark"):
        page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
        colours = page.locator("#generate-start").evaluate(
            "b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]"
        )
        front, back = (luminance([int(n) for n in re.findall(r"\d+", colour)[:3]]) for colour in colours)
        assert (max(front, back) + 0.05) / (min(front, back) + 0.05) >= 4.5


def luminance(rgb: list[int]) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
