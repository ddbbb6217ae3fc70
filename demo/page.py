"""The page: a header, and one tab a subject."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_function_description

from .components.address import Address
from .components.notices import Notices
from .context import App, Session
from .mcp import speak_json
from .models import ModelStore
from .tabs import (
    build_attention_tab,
    build_generate_tab,
    build_models_tab,
    build_score_tab,
    build_speed_tab,
    build_training_tab,
)

TITLE = "Efficient attention, side by side"
SUBTITLE = "One language model, several ways to attend: what each writes, sees and costs."
STYLE = Path(__file__).with_name("page.css")
TABS = (
    build_generate_tab,
    build_score_tab,
    build_attention_tab,
    build_speed_tab,
    build_training_tab,
    build_models_tab,
)
# The address as it was when the page was asked for: tabs have named themselves in it since.
OPEN_TAB = """() => {
  const asked = new URL(performance.getEntriesByType("navigation")[0].name);
  const name = asked.searchParams.get("tab");
  const tab = document.getElementById(name + "-tab-button");
  if (name === null) return "";
  if (tab?.getAttribute("role") !== "tab") return name || " ";
  tab.click();
  return "";
}"""
SESSIONS = 100  # visitors whose state is kept; the one who was away longest goes
UPLOAD_LIMIT = "1mb"  # what the page takes is smaller, but Gradio's route is open to all


def build(app: App) -> gr.Blocks:
    """The page with all its tabs and endpoints."""
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}\n## {SUBTITLE}", elem_id="title")
        notices = Notices(elem_id="notices")
        session = Session(
            blocks,
            runs=gr.State([]),
            names=gr.State(app.store.names()),
            costs=gr.State(None),
            address=Address(elem_id="address"),
        )
        with gr.Tabs(elem_id="tabs", **_known(gr.Tabs, overflow_behavior="wrap")):
            built = [build_tab(app, session) for build_tab in TABS]
            for tab in built:
                _keep_in_address(tab, is_first=tab is built[0])
        unknown = gr.Textbox(visible=False)  # what the address calls a tab and is none
        tabs = ", ".join(tab.id for tab in built)
        blocks.load(lambda name: _say_unknown(name, tabs), unknown, js=OPEN_TAB, api_visibility="private")
        describe_parameters(blocks)
        poll = gr.Timer(1, active=False)
        refresh: dict[str, Any] = {
            "fn": lambda: (app.store.names(), notices_of(app.store), gr.Timer(active=bool(app.store.pulling))),
            "outputs": [session.names, notices, poll],
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        blocks.load(**refresh)
        poll.tick(**refresh)
    return blocks.queue(max_size=app.limits.queue, default_concurrency_limit=16)


def _say_unknown(name: str, tabs: str) -> None:
    if name:
        gr.Warning(f"In the link tab is {name[:80]!r}; it must be one of {tabs}.")


def _keep_in_address(tab: gr.Tab, is_first: bool) -> None:
    """Names the tab that is open in the address, without the server; the first one needs no name."""
    change = 'query.delete("tab")' if is_first else f'query.set("tab", {json.dumps(tab.id)})'
    show = f"""() => {{
      const query = new URLSearchParams(location.search);
      {change};
      history.replaceState(null, "", location.pathname + (query.size ? "?" + query : ""));
    }}"""
    tab.select(None, js=show, api_visibility="private", queue=False)


def describe_parameters(blocks: gr.Blocks) -> None:
    """Takes what "Use via API" says of each parameter of an endpoint from the function's docstring."""
    for function in blocks.fns.values():
        if function.api_visibility == "public" and function.fn is not None:
            _, said, _ = get_function_description(function.fn)
            for component, (name, text) in zip(function.inputs, said.items(), strict=True):
                component.label = name
                component._api_info = {**component.api_info(), "additional_description": text}


def notices_of(store: ModelStore) -> list[dict[str, str]]:
    """A notice for every model that was asked for and is on its way, or cannot be used."""
    pulling = [
        f"Pulling {source}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
        for source, (done, total) in list(store.pulling.items())
    ]
    return [{"level": "info", "text": text} for text in pulling] + [
        {"level": "warning", "text": text} for text in list(store.problems.values())
    ]


def theme() -> gr.Theme:
    """Fonts of the visitor's own system, so that nothing is fetched from elsewhere; hints dark enough to be read."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def _known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a function of the installed Gradio has; 6.10 neither wraps tabs nor keeps a history of runs."""
    return {name: value for name, value in options.items() if name in signature(function).parameters}


def launch(app: App, host: str | None = None, port: int | None = None, **options: Any) -> tuple[Any, str, str]:
    """Builds and serves the page; see `launch_blocks`."""
    return launch_blocks(build(app), host, port, **options)


def launch_blocks(
    blocks: gr.Blocks, host: str | None = None, port: int | None = None, **options: Any
) -> tuple[Any, str, str]:
    """Serves the page that `build` made; `options` go to `gr.Blocks.launch`.

    Args:
        host: default 127.0.0.1, or what GRADIO_SERVER_NAME says.
        port: default the first free one from 7860, or what GRADIO_SERVER_PORT says.
    """
    settings: dict[str, Any] = {
        "theme": theme(),
        "css_paths": STYLE,
        "ssr_mode": False,
        **_known(gr.Blocks.launch, run_history=False),
        "state_session_capacity": SESSIONS,
        "max_file_size": UPLOAD_LIMIT,
        "footer_links": ["api", "settings"],
        "share": False,
        # Gradio asks the server for its start-up events first and waits; its second question, which this skips, gives
        # up after three seconds and would keep a slow machine from starting.
        "_frontend": False,
    }
    launched = blocks.launch(server_name=host, server_port=port, **{**settings, **options})
    if blocks.mcp_server_obj is not None:
        speak_json(blocks.mcp_server_obj)
    return launched


def serve(app: App, host: str | None = None, port: int | None = None, **options: Any) -> None:
    """Serves the page until it is interrupted, and then ends the process, whatever is being computed.

    Computations end at their next step. One that is in a long step cannot be told, and an interpreter that is torn down
    under a thread that computes aborts: so the process leaves without that, when all that is open is closed.
    """
    blocks = build(app)
    launch_blocks(blocks, host, port, prevent_thread_lock=True, **options)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Interrupted: closing.")
    app.store.closing.set()
    close_server(blocks)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def close_server(blocks: gr.Blocks) -> None:
    """Stops serving; pages that are open are given a second, and what is cut off then is no error."""
    logging.getLogger("uvicorn.error").disabled = True
    blocks.server.config.timeout_graceful_shutdown = 1
    blocks.server.should_exit = True
    blocks.server.thread.join(timeout=3)
