"""The tab where several models continue one prompt side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from pydantic import TypeAdapter

from ..address import copy_link
from ..components.costs import CostTable
from ..components.notices import Notices
from ..components.tokens import TokenColumns
from ..context import GENERATE, App, Session
from ..engine import Generation, RemoteGeneration, frames
from ..example import EXAMPLE_PROMPT, PROMPTS, FirstRun, ticked
from ..gpu import IS_LENT, with_gpu
from ..models import ModelStore
from ..request import FIELDS, RequestError, from_query, in_address, read_settings
from ..runs import Column, Run, Settings, newest
from ..views import (
    KL_LEGEND,
    KL_TICKS,
    columns_view,
    cost_table,
    history_label,
    prompt_notices,
    settings_line,
    what_it_reads,
)
from .blind import build_blind_test

_RUN, _RUNS = TypeAdapter(Run), TypeAdapter(list[Run])

COPY_ADDRESS = copy_link(
    "The link is copied: whoever opens it sees this run made anew.",
    needed="prompt",
    without="This prompt is too long for a link. Download JSON keeps the run.",
)

NONE_EARLIER, SHOWN_BELOW = "There is none yet: it takes two runs.", "Shown below the newest one."

SAVE_FILE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "runs.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass(frozen=True)
class Controls:
    """What a visitor sets, in the order of `FIELDS`."""

    fields: list[gr.components.Component]

    @property
    def prompt(self) -> gr.Textbox:
        return self.fields[0]

    @property
    def models(self) -> gr.CheckboxGroup:
        return self.fields[1]


@dataclass(frozen=True)
class Buttons:
    """What a run switches on and off."""

    start: gr.Button
    stop: gr.Button
    link: gr.Button
    save: gr.Button


def idle() -> list[Any]:
    """Generate, Stop and whether there is a run, while there is none."""
    return [gr.Button("Generate", interactive=True), gr.Button(interactive=False), False]


def busy(word: str) -> list[Any]:
    """The same while there is one, which is only told of on Generate."""
    return [gr.Button(word, interactive=False), gr.Button(interactive=True), True]


def build_generate_tab(app: App, session: Session) -> gr.Tab:
    """Settings, the models' texts as they are written, what they cost, and the runs before."""
    example = FirstRun(app.store)
    handlers = Handlers(app.store, example)
    with gr.Tab("Generate", id="generate", elem_id="generate-tab") as tab:
        controls, notes = _controls(app, ticked(app.store))
        buttons = _buttons()
        said = Notices(elem_id="generate-said")
        soon = example.waiting()
        shown = gr.Textbox(
            settings_line(soon.settings) if soon.columns else "",
            label="Settings of the run below",
            show_label=False,
            container=False,
            max_lines=4,
            interactive=False,
            elem_id="generate-shown",
        )
        columns = TokenColumns(
            columns_view(soon, app.store),
            elem_id="generate-columns",
            legend=KL_LEGEND,
            ticks=KL_TICKS,
            takes=True,
        )
        costs = CostTable(
            cost_table(soon),
            elem_id="generate-costs",
            note="Taken once, while the models took turns; × is relative to the first plain model. The Speed tab "
            "measures with care, and over many lengths.",
        )
        with gr.Accordion("Earlier runs", open=False, elem_id="generate-history"):
            earlier = gr.Radio([], label="Compare with", info=NONE_EARLIER, type="index", elem_id="generate-earlier")
            earlier_columns = TokenColumns(elem_id="generate-earlier-columns", legend=KL_LEGEND, ticks=KL_TICKS)
            earlier_costs = CostTable(elem_id="generate-earlier-costs")
        build_blind_test(app, session, controls.fields, handlers.generation)
        gr.api(handlers.generate, api_name="generate", **app.lane(GENERATE))
        current, linked, is_busy = gr.State(), gr.State(), gr.State(False)
        file = gr.Textbox(visible=False)

    views = [notes, shown, columns, costs]
    switches = [buttons.start, buttons.stop, is_busy]
    page = [*views, session.address, current, session.runs, *switches, buttons.link]
    queued: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    private = {**queued, "queue": False}  # changes of a State are only told of by events in the queue
    accepted = gr.on(
        [buttons.start.click, controls.prompt.submit, linked.change],
        handlers.accept,
        [*controls.fields, is_busy],
        switches,
        validator=handlers.validate,
        **queued,
    )
    run = accepted.success(
        handlers.stream,
        [*controls.fields, session.runs],
        page,
        show_progress="minimal",
        show_progress_on=shown,
        api_visibility="private",
        **app.lane(GENERATE),
    )
    # Not with the last frame: a run that is asked for before this one has ended for Gradio would be dropped.
    for ended in (run.success, run.failure):
        ended(idle, None, switches, **private)
    buttons.stop.click(handlers.stop, [current, session.runs], page, cancels=[run], **queued)
    buttons.link.click(None, None, said, js=COPY_ADDRESS, **private)
    buttons.save.click(handlers.dump, session.runs, file, **private).then(None, file, js=SAVE_FILE, **private)
    columns.select(handlers.take, session.runs, [*controls.fields, linked], **queued)
    session.runs.change(handlers.list_earlier, session.runs, earlier, **private)
    earlier.change(handlers.show_earlier, [earlier, session.runs], [earlier_columns, earlier_costs], **private)
    session.names.change(handlers.offer, session.names, controls.models, **private)
    session.blocks.load(handlers.open_link, None, [*controls.fields, said, linked, *views[1:]], **queued)
    session.blocks.load(handlers.open_example, None, [*views[1:], session.runs], **queued)
    return tab


