"""The tab that shows what a model attends to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from attention import ConfigError

from ..address import in_address, number_in, unknown_models
from ..attention import AttentionViews, Passage, Subject, ViewError, encode_text, passage
from ..components import AttentionMaps, HeadGrid, Meter
from ..components.notices import Notices, warnings
from ..context import VIEW, App, Session
from ..glossary import GLOSSARY
from ..mechanisms import UNCHANGED, Change, as_variant
from ..models import LoadedModel, LoadError, ModelStore
from ..runs import Run

SHORTEST = 8
FEWEST_BLOCKS = 3  # native sparse attention always reads as many
NONE = "none"
LOADING = "Loading the models"
LONGEST_LISTS = 400  # layers, heads and parts that one request may name
# Tells as the last value whether the tab is the one that is seen.
IS_OPEN = """(...values) => [...values.slice(0, -1), Boolean(document.getElementById("attention-tab")?.offsetParent)]"""


@dataclass(frozen=True)
class Chosen:
    """What is on the tab: kept for the visitor, so that nothing is computed twice."""

    model: str = ""
    text: str = ""
    start: int = 0
    count: int = 0
    beside: str = NONE
    change: Change = UNCHANGED
    layer: int = 0
    head: int = 0

    def same_passage(self, other: Chosen) -> bool:
        return self == replace(other, layer=self.layer, head=self.head)


def build_attention_tab(app: App, session: Session) -> gr.Tab:
    """A model and a text, thumbnails of all layers and heads, and the maps of the one that is open."""
    handlers = Handlers(app.store)
    names = app.store.names()
    first = handlers.first_model(names)
    with gr.Tab("Attention", id="attention", elem_id="attention-tab") as tab:
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    model = gr.Dropdown(
                        names,
                        value=first,
                        label="Model",
                        info="Its maps are shown beside those of its base.",
                        elem_id="attention-model",
                        min_width=140,
                    )
                    beside = gr.Dropdown(
                        handlers.beside_choices(first),
                        value=NONE,
                        label="And beside it",
                        info="A second model of the same base.",
                        elem_id="attention-beside",
                        min_width=140,
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
                *what_if, reset = _what_if_controls()
                show = gr.Button("Show attention", variant="primary", elem_id="attention-show")
                said = Notices(elem_id="attention-said")
                meter = Meter(elem_id="attention-meter")
            with gr.Column(scale=4, min_width=300):
                grid = HeadGrid(elem_id="attention-heads", empty="Every layer and head of the model appears here.")
        maps = AttentionMaps(elem_id="attention-maps", empty="Generate a text or write one, then press Show attention.")
        with gr.Accordion("Words", open=False, elem_id="attention-glossary"):
            gr.Markdown(GLOSSARY)
        chosen = gr.State(Chosen())

        lane = app.lane(VIEW)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # What is asked for while the same is under way is done after it; Gradio would drop it.
        last: dict[str, Any] = {"trigger_mode": "always_last", **quiet}
        # The model whose parts stand among the controls of what is switched off. No state: that is the server's, and a
        # request on its way would come with the sizes of one model and the name of the next.
        offered = gr.Textbox("", visible=False)
        is_open = gr.Checkbox(True, visible=False)  # `IS_OPEN` answers for it
        inputs = [model, text, start, count, beside, offered, *what_if, session.runs, chosen]
        outputs = [meter, grid, maps, chosen, session.address]
        off, off_in, silent, window, blocks = what_if
        controls = [offered, beside, *what_if]

        def offering(after: Any, **when: Any) -> Any:
            """Has the controls offer the model's parts; what is shown waits for that, as a model's sizes bound them."""
            asked = [model, offered, is_open]
            begun = after(handlers.begin_to_offer, asked, meter, queue=False, **when, **last)
            return begun.then(handlers.offer_parts, asked, [*controls, meter], queue=False, **when, **last)

        def following(after: Any) -> None:
            after(handlers.follow, [*inputs, is_open], outputs, js=IS_OPEN, **last, **lane)

        # A model is loaded for its parts and maps only once they can be seen.
        following(offering(tab.select).then)
        following(offering(model.change, js=IS_OPEN).then)
        asked = offering(partial(gr.on, [show.click, text.submit]))
        asked.then(handlers.show, inputs, outputs, **last, **lane)
        gr.on(
            [
                beside.input,
                start.change,
                count.release,
                off.input,
                off_in.input,
                silent.input,
                window.release,
                blocks.release,
            ],
            handlers.show_if_any,
            inputs,
            outputs,
            **last,
            **lane,
        )
        took_back = reset.click(handlers.offer_parts, model, [*controls, meter], queue=False, **last)
        took_back.then(handlers.show_if_any, inputs, outputs, **last, **lane)
        # Not "always_last": Gradio would repeat the data of the first click in place of the last one's.
        opened = [maps, chosen, session.address]
        grid.select(handlers.open, [session.runs, chosen], opened, trigger_mode="multiple", **quiet, **lane)
        maps.select(handlers.act, [session.runs, chosen], [meter, maps, start], **quiet, **lane)
        taken = session.runs.change(
            handlers.take_text, [session.runs, model], [text, model, start], queue=False, **quiet
        )
        following(offering(taken.then, js=IS_OPEN).then)
        link = session.blocks.load(
            handlers.open_link, None, [model, text, start, count, chosen, *controls, said], **quiet, **lane
        )
        following(link.then)
        session.names.change(handlers.offer, [session.names, model], model, queue=False, **quiet)
        gr.api(handlers.attention, api_name="attention", **lane)
    return tab


def _what_if_controls() -> list[Any]:
    """Parts of the model to switch off, sizes to shrink, and a button that takes it all back."""
    with gr.Accordion("What if …", open=False, elem_id="attention-what-if"):
        gr.Markdown("Switch parts off or make them smaller: maps, gates, next tokens and KL follow.")
        return [
            gr.CheckboxGroup([], label="Switched off", elem_id="attention-off"),
            gr.Dropdown(
                [],
                multiselect=True,
                label="In these layers only",
                info="None chosen: in all of them.",
                elem_id="attention-off-in",
            ),
            gr.Dropdown(
                [],
                multiselect=True,
                label="Silent layers and heads",
                info="Their attention adds nothing.",
                elem_id="attention-silent",
            ),
            gr.Slider(1, 2, 1, step=1, label="Window", visible=False, elem_id="attention-window"),
            gr.Slider(
                FEWEST_BLOCKS,
                FEWEST_BLOCKS + 1,
                FEWEST_BLOCKS,
                step=1,
                label="Blocks read",
                visible=False,
                elem_id="attention-blocks",
            ),
            gr.Button("As it is", size="sm", elem_id="attention-as-it-is"),
        ]


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

    def beside_choices(self, model: str | None) -> list[str]:
        """The other variants of a model's base, which read the same tokens."""
        if model not in self.store.names():
            return [NONE]
        others = [name for name in self.store.names() if not self.store.entry(name).is_base and name != model]
        return [NONE, *(name for name in others if self._base_of(name) == self._base_of(model))]

    def parts_of(self, model: str | None) -> tuple[list[str], list[int], list[tuple[str, str]], int, int]:
        """What of a model can be switched off: branches, layers, silent places, largest window, most blocks."""
        try:
            mechanisms = as_variant(self.store.get(model)).mechanisms if model in self.store.names() else []
        except (LoadError, ValueError):
            mechanisms = []
        branches = dict.fromkeys(name for mechanism in mechanisms for name in _in_use(mechanism))
        places = []
        for layer, mechanism in enumerate(mechanisms):
            places.append((f"layer {layer}", str(layer)))
            places += [(f"layer {layer}, head {h}", f"{layer}.{h}") for h in range(mechanism.layer.num_heads)]
        window, blocks = (
            max((getattr(mechanism.config, name, 0) or 0 for mechanism in mechanisms), default=0)
            for name in ("window", "num_selected")
        )
        window, blocks = max(window, 1), max(blocks, FEWEST_BLOCKS)
        return list(branches), list(range(len(mechanisms))), places, window, blocks

    def begin_to_offer(self, model: str | None, offered: str, is_open: bool) -> Any:
        """Says that a model is loaded, if its parts are to be offered."""
        return gr.skip() if model == offered or not is_open else _meter(0, LOADING)

    def offer_parts(self, model: str | None, offered: str = "", is_open: bool = True) -> tuple[Any, ...]:
        """The parts of a model, none of them switched off; nothing new if they are offered already or not seen."""
        if model == offered or not is_open:
            return (gr.skip(),) * 8
        *_, window, blocks = self.parts_of(model)
        return model, *self._controls(model, NONE, [], [], [], window, blocks), None

    def _controls(
        self, model: str | None, beside: str, off: list, off_in: list, silent: list, window: int, blocks: int
    ) -> tuple[Any, ...]:
        """The controls of what is switched off, for a model's parts and with these values."""
        branches, layers, places, most_window, most_blocks = self.parts_of(model)
        fewest = FEWEST_BLOCKS
        return (
            gr.Dropdown(choices=self.beside_choices(model), value=beside),
            gr.CheckboxGroup(choices=branches, value=off, visible=bool(branches)),
            gr.Dropdown(choices=layers, value=off_in, multiselect=True, visible=bool(branches)),
            gr.Dropdown(choices=places, value=silent, multiselect=True),
            gr.Slider(maximum=max(most_window, 2), value=window, visible=most_window > 1),
            gr.Slider(maximum=max(most_blocks, fewest + 1), value=blocks, visible=most_blocks > fewest),
        )

    def take_text(self, runs: list[Run], model: str | None, request: gr.Request) -> tuple[Any, Any, Any]:
        """The text of the newest run: the chosen model's, or else that of the first variant in it.

        The first run is that of the page's address or the example, and a text in the address goes before it.
        """
        names, query = self.store.names(), request.query_params
        columns = [column for column in runs[0].columns if column.tokens] if runs else []
        linked = query.get("attention_model") in names and "attention_text" in query
        if not columns or (linked and len(runs) == 1):
            return gr.skip(), gr.skip(), gr.skip()
        own = [column for column in columns if column.name == model]
        variants = [c for c in columns if c.name in names and not self.store.entry(c.name).is_base]
        column = (own or variants or columns)[0]
        return "".join(column.tokens), column.name if column.name in names else gr.skip(), 0

    def open_link(self, request: gr.Request) -> tuple[Any, ...]:
        """What the page's address asks for: model, text, part, place, what is switched off, and its mistakes."""
        query, names = request.query_params, self.store.names()
        model, text = query.get("attention_model"), query.get("attention_text")
        problems = unknown_models([] if model is None else [model], names)
        if model not in names:
            return *(gr.skip(),) * 12, warnings(problems)
        most, limit = self.store.limits.view_tokens, self.store.limits.prompt_characters
        if text is not None and len(text) > limit:
            problems.append(f"The text in the link has {len(text):,} characters; the first {limit:,} are taken.")
        layer, head, start, count = (
            number_in(query, f"attention_{name}", default, problems)
            for name, default in (("layer", 0), ("head", 0), ("start", 0), ("count", most))
        )
        parts = self._linked_parts(model, query, problems)
        return (
            model,
            gr.skip() if text is None else text[:limit],
            start,
            min(max(count, SHORTEST), most),
            Chosen(layer=layer, head=head),
            *parts,
            warnings(problems),
        )

    def _linked_parts(self, model: str, query: Any, problems: list[str]) -> tuple[Any, ...]:
        """The controls of what is switched off, with the values of an address as far as the model has them."""
        if not any(name.startswith("attention_if_") or name == "attention_beside" for name in query):
            return "", *(gr.skip(),) * 6
        off, off_in, silent, window, blocks = self.parts_of(model)

        def known(name: str, of: Sequence[Any]) -> list[Any]:
            """What the model has of the values of a parameter; the others are named among the problems."""
            asked, names = query.getlist(f"attention_{name}"), list(map(str, of))
            if gone := [repr(value[:80]) for value in asked if value not in names]:
                problems.append(f"The link asks for {', '.join(gone)} ({name}), which {model} does not have.")
            return [value for value in of if str(value) in asked]

        beside = known("beside", self.beside_choices(model))
        values = (
            beside[0] if beside else NONE,
            known("if_off", off),
            known("if_layer", off_in),
            known("if_silent", [place for _, place in silent]),
            min(max(number_in(query, "attention_if_window", window, problems), 1), window),
            min(max(number_in(query, "attention_if_blocks", blocks, problems), FEWEST_BLOCKS), blocks),
        )
        return model, *self._controls(model, *values)

    def in_address(self, chosen: Chosen, runs: list[Run]) -> Any:
        """What is shown, for the page's address; a text that was generated here comes with its run."""
        change = chosen.change
        own = any("".join(column.tokens) == chosen.text for run in runs for column in run.columns)
        silent = [*map(str, sorted(change.silent_layers)), *(f"{a}.{b}" for a, b in sorted(change.silent_heads))]
        whole = chosen.count == self.store.limits.view_tokens
        return in_address(
            attention_model=[chosen.model],
            attention_text=[] if own else [chosen.text],
            attention_layer=[str(chosen.layer)],
            attention_head=[str(chosen.head)],
            attention_start=[str(chosen.start)] if chosen.start else [],
            attention_count=[] if whole else [str(chosen.count)],
            attention_beside=[] if chosen.beside == NONE else [chosen.beside],
            attention_if_off=sorted(change.off),
            attention_if_layer=list(map(str, sorted(change.layers))),
            attention_if_silent=silent,
            attention_if_window=[] if change.window is None else [str(change.window)],
            attention_if_blocks=[] if change.blocks is None else [str(change.blocks)],
        )

    def show(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Thumbnails and maps of a text, and until they are there how far they have come."""
        *asked, runs, chosen = values
        yield _meter(0, LOADING), *(gr.skip(),) * 4
        try:
            wanted = self._wanted(*asked, layer=chosen.layer, head=chosen.head)
            subject = self._subject(wanted, runs)
            for share, doing in self.views.work(subject):
                yield _meter(share, doing), *(gr.skip(),) * 4
            heads = self.views.heads(subject, chosen.layer, chosen.head)
            maps = self.views.maps(subject, heads["layer"], heads["head"])
        except (ViewError, LoadError, ConfigError) as error:
            yield None, *(gr.skip(),) * 4  # nothing is on its way any more
            raise gr.Error(str(error), print_exception=False) from None
        shown = replace(wanted, layer=heads["layer"], head=heads["head"])
        yield _elsewhere(wanted, shown), heads, maps, shown, self.in_address(shown, runs)

    def show_if_any(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same where there is a text and it is not shown already."""
        *asked, _, chosen = values
        model, text = asked[:2]
        if text and model and not self._wanted(*asked).same_passage(chosen):
            yield from self.show(*values)
        else:
            yield (gr.skip(),) * 5

    def follow(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same, if the tab is open, as the last value says."""
        *inputs, is_open = values
        if is_open:
            yield from self.show_if_any(*inputs)
        else:
            yield (gr.skip(),) * 5

    def open(self, runs: list[Run], chosen: Chosen, event: gr.EventData) -> tuple[Any, Chosen, Any]:
        """The maps of a layer and head that was clicked."""
        try:
            layer, head = int(event.layer), int(event.head)
            maps = self.views.maps(self._subject(chosen, runs), layer, head)
        except (ViewError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        shown = replace(chosen, layer=layer, head=head)
        return maps, shown, self.in_address(shown, runs)

    def act(self, runs: list[Run], chosen: Chosen, event: gr.EventData) -> Iterator[tuple[Any, Any, Any]]:
        """What a part of the maps asks for: another part of the text, or how far back a token's prediction reaches."""
        data = event._data or {}
        if "start" in data:
            yield gr.skip(), gr.skip(), _whole("start", data["start"])
            return
        try:
            subject, row = self._subject(chosen, runs), _whole("token", data.get("reach"))
            found = None
            for share, found in self.views.reach(subject, row):
                if found is None:
                    yield _meter(share, "Changing one token after another"), gr.skip(), gr.skip()
            maps = self.views.maps(subject, chosen.layer, chosen.head)
        except (ViewError, LoadError) as error:
            yield None, gr.skip(), gr.skip()
            raise gr.Error(str(error), print_exception=False) from None
        yield None, {**maps, "reach": found}, gr.skip()

    def attention(
        self,
        text: str,
        model: str,
        layer: int = 0,
        head: int = 0,
        start: int = 0,
        count: int = 64,
        off: list[str] | None = None,
        window: int | None = None,
        blocks: int | None = None,
    ) -> dict[str, Any]:
        """What one head of a model attends to in a text, beside the same head of its base.

        Args:
            text: any text; the model reads as much of it as it can hold.
            model: name of a model, as /models lists them.
            layer: layer of the model, from 0.
            head: head of the layer, from 0.
            start: first token to return.
            count: how many tokens to return, at most 400.
            off: parts of the method to switch off in all layers: branches, or places of masks.
            window: a smaller window, where the method has one.
            blocks: fewer blocks to read, where the method reads blocks; at least 3.

        Returns:
            A JSON object: `tokens`; `maps`, with `model` and, for a variant, `base` (and `unchanged`, if parts are
            off), each a list of rows, where number j of row i is the weight with which token i reads token j ≤ i;
            `before`, the weight on tokens before the first one returned; `elsewhere`, for each other map the part of
            the attention that lies elsewhere, over all tokens that are read; `keys_read` and `keys_scored`, numbers
            for each token; `start` and `total_tokens`; `layers` and `heads`, how many the model has.
        """
        try:
            change = Change(
                off=frozenset(_strings("off", off)),
                window=None if window is None else _positive("window", window, 1),
                blocks=None if blocks is None else _positive("blocks", blocks, FEWEST_BLOCKS),
            )
            count = min(_whole("count", count), self.store.limits.view_tokens)
            subject = self._subject(Chosen(model, text, _whole("start", start or 0), count, NONE, change), [])
            return self.views.numbers(subject, _whole("layer", layer), _whole("head", head))
        except (ViewError, LoadError, ConfigError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def _wanted(
        self,
        model: str | None,
        text: str,
        start: int | None,
        count: int,
        beside: str | None,
        offered: str,
        off: list[str],
        off_in: list[int],
        silent: list[str],
        window: int | None,
        blocks: int | None,
        **place: int,
    ) -> Chosen:
        """What the controls ask for; a size that is the model's own is no change, and neither is another model's."""
        beside = beside if beside in self.beside_choices(model) else NONE
        asked = Chosen(model or "", text, int(start or 0), int(count), beside, **place)
        if offered != model:
            return asked
        branches, layers, places, most_window, most_blocks = self.parts_of(model)
        known = {value for _, value in places}
        heads = [place.split(".") for place in _strings("silent", silent) if place in known]
        off = [name for name in _strings("off", off) if name in branches]
        change = Change(
            off=frozenset(off),
            layers=frozenset(layer for layer in off_in or [] if layer in layers) if off else frozenset(),
            silent_layers=frozenset(int(parts[0]) for parts in heads if len(parts) == 1),
            silent_heads=frozenset((int(parts[0]), int(parts[1])) for parts in heads if len(parts) == 2),
            window=_smaller(window, most_window, 1),
            blocks=_smaller(blocks, most_blocks, FEWEST_BLOCKS),
        )
        return replace(asked, change=change)

    def _subject(self, chosen: Chosen, runs: list[Run]) -> Subject:
        loaded, part = self._read(chosen.model, chosen.text, chosen.start, chosen.count, runs)
        branches = self.parts_of(chosen.model)[0]
        if unknown := sorted(chosen.change.off - set(branches)):
            raise ViewError(
                f"{loaded.name} has no part {', '.join(unknown)[:80]}; there are: {', '.join(branches) or 'none'}."
            )
        beside = None
        if chosen.beside != NONE:
            if chosen.beside not in self.beside_choices(chosen.model):
                raise ViewError(
                    f"{str(chosen.beside)[:80]} cannot be shown beside {loaded.name}: not of the same base."
                )
            beside = self.store.get(chosen.beside)
        return Subject(loaded, part, chosen.change, beside)

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


def _elsewhere(wanted: Chosen, shown: Chosen) -> dict[str, Any] | None:
    """Says that a layer or head that a link asks for does not exist; nothing where it does."""
    if (wanted.layer, wanted.head) == (shown.layer, shown.head):
        return None
    asked = f"{wanted.model} has no layer {wanted.layer} with a head {wanted.head}"
    return _meter(1, f"{asked}: layer {shown.layer}, head {shown.head} is shown.")


def _meter(share: float, text: str) -> dict[str, Any]:
    return {"share": share, "text": text}


def _in_use(mechanism: Any) -> list[str]:
    """The branches of a mechanism that it has: of masks, the places with a weight."""
    weights = mechanism.summary()
    return [name for name in mechanism.branches if name not in weights or any(weights[name])]


def _smaller(size: int | None, most: int, least: int) -> int | None:
    """A size below the model's own, None for its own."""
    return None if size is None or not least <= size < most else int(size)


def _strings(name: str, values: object) -> list[str]:
    if values is None:
        return []
    if not isinstance(values, list) or len(values) > LONGEST_LISTS or not all(isinstance(v, str) for v in values):
        raise ViewError(f"{name} is {str(values)[:80]!r}; it must be a list of names.")
    return values


def _positive(name: str, value: object, least: int) -> int:
    if (number := _whole(name, value)) < least:
        raise ViewError(f"{name} is {number}; it must be at least {least}.")
    return number


def _whole(name: str, value: object) -> int:
    """A whole number out of untrusted JSON.

    Raises:
        ViewError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ViewError(f"{name} is {str(value)[:80]!r}; it must be a whole number.")
    return int(value)
