"""The tab that shows how the models see a text that is given."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import gradio as gr

from ..address import unknown_models
from ..components import Curves, TokenColumns
from ..components.address import AddressView
from ..components.notices import Notices, notice, warning, warnings
from ..components.table import TextTable
from ..context import VIEW, App, Session
from ..example import STORY, ticked
from ..models import ModelStore
from ..runs import ColumnView, TokenView
from ..score import ScoreError, TextScores, check, score_text
from ..views import KL_TICKS, colour, lines, looked_up, visible_text
from .generate import model_choices

FILE_BYTES = 100_000
SHOWN_PLACES = 20
PART = 1000  # tokens on the page at once
LONGEST_IN_ADDRESS = 4000  # characters, as they are written there
NOTHING = {"headers": [], "rows": []}
LEGEND = "Colour: KL of the chosen model to the base, in nats; each mark is ten times the one before"

SAVE_FILE = """(text, name) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text]));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}"""


def build_score_tab(app: App, session: Session) -> gr.Tab:
    """A text, the models' means on it and by position, where they part most, and the text coloured by distance."""
    handlers = Handlers(app.store)
    with gr.Tab("Score", id="score", elem_id="score-tab") as tab:
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                text = gr.Textbox(
                    STORY.read_text(encoding="utf-8"),
                    label="Passage",
                    info="Any text: every token of it is predicted by each model from what comes before it.",
                    lines=5,
                    max_lines=8,
                    max_length=app.limits.prompt_characters,
                    elem_id="score-text",
                )
                upload = gr.UploadButton(
                    "Choose a text file, up to 100 kB", file_types=["text"], size="sm", elem_id="score-file"
                )
            with gr.Column(scale=3, min_width=320):
                models = gr.CheckboxGroup(
                    model_choices(app.store, app.store.names()),
                    value=ticked(app.store),
                    label="Attention methods",
                    info="Of one base; what a token reads of the text before it:",
                    elem_id="score-models",
                    elem_classes="choices",
                )
        with gr.Row(elem_classes="actions"):
            start = gr.Button("Score", variant="primary", scale=3, elem_id="score-start")
            save_csv = gr.Button("Download CSV", scale=1, interactive=False, elem_id="score-csv")
            save_json = gr.Button("Download JSON", scale=1, interactive=False, elem_id="score-json")
        said = Notices(elem_id="score-said")
        means = TextTable(NOTHING, elem_id="score-means")
        gr.Markdown("### Along the text")
        positions = Curves([], empty="How the distance changes along the text appears here.", elem_id="score-positions")
        with gr.Row():
            chosen = gr.Radio([], label="Coloured by", visible=False, elem_id="score-chosen")
            part = gr.Slider(0, PART, 0, step=PART, label="From token", visible=False, buttons=[], elem_id="score-part")
        columns = TokenColumns(elem_id="score-columns", legend=LEGEND, ticks=KL_TICKS, mark="")
        places = TextTable(NOTHING, elem_id="score-places")
        current = gr.State()
        # No State: Gradio takes the first event that leaves a State of an unopened tab as it is for a change of it.
        linked = gr.Number(visible=False)
        file, name = gr.Textbox(visible=False), gr.Textbox(visible=False)
        gr.api(handlers.score, api_name="score", **app.lane(VIEW))
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [said, means, positions, places, columns, chosen, part, current, session.address, save_csv, save_json]
    gr.on(
        [start.click, text.submit, linked.change],
        handlers.stream,
        [text, models],
        outputs,
        trigger_mode="once",
        **quiet,
        **app.lane(VIEW),
    )
    upload.upload(handlers.read_file, upload, text, **quiet)
    gr.on([chosen.input, part.release], handlers.show_text, [current, chosen, part], columns, **quiet)
    for button, make in ((save_csv, handlers.csv), (save_json, handlers.json)):
        button.click(make, current, [file, name], **quiet).then(None, [file, name], js=SAVE_FILE, **quiet)
    session.names.change(handlers.offer, session.names, models, queue=False, **quiet)
    session.blocks.load(handlers.open_link, None, [text, models, linked, said], **quiet)
    return tab


