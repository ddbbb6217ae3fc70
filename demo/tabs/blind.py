"""The blind test: two texts without names, which one is the base's, and which reads better."""

from __future__ import annotations

import math
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import gradio as gr

from ..components.notices import Notices, notice, warning
from ..components.table import TextTable
from ..components.tokens import TokenColumns
from ..context import GENERATE, App, Session
from ..engine import Generation, frames
from ..models import ModelStore
from ..request import FIELDS, RequestError, read_settings
from ..runs import Column, ColumnView, Run, Settings
from ..views import KL_LEGEND, KL_TICKS, columns_view, lines
from ..votes import Text, Vote, dump, merged, read, reading_seconds, table

LEAST_SECONDS = 5.0
KEPT_CHARACTERS = 3_000_000  # of votes in the visitor's browser, which holds about five million
FIRST, SECOND, EQUAL = "A", "B", "They are equal"
CHOICES = {FIRST: "first", SECOND: "second", EQUAL: "tie"}

SAVE_FILE = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  link.download = "votes.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass(frozen=True)
class Round:
    """Two texts that a visitor has before them; it never leaves the server.

    Attributes:
        run: the run that wrote them, its columns in the order in which they are shown.
        since: when they were shown, by the monotonic clock.
    """

    run: Run
    since: float = field(default_factory=time.monotonic)

    @property
    def texts(self) -> list[str]:
        return [column.text for column in self.run.columns]

    @property
    def asks_for_base(self) -> bool:
        """Whether one of the two is the base's."""
        return sum(column.method == "softmax" for column in self.run.columns) == 1

    @property
    def least_seconds(self) -> float:
        """The time after which an answer counts."""
        return max(LEAST_SECONDS, reading_seconds(self.texts))


def build_blind_test(
    app: App, session: Session, fields: Sequence[gr.components.Component], generation: Callable[[Settings], Generation]
) -> None:
    """Draws two of the chosen models, shows what they write without their names, asks, and keeps count.

    Args:
        fields: what sets a run, in the order of `FIELDS`.
        generation: starts a run.
    """
    handlers = Handlers(app.store, generation)
    # Gradio encrypts what it keeps in the browser with a key that a restart would change; votes are no secret. It reads
    # them as this becomes part of the page, which in a closed accordion is later than the page's load.
    votes = gr.BrowserState("", storage_key="attention-votes", secret="votes")
    with gr.Accordion("Blind test: can you tell which text is the base's?", open=False, elem_id="blind"):
        gr.Markdown(
            "Two of the models chosen above, drawn by lot, continue the prompt with the same seed. Their names come "
            "after your answer. Nearness in numbers need not be what a reader notices: this finds out."
        )
        start = gr.Button("Write two texts", variant="primary", elem_id="blind-start")
        said = Notices(elem_id="blind-said")
        texts = TokenColumns(elem_id="blind-texts", legend=KL_LEGEND, ticks=KL_TICKS)
        with gr.Row(visible=False, elem_id="blind-questions") as questions:
            base = gr.Radio([FIRST, SECOND], label="Which is the base's?", elem_id="blind-base")
            better = gr.Radio([FIRST, EQUAL, SECOND], label="Which reads better?", elem_id="blind-better")
            answer = gr.Button("Answer", variant="primary", elem_id="blind-answer")
        tally = TextTable(elem_id="blind-tally")
        with gr.Row(elem_classes="actions"):
            save = gr.Button("Download votes", elem_id="blind-save")
            forget = gr.Button("Forget my votes", elem_id="blind-forget")
        current, file = gr.State(), gr.Textbox(visible=False)
        reading = gr.Timer(LEAST_SECONDS, active=False)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    asked = [texts, questions, base, better, answer, current, reading, start]
    writing = start.click(handlers.start, fields, [said, *asked], trigger_mode="once", **quiet, **app.lane(GENERATE))
    writing.failure(lambda: gr.Button(interactive=True), None, start, **quiet)
    reading.tick(handlers.let_answer, None, [answer, reading, said], **quiet)
    answer.click(
        handlers.answer, [current, base, better, votes], [said, texts, questions, current, votes, tally], **quiet
    )
    save.click(lambda text: text or "", votes, file, **quiet).then(None, file, js=SAVE_FILE, **quiet)
    forget.click(lambda: ("", table([])), None, [votes, tally], **quiet)
    gr.on([session.blocks.load, votes.change], handlers.tally, votes, tally, **quiet)  # it may be read after loading


