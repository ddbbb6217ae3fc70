"""Takes the README's pictures anew: `python -m tests.browser.screenshots` writes them to docs/images."""

import io
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from demo.context import App
from demo.example import CHECKPOINTS
from demo.models import ModelStore, bundled
from demo.page import launch
from tests.demo.conftest import free_port

from .conftest import CHROMIUMS

FOLDER = Path(__file__).parents[2] / "docs" / "images"


def generate(page: Page) -> None:
    """The example, with the card of a token that the variant and the base disagree about."""
    page.set_viewport_size({"width": 1280, "height": 860})
    show_from(page, "#generate-start")
    page.locator("#generate-columns .parts").nth(1).hover()


def attention(page: Page) -> None:
    """The maps of nsa on the same text, one cell kept."""
    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("heading", name="masks · layer 0").wait_for()
    page.locator("#attention-model input").click()
    page.get_by_role("option", name="nsa", exact=True).click()
    page.get_by_role("heading", name="nsa · layer 0").wait_for()
    page.get_by_role("radio", name="Layer 4, head 1").click()
    page.get_by_role("heading", name="nsa · layer 4 · head 1").wait_for()
    page.locator("#attention-maps .tokens .token").nth(45).click()
    page.mouse.move(0, 0)
    page.set_viewport_size({"width": 1280, "height": 1220})
    show_from(page, "#attention-model")


def show_from(page: Page, selector: str) -> None:
    """Scrolls an element to the top."""
    page.locator(selector).evaluate("node => window.scrollBy(0, node.getBoundingClientRect().top - 16)")
    page.wait_for_timeout(300)


def save(page: Page, file: Path) -> None:
    """Takes the picture; lossless, since a page of text is small like that."""
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.save(file, lossless=True, method=6)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    app, url, _ = launch(App(ModelStore(bundled(CHECKPOINTS))), port=free_port(), prevent_thread_lock=True, quiet=True)
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{url}?__theme=light")
        page.locator("#generate-columns .token").nth(60).wait_for(timeout=120_000)
        for take in (generate, attention):
            take(page)
            save(page, FOLDER / f"{take.__name__}.webp")
        browser.close()
    app.blocks.close()


if __name__ == "__main__":
    main()