class Handlers:
    """What happens on the score tab."""

    def __init__(self, store: ModelStore):
        self.store = store

    def read_file(self, file: str) -> str:
        """The text of a file that was chosen."""
        path = Path(file)
        if path.stat().st_size > FILE_BYTES:
            size = path.stat().st_size
            raise gr.Error(f"The file has {size / 1e3:,.0f} kB; at most {FILE_BYTES / 1e3:.0f} are read.")
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise gr.Error("The file is no text in UTF-8.", print_exception=False) from None

    def stream(self, text: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yields all that the tab shows while the text is read."""
        try:
            text, names = check(text, names, self.store)
            address = in_address(text, names)
            for scores in score_text(self.store, names, text):
                yield *self._show(scores, done=False), address, *[gr.skip()] * 2
        except ScoreError as error:
            yield warning(error), *[gr.skip()] * 10
            return
        # The page shows only the last of values that come at once, so the address is among all of them.
        yield *self._show(scores, done=True), address, gr.Button(interactive=True), gr.Button(interactive=True)

    def _show(self, scores: TextScores, done: bool) -> tuple[Any, ...]:
        if not done:
            return progress(scores), means_table(scores), *[gr.skip()] * 5, None
        first = next((name for name in scores.seen if name != scores.base), next(iter(scores.seen), None))
        return (
            progress(scores, done),
            means_table(scores),
            position_curves(scores),
            places_table(scores),
            text_view(scores, first, 0),
            gr.Radio(choices=list(scores.seen), value=first, visible=True),
            gr.Slider(maximum=max(scores.scored - 1, 1), value=0, visible=scores.scored > PART),
            scores,
        )

    def show_text(self, scores: TextScores | None, chosen: str | None, part: float) -> Any:
        """The text from a token on, coloured by one model's distance."""
        return gr.skip() if scores is None else text_view(scores, chosen, int(part))

    def csv(self, scores: TextScores | None) -> tuple[str, str]:
        """All tokens as a table."""
        return (scores.csv() if scores else ""), "scores.csv"

    def json(self, scores: TextScores | None) -> tuple[str, str]:
        """Everything as JSON."""
        data = {**scores.summary(), "rows": scores.rows()} if scores else None
        return (json.dumps(data, ensure_ascii=False) if data else ""), "scores.json"

    def offer(self, names: list[str]) -> dict[str, Any]:
        """The models that can be chosen; what was chosen stays so."""
        return gr.CheckboxGroup(choices=model_choices(self.store, names))

    def open_link(self, request: gr.Request) -> tuple[Any, ...]:
        """The text and the models in the page's address, which are scored if they are here."""
        text, names = request.query_params.get("score_text"), request.query_params.getlist("score_models")
        if text is None:
            return (gr.skip(),) * 4
        problems = unknown_models(names, self.store.names())
        known = [name for name in self.store.names() if name in names]
        return text, known or gr.skip(), gr.skip() if problems else time.time(), warnings(problems)

    def score(self, text: str, models: list[str] | None = None, tokens: bool = False) -> dict[str, Any]:
        """How several attention methods see a text: the distance of each from the base, and where they part most.

        Args:
            text: the text, at most 100,000 characters; every token of it is predicted from what comes before it.
            models: names of models of one base, see /models; by default all of them, up to the limit of one run.
            tokens: also give every token with each model's KL, probability and rank.

        Returns:
            `means`, for each model its KL to the base in nats per token, its perplexity, and how often its most
            probable token is the base's; `means_of_hits`, the same over tokens that end a rare pair which the text has
            had before and so can be looked up; the same `by_position`; `places` where the models part most, the
            farthest first; `problems` of models that failed; `ended`, why it ended before the text did; and with
            `tokens` the `rows`.
        """
        names = self.store.names()[: self.store.limits.models_per_run] if models is None else models
        try:
            *_, scores = score_text(self.store, *reversed(check(text, names, self.store)))
        except ScoreError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {**scores.summary(), **({"rows": scores.rows()} if tokens else {})}


def in_address(text: str, names: list[str]) -> AddressView:
    """A short text and its models as the page's address holds them; a long one is not kept there."""
    short = is_short(text)
    return {"parameters": {"score_text": [text] if short else [], "score_models": names if short else []}, "push": True}


def is_short(text: str) -> bool:
    """Whether the page's address has room for a text."""
    return len(quote_plus(text)) <= LONGEST_IN_ADDRESS


def progress(scores: TextScores, done: bool = False) -> list[dict[str, str]]:
    """How far it is, and what went wrong."""
    total = len(scores.token_ids) - 1
    said = f"Scored {scores.scored:,} of {total:,} tokens" + (f": {scores.ended}." if scores.ended else "." * done)
    if done and not is_short("".join(scores.tokens)):
        said += " The text is too long for the page's address: CSV and JSON keep what was found, a reload does not."
    return notice(said) + warnings(scores.problems.values())


def means_table(scores: TextScores) -> dict[str, Any]:
    """Each model's means over the text and over its hits, as `TextTable` shows them."""
    rows = []
    of_hits = {mean["name"]: mean for mean in scores.means_of_hits()}
    for mean in scores.means():
        if mean["kl"] is None:
            continue
        kl = "–" if mean["name"] == scores.base else f"{mean['kl']:.4f}"
        row = [mean["name"], kl, f"{mean['perplexity']:.2f}", f"{mean['same_top']:.1%}", f"{mean['tokens']:,}"]
        if hit := of_hits.get(mean["name"]):
            row += ["–" if kl == "–" else f"{hit['kl']:.4f}", f"{hit['perplexity']:.2f}", f"{hit['tokens']:,}"]
        rows.append(row)
    headers = ["Model", "KL to the base, nats/token", "Perplexity", "Same most probable token", "Tokens"]
    headers += ["KL on hits", "Perplexity on hits", "Hits"] if of_hits else []
    return {"headers": headers if rows else [], "rows": rows}


def position_curves(scores: TextScores) -> list[dict[str, Any]]:
    """Each model's KL along the text, as `Curves` shows it."""
    ranges = scores.by_position()
    series = []
    for color, name in enumerate((name for name in scores.seen if name != scores.base), 1):
        means = [next(mean for mean in each["models"] if mean["name"] == name) for each in ranges]
        points = [[(each["start"] * each["end"]) ** 0.5, mean["kl"]] for each, mean in zip(ranges, means, strict=True)]
        series.append({"name": name, "color": min(color, 6), "dots": True, "points": points})
    if not series:
        return []
    return [
        {
            "title": "KL to the base along the text",
            "note": "Means over tokens 1 to 63, 64 to 127, 128 to 255, and so on.",
            "x": {"label": "position in the text", "log": True},
            "y": {"label": "KL, nats/token", "min": 0},
            "series": series,
        }
    ]


def places_table(scores: TextScores) -> dict[str, Any]:
    """The places where the models part most, as `TextTable` shows them."""
    rows = [
        [
            f"{place['position']:,}",
            visible_text(place["token"]),
            f"{place['parting']:.3f}",
            *(f"{each['probability']:.1%}" for each in place["models"].values()),
            "…" + place["before"].replace("\n", " "),
        ]
        for place in scores.places(SHOWN_PLACES)
    ]
    headers = ["Token no.", "Token", "Parting, nats", *(f"{name}: probability" for name in scores.seen), "After"]
    return {"headers": headers if rows else [], "rows": rows}


def text_view(scores: TextScores, chosen: str | None, start: int) -> list[ColumnView]:
    """A part of the text as `TokenColumns` shows it, with every model's numbers on each token's card."""
    if chosen not in scores.seen:
        return []
    start = min(max(start, 0), max(scores.scored - 1, 0))
    end = min(start + PART, scores.scored)
    return [
        {
            "title": chosen,
            "note": f"Tokens {start + 1:,} to {end:,} of {len(scores.tokens):,}",
            "prompt": "".join(scores.tokens[: start + 1]),
            "prompt_tokens": start + 1,
            "lines": lines(_token_view(scores, chosen, index) for index in range(start, end)),
        }
    ]


def _token_view(scores: TextScores, chosen: str, index: int) -> TokenView:
    details = [["Parting", f"{float(scores.parting[index]):.3f} nats"]]
    for name, seen in scores.seen.items():
        kl = "" if name == scores.base else f"KL {float(seen.kl[index]):.3f} · "
        details.append([name, f"{kl}{float(seen.probability[index]):.1%} · rank {int(seen.rank[index]):,}"])
    view: TokenView = {"text": scores.tokens[index + 1], "details": details}
    view["score"] = round(colour(float(scores.seen[chosen].kl[index])), 4)
    if scores.hits and scores.hits[index + 1]:
        view["hit"] = True
        details.append(looked_up(scores.hits[index + 1]))
    return view