class Handlers:
    """What happens in the blind test."""

    def __init__(self, store: ModelStore, generation: Callable[[Settings], Generation]):
        self.store = store
        self.generation = generation
        self.draw = random.SystemRandom()

    def start(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields (said, what is asked ...) while two texts are written, of which only the end is shown."""
        try:
            settings = read_settings(dict(zip(FIELDS, values, strict=True)), self.store)
            pair = draw_pair(settings.models, self.store, self.draw)
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from None
        settings = replace(settings, models=pair, seed=self.draw.randrange(2**32))
        generation = self.generation(settings)
        # In each frame, for the page may show only the last of those that come at once.
        off = [gr.Timer(active=False), gr.Button(interactive=False)]
        nothing = [[], gr.Row(visible=False), gr.Radio(value=None), gr.Radio(value=None), gr.Button(), None, *off]
        yield notice("Waiting for the models."), *nothing
        for run in frames(generation):
            total = len(pair) * settings.max_new_tokens
            yield notice(f"Writing: {run.generated} of {total} tokens."), *nothing
        yield self._ask(Round(generation.run))

    def _ask(self, shown: Round) -> tuple[Any, ...]:
        again = [gr.skip()] * 6 + [gr.Timer(active=False), gr.Button(interactive=True)]
        if any(column.stage == "failed" or not column.generated for column in shown.run.columns):
            return notice("One of the two could not write: draw again."), *again
        if len(set(shown.texts)) == 1:
            return notice("Both wrote the same text: there is nothing to tell apart. Draw again."), *again
        seconds = math.ceil(shown.least_seconds)
        return (
            notice(f"Read both. An answer counts after {seconds} s."),
            nameless(shown.run),
            gr.Row(visible=True),
            gr.Radio(value=None, visible=shown.asks_for_base),
            gr.Radio(value=None),
            gr.Button(interactive=False),
            shown,
            gr.Timer(seconds, active=True),
            gr.Button(interactive=True),
        )

    def let_answer(self) -> tuple[Any, Any, Any]:
        """The time to read is over."""
        return gr.Button(interactive=True), gr.Timer(active=False), notice("Read both, then answer.")

    def answer(self, shown: Round | None, base: str | None, better: str | None, votes: str) -> tuple[Any, ...]:
        """Counts a vote and tells the names, or says why it does not count."""
        problem = self._problem(shown, base, better)
        if problem:
            return warning(problem), *[gr.skip()] * 5
        vote = vote_of(shown, base, better)
        kept = keep([*read(votes)[0], vote])
        return (
            notice(revealed(vote)),
            named(shown.run, self.store),
            gr.Row(visible=False),
            None,
            kept,
            table(read(kept)[0]),
        )

    @staticmethod
    def _problem(shown: Round | None, base: str | None, better: str | None) -> str | None:
        if shown is None:
            return "There is nothing to answer: have two texts written first."
        had = time.monotonic() - shown.since
        if had < shown.least_seconds:
            return f"You have had the texts for {had:.0f} s; nobody reads them in less than {shown.least_seconds:.0f}."
        if better not in CHOICES:
            return "Say which one reads better, or that they are equal."
        if shown.asks_for_base and base not in (FIRST, SECOND):
            return "Say which one is the base's; a guess will do."
        return None

    def tally(self, votes: str) -> dict[str, Any]:
        """What this visitor's votes say so far."""
        return table(read(votes or "")[0])


def draw_pair(names: Sequence[str], store: ModelStore, draw: random.Random) -> tuple[str, str]:
    """Two of the chosen models in an order by lot: a plain one and a variant where there are both, else two variants.

    Raises:
        RequestError: if there are no two.
    """
    plain = [name for name in names if store.entry(name).is_base]
    variants = [name for name in names if not store.entry(name).is_base]
    if plain and variants:
        pair = [draw.choice(plain), draw.choice(variants)]
    elif len(variants) > 1:
        pair = draw.sample(variants, 2)
    else:
        raise RequestError(["A blind test needs two models: tick the base and a variant, or several variants."])
    draw.shuffle(pair)
    return pair[0], pair[1]


def nameless(run: Run) -> list[ColumnView]:
    """Two texts, and nothing by which one could tell who wrote them."""
    return [
        {
            "title": title,
            "status": f"{column.generated} tokens",
            "prompt": column.prompt,
            "prompt_tokens": column.prompt_length,
            "lines": lines({"text": text} for text in column.tokens[column.prompt_length :]),
        }
        for title, column in zip((FIRST, SECOND), run.columns, strict=True)
    ]


def named(run: Run, store: ModelStore) -> list[ColumnView]:
    """The same texts with their names, coloured."""
    views = columns_view(run, store)
    return [{**view, "title": f"{title}: {view['title']}"} for title, view in zip((FIRST, SECOND), views, strict=True)]


def vote_of(shown: Round, base: str | None, better: str) -> Vote:
    """An answer as it is kept."""
    settings, (first, second) = shown.run.settings, shown.run.columns
    return Vote(
        id=uuid.uuid4().hex,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        prompt=settings.prompt,
        seed=settings.seed,
        tokens=settings.max_new_tokens,
        first=_text(first),
        second=_text(second),
        base=CHOICES[base] if shown.asks_for_base else None,
        better=CHOICES[better],
        seconds=round(time.monotonic() - shown.since, 1),
    )


def _text(column: Column) -> Text:
    scores = column.scores
    if not scores:
        return Text(column.name, column.method)
    surprise = -math.fsum(math.log(max(score.base_probability, 1e-30)) for score in scores) / len(scores)
    looked_up = [score.kl for score, back in zip(scores, column.hits, strict=False) if back]
    return Text(
        column.name,
        column.method,
        kl=_mean([score.kl for score in scores]),
        perplexity=round(math.exp(surprise), 3),
        hits=len(looked_up) if column.hits else None,
        hits_kl=_mean(looked_up) if looked_up else None,
    )


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 5)


