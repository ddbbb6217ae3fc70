"""The attention tab in a browser: values, keeping, thumbnails, links to the text, downloads, hostile tokens."""

import json
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest
import torch
from playwright.sync_api import BrowserContext, Locator, Page, expect

import attention
from demo.attention import Look
from demo.context import App
from demo.engine import Decoder
from demo.limits import Limits
from demo.models import ModelStore
from demo.page import launch
from tests.demo.conftest import CONTEXT, free_port
from tests.demo.zoo import SMALL

from .conftest import Watched

TEXT = "Far away in the north a small ship lay in the ice, and nobody had seen her for years."
FIRST_HEAD = "masks · layer 0 · head 0"
HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x` \u202e \u0007 </script>"


@pytest.fixture(scope="module")
def opened(browser: BrowserContext, url: str) -> Page:
    """The tab, opened once for all tests, with the text that was generated last."""
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    expect(watched.page.locator("#generate-columns .token").nth(60)).to_be_visible()
    watched.page.get_by_role("tab", name="Attention").click()
    expect(title(watched.page)).to_contain_text("masks · layer 0")
    yield watched.page
    watched.close()


@pytest.fixture
def tab(opened: Page) -> Page:
    """The tab with the maps of masks, layer 0, head 0, of `TEXT`, and nothing kept."""
    opened.set_viewport_size({"width": 1280, "height": 900})
    if text(opened).inner_text() != TEXT:  # else it would be built anew under a test
        show(opened, TEXT)
    if title(opened).inner_text() != FIRST_HEAD:
        opened.get_by_role("radio", name="Layer 0, head 0").click()
        expect(title(opened)).to_have_text(FIRST_HEAD)
    canvas(opened).press("Escape")
    return opened


def show(page: Page, passage: str) -> None:
    """Shows a text other than the one that is there."""
    page.locator("#attention-text textarea").fill(passage)
    page.get_by_role("button", name="Show attention").click()
    expect(text(page)).to_contain_text(passage[:10])
    expect(page.locator("#attention-meter")).to_have_text("")


def text(page: Page) -> Locator:
    return page.locator("#attention-maps .tokens").first  # below it there may be what a token reaches


def title(page: Page) -> Locator:
    return page.locator("#attention-maps .title")


def canvas(page: Page, key: str = "model") -> Locator:
    return page.locator(f"#attention-maps canvas[data-map={key}]")


def where(page: Page) -> Locator:
    return page.locator("#attention-maps .where")


def value(page: Page, map_title: str) -> Locator:
    line = page.locator("#attention-maps .readings .line").filter(has=page.get_by_text(map_title, exact=True))
    return line.locator(".number")


def point(page: Page, row: int, column: int, count: int, key: str = "model") -> None:
    """Moves the mouse over a cell of a map of `count` tokens."""
    target = canvas(page, key)
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    gutter = round(min(max(box["width"] * 0.17, 46), 84))
    cell = (box["width"] - gutter - 1) / count
    page.mouse.move(box["x"] + gutter + (column + 0.5) * cell, box["y"] + gutter + (row + 0.5) * cell)


@pytest.fixture(scope="module")
def maps(store) -> dict[str, list[torch.Tensor]]:
    """Maps of `TEXT` in base and masks, by layer."""
    loaded = store.get("masks")
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with loaded.lock, loaded.base.lock:  # the app may be using them
        models = {"masks": loaded.model, "base": loaded.base.model}
        return {name: attention.attention_maps(model, ids) for name, model in models.items()}


def test_the_text_generated_last_is_there(opened: Page):
    written = opened.locator("#generate-columns section").nth(1).locator(".token").all_text_contents()
    shown = opened.locator("#attention-maps .tokens .token")
    expect(shown).to_have_count(CONTEXT)  # the end of the prompt, and what was written
    ends = ["".join(texts[-len(written) :]).replace("\ufffd", "") for texts in (shown.all_text_contents(), written)]
    assert ends[0] == ends[1]  # but for characters of which there are parts alone


def test_the_value_under_the_pointer_is_the_models(tab: Page, maps):
    count = maps["masks"][0].shape[-1]
    for row, column in ((count - 1, 2), (9, 9), (count - 1, count - 3)):
        point(tab, row, column, count)
        expect(where(tab)).to_contain_text(f"({row}) reads")
        expect(where(tab)).to_contain_text(f"({column})")
        ours, theirs = (float(maps[name][0][0, 0, row, column]) for name in ("masks", "base"))
        assert float(value(tab, "masks").inner_text()) == pytest.approx(ours, rel=0.01, abs=1e-6)
        assert float(value(tab, "base (softmax)").inner_text()) == pytest.approx(theirs, rel=0.01, abs=1e-6)
        assert float(value(tab, "masks less base").inner_text()) == pytest.approx(ours - theirs, rel=0.02, abs=1e-3)
        expect(tab.locator("#attention-maps .tip")).to_contain_text(value(tab, "masks").inner_text())
    point(tab, 3, 7, count)
    expect(where(tab)).to_contain_text("it comes later")
    expect(value(tab, "masks")).to_have_text("–")


def test_a_cell_is_kept_and_let_go(tab: Page, maps):
    count = maps["masks"][0].shape[-1]
    point(tab, 9, 4, count)
    tab.mouse.down()
    tab.mouse.up()
    tab.mouse.move(5, 5)
    expect(where(tab)).to_contain_text("(9) reads")
    expect(where(tab)).to_contain_text("kept")
    point(tab, 12, 3, count)  # hovering goes before what is kept
    expect(where(tab)).to_contain_text("(12) reads")
    tab.mouse.move(5, 5)
    expect(where(tab)).to_contain_text("(9) reads")
    point(tab, 9, 4, count)
    tab.mouse.down()
    tab.mouse.up()
    tab.mouse.move(5, 5)
    expect(where(tab)).to_contain_text("Point at a cell")


def test_the_keyboard_moves_the_kept_cell(tab: Page, maps):
    last = maps["masks"][0].shape[-1] - 1
    canvas(tab).focus()
    canvas(tab).press("ArrowUp")
    expect(where(tab)).to_contain_text(f"({last}) reads")
    canvas(tab).press("Home")
    expect(where(tab)).to_contain_text("(0)")
    canvas(tab).press("ArrowUp")
    canvas(tab).press("ArrowRight")
    expect(where(tab)).to_contain_text(f"({last - 1}) reads")
    expect(where(tab)).to_contain_text("(1)")
    canvas(tab).press("ArrowLeft")
    canvas(tab).press("ArrowLeft")  # not past the edge
    expect(where(tab)).to_contain_text("(0)")
    canvas(tab).press("Escape")
    expect(where(tab)).to_contain_text("Point at a cell")


def test_thumbnails_open_a_head(tab: Page):
    heads = tab.locator("#attention-heads").get_by_role("radio")
    expect(heads).to_have_count(4)
    tab.get_by_role("radio", name="Layer 1, head 0").click()
    expect(title(tab)).to_have_text("masks · layer 1 · head 0")
    expect(tab.get_by_role("radio", name="Layer 1, head 0")).to_be_checked()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    expect(title(tab)).to_have_text("masks · layer 1 · head 1")


def test_the_last_of_quick_clicks_counts(tab: Page):
    for layer, head in ((1, 0), (0, 1), (1, 0), (1, 1)):
        tab.get_by_role("radio", name=f"Layer {layer}, head {head}").click()
    expect(title(tab)).to_have_text("masks · layer 1 · head 1")
    tab.wait_for_timeout(500)
    expect(title(tab)).to_have_text("masks · layer 1 · head 1")


def test_the_kept_cell_stays_when_another_head_is_opened(tab: Page, maps):
    point(tab, 9, 4, maps["masks"][0].shape[-1])
    tab.mouse.down()
    tab.mouse.up()
    tab.get_by_role("radio", name="Layer 1, head 1").click()
    expect(title(tab)).to_have_text("masks · layer 1 · head 1")
    tab.mouse.move(5, 5)
    expect(where(tab)).to_contain_text("(9) reads")
    shown = float(value(tab, "masks").inner_text())
    assert shown == pytest.approx(float(maps["masks"][1][0, 1, 9, 4]), rel=0.01, abs=1e-6)


def test_map_and_text_are_linked(tab: Page, maps):
    tokens = tab.locator("#attention-maps .tokens .token")
    count = maps["masks"][0].shape[-1]
    expect(tokens).to_have_count(count)
    assert text(tab).inner_text() == TEXT
    tokens.nth(10).hover()
    expect(where(tab)).to_contain_text("(10) reads")
    expect(tokens.nth(10)).to_have_class("token query")
    expect(tokens.nth(11)).to_have_class("token later")
    strongest = int(maps["masks"][0][0, 0, 10].argmax())
    expect(where(tab)).to_contain_text(f"({strongest})")
    point(tab, 12, 5, count, key="base")
    expect(tokens.nth(12)).to_have_class("token query")
    expect(tokens.nth(5)).to_have_class("token read-key")


def test_inside_the_method(tab: Page, store):
    expect(canvas(tab, "mask")).to_be_visible()
    expect(canvas(tab, "exact")).to_be_visible()
    cells = tab.locator("#attention-maps table").first.locator("tbody tr")
    expect(cells).to_have_count(len(store.entry("masks").options["candidates"]))
    expect(tab.locator("#attention-maps .chart")).to_have_count(2)


def test_zoom(tab: Page, maps):
    count = maps["masks"][0].shape[-1]
    point(tab, 10, 4, count)
    tab.mouse.down()
    tab.mouse.up()
    for _ in range(9):
        tab.get_by_role("button", name="Zoom in").click()
    point(tab, 7, 7, 8)  # the smallest part is 8 tokens wide, with the kept cell in it
    rows = where(tab).inner_text()
    assert "(7) reads" not in rows
    tab.get_by_role("button", name="Show the whole map").click()
    point(tab, 7, 7, count)
    expect(where(tab)).to_contain_text("(7) reads")


def test_maps_are_saved_as_numbers_and_as_a_picture(tab: Page, maps):
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the maps as numbers").click()
    assert download.value.suggested_filename == "masks-layer0-head0.json"
    data = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert "".join(data["tokens"]) == TEXT
    for key, name in (("model", "masks"), ("base", "base")):
        for i, row in enumerate(data["maps"][key]):
            torch.testing.assert_close(
                torch.tensor(row, dtype=torch.float), maps[name][0][0, 0, i, : i + 1], atol=1e-3, rtol=1e-2
            )
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the maps as a picture").click()
    header = download.value.path().read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    assert width > 600
    assert height > 600


def test_the_drawing_has_labels_colours_and_the_text(tab: Page, maps):
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the maps as a drawing").click()
    root = ElementTree.parse(download.value.path()).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [node.text or "" for node in root.iter(f"{space}text")]
    assert "masks · layer 0 · head 0" in texts
    assert len(list(root.iter(f"{space}linearGradient"))) == len(list(root.iter(f"{space}image"))) - 1  # one by branch
    assert "".join(texts[-maps["masks"][0].shape[-1] :]) == TEXT
    assert any("of its weight" in text for text in texts)


def test_the_page_of_its_own_needs_nothing_and_runs_no_token(tab: Page, browser: BrowserContext, tmp_path):
    show(tab, HOSTILE)
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download this view as a page of its own").click()
    path = tmp_path / "view.html"
    download.value.save_as(path)
    watched = Watched(browser.new_page(), may_open=("file:",))
    watched.page.goto(path.as_uri())
    expect(watched.page.locator(".title")).to_have_text("masks · layer 0 · head 0")
    expect(watched.page.locator(".tokens")).to_contain_text("<img src=x onerror=alert(1)> ${alert(2)}")
    watched.page.locator(".tokens .token").nth(6).click()
    expect(watched.page.locator(".where")).to_contain_text("(6) reads")
    expect(watched.page.locator(".steps li").first).to_be_visible()
    expect(watched.page.get_by_role("button", name="Reach")).to_have_count(0)
    watched.close()


def test_the_sentence_and_the_steps_follow_the_token(tab: Page, maps):
    tokens = tab.locator("#attention-maps .tokens .token")
    tokens.nth(3).hover()
    summary = tab.locator("#attention-maps .summary")
    expect(summary).to_contain_text("It reads 4 of 4 tokens; of its weight")
    tokens.nth(12).hover()
    expect(summary).to_contain_text("of 13 tokens")
    expect(tab.locator("#attention-maps .steps")).to_contain_text("of the 13 tokens so far")
    expect(tab.locator("#attention-maps .next")).to_contain_text("perplexity")
    tab.get_by_role("button", name="Words").click()
    expect(tab.locator("#attention-glossary")).to_contain_text("Keys scored: what is gone through")
    tab.get_by_role("button", name="Words").click()
    expect(tab.locator("#attention-maps .unseen")).to_have_text(f"{FIRST_HEAD}: the maps are shown.")


def test_heads_in_another_order(tab: Page):
    heads = tab.locator("#attention-heads")
    heads.get_by_label("Heads in order of").select_option("previous")
    shares = [int(re.search(r"(\d+) %", text)[1]) for text in heads.locator(".head .axis").all_inner_texts()]
    assert len(shares) == 4
    assert shares == sorted(shares, reverse=True)
    third = heads.get_by_role("radio").nth(2)
    third.click()
    expect(third).to_be_checked()
    layer, head = re.match(r"Layer (\d+), head (\d+)", third.get_attribute("aria-label")).groups()
    expect(title(tab)).to_have_text(f"masks · layer {layer} · head {head}")
    heads.get_by_label("Heads in order of").select_option("place")


def test_what_if(tab: Page):
    tab.get_by_role("button", name="What if").click()
    tab.get_by_label("window(6)").check()
    expect(title(tab)).to_contain_text("masks, without window(6) · layer 0")
    expect(canvas(tab, "unchanged")).to_be_visible()
    expect(tab.locator("#attention-maps .next h4")).to_have_text(["masks, without window(6)", "masks", "base"])
    expect(tab.locator("#attention-meter progress")).to_be_hidden()
    tab.get_by_role("button", name="As it is").click()
    expect(title(tab)).to_have_text("masks · layer 0 · head 0")
    tab.get_by_role("button", name="What if").click()


def test_reach(tab: Page):
    tab.locator("#attention-maps .tokens .token").nth(9).click()
    tab.get_by_role("button", name="Reach").click()
    reached = tab.locator("#attention-maps .reached")
    expect(reached).to_have_count(2)
    expect(reached.first.locator(".token")).to_have_count(10)
    expect(tab.locator("#attention-maps")).to_contain_text("reached by 10 of 10 tokens")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> threading.Event:
    """Holds the maps until it is opened."""
    rows = Look.rows

    def rows_in_time(look: Look, layer: int) -> torch.Tensor:
        gate.wait()
        return rows(look, layer)

    monkeypatch.setattr(Look, "rows", rows_in_time)
    return gate


def test_it_shows_that_it_works(tab: Page, held: threading.Event):
    tab.locator("#attention-text textarea").fill("Something new that takes its time.")
    tab.get_by_role("button", name="Show attention").click()
    expect(tab.locator("#attention-meter")).to_contain_text("masks: layer 0 of 2")
    expect(tab.locator("#attention-meter progress")).to_be_visible()
    held.set()
    expect(text(tab)).to_contain_text("Something new")
    expect(tab.locator("#attention-meter")).to_have_text("")


@pytest.fixture
def sized(browser: BrowserContext, checkpoints: Path, tmp_path: Path) -> Iterator[Page]:
    """The tab of an app of its own, whose variant, nsa, has a window and blocks that can be made smaller."""
    base, _ = attention.load(checkpoints / "base")
    config = attention.config_from_dict({"method": "nsa", **SMALL["nsa"], "num_selected": 6})
    attention.save(attention.convert(base, config), tmp_path / "nsa", dtype=None)
    store = ModelStore([checkpoints / "base", tmp_path / "nsa"], Limits(new_tokens=20, seconds=3600))
    app, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    expect(watched.page.locator("#generate-columns .token.scored").first).to_be_visible()
    watched.page.get_by_role("tab", name="Attention").click()
    expect(title(watched.page)).to_have_text("nsa · layer 0 · head 0")
    yield watched.page
    watched.close()
    app.blocks.close()


def test_a_model_is_not_shown_with_the_sizes_of_another(sized: Page, held: threading.Event):
    for name, passage in (("base", "A text that takes its time."), ("nsa", "And one more that takes as long.")):
        held.clear()
        sized.locator("#attention-text textarea").fill(passage)
        sized.get_by_role("button", name="Show attention").click()
        expect(sized.locator("#attention-meter progress")).to_be_visible()
        sized.locator("#attention-model input").click()
        sized.get_by_role("option", name=name, exact=True).click()
        sized.wait_for_timeout(500)  # what the choice asks for has come to the server, and waits there
        held.set()
        expect(text(sized)).to_contain_text(passage[:10])
        expect(title(sized)).to_have_text(f"{name} · layer 0 · head 0")
    expect(sized.locator("#attention-meter")).to_have_text("")


def test_the_last_of_quick_choices_of_a_model_is_shown(sized: Page, held: threading.Event):
    sized.locator("#attention-text textarea").fill("A text that none of them has seen.")
    for name in ("base", "nsa"):
        sized.locator("#attention-model input").click()
        sized.get_by_role("option", name=name, exact=True).click()
        sized.wait_for_timeout(500)  # the maps of the first are on their way
    held.set()
    expect(text(sized)).to_contain_text("A text that none")
    expect(title(sized)).to_have_text("nsa · layer 0 · head 0")
    expect(sized.locator("#attention-meter")).to_have_text("")


def test_what_is_shown_survives_a_reload(browser: BrowserContext, url: str):
    watched = Watched(browser.new_page())
    query = {"attention_model": "masks", "attention_text": TEXT, "attention_layer": 1, "attention_head": 1}
    watched.page.goto(f"{url}?{urlencode(query)}")
    expect(watched.page.locator("#generate-columns .token").nth(60)).to_be_visible()
    watched.page.get_by_role("tab", name="Attention").click()
    expect(title(watched.page)).to_have_text("masks · layer 1 · head 1")
    assert text(watched.page).inner_text() == TEXT
    watched.page.get_by_role("radio", name="Layer 0, head 1").click()
    watched.page.wait_for_url("**attention_layer=0**")
    assert "attention_head=1" in watched.page.url
    watched.close()


def test_hostile_tokens_are_text(tab: Page):
    show(tab, HOSTILE)
    tokens = text(tab)
    expect(tokens).to_contain_text("<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x` ")
    expect(tokens).to_contain_text("⟨202E⟩ ⟨0007⟩ </script>")
    for token in tokens.locator(".token").all()[:12]:
        token.hover()
    assert tab.locator("#attention-maps img, #attention-maps script").count() == 0


