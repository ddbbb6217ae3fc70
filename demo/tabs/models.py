"""The tab that lists the models and adds others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..components.notices import Notices, notice, warning
from ..components.table import TextTable
from ..context import App, Session
from ..models import LONGEST_SOURCE, Entry, LoadError, ModelStore, is_local
from ..views import option_text

LANE = "models"
HEADERS = ["Name", "Method", "Made from", "Weights", "In memory", "Where", "Options"]


def build_models_tab(app: App, session: Session) -> gr.Tab:
    """What can be chosen, and a way to add to it from a folder or from the Hub."""
    handlers = Handlers(app.store)
    limits = app.limits
    with gr.Tab("Models", id="models", elem_id="models-tab") as tab:
        gr.Markdown(
            f"A model is loaded when it is first used; {limits.loaded_models} stay in memory and the least recently "
            "used one makes room. Variants share their base's weights, so each takes little more than what differs."
        )
        table = TextTable(handlers.table(), elem_id="models-table")
        source = gr.Textbox(
            label="Add a model",
            info="A folder, or user/repo[/subfolder][@revision] on the Hub. Only safetensors are read, no code is run, "
            f"and at most {limits.download_bytes / 1e9:g} GB are pulled.",
            placeholder="runs/mine/variant or user/repo",
            max_length=LONGEST_SOURCE,
            elem_id="models-source",
        )
        with gr.Row(elem_classes="actions"):
            look = gr.Button("Look up", elem_id="models-look")
            add = gr.Button("Add", variant="primary", elem_id="models-add")
        news = Notices(elem_id="models-news")
        gr.api(handlers.models, api_name="models", queue=False)

    work: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "concurrency_id": LANE,
        "concurrency_limit": 2,
        "trigger_mode": "always_last",  # what is asked for meanwhile is done after it; Gradio would drop it
    }
    gr.on([look.click, source.submit], handlers.look_up, source, news, **work)
    add.click(handlers.add, source, [news, table, session.names], **work)
    for event in (tab.select, session.names.change):
        event(handlers.table, None, table, queue=False, show_progress="hidden", api_visibility="private")
    return tab


class Handlers:
    """What happens on the models tab."""

    def __init__(self, store: ModelStore):
        self.store = store

    def table(self) -> dict[str, Any]:
        """What `TextTable` shows."""
        loaded = set(self.store.loaded())
        rows = [self._row(self.store.entry(name), name in loaded) for name in self.store.names()]
        return {"headers": HEADERS, "rows": rows}

    @staticmethod
    def _row(entry: Entry, loaded: bool) -> list[str]:
        options = [f"{name} {option_text(value)}" for name, value in entry.options.items()]
        return [
            entry.name,
            entry.method,
            entry.base or "–",
            megabytes(entry.size),
            "yes" if loaded else "no",
            where(entry),
            " · ".join(options)[:400] or "–",
        ]

    def look_up(self, source: str) -> list[dict[str, str]]:
        """Says what adding a model would take."""
        try:
            source = source.strip()
            size = self.store.download_size(source)
        except LoadError as error:
            return warning(error)
        limit = self.store.limits.download_bytes
        if size > limit:
            return warning(f"{source} is {megabytes(size)} to download; at most {megabytes(limit)} are.")
        return notice(f"{source}: {megabytes(size)} to download, its base included." if size else f"{source} is here.")

    def add(self, source: str) -> Iterator[tuple[Any, ...]]:
        """Yields (news, table, names) while a model is pulled, and when it can be chosen."""
        source = source.strip()
        job = Job(self.store, source)
        while not job.wait(0.25):
            yield notice(job.progress()), gr.skip(), gr.skip()
        if job.problem is not None:
            yield warning(job.problem), gr.skip(), gr.skip()
        else:
            text = f"{job.entry.name} can be chosen now, on every tab."
            yield notice(text), self.table(), self.store.names()

    def models(self) -> list[dict]:
        """List the models that the other endpoints can use.

        Returns:
            For each model its name, its attention method with a description and options, the model that it was made
            from (null for a plain one), the bytes of its weights on disk, and whether it is in memory now.
        """
        loaded = set(self.store.loaded())
        return [
            {
                "name": entry.name,
                "method": entry.method,
                "description": entry.description,
                "options": entry.options,
                "base": entry.base,
                "bytes": entry.size,
                "loaded": entry.name in loaded,
            }
            for entry in map(self.store.entry, self.store.names())
        ]


class Job:
    """Adding a model in a thread of its own, so that its progress can be shown meanwhile."""

    def __init__(self, store: ModelStore, source: str):
        self.entry: Entry | None = None
        self.problem: str | None = None
        self._bytes = (0, 0)
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(store, source), name="add-model", daemon=True)
        self._thread.start()

    def _run(self, store: ModelStore, source: str) -> None:
        try:
            self.entry = store.add(source, self._report)
        except LoadError as error:
            self.problem = str(error)
        except Exception as error:
            self.problem = f"{source} cannot be added: {error}"
            raise

    def _report(self, done: int, total: int) -> None:
        self._bytes = done, total

    def wait(self, seconds: float) -> bool:
        """Whether it is over, after at most `seconds`."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def progress(self) -> str:
        """How far it is, in words."""
        done, total = self._bytes
        seconds = f"{time.monotonic() - self._start:.0f} s"
        return f"Pulling: {megabytes(done)} of {megabytes(total)}, {seconds}" if total else f"Looking it up, {seconds}"


def megabytes(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:,.1f} MB"


def where(entry: Entry) -> str:
    """Where a model comes from; a folder as seen from where the app was started."""
    if not is_local(entry.source):
        return f"Hub: {entry.source}"
    folder = entry.folder
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