def revealed(vote: Vote) -> str:
    """What the texts were, in words."""
    known = {True: "You found the base. ", False: "You took the other one for the base. ", None: ""}[vote.found]
    texts = [_described(title, text) for title, text in ((FIRST, vote.first), (SECOND, vote.second))]
    return known + " ".join(texts)


def _described(title: str, text: Text) -> str:
    is_base = text.method == "softmax"
    hits_kl = "" if text.hits_kl is None or is_base else f", KL {text.hits_kl:.3f} there"
    numbers = [
        f"KL to the base {text.kl:.3f} nats/token" if text.kl is not None and not is_base else "",
        f"perplexity to the base {text.perplexity:.1f}" if text.perplexity is not None else "",
        f"{text.hits} hit{'s' * (text.hits != 1)} to be looked up{hits_kl}" if text.hits is not None else "",
    ]
    said = ", ".join(filter(None, numbers))
    return f"{title} is by {text.model}{f' ({said})' if said else ''}."


def keep(votes: Sequence[Vote]) -> str:
    """Votes as the visitor's browser keeps them: JSON lines, the oldest dropped where there are too many."""
    kept, size = [], 0
    for vote in reversed(merged(votes)):
        size += len(dump([vote]))
        if kept and size > KEPT_CHARACTERS:
            break
        kept.append(vote)
    return dump(reversed(kept))