def test_a_long_text_is_shown_in_parts(tab: Page, store):
    context = store.get("masks").context
    show(tab, "far away " * context)
    expect(title(tab)).to_contain_text("tokens 0 to")
    expect(tab.locator("#attention-maps .tokens .token")).to_have_count(context)
    tab.locator("#attention-part button").first.click()
    start = tab.locator("#attention-start input")
    start.fill("20")
    start.press("Enter")
    expect(title(tab)).to_contain_text("tokens 20 to")
    tab.get_by_role("button", name="Show a later part of the text").click()
    expect(title(tab)).not_to_contain_text("tokens 20 to")
    tab.locator("#attention-maps .strip .bar").click(position={"x": 2, "y": 5})
    expect(title(tab)).to_contain_text("tokens 0 to")


def test_bad_input_is_said(tab: Page):
    tab.locator("#attention-text textarea").fill("")
    tab.get_by_role("button", name="Show attention").click()
    expect(tab.get_by_text("The text is empty").first).to_be_visible()
    tab.locator("#attention-text textarea").fill("x" * 5001)
    tab.get_by_role("button", name="Show attention").click()
    expect(tab.get_by_text("5,001 characters").first).to_be_visible()
    expect(tab.locator("#attention-meter")).not_to_contain_text("Loading")


