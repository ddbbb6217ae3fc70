"""A real browser on the real app; every page is watched for errors and for requests that leave the machine."""

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gradio.blocks import BlockFunction, Blocks
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from demo.context import App
from demo.limits import Limits
from demo.models import Access, ModelStore
from demo.page import launch
from tests.demo.conftest import checkpoints, free_port  # noqa: F401 (a fixture)

TIMEOUT_MS = 1000 * int(os.environ.get("BROWSER_TIMEOUT", "90"))  # seconds; a busy machine needs them
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
# Routes would do the same, but with them nothing is cached: each page would fetch all of Gradio's files again.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
expect.set_options(timeout=TIMEOUT_MS)

# When a page is reloaded or left Gradio's client cuts the streams that are open, and reports each as broken.
OPENED, LEFT = "page: opened", "page: left"
TELL = f'console.debug("{OPENED}"); addEventListener("beforeunload", () => console.debug("{LEFT}"));'
CUT = (
    "AbortError: signal is aborted without reason",
    "Unexpected error Connection errored out.",
    "Unexpected error 404: Not Found",  # a stream that was to take the place of one that is cut
)
REFUSED = "the server responded with a status of 422"


@dataclass
class Watched:
    """A page, and what went wrong on it.

    Attributes:
        may_open: beginnings of further addresses that it may ask for.
        may_refuse: whether the server refuses something here on purpose, which a browser logs as an error.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    may_open: tuple[str, ...] = ()
    may_refuse: bool = False
    _left: bool = False

    def __post_init__(self) -> None:
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.add_init_script(TELL)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self._on_error(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.text in (OPENED, LEFT):
            self._left = message.text == LEFT
        elif message.type == "error":
            self._on_error(f"{message.text} ({message.location['url']})")

    def _on_error(self, text: str) -> None:
        cut = self._left and text.startswith(CUT)
        refused = self.may_refuse and REFUSED in text
        if not cut and not refused:
            self.errors.append(text)

    def close(self) -> None:
        """Closes the page; there must have been no error and no request to elsewhere."""
        self.page.close()
        assert self.errors == []
        assert self.foreign == []

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:", *self.may_open)):
            self.foreign.append(request.url)


@pytest.fixture(scope="session")
def browser() -> Iterator[BrowserContext]:
    """A browser with one profile, so that Gradio's own files are fetched once."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", OFFLINE])
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@pytest.fixture(scope="session")
def store(checkpoints: Path) -> ModelStore:  # noqa: F811
    """A tiny base and a variant, and time for everything."""
    limits = Limits(new_tokens=60, prompt_characters=5000, seconds=3600)
    return ModelStore([checkpoints / "base", checkpoints / "masks"], limits, Access(None, (checkpoints,)))


@pytest.fixture(scope="session")
def url(store: ModelStore) -> Iterator[str]:
    """Where the app is served, once its example is written: pages wait for that only so long."""
    app, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    for thread in threading.enumerate():
        if thread.name == "first-run":
            thread.join()
    yield url
    app.blocks.close()


@pytest.fixture
def watched(browser: BrowserContext, url: str) -> Iterator[Watched]:
    """A page that is open and has got its example, so that nothing of its start is still on the way."""
    watched = Watched(browser.new_page())
    watched.page.goto(url)
    expect(watched.page.locator("#generate-columns .token.scored").first).to_be_visible()
    yield watched
    watched.close()


@pytest.fixture
def page(watched: Watched) -> Page:
    """The page alone."""
    return watched.page


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds what waits for it, however long it takes, until the test opens it or ends."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def hold_end(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> Callable[[Any, str, str], None]:
    """Has an event end only once the gate is open, though its last values are on the page.

    Takes what makes these values, as a class or module and a name in it, and the name of the event's function.
    """
    process = Blocks.process_api
    made: set[str] = set()

    async def process_in_time(blocks: Blocks, block_fn: BlockFunction, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if block_fn.name in made:
            await asyncio.to_thread(gate.wait)
        return await process(blocks, block_fn, *args, **kwargs)

    def hold(place: Any, name: str, event: str) -> None:
        make = getattr(place, name)

        def make_last(*args: Any) -> Any:
            made.add(event)
            return make(*args)

        monkeypatch.setattr(place, name, make_last)

    monkeypatch.setattr(Blocks, "process_api", process_in_time)
    return hold
