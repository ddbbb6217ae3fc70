"""The tab that measures what attention costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..components import Curves, Meter
from ..components.notices import Notices
from ..context import MEASURE, App, Session
from ..models import LoadError, ModelStore
from ..speed import COUNTED, LONGEST, MEASURED, Level, SpeedError, SpeedRun, charts, report, verdicts

LEVELS: list[tuple[str, Level]] = [("One layer's attention alone", "layer"), ("The whole model", "model")]
CHART_HEIGHT = 330  # about what the charts take
FRAME_SECONDS = 0.15  # the bar does not move more often: every step goes through the network
STOP_SECONDS = 5.0  # how long Stop waits for a pass to end
LENGTHS = [512, 1024, 2048, 4096, LONGEST]


def build_speed_tab(app: App, session: Session) -> gr.Tab:
    """Models, a level and a length; curves that grow as they are measured, and the arithmetic beside them."""
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
                value="layer",
                label="What is measured",
                info="The rest of a model costs the same for every method; its context ends the curves.",
                elem_id="speed-level",
                min_width=300,
            )
            longest = gr.Dropdown(
                LENGTHS, value=4096, label="Longest text", info="In tokens.", elem_id="speed-longest", min_width=140
            )
        with gr.Row(elem_classes="actions"):
            start = gr.Button("Measure", variant="primary", scale=3, elem_id="speed-start")
            stop = gr.Button("Stop", scale=1, elem_id="speed-stop")
        meter = Meter(elem_id="speed-meter")
        gr.Markdown(
            "### Measured on this machine\nLogarithmic axes; lower is better. Each time is the shortest of several."
        )
        measured = Curves(
            elem_id="speed-measured",
            empty="Press Measure: the curves appear length by length, in under a minute.",
            room=CHART_HEIGHT,
        )
        verdict = Notices(elem_id="speed-verdict")
        gr.Markdown(
            "### Counted\nThe same on every machine: these say what to expect where a busy machine misleads the clock."
        )
        counted = Curves(elem_id="speed-counted", empty="Counted along with the measurement.", room=CHART_HEIGHT)
        lane = app.lane(MEASURE)
        outputs = [meter, verdict, measured, counted]
        running = start.click(
            handlers.measure,
            [models, level, longest],
            outputs,
            show_progress="hidden",
            api_visibility="private",
            **lane,
        )
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Through the queue, like the measurement: so the browser gets its answer after all that was on the way.
        stop.click(handlers.stop, None, meter, cancels=[running], concurrency_limit=None, **quiet)
        session.names.change(handlers.offer, [session.names, models], models, queue=False, **quiet)
        gr.api(handlers.speed, api_name="speed", **lane)
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

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """Ends the visitor's measurement; returns what the bar says, once nothing more can come."""
        run = self._running.get(request.session_hash)
        if run is not None:
            run.stop()
            run.ended.wait(STOP_SECONDS)
        return {"share": run.share if run else 0.0, "text": "Stopped; what was measured stays."}

    def measure(self, models: list[str], level: Level, longest: int, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Yields (meter, verdicts, measured, counted) while it measures."""
        yield {"share": 0.0, "text": "Loading the models"}, [], gr.skip(), gr.skip()
        try:
            run = self._run(models, level, longest)
        except (SpeedError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        self._running[request.session_hash] = run
        try:
            yield from _frames(run)
        finally:
            self._running.pop(request.session_hash, None)

    def speed(self, models: list[str], level: Level = "layer", longest: int = 2048) -> dict[str, Any]:
        """Measures what models cost on this machine, by the length of the text.

        Args:
            models: names of models, as /models lists them; the base of each is measured along with it.
            level: "layer" for the attention of one layer alone, "model" for the whole model.
            longest: tokens of the longest text, from 64 to 8192; a whole model ends at its context.

        Returns:
            A JSON object: `samples`, one for each model and length, with `prefill_ms`, `token_ms`, `peak_bytes`,
            `state_bytes`, `operations` and `keys_read`; `break_even`, for each variant the length from which on it is
            at least as fast as its base, or null; `verdicts`, the same in words; `finished`, false if time ran out.
        """
        try:
            run = self._run(models, level, longest)
        except (SpeedError, LoadError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        for _ in run.measure():
            pass
        return report(run)

    def _run(self, models: list[str], level: Level, longest: int) -> SpeedRun:
        problems = []
        limits, names = self.store.limits, self.store.names()
        if not isinstance(models, list) or not 0 < len(models) <= limits.models_per_run:
            problems.append(f"Choose 1 to {limits.models_per_run} models.")
        elif unknown := [str(name)[:80] for name in models if name not in names]:
            problems.append(f"No model {', '.join(unknown)}; there are: {', '.join(names)}.")
        if level not in ("layer", "model"):
            problems.append(f"What is measured is 'layer' or 'model', not {str(level)[:80]!r}.")
        if not isinstance(longest, int) or not 64 <= longest <= LONGEST:
            problems.append(f"The longest text has 64 to {LONGEST:,} tokens.")
        if problems:
            raise SpeedError(" ".join(problems))
        return SpeedRun([self.store.get(name) for name in models], level, longest, limits.seconds)


def _frames(run: SpeedRun) -> Iterator[tuple[Any, ...]]:
    """What the page shows of a run: the curves whenever a length is done, the bar in between."""
    known, shown = 0, time.monotonic()
    for _ in run.measure():
        meter = {"share": run.share, "text": run.doing}
        if len(run.samples) > known:
            known = len(run.samples)
            said = [{"level": "info", "text": sentence} for sentence in verdicts(run)]
            yield meter, said, charts(run, MEASURED), charts(run, COUNTED)
        elif time.monotonic() - shown > FRAME_SECONDS:
            yield meter, gr.skip(), gr.skip(), gr.skip()
        else:
            continue
        shown = time.monotonic()
    yield {"share": run.share, "text": run.doing}, gr.skip(), gr.skip(), gr.skip()
