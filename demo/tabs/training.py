"""The tab that shows how a checkpoint came to be."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..address import in_address, unknown_models
from ..components import Curves, Facts, Samples
from ..components.notices import Notices, warnings
from ..components.table import TextTable
from ..context import App, Session
from ..models import ModelStore
from ..training import curves, facts, learned, read_card, read_history, samples, slices


def build_training_tab(app: App, session: Session) -> gr.Tab:
    """A checkpoint's card in short, its curves, what its mechanisms learned, and what it wrote on the way."""
    handlers = Handlers(app.store)
    names = app.store.names()
    with gr.Tab("Training", id="training", elem_id="training-tab") as tab:
        model = gr.Radio(
            names,
            value=handlers.first_model(names),
            label="Checkpoint",
            info="From its own files: the history of its training and its card.",
            elem_id="training-model",
        )
        said = Notices(elem_id="training-said")
        about = Facts(elem_id="training-facts")
        gr.Markdown(
            "### What must be looked up\nA hit ends a rare pair of tokens that stood so far back in the text, as names "
            "do. Nats per token, with standard errors."
        )
        lookups = TextTable(elem_id="training-slices")
        with gr.Column(visible=False) as through:
            gr.Markdown(
                "### Through training\nVertical lines: a stage begins. What came before the curves, if anything, is "
                "not on record step by step."
            )
            history = Curves(elem_id="training-curves", empty="This checkpoint has no history of its training.")
        with gr.Column(visible=False) as wrote:
            gr.Markdown("### What it wrote on the way")
            texts = Samples(elem_id="training-samples", empty="No texts were written while it was trained.")
        with gr.Column(visible=False) as inner:
            gr.Markdown(
                "### What its attention learned\nMeans over the heads, from the first layer (faint) to the last; a "
                "layer without a curve does not have the part."
            )
            inside = Curves(elem_id="training-learned", empty="Its mechanisms have recorded nothing of their own.")
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        outputs = [about, history, texts, inside, through, wrote, inner, lookups]
        # By default a choice made while the tab is still being filled would be dropped.
        gr.on([tab.select, model.change], handlers.show, model, outputs, trigger_mode="always_last", **quiet)
        model.input(lambda name: in_address(training_model=[name]), model, session.address, **quiet)
        session.blocks.load(handlers.open_link, None, [model, said], **quiet)
        session.names.change(handlers.offer, [session.names, model], model, **quiet)
    return tab


class Handlers:
    """What happens on the training tab."""

    def __init__(self, store: ModelStore):
        self.store = store

    def first_model(self, names: list[str]) -> str | None:
        """The first variant, or the first model where there is none."""
        variants = [name for name in names if not self.store.entry(name).is_base]
        return next(iter(variants or names), None)

    def offer(self, names: list[str], model: str | None) -> dict[str, Any]:
        """The models that can be chosen."""
        return gr.Radio(choices=names, value=model if model in names else self.first_model(names))

    def open_link(self, request: gr.Request) -> tuple[Any, list[dict[str, str]]]:
        """The checkpoint in the page's address, and what is wrong with it."""
        names = request.query_params.getlist("training_model")[:1]
        problems = unknown_models(names, self.store.names())
        return names[0] if names and not problems else gr.skip(), warnings(problems)

    def show(self, model: str | None) -> tuple[Any, ...]:
        """Facts, curves, samples and learned quantities of a checkpoint, whether there are any of these, and slices."""
        if model not in self.store.names():
            return [], [], [], [], *(gr.Column(visible=False),) * 3, {}
        entry = self.store.entry(model)
        rows, card = read_history(entry.folder), read_card(entry.folder)
        shown = curves(rows, card), samples(rows), learned(rows)
        return facts(entry, rows, card), *shown, *(gr.Column(visible=bool(each)) for each in shown), slices(card)
