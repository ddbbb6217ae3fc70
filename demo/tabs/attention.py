"""The tab that shows what a model attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..attention import AttentionViews, Passage, ViewError, encode_text, passage
from ..components import AttentionMaps, HeadGrid
from ..context import VIEW, App, Session
from ..models import LoadedModel, LoadError, ModelStore
from ..runs import Run

SHORTEST = 8
# Tells as the last value whether the tab is the one that is seen.
IS_OPEN = """(...values) => [...values.slice(0, -1), Boolean(document.getElementById("attention-tab")?.offsetParent)]"""


@dataclass(frozen=True)
class Chosen:
    """What is on the tab: kept for the visitor, so that nothing is computed twice."""

    model: str = ""
    text: str = ""
    start: int = 0
    count: int = 0
    layer: int = 0
    head: int = 0

    def same_passage(self, other: Chosen) -> bool:
        return (self.model, self.text, self.start, self.count) == (other.model, other.text, other.start, other.count)


def build_attention_tab(app: App, session: Session) -> gr.Tab:
    """A model and a text, thumbnails of all layers and heads, and the maps of the one that is open."""
    handlers = Handlers(app.store)
    names = app.store.names()
    with gr.Tab("Attention", id="attention", elem_id="attention-tab") as tab:
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                model = gr.Dropdown(
                    names,
                    value=handlers.first_model(names),
                    label="Model",
                    info="Its maps are shown beside those of its base on the same text.",
                    elem_id="attention-model",
                )
                text = gr.Textbox(
                    label="Text",
                    info="The text generated last, or any other. Shift + Enter shows it.",
                    lines=4,
                    max_lines=8,
                    elem_id="attention-text",
                )
                with gr.Accordion("Part of the text", open=False, elem_id="attention-part"), gr.Row():
                    start = gr.Number(0, precision=0, minimum=0, label="First token shown", elem_id="attention-start")
                    count = gr.Slider(
                        SHORTEST,
                        app.limits.view_tokens,
                        app.limits.view_tokens,
                        step=1,
                        label="Tokens shown",
                        info="Longer texts are shown in parts.",
                        elem_id="attention-count",
                    )
                show = gr.Button("Show attention", variant="primary", elem_id="attention-show")
            with gr.Column(scale=4, min_width=300):
                grid = HeadGrid(elem_id="attention-heads", empty="Every layer and head of the model appears here.")
        maps = AttentionMaps(elem_id="attention-maps", empty="Generate a text or write one, then press Show attention.")
        chosen = gr.State(Chosen())

        lane = app.lane(VIEW)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs = [model, text, start, count, session.runs, chosen]
        gr.on([show.click, text.submit], handlers.show, inputs, [grid, maps, chosen], **quiet, **lane)
        gr.on(
            [tab.select, model.input, start.change, count.release],
            handlers.show_if_any,
            inputs,
            [grid, maps, chosen],
            trigger_mode="always_last",
            **quiet,
            **lane,
        )
        # Not "always_last": Gradio would repeat the data of the first click in place of the last one's.
        grid.select(handlers.open, [session.runs, chosen], [maps, chosen], trigger_mode="multiple", **quiet, **lane)
        taken = session.runs.change(
            handlers.take_text, [session.runs, model], [text, model, start], queue=False, **quiet
        )
        is_open = gr.Checkbox(visible=False)
        taken.then(handlers.follow, [*inputs, is_open], [grid, maps, chosen], js=IS_OPEN, **quiet, **lane)
        session.names.change(handlers.offer, [session.names, model], model, queue=False, **quiet)
        gr.api(handlers.attention, api_name="attention", **lane)
    return tab


class Handlers:
    """What happens on the attention tab."""

    def __init__(self, store: ModelStore):
        self.store = store
        self.views = AttentionViews()

    def first_model(self, names: list[str]) -> str | None:
        """The first variant, or the first model where there is none."""
        variants = [name for name in names if not self.store.entry(name).is_base]
        return next(iter(variants or names), None)

    def offer(self, names: list[str], model: str | None) -> dict[str, Any]:
        """The models that can be chosen."""
        return gr.Dropdown(choices=names, value=model if model in names else self.first_model(names))

    def take_text(self, runs: list[Run], model: str | None) -> tuple[Any, Any, Any]:
        """The text of the newest run: the chosen model's, or else that of the first variant in it."""
        columns = [column for column in runs[0].columns if column.tokens] if runs else []
        if not columns:
            return (gr.skip(),) * 3
        names = self.store.names()
        own = [column for column in columns if column.name == model]
        variants = [c for c in columns if c.name in names and not self.store.entry(c.name).is_base]
        column = (own or variants or columns)[0]
        return "".join(column.tokens), column.name if column.name in names else gr.skip(), 0

    def show(
        self, model: str | None, text: str, start: int | None, count: int, runs: list[Run], chosen: Chosen
    ) -> tuple[Any, Any, Chosen]:
        """Thumbnails and maps of a text."""
        try:
            loaded, part = self._read(model, text, start, count, runs)
            heads = self.views.heads(loaded, part, chosen.layer, chosen.head)
            maps = self.views.maps(loaded, part, heads["layer"], heads["head"])
        except (ViewError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return heads, maps, Chosen(model, text, int(start or 0), int(count), heads["layer"], heads["head"])

    def show_if_any(
        self, model: str | None, text: str, start: int | None, count: int, runs: list[Run], chosen: Chosen
    ) -> tuple[Any, Any, Any]:
        """The same where there is a text and it is not shown already."""
        wanted = Chosen(model or "", text, int(start or 0), int(count))
        if not text or not model or wanted.same_passage(chosen):
            return (gr.skip(),) * 3
        return self.show(model, text, start, count, runs, chosen)

    def follow(self, *values: Any) -> tuple[Any, Any, Any]:
        """The same, if the tab is open, as the last value says."""
        *inputs, is_open = values
        return self.show_if_any(*inputs) if is_open else (gr.skip(),) * 3

    def open(self, runs: list[Run], chosen: Chosen, event: gr.EventData) -> tuple[Any, Chosen]:
        """The maps of a layer and head that was clicked."""
        try:
            layer, head = int(event.layer), int(event.head)
            loaded, part = self._read(chosen.model, chosen.text, chosen.start, chosen.count, runs)
            maps = self.views.maps(loaded, part, layer, head)
        except (ViewError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return maps, Chosen(chosen.model, chosen.text, chosen.start, chosen.count, layer, head)

    def attention(
        self, text: str, model: str, layer: int = 0, head: int = 0, start: int = 0, count: int = 64
    ) -> dict[str, Any]:
        """What one head of a model attends to in a text, beside the same head of its base.

        Args:
            text: any text; the model reads as much of it as it can hold.
            model: name of a model, as /models lists them.
            layer: layer of the model, from 0.
            head: head of the layer, from 0.
            start: first token to return.
            count: how many tokens to return, at most 400.

        Returns:
            A JSON object: `tokens`; `maps`, with `model` and, for a variant, `base`, each a list of rows, where
            number j of row i is the weight with which token i reads token j ≤ i; `keys_read`, a number for each
            token; `start` and `total_tokens`; `layers` and `heads`, how many the model has.
        """
        try:
            loaded, part = self._read(model, text, start, count, [])
            return self.views.numbers(loaded, part, _whole("layer", layer), _whole("head", head))
        except (ViewError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def _read(
        self, model: str | None, text: str, start: int | None, count: int, runs: list[Run]
    ) -> tuple[LoadedModel, Passage]:
        if model not in self.store.names():
            raise ViewError(f"No model {str(model)[:80]!r}; there are: {', '.join(self.store.names())}.")
        if not isinstance(text, str):
            raise ViewError("The text is not text.")
        loaded = self.store.get(model)
        limits = self.store.limits
        ids = self._generated(loaded, text, runs) or encode_text(loaded, text, limits.prompt_characters)
        count = min(_whole("count", count), limits.view_tokens)
        return loaded, passage(loaded, ids, _whole("start", start or 0), count)

    def _generated(self, loaded: LoadedModel, text: str, runs: list[Run]) -> list[int] | None:
        """The very tokens of a generated text: encoding it again may cut it elsewhere."""
        names = self.store.names()
        for column in (column for run in runs for column in run.columns):
            same_base = column.name in names and self._base_of(column.name) == self._base_of(loaded.name)
            if same_base and column.token_ids and "".join(column.tokens) == text:
                return column.token_ids
        return None

    def _base_of(self, name: str) -> str:
        return self.store.entry(name).base or name


def _whole(name: str, value: object) -> int:
    """A whole number out of untrusted JSON.

    Raises:
        ViewError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ViewError(f"{name} is {str(value)[:80]!r}; it must be a whole number.")
    return int(value)