def _controls(app: App, chosen: Sequence[str]) -> tuple[Controls, Notices]:
    names = app.store.names()
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            prompt = gr.Textbox(
                EXAMPLE_PROMPT,
                label="Prompt",
                info="The models continue it; the longer it is, the more there is to look up. Shift + Enter generates.",
                lines=3,
                max_lines=5,
                elem_id="generate-prompt",
            )
            notes = Notices(elem_id="generate-notes")
            gr.Examples(
                [[text] for text in PROMPTS.values()],
                [prompt],
                label="Examples",
                example_labels=list(PROMPTS),
                api_visibility="private",
            )
        with gr.Column(scale=3, min_width=320):
            models = gr.CheckboxGroup(
                model_choices(app.store, names),
                value=list(chosen),
                label="Attention methods",
                info="The same network; what a token reads of the text before it:",
                elem_id="generate-models",
                elem_classes="choices",
            )
    with gr.Accordion("Sampling", open=False, elem_id="generate-sampling"), gr.Row():
        options = _sampling(app)
    return Controls([prompt, models, *options]), notes


def _sampling(app: App) -> list[gr.components.Component]:
    default, longest = Settings("", ()), app.limits.new_tokens
    sliders = {
        "Temperature": (0, 2, 0.05, default.temperature, "0 takes the most probable token."),
        "Top-k": (0, 200, 1, default.top_k, "Draw among the k most probable; 0: all."),
        "Top-p": (0.05, 1, 0.05, default.top_p, "Draw among the fewest with this share."),
        "Repetition penalty": (1, 2, 0.05, default.repetition_penalty, "1 is none."),
        "Length": (1, longest, 1, min(default.max_new_tokens, longest), "New tokens, at most."),
    }
    options: list[gr.components.Component] = [
        gr.Slider(low, high, value, step=step, label=label, info=info, min_width=230, buttons=[])
        for label, (low, high, step, value, info) in sliders.items()
    ]
    seed = gr.Number(
        default.seed, precision=0, minimum=0, label="Seed", info="Same seed, same settings: same text.", min_width=230
    )
    return [*options, seed]


def _buttons() -> Buttons:
    with gr.Row(elem_classes="actions"):
        return Buttons(
            gr.Button("Generate", variant="primary", scale=3, elem_id="generate-start"),
            gr.Button("Stop", scale=1, elem_id="generate-stop", interactive=False),
            gr.Button("Copy link", scale=1, elem_id="generate-link", interactive=False),
            gr.Button("Download JSON", scale=1, elem_id="generate-save"),
        )


def model_choices(store: ModelStore, names: list[str]) -> list[tuple[str, str]]:
    """Names for a picker, each in one line."""
    return [(f"{name}: {what_it_reads(name, store)}", name) for name in names]