def test_colours_follow_the_theme(tab: Page):
    look = """() => {
        const canvas = document.querySelector("#attention-maps canvas[data-map=model]");
        const pixel = canvas.getContext("2d").getImageData(canvas.width * 0.3, canvas.height * 0.9, 1, 1).data;
        return pixel[0] + pixel[1] + pixel[2];
    }"""
    light = tab.evaluate(look)
    tab.evaluate("document.body.classList.toggle('dark')")
    tab.wait_for_function(f"light => Math.abs(({look})() - light) > 60", arg=light)
    tab.evaluate("document.body.classList.toggle('dark')")
    tab.wait_for_function(f"light => ({look})() === light", arg=light)


@pytest.mark.parametrize("width", [380, 2560])
def test_the_maps_fit_the_window(tab: Page, width: int):
    tab.set_viewport_size({"width": width, "height": 900})
    for key in ("model", "base", "difference"):
        box = canvas(tab, key).bounding_box()
        assert box["width"] >= 250
        assert box["x"] + box["width"] <= width
        assert box["width"] == pytest.approx(box["height"], abs=1)


def test_the_maps_follow_a_run_that_ends_while_they_are_open(
    page: Page, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
):
    step = Decoder.step

    def held(decoder: Decoder) -> None:
        gate.wait()
        step(decoder)

    expect(page.locator("#generate-columns .token").nth(60)).to_be_visible()
    monkeypatch.setattr(Decoder, "step", held)
    page.get_by_label("Prompt").fill("Follow me")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("#generate-columns")).to_contain_text("loading the model")
    page.get_by_role("tab", name="Attention").click()
    expect(title(page)).to_contain_text("masks · layer 0")
    gate.set()
    expect(text(page)).to_contain_text("Follow me")
