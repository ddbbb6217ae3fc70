"""Components on a page of their own: tokens by pointer and keyboard, streaming, hostile values, curves with gaps."""

import time

import gradio as gr
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from demo.components import Curves, Samples, TokenColumns
from demo.views import lines
from tests.demo.conftest import free_port

from .conftest import Watched

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}`\u202e\u0007"


PROMPT = "first " + "word " * 1000 + HOSTILE + " the end."


def take(event: gr.EventData) -> str:
    return f"{event.column} {event.index} {event.of_base} {event.rank}"


def columns(count: int, scored: bool) -> list[dict]:
    """Two columns of `count` tokens after a long prompt, every fifth token hostile."""
    tokens = []
    for i in range(count):
        token = {"text": HOSTILE if i % 5 == 4 else f" t{i}", "parts": i == 6}
        if scored:
            rest = {"details": [["Rank", str(i)]], "top": [[HOSTILE, 0.5]], "base_top": [[" b", 0.25]]}
            token |= {"score": i / count, **rest}
        tokens.append(token)
    rest = {"note": HOSTILE, "status": f"{count} tokens", "busy": not scored, "lines": lines(tokens)}
    return [{"title": title, "prompt": PROMPT, "prompt_tokens": 1234, **rest} for title in ("a", "b")]


def stream():
    for count in range(0, 401, 5):
        yield columns(count, scored=False)
        time.sleep(0.02)
    yield columns(400, scored=True)


@pytest.fixture(scope="module")
def page(browser: BrowserContext):
    curve = {
        "title": HOSTILE,
        "x": {"label": "x", "log": True},
        "y": {"label": "y", "log": True},
        "series": [
            {"name": HOSTILE, "points": [[1, 1], [2, None], [4, 0], [8, 2], [16, 4]]},
            {"name": "none", "points": []},
        ],
        "events": [{"x": 3, "label": HOSTILE}],
    }
    with gr.Blocks(analytics_enabled=False) as blocks:
        tokens = TokenColumns(columns(20, scored=True), elem_id="tokens", ticks=["0.01", "0.1", "1", "10"], takes=True)
        taken = gr.Textbox(label="Taken")
        tokens.select(take, None, taken, show_progress="hidden")
        gr.Button("Leave").click(gr.skip, None, tokens, show_progress="hidden").then(lambda: "left", None, taken)
        gr.Button("Stream").click(stream, None, tokens, show_progress="hidden")
        Curves([curve], elem_id="curves")
        Samples([{"step": 1, "texts": [{"prompt": HOSTILE, "base": HOSTILE, "variant": HOSTILE}]}], elem_id="samples")
    _, url, _ = blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False)
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    yield watched.page
    watched.close()
    blocks.close()


def tokens_of(page: Page, column: int):
    return page.locator("#tokens section").nth(column).locator(".token")


def card(page: Page):
    return page.locator("#tokens .card")


def test_text_is_text_everywhere(page: Page):
    shown = HOSTILE.replace("\u202e", "⟨202E⟩").replace("\u0007", "⟨0007⟩")
    expect(tokens_of(page, 0).nth(4)).to_have_text(shown)
    for place in ("#tokens .note", "#curves h4", "#curves .event-label"):
        expect(page.locator(place).first).to_have_text(shown)
    expect(page.locator("#tokens .prompt").first).to_contain_text(shown)
    expect(page.locator("#samples .prompt")).to_have_text(shown)
    assert page.locator("#tokens img, #curves img, #samples img").count() == 0


def test_a_token_is_hovered_kept_and_let_go(page: Page):
    tokens_of(page, 0).nth(7).hover()
    expect(card(page)).to_contain_text("Rank7")
    expect(card(page)).to_contain_text("50.0 %")
    tokens_of(page, 0).nth(7).click()
    page.mouse.move(0, 0)
    expect(card(page)).to_contain_text("Rank7")
    tokens_of(page, 1).nth(3).hover()
    expect(card(page)).to_contain_text("Rank3")
    page.mouse.move(0, 0)
    expect(card(page)).to_contain_text("Rank7")
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()


def test_tokens_by_keyboard(page: Page):
    tokens_of(page, 1).first.focus()
    page.keyboard.press("End")
    expect(card(page)).to_contain_text("Rank19")
    page.keyboard.press("ArrowLeft")
    expect(card(page)).to_contain_text("Rank18")
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    expect(tokens_of(page, 1).first).to_be_focused()
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()


def test_another_token_is_taken_by_pointer_and_by_keyboard(page: Page):
    tokens_of(page, 1).nth(7).click()
    card(page).get_by_role("button").nth(1).click()  # the base's
    expect(page.get_by_label("Taken")).to_have_value("1 7 true 0".replace("true", "True"))
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    tokens_of(page, 0).first.focus()
    for key in ("ArrowRight", "Enter", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    expect(page.get_by_label("Taken")).to_have_value("0 1 False 0")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()


def test_options_outlast_an_event_that_changes_nothing(page: Page):
    page.get_by_role("button", name="Leave").click()
    expect(page.get_by_label("Taken")).to_have_value("left")
    tokens_of(page, 0).nth(7).click()
    expect(card(page)).to_contain_text("Choose a token to go on from there")
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()


def test_every_token_is_coloured_and_the_parting_is_marked(page: Page):
    expect(page.locator("#tokens section").first.locator(".scored")).to_have_count(20)
    expect(page.locator("#tokens .parts")).to_have_count(2)
    expect(page.locator("#tokens .legend")).to_contain_text("0.010.1110")


def test_a_long_prompt_is_folded_to_its_last_lines(page: Page):
    prompt = page.locator("#tokens .prompt").first
    expect(prompt).not_to_contain_text("first")
    expect(prompt).to_contain_text("the end.")
    assert prompt.locator("*").count() == 0
    fold = page.locator("#tokens .fold").nth(1)
    expect(fold).to_have_text("… 1,234 tokens")
    fold.click()
    expect(prompt).to_contain_text("first word")  # in every column
    expect(fold).to_have_attribute("aria-expanded", "true")
    fold.click()
    expect(prompt).not_to_contain_text("first")


def test_a_curve_breaks_off_where_there_is_no_value(page: Page):
    path = page.locator("#curves path.series").first.get_attribute("d")
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_streaming_repaints_only_what_is_new(page: Page):
    height = page.locator("#tokens").bounding_box()["height"]
    page.locator("#tokens .columns").evaluate(
        """grid => {
          window.added = 0;
          new MutationObserver((list) => {
            for (const { addedNodes } of list) {
              window.added += [...addedNodes].filter((node) => node.className === "token").length;
            }
          }).observe(grid, { childList: true, subtree: true });
        }"""
    )
    box = page.locator("#tokens .text").first
    page.get_by_role("button", name="Stream").click()
    expect(tokens_of(page, 0).nth(250)).to_be_attached()
    assert box.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight") < 100  # it follows
    expect(page.locator("#tokens section").first.locator(".scored")).to_have_count(400)
    expect(page.locator("#tokens .unseen")).to_have_text("The run has ended. a: 400 tokens; b: 400 tokens")
    assert page.evaluate("window.added") <= 2 * 400  # each token is made once
    assert page.locator("#tokens").bounding_box()["height"] == height
