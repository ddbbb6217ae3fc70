"""The page: a header, and one tab a subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from .components.address import Address
from .components.notices import Notices
from .context import App, Session
from .models import ModelStore
from .tabs import (
    build_attention_tab,
    build_generate_tab,
    build_models_tab,
    build_speed_tab,
    build_training_tab,
)

TITLE = "Efficient attention, side by side"
STYLE = Path(__file__).with_name("page.css")
TABS = (build_generate_tab, build_attention_tab, build_speed_tab, build_training_tab, build_models_tab)
SESSIONS = 100  # visitors whose state is kept; the one who was away longest goes
UPLOAD_LIMIT = "1mb"  # the page takes no files, but Gradio's route for them is there


def build(app: App) -> gr.Blocks:
    """The page with all its tabs and endpoints."""
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {TITLE}\nOne language model, several ways to attend: what each writes, sees and costs.")
        notices = Notices(elem_id="notices")
        session = Session(blocks, runs=gr.State([]), names=gr.State([]), address=Address(elem_id="address"))
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            for build_tab in TABS:
                build_tab(app, session)
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
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def launch(app: App, host: str | None = None, port: int | None = None, **options: Any) -> tuple[Any, str, str]:
    """Serves the page; `options` go to `gr.Blocks.launch`.

    Args:
        host: default 127.0.0.1, or what GRADIO_SERVER_NAME says.
        port: default the first free one from 7860, or what GRADIO_SERVER_PORT says.
    """
    settings: dict[str, Any] = {
        "theme": theme(),
        "css_paths": STYLE,
        "ssr_mode": False,
        "run_history": False,
        "state_session_capacity": SESSIONS,
        "max_file_size": UPLOAD_LIMIT,
        "footer_links": ["api", "settings"],
        "share": False,
        # Gradio asks the server for its start-up events first and waits; its second question, which this skips, gives
        # up after three seconds and would keep a slow machine from starting.
        "_frontend": False,
    }
    return build(app).launch(server_name=host, server_port=port, **{**settings, **options})
