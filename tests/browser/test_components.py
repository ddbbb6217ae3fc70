"""Components on a page of their own: tokens by pointer and keyboard, streaming, hostile values, curves with gaps."""

import gradio as gr
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from demo.components import Curves, Samples, TokenColumns
from tests.demo.conftest import free_port

from .conftest import Watched

HOSTILE = "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}`\u202e\u0007"


def columns(count: int, scored: bool) -> list[dict]:
    """Two columns of `count` tokens, every fifth one hostile."""
    tokens = []
    for i in range(count):
        token = {"text": HOSTILE if i % 5 == 4 else f" t{i}", "prompt": i < 2, "parts": i == 6}
        if scored and i >= 2:
            rest = {"details": [["Rank", str(i)]], "top": [[HOSTILE, 0.5]], "base_top": [[" b", 0.25]]}
            token |= {"score": i / count, **rest}
        tokens.append(token)
    return [{"title": title, "note": HOSTILE, "status": f"{count} tokens", "tokens": tokens} for title in ("a", "b")]


def stream():
    for count in range(5, 41, 5):
        yield columns(count, scored=False)
    yield columns(40, scored=True)


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
        tokens = TokenColumns(columns(20, scored=True), elem_id="tokens")
        gr.Button("Stream").click(stream, None, tokens, show_progress="hidden")
        Curves([curve], elem_id="curves")
        Samples([{"step": 1, "texts": [{"prompt": HOSTILE, "base": HOSTILE, "variant": HOSTILE}]}], elem_id="samples")
    _, url, _ = blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False)
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    yield watched.page
    watched.page.close()
    blocks.close()
    assert watched.errors == []
    assert watched.foreign == []


def tokens_of(page: Page, column: int):
    return page.locator("#tokens section").nth(column).locator(".token")


def card(page: Page):
    return page.locator("#tokens .card")


def test_text_is_text_everywhere(page: Page):
    shown = HOSTILE.replace("\u202e", "⟨202E⟩").replace("\u0007", "⟨0007⟩")
    expect(tokens_of(page, 0).nth(4)).to_have_text(shown)
    for place in ("#tokens .note", "#curves h4", "#curves .event-label"):
        expect(page.locator(place).first).to_have_text(shown)
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
    page.keyboard.press("Home")  # a prompt token: it has no card of its own
    expect(tokens_of(page, 1).first).to_be_focused()
    page.keyboard.press("Escape")
    expect(card(page)).to_be_hidden()


def test_only_generated_tokens_are_coloured_and_the_parting_is_marked(page: Page):
    expect(tokens_of(page, 0).nth(1)).not_to_have_class("scored")
    expect(page.locator("#tokens section").first.locator(".scored")).to_have_count(18)
    expect(page.locator("#tokens .parts")).to_have_count(2)


def test_a_curve_breaks_off_where_there_is_no_value(page: Page):
    path = page.locator("#curves path.series").first.get_attribute("d")
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_streaming_repaints_only_what_is_new(page: Page):
    tokens_of(page, 0).nth(3).evaluate("span => { span.mine = true; }")
    height = page.locator("#tokens").bounding_box()["height"]
    page.get_by_role("button", name="Stream").click()
    expect(tokens_of(page, 0)).to_have_count(40)
    expect(page.locator("#tokens section").first.locator(".scored")).to_have_count(38)
    assert tokens_of(page, 0).nth(3).evaluate("span => span.mine")
    assert page.locator("#tokens").bounding_box()["height"] == height
