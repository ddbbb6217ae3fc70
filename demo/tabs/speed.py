"""The tab that shows what attention costs: measured on this machine, and counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.datastructures import QueryParams

from .. import counting
from ..address import copy_link, in_address, unknown_models
from ..components import Curves, Meter
from ..components.address import AddressView
from ..components.notices import Notices, notice, warnings
from ..components.table import TextTable
from ..context import MEASURE, App, Session
from ..costs_table import HELP, costs_table
from ..counting import Counted
from ..measured import Level, Measured, charts, packed, report, unpacked, verdicts
from ..models import LoadError, ModelStore
from ..speed import LONGEST, SpeedError, SpeedRun, mechanisms_of

COUNT = "count"
LEVELS: list[tuple[str, Level]] = [("Attention alone", "attention"), ("The whole model", "model")]
ALL_LAYERS = "all layers"
LAYER_DIGITS = 3
CHART_HEIGHT = 330  # about what the charts take
FRAME_SECONDS = 0.15  # the bar does not move more often: every step goes through the network
STOP_SECONDS = 5.0  # how long Stop waits for a pass to end
LENGTHS = [512, 1024, 2048, 4096, LONGEST]


def build_speed_tab(app: App, session: Session) -> gr.Tab:
    """Models, a level and a length; curves that grow as they are measured, the arithmetic, and all of it in a table."""
    handlers = Handlers(app.store)
    names = app.store.names()
    with gr.Tab("Speed", id="speed", elem_id="speed-tab") as tab:
        with gr.Row():
            models = gr.CheckboxGroup(
                names,
                value=names[: app.limits.models_per_run],
                label="Models",
                info="Each is compared with its base, which is measured along with it.",
                elem_id="speed-models",
                min_width=300,
            )
            level = gr.Radio(
                LEVELS,
                value="attention",
                label="What is measured",
                info="The rest of a model costs the same for every method; its context ends the measured curves.",
                elem_id="speed-level",
                min_width=300,
            )
            layer = gr.Dropdown(
                [ALL_LAYERS],
                value=ALL_LAYERS,
                label="Layers",
                info="All, one after another, or one.",
                elem_id="speed-layer",
                min_width=140,
            )
            longest = gr.Dropdown(
                LENGTHS, value=4096, label="Longest text", info="In tokens.", elem_id="speed-longest", min_width=140
            )
        with gr.Row(elem_classes="actions"):
            start = gr.Button("Measure", variant="primary", scale=3, elem_id="speed-start")
            stop = gr.Button("Stop", scale=1, elem_id="speed-stop", interactive=False)
            link = gr.Button("Copy link", scale=1, elem_id="speed-link")
        said = Notices(elem_id="speed-said")
        meter = Meter(elem_id="speed-meter")
        gr.Markdown(
            "### Measured\nLogarithmic axes; lower is better. Medians of several rounds, in which the models take "
            "turns; the bars are where the median lies with 90 %. While anything else is computed here, it waits."
        )
        measured = Curves(
            elem_id="speed-measured",
            empty="Press Measure: the curves appear length by length, in about a minute.",
            room=CHART_HEIGHT,
        )
        verdict = Notices(elem_id="speed-verdict")
        gr.Markdown(
            "### Counted\nThe same on every machine, for texts of up to a million tokens. Operations are not time: "
            "how many a second a machine does depends on their kind."
        )
        counted = Curves(elem_id="speed-counted", empty="Nothing is chosen.", room=CHART_HEIGHT)
        counted_verdict = Notices(elem_id="speed-counted-verdict")
        gr.Markdown(f"### In one table\n{HELP}")
        table = TextTable(elem_id="speed-table", file="attention-costs")

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        asked = [models, level, layer, longest]
        outcome = [verdict, measured, session.costs, session.address, start, stop]
        accepted = start.click(handlers.accept, None, [meter, start, stop], queue=False, **quiet)
        running = accepted.then(handlers.measure, asked, [meter, *outcome], **quiet, **app.lane(MEASURE))
        # Not with the last frame: a measurement asked for before this one has ended for Gradio would be dropped.
        running.success(lambda: idle()[1:], None, [start, stop], queue=False, **quiet)
        running.failure(idle, None, [meter, start, stop], queue=False, **quiet)
        # Through the queue, like the measurement: so the browser gets its answer after all that was on the way.
        stop.click(handlers.stop, asked, [meter, *outcome], cancels=[running], concurrency_limit=None, **quiet)
        shown = gr.State(None)  # what is counted on the page
        gr.on(  # one event for all that changes the table: of two, the one that began earlier might end later
            [tab.select, models.change, level.change, layer.change, session.costs.change],
            handlers.count,
            [models, level, layer, session.costs, shown],
            [layer, counted_verdict, counted, table, shown],
            trigger_mode="always_last",
            **quiet,
            **app.lane(COUNT),
        )
        for field in asked:
            field.input(settings_in_address, asked, session.address, queue=False, **quiet)
        link.click(None, None, said, js=copy_link("The link is copied, with what was measured."), queue=False, **quiet)
        session.blocks.load(
            handlers.open_link, None, [*asked, said, verdict, measured, session.costs], queue=False, **quiet
        )
        session.names.change(handlers.offer, [session.names, models], models, queue=False, **quiet)
        gr.api(handlers.speed, api_name="speed", **app.lane(MEASURE))
    return tab


class Handlers:
    """What happens on the speed tab."""

    def __init__(self, store: ModelStore):
        self.store = store
        self._running: dict[str | None, SpeedRun] = {}  # by session

    def offer(self, names: list[str], chosen: list[str]) -> dict[str, Any]:
        """The models that can be chosen; what was chosen stays so."""
        kept = [name for name in chosen if name in names]
        return gr.CheckboxGroup(choices=names, value=kept or names[: self.store.limits.models_per_run])

    def accept(self) -> tuple[Any, ...]:
        """Takes a request, which now waits for its turn."""
        return {"share": 0.0, "text": "Waiting for its turn"}, *busy()

    def open_link(self, request: gr.Request) -> tuple[Any, ...]:
        """What the page's address asks for and what was found then: (models, level, layer, longest, said, …)."""
        link = read_link(request.query_params, self.store)
        found = link.found
        settings = [link.settings.get(name, gr.skip()) for name in SETTINGS]
        return (
            *settings,
            warnings(link.problems),
            *((_said(found), charts(found), found) if found else (gr.skip(),) * 3),
        )

    def stop(self, models: list[str], level: Level, layer: str, longest: int, request: gr.Request) -> tuple[Any, ...]:
        """Ends the visitor's measurement; returns what the page shows, once nothing more can come."""
        run = self._running.get(request.session_hash)
        if run is None:
            return {"share": 0.0, "text": "Nothing is being measured."}, *(gr.skip(),) * 4, *idle()[1:]
        run.stop()
        run.ended.wait(STOP_SECONDS)
        meter = {"share": run.share, "text": "Stopped; what was measured stays."}
        return meter, *_ended(run, models, level, layer, longest), *idle()[1:]

    def count(
        self, models: list[str], level: Level, layer: str, results: Measured | None, shown: Any
    ) -> tuple[Any, Any, Any, Any, Any]:
        """What the chosen models need, by count: (layers to choose from, words, curves, table, what is shown).

        The table holds what was measured as well. Curves that the page shows already are left alone.
        """
        asked = (models, level, layer)
        if not models:
            return gr.skip(), [], [], {}, asked
        try:
            found = self._count(models, level, layer)
        except (SpeedError, LoadError) as error:
            return gr.skip(), [{"level": "warning", "text": str(error)}], [], {}, asked
        table = costs_table(found, results and report(results))
        if shown == asked:
            return *(gr.skip(),) * 3, table, asked
        layers = max(len(mechanisms_of(each)) for each in found.models)
        choices = gr.Dropdown(choices=[ALL_LAYERS, *map(str, range(layers))], visible=level != "model")
        said = [{"level": "info", "text": sentence} for sentence in counting.verdicts(found)]
        return choices, said, counting.charts(found), table, asked

    def measure(
        self, models: list[str], level: Level, layer: str, longest: int, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Yields (meter, verdicts, curves, what was measured, address, Measure, Stop) while it measures."""
        yield {"share": 0.0, "text": "Loading the models"}, [], [], *(gr.skip(),) * 2, *busy()
        try:
            run = self._run(models, level, longest, layer)
        except (SpeedError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        self._running[request.session_hash] = run
        try:
            yield from _frames(run)
            meter = {"share": run.share, "text": run.doing}
            yield meter, *_ended(run, models, level, layer, longest), *busy()
        finally:
            self._running.pop(request.session_hash, None)

    def speed(
        self, models: list[str], level: Level = "attention", longest: int = 2048, layer: int | None = None
    ) -> dict[str, Any]:
        """Measures and counts what models cost, by the length of the text.

        Args:
            models: names of models, as /models lists them; the base of each is measured along with it.
            level: "attention" for the attention of the layers alone, "model" for the whole model.
            longest: tokens of the longest text that is measured, from 64 to 8192; a whole model ends at its context.
            layer: with level "attention", the one layer that is measured, from 0; null: all, one after another.

        Returns:
            A JSON object: `samples`, one for each model and length, with `prefill_ms`, `token_ms`, their spreads,
            `peak_bytes` and `state_bytes`; `ratios` to the base, with intervals; `break_even`, for each variant the
            length from which on it is as fast as its base, how far it is surely slower and from where on surely
            faster, null where noise hides it; `verdicts`, the same in words; `asked` and `reached`, the longest
            texts; `finished`, false if time ran out; `counted`, one for each model and length up to 1,048,576, with
            `operations`, `keys_read`, `keys_scored` and `state_bytes`, and `counted_break_even`.
        """
        chosen = ALL_LAYERS if layer is None else str(layer)
        try:
            run = self._run(models, level, longest, chosen)
            found = self._count(models, level, chosen)
        except (SpeedError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        for _ in run.measure():
            pass
        return {**report(run.measured), **counting.report(found)}

    def _count(self, models: list[str], level: Level, layer: str) -> Counted:
        self._check(models, level, layer)
        return Counted([self.store.get(name) for name in models], level, _layers(layer))

    def _run(self, models: list[str], level: Level, longest: int, layer: str = ALL_LAYERS) -> SpeedRun:
        problems = []
        if not isinstance(longest, int) or not 64 <= longest <= LONGEST:
            problems.append(f"The longest text has 64 to {LONGEST:,} tokens.")
        self._check(models, level, layer, problems)
        layers = _layers(layer)
        return SpeedRun([self.store.get(name) for name in models], level, longest, self.store.limits.seconds, layers)

    def _check(self, models: list[str], level: Level, layer: str, others: list[str] | None = None) -> None:
        """Raises `SpeedError` with all that is wrong."""
        problems = []
        limits, names = self.store.limits, self.store.names()
        if not isinstance(models, list) or not 0 < len(models) <= limits.models_per_run:
            problems.append(f"Choose 1 to {limits.models_per_run} models.")
        elif unknown := [str(name)[:80] for name in models if name not in names]:
            problems.append(f"No model {', '.join(unknown)}; there are: {', '.join(names)}.")
        if level not in ("attention", "model"):
            problems.append(f"What is measured is 'attention' or 'model', not {str(level)[:80]!r}.")
        if layer != ALL_LAYERS and not is_layer(layer):
            problems.append(f"A layer is a number from 0, not {str(layer)[:80]!r}.")
        if problems := [*problems, *(others or [])]:
            raise SpeedError(" ".join(problems))


def _layers(layer: str) -> list[int] | None:
    return None if layer == ALL_LAYERS else [int(layer)]


def _frames(run: SpeedRun) -> Iterator[tuple[Any, ...]]:
    """What the page shows of a run: more curves whenever a length is done, the bar in between.

    The page may show only the last of frames that come at once, so each says all.
    """
    known, shown, drawn = 0, 0.0, ([], [])
    for _ in run.measure():
        is_new = len(run.samples) > known
        if is_new:
            known, found = len(run.samples), run.measured
            drawn = _said(found), charts(found)
        if is_new or time.monotonic() - shown > FRAME_SECONDS:
            yield {"share": run.share, "text": run.doing}, *drawn, gr.skip(), gr.skip(), *busy()
            shown = time.monotonic()


def _ended(run: SpeedRun, *settings: Any) -> tuple[Any, ...]:
    """What stays of a run: (words, curves, what was measured, address)."""
    found = run.measured
    address = in_address(push=True, **settings_as_parameters(*settings), speed_results=[packed(found)])
    kept = (found, address) if found.samples else (gr.skip(), gr.skip())
    return _said(found), charts(found), *kept


def _said(found: Measured) -> list[dict[str, str]]:
    """What was found in words, and where."""
    said = [{"level": "info", "text": sentence} for sentence in verdicts(found)]
    if found.falls_short:
        said[-1]["level"] = "warning"
    where = notice(f"Measured {found.where}.") if found.samples else []
    return [*said, *where]


def busy() -> list[Any]:
    """Measure and Stop while there is a measurement."""
    return [gr.Button(interactive=False), gr.Button(interactive=True)]


def idle() -> list[Any]:
    """The bar, Measure and Stop while there is none."""
    return [None, gr.Button(interactive=True), gr.Button(interactive=False)]


@dataclass(frozen=True)
class Link:
    """What the page's address asks the speed tab for.

    Attributes:
        settings: what is usable of it, by parameter.
        found: what was measured when the address was made.
        problems: what is not usable, in words.
    """

    settings: dict[str, Any]
    found: Measured | None
    problems: list[str]


SETTINGS = ("speed_models", "speed_level", "speed_layer", "speed_longest")


def settings_as_parameters(models: list[str], level: Level, layer: str, longest: int) -> dict[str, list[str]]:
    """What is asked for, as the page's address holds it."""
    return dict(zip(SETTINGS, (models, [level], [layer], [str(longest)]), strict=True))


def settings_in_address(*settings: Any) -> AddressView:
    """The same, put there; what was measured before stays there as it stays on the page."""
    return in_address(**settings_as_parameters(*settings))


def read_link(query: QueryParams, store: ModelStore) -> Link:
    """Reads the page's address, which anyone may have written."""
    settings: dict[str, Any] = {}
    problems = []
    if asked := query.getlist("speed_models"):
        known = [name for name in store.names() if name in asked][: store.limits.models_per_run]
        settings |= {"speed_models": known} if known else {}
        problems += unknown_models(asked, store.names())
    if (level := query.get("speed_level")) is not None:
        if level in [value for _, value in LEVELS]:
            settings["speed_level"] = level
        else:
            problems.append(f"What is measured is 'attention' or 'model', not {level[:80]!r}.")
    if (layer := query.get("speed_layer", ALL_LAYERS)) != ALL_LAYERS:
        if is_layer(layer):
            settings["speed_layer"] = gr.Dropdown(choices=[ALL_LAYERS, layer], value=layer)
        else:
            problems.append(f"A layer is a number from 0, not {layer[:80]!r}.")
    if (longest := query.get("speed_longest")) is not None:
        if longest in map(str, LENGTHS):
            settings["speed_longest"] = int(longest)
        else:
            problems.append(f"The longest text is one of {', '.join(map(str, LENGTHS))}, not {longest[:80]!r}.")
    found = None
    if word := query.get("speed_results"):
        try:
            found = unpacked(word)
        except ValueError as error:
            problems.append(str(error))
    return Link(settings, found, problems)


def is_layer(layer: Any) -> bool:
    """Whether it is the number of a layer."""
    return isinstance(layer, str) and layer.isascii() and layer.isdecimal() and len(layer) <= LAYER_DIGITS