class Handlers:
    """What happens on the generate tab; knows nothing of its layout but the order of inputs and outputs."""

    def __init__(self, store: ModelStore, example: FirstRun):
        self.store = store
        self.example = example
        self._lent = with_gpu(self._write, lambda settings: expected_seconds(settings, store))

    def validate(self, *values: Any) -> list[dict[str, Any]]:
        """Says before queueing what is wrong, at the field where it is."""
        given = dict(zip(FIELDS, values, strict=False))
        valid = {"prompt": "x", "models": self.store.names()[:1]}
        verdicts = []
        for name in FIELDS:
            try:
                read_settings({**valid, name: given[name]}, self.store)
                verdicts.append(gr.validate(True, ""))
            except RequestError as error:
                verdicts.append(gr.validate(False, str(error)))
        return [*verdicts, gr.validate(True, "")]  # whether there is a run

    def accept(self, *values: Any) -> list[Any]:
        """Takes a request that is valid: it now waits for its turn, and another one has to wait for its end."""
        if values[-1]:
            raise gr.Error("A run is under way: stop it, or wait for its end.", print_exception=False)
        return busy("Waiting …")

    def _write(self, settings: Settings) -> Iterator[Run]:
        self.store.use("cuda")
        yield from frames(Generation(self.store, settings))

    def generation(self, settings: Settings) -> Generation:
        """A run with these settings, on a GPU that is lent for it where there is one."""
        return RemoteGeneration(self.store, settings, self._lent) if IS_LENT else Generation(self.store, settings)

    def stream(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields (notes, settings, columns, costs, address, generation, runs, buttons) while the models write."""
        *fields, runs = values
        try:
            settings = read_settings(dict(zip(FIELDS, fields, strict=True)), self.store)
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from None
        generation = self.generation(settings)
        # The page shows only the last of frames that come at once, so each says all; what stays here is said once.
        kept, buttons = generation, [*busy("Writing …"), gr.Button(interactive=True)]
        for run in frames(generation):
            yield *self._show(run), in_address(settings), kept, gr.skip(), *buttons
            kept = gr.skip()
        yield *self._finished(generation, runs), *buttons

    def stop(self, generation: Generation | None, runs: list[Run]) -> tuple[Any, ...]:
        """Ends a run where it is and compares what there is; a request that still waits is taken back."""
        if generation is None:
            return *[gr.skip()] * 7, *idle(), gr.skip()
        generation.finish()
        return *self._finished(generation, runs), *idle(), gr.Button(interactive=True)

    def _finished(self, generation: Generation, runs: list[Run]) -> tuple[Any, ...]:
        run = generation.run
        runs = [run, *(each for each in runs if each is not run)]
        limits = self.store.limits
        kept = newest(runs, limits.runs, limits.history_tokens)
        return *self._show(run), in_address(run.settings), None, kept

    def _show(self, run: Run) -> tuple[Any, str, Any, Any]:
        return prompt_notices(run), settings_line(run.settings), columns_view(run, self.store), cost_table(run)

    def take(self, runs: list[Run], event: gr.EventData) -> tuple[Any, ...]:
        """Goes on from a text with another token in place of one that was written: fields, and a sign to run them."""
        try:
            settings = with_token(runs[0], int(event.column), int(event.index), bool(event.of_base), int(event.rank))
            read_settings({name: getattr(settings, name) for name in FIELDS}, self.store)
        except (IndexError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return *[listed(getattr(settings, name)) for name in FIELDS], time.time()

    def dump(self, runs: list[Run]) -> str:
        """The visitor's runs as JSON."""
        return _RUNS.dump_json(runs, indent=1).decode() if runs else ""

    def list_earlier(self, runs: list[Run]) -> dict[str, Any]:
        """All runs but the newest, which is on the page."""
        choices = [f"{i}. {history_label(run)}" for i, run in enumerate(runs[1:], 1)]
        return gr.Radio(choices=choices, value=None, info=SHOWN_BELOW if choices else NONE_EARLIER)

    def show_earlier(self, index: int | None, runs: list[Run]) -> tuple[Any, Any]:
        """One of the earlier runs."""
        if index is None or index + 1 >= len(runs):
            return None, None
        return self._show(runs[index + 1])[2:]

    def offer(self, names: list[str]) -> dict[str, Any]:
        """The models that can be chosen; what was chosen stays so."""
        return gr.CheckboxGroup(choices=model_choices(self.store, names))

    def open_link(self, request: gr.Request) -> tuple[Any, ...]:
        """The settings in the page's address; a link with a prompt also runs it, if nothing in it is wrong."""
        link = from_query(request.query_params, self.store)
        problems = [{"level": "warning", "text": problem} for problem in link.problems]
        if problems and link.prompt_given:
            problems.insert(0, {"level": "warning", "text": "Nothing was run, for the link has mistakes:"})
        fields = [link.settings.get(name, gr.skip()) for name in FIELDS]
        if not link.runs:
            return *fields, problems, *(gr.skip(),) * 4
        return *fields, problems, time.time(), *self._waiting(link.settings)

    def _waiting(self, given: dict[str, Any]) -> tuple[Any, ...]:
        """A run that a link asks for, before its turn: (line, columns, costs)."""
        settings = read_settings({"models": ticked(self.store), **given}, self.store)
        return self._show(Run(settings, [Column(name) for name in settings.models]))[1:]

    def open_example(self, request: gr.Request) -> tuple[Any, ...]:
        """A finished run for a page that was opened without a link to one."""
        linked = from_query(request.query_params, self.store).runs
        run = None if linked else self.example.get(seconds=30)
        if run is None:
            return (gr.skip(),) * 4
        return *self._show(run)[1:], [run]

    def generate(
        self,
        prompt: str,
        models: list[str] | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        repetition_penalty: float = 1.1,
        max_new_tokens: int = 120,
        seed: int = 0,
        scores: bool = False,
    ) -> Iterator[dict]:
        """Continue a prompt with several attention methods side by side; the same seed and settings give the same text.

        Streams the run as it grows; the last message is the whole of it.

        Args:
            prompt: the text to continue; of a longer one than a model holds, its last tokens are used.
            models: names of models, see /models; by default all of them, up to the limit of one run.
            temperature: 0 takes the most probable token.
            top_k: draw among the k most probable tokens; 0 keeps all.
            top_p: draw among the fewest tokens that hold this share of the probability.
            repetition_penalty: 1 is none.
            max_new_tokens: how many tokens to write at most.
            seed: of the random draws.
            scores: also give, for each new token, the KL to the base, the five most probable tokens of both, and how
                many tokens back it can be looked up, if it is a hit.

        Returns:
            The run: its settings, and for each model a column with its text, tokens, cost, and why it stopped.
        """
        values = {name: value for name, value in locals().items() if name in FIELDS}
        values["models"] = self.store.names()[: self.store.limits.models_per_run] if models is None else models
        try:
            settings = read_settings(values, self.store)
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from None
        for run in frames(self.generation(settings)):
            yield plain(run, scores)


def expected_seconds(settings: Settings, store: ModelStore) -> float:
    """How long a run takes at most, for a Space that refuses by what is declared: loading, prompt, tokens."""
    tokens = len(settings.models) * settings.max_new_tokens
    prompt = len(settings.models) * len(settings.prompt) / 4
    return min(10 + 3 * len(settings.models) + 0.05 * tokens + 0.002 * prompt, store.limits.seconds)


def with_token(run: Run, column: int, index: int, of_base: bool, rank: int) -> Settings:
    """Settings that go on from what a column of a run wrote before its token `index`, with another in its place.

    Raises:
        IndexError: if there is no such token.
        ValueError: if the token is part of a character, which no prompt can end with.
    """
    written = run.columns[column]
    score = written.scores[index]
    text, _ = (score.base_top if of_base else score.top)[rank]
    if "\ufffd" in text:
        raise ValueError("This token is part of a character; a text cannot go on from it.")
    before = "".join(written.tokens[written.prompt_length :][:index])
    return replace(run.settings, prompt=run.settings.prompt + before + text)


def listed(value: Any) -> Any:
    """A value as Gradio takes it."""
    return list(value) if isinstance(value, tuple) else value


def plain(run: Run, scores: bool) -> dict[str, Any]:
    """A run as plain JSON data, each column with its text."""
    data = _RUN.dump_python(run, mode="json", exclude=None if scores else {"columns": {"__all__": {"scores", "hits"}}})
    for column, view in zip(run.columns, data["columns"], strict=True):
        view["text"] = column.text
    return data
