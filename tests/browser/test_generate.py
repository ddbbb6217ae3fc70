"""Generating in a browser: text, costs, links, Stop, hostile prompts."""

import json
import re
import threading
import time

import pytest
from playwright.sync_api import Page, expect

from demo.engine import Decoder, Generation
from demo.runs import Run

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


def test_a_finished_example_is_there_before_anything_is_pressed(page: Page):
    expect(column(page, "base")).to_contain_text("60 tokens")
    expect(column(page, "masks")).to_contain_text("60 tokens · KL")
    expect(page.locator("#generate-costs tbody tr")).to_have_count(2)


def test_two_methods_write_side_by_side(page: Page):
    page.get_by_label("Prompt").fill("Once upon a time")
    choose(page, "base", "masks")
    set_length(page, 12)
    generate(page)
    for name in ("base", "masks"):
        expect(column(page, name)).to_contain_text("12 tokens")
        expect(column(page, name)).to_contain_text("Once upon a time")
        expect(column(page, name).locator(".token:not(.prompt)")).to_have_count(12)
    row = page.locator("#generate-costs tbody tr").nth(1)
    expect(row.get_by_role("rowheader")).to_have_text("masks")
    for cell in row.get_by_role("cell").all():
        expect(cell).to_contain_text("×")
    expect(column(page, "masks").locator(".parts")).to_have_count(1)
    page.get_by_role("tab", name="Attention").click()
    expect(page.get_by_label("Text", exact=False).first).to_have_value(re.compile("^Once upon a time"))
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
    expect(column(page, "masks")).to_contain_text("9 tokens")
    text = column(page, "masks").locator(".text").inner_text()
    assert "max_new_tokens=9" in page.url
    again = page.context.new_page()
    again.goto(page.url)
    expect(column(again, "masks")).to_contain_text("9 tokens")
    assert column(again, "masks").locator(".text").inner_text() == text
    expect(again.get_by_label("Prompt")).to_have_value("A & b = c?")
    expect(column(again, "base")).to_have_count(0)


def test_stop_keeps_and_compares_what_is_written(page: Page, monkeypatch: pytest.MonkeyPatch):
    expect(column(page, "base")).to_contain_text("60 tokens")
    step, finish, gate = Decoder.step, Generation.finish, threading.Event()

    def held(decoder: Decoder) -> None:
        gate.wait(60 if decoder.column.generated == 5 else 0.05)  # slow enough for every token to be shown
        step(decoder)

    def stopped(generation: Generation) -> Run:
        gate.set()  # Stop has arrived
        return finish(generation)

    monkeypatch.setattr(Decoder, "step", held)
    monkeypatch.setattr(Generation, "finish", stopped)
    page.get_by_label("Prompt").fill("Stop me")
    generate(page)
    expect(column(page, "masks")).to_contain_text(re.compile("Stop me.*tokens …"))
    page.get_by_role("button", name="Stop").click()
    for name in ("base", "masks"):
        expect(column(page, name)).to_contain_text(re.compile(r"[1-6] tokens?, stopped"))
        expect(column(page, name).locator(".token:not(.prompt):not(.scored)")).to_have_count(0)


def test_a_closed_page_frees_the_worker(page: Page, url: str, monkeypatch: pytest.MonkeyPatch):
    step, written = Decoder.step, []

    def slow(decoder: Decoder) -> None:
        written.append(decoder.settings.prompt)
        time.sleep(0.2 if decoder.settings.prompt == "Left behind" else 0)
        step(decoder)

    monkeypatch.setattr(Decoder, "step", slow)
    other = page.context.new_page()
    other.goto(url)
    other.get_by_label("Prompt").fill("Left behind")
    generate(other)
    expect(column(other, "base")).to_contain_text("tokens …")
    other.close()
    page.get_by_label("Prompt").fill("Next")
    generate(page)
    expect(column(page, "base")).to_contain_text("60 tokens")
    assert written.count("Left behind") < 120


def test_the_keyboard_is_enough(page: Page):
    page.get_by_label("Prompt").fill("By keyboard")
    page.get_by_label("Prompt").press("Shift+Enter")
    expect(column(page, "base")).to_contain_text("By keyboard")
    expect(column(page, "base")).to_contain_text("60 tokens")


def test_bad_input_is_said_where_it_is(watched: Watched):
    page = watched.page
    page.get_by_label("Prompt").fill("")
    generate(page)
    expect(page.get_by_text("The prompt is empty").first).to_be_visible()
    page.get_by_label("Prompt").fill("x" * 2001)
    generate(page)
    expect(page.get_by_text("2,001 characters").first).to_be_visible()
    page.get_by_label("Prompt").fill("a " * 500)
    generate(page)
    expect(column(page, "base")).to_contain_text("Shorten the prompt")
    refusals = [error for error in watched.errors if "422" in error]  # how the browser logs a refused request
    assert watched.errors == refusals
    watched.errors.clear()


def test_hostile_text_is_text(page: Page):
    page.get_by_label("Prompt").fill(HOSTILE)
    set_length(page, 3)
    generate(page)
    expect(column(page, "base")).to_contain_text("<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x`")
    expect(column(page, "base")).to_contain_text("3 tokens")
    assert page.locator("#generate-columns img").count() == 0


def test_history_and_download(page: Page):
    set_length(page, 5)
    for prompt in ("First one", "Second one"):
        page.get_by_label("Prompt").fill(prompt)
        generate(page)
        expect(column(page, "masks")).to_contain_text(prompt)
        expect(column(page, "masks")).to_contain_text("5 tokens · KL")
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


@pytest.mark.parametrize("width", [380, 2560])
def test_nothing_is_wider_than_the_window(page: Page, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    expect(column(page, "base")).to_contain_text("60 tokens")
    for name in ("Generate", "Attention", "Speed", "Training", "Models"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
