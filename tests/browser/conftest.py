"""A real browser on the real app; every page is watched for errors and for requests that leave the machine."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Route, expect, sync_playwright

from demo.context import App
from demo.limits import Limits
from demo.models import Access, ModelStore
from demo.page import launch
from tests.demo.conftest import checkpoints, free_port  # noqa: F401 (a fixture)

TIMEOUT_MS = 1000 * int(os.environ.get("BROWSER_TIMEOUT", "90"))  # seconds; a busy machine needs them
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=TIMEOUT_MS)


@dataclass
class Watched:
    """A page, and what went wrong on it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.page.route("**/*", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, route: Route) -> None:
        if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            route.continue_()
        else:
            self.foreign.append(route.request.url)
            route.abort()


@pytest.fixture(scope="session")
def browser() -> BrowserContext:
    """A browser with one profile, so that Gradio's own files are fetched once."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@pytest.fixture(scope="session")
def store(checkpoints: Path) -> ModelStore:  # noqa: F811
    """A tiny base and a variant."""
    limits = Limits(new_tokens=60, prompt_characters=5000, seconds=60)
    return ModelStore([checkpoints / "base", checkpoints / "masks"], limits, Access(None, (checkpoints,)))


@pytest.fixture(scope="session")
def url(store: ModelStore) -> str:
    """Where the app is served."""
    app, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    yield url
    app.blocks.close()


@pytest.fixture
def watched(browser: BrowserContext, url: str) -> Watched:
    """A page that is open and ready; at the end there must be no error and no request to elsewhere."""
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    expect(watched.page.get_by_role("button", name="Generate", exact=True)).to_be_visible()
    yield watched
    watched.page.close()
    assert watched.errors == []
    assert watched.foreign == []


@pytest.fixture
def page(watched: Watched) -> Page:
    """The page alone."""
    return watched.page
