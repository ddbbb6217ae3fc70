"""A generation run as plain data: what was asked, what came out, how far it is from the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Literal, TypedDict

from pydantic import Field

Stage = Literal["waiting", "loading", "writing", "done", "failed"]
Ending = Literal["length", "end", "context", "time", "stopped"]


@dataclass(frozen=True)
class Settings:
    """What one press of Generate asks for; the bounds are checked by `request.read_settings`.

    Attributes:
        models: names in the model store, one column each.
        temperature: 0 takes the most probable token.
        top_k: 0 keeps every token.
        top_p: 1.0 keeps every token.
        repetition_penalty: 1.0 is none (arXiv 1909.05858, section 4.1).
    """

    prompt: str
    models: tuple[str, ...]
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0, le=1000)] = 40
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    repetition_penalty: Annotated[float, Field(ge=1, le=2)] = 1.1
    max_new_tokens: Annotated[int, Field(ge=1)] = 120
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class Cost:
    """What a column cost.

    Attributes:
        prefill_ms: time of the forward pass over the prompt, in milliseconds.
        ms_per_token: median time of the forward pass over one new token, in milliseconds; None after one token.
        tokens_per_second: new tokens after the first over the time they took, sampling included.
        state_bytes: bytes of the decode state after the last token, all layers.
        peak_bytes: bytes of the weights, and of whichever is more: the state after the last token, or all that was
            alive at once in the forward pass over the prompt.
        keys_read: keys that the last token read in a layer, mean over layers.
        keys_scored: keys, summaries or tokens' ids that it went through to choose those, likewise.
    """

    prefill_ms: float
    ms_per_token: float | None
    tokens_per_second: float | None
    state_bytes: int
    peak_bytes: int
    keys_read: int
    keys_scored: int


@dataclass(frozen=True)
class TokenScore:
    """How a model and its base saw one generated token, given the same text before it.

    Attributes:
        kl: KL(base ‖ model) of the next-token distributions at this point, in nats.
        probability, rank: the model's for this token, before any sampling option; rank 1 is the most probable.
        base_probability, base_rank: the base's.
        top, base_top: the five most probable tokens of each, with their probabilities.
    """

    kl: float
    probability: float
    rank: int
    base_probability: float
    base_rank: int
    top: tuple[tuple[str, float], ...]
    base_top: tuple[tuple[str, float], ...]


@dataclass
class Column:
    """What one model wrote.

    Attributes:
        name: the model's name in the store.
        method: the model's method.
        token_ids: prompt and generated tokens.
        tokens: the text of each; a character of several tokens belongs to the last of them.
        prompt_length: how many of them are the prompt.
        dropped: how many tokens of the prompt came before those and were left out, for want of room.
        stopped: why it ended: the length asked for, the model's end token, the end of the context, the time limit,
            or Stop.
        problem: why it failed, in words for the visitor.
        scores: one for each generated token, once they are computed.
        hits: for each generated token how many tokens back it can be looked up, 0 for one that is no hit; empty where
            that is not known, see `hits.distances`.
        parts_at: index in `tokens` of the first that differs from the reference column's; None if none does.
    """

    name: str
    method: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    prompt_length: int = 0
    dropped: int = 0
    stage: Stage = "waiting"
    stopped: Ending | None = None
    problem: str | None = None
    cost: Cost | None = None
    scores: list[TokenScore] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    parts_at: int | None = None

    @property
    def generated(self) -> int:
        """How many tokens the model wrote."""
        return len(self.token_ids) - self.prompt_length

    @property
    def prompt(self) -> str:
        """What the model read of the prompt."""
        return "".join(self.tokens[: self.prompt_length])

    @property
    def text(self) -> str:
        """What the model wrote, without the prompt."""
        return "".join(self.tokens[self.prompt_length :])


@dataclass
class Run:
    """One press of Generate.

    Attributes:
        reference: name of the column that the others are compared with for `parts_at`: the base, or else the first.
        measured: where and when its costs were measured; empty: here and now.
    """

    settings: Settings
    columns: list[Column]
    reference: str | None = None
    measured: str = ""

    @property
    def generated(self) -> int:
        """How many tokens all models wrote."""
        return sum(column.generated for column in self.columns)


def newest(runs: Sequence[Run], count: int, tokens: int) -> list[Run]:
    """The first of `runs`, at most `count`, that together have at most `tokens` written tokens; at least one."""
    totals = accumulate(run.generated for run in runs)
    return [run for i, (run, total) in enumerate(zip(runs, totals, strict=True)) if i == 0 or total <= tokens][:count]


class TokenView(TypedDict, total=False):
    """One token as a component shows it; plain JSON. Only `text` is required."""

    text: str
    score: float | None  # what the colour shows, in [0, 1]; None: no colour
    parts: bool  # the first token that differs from the reference's text
    hit: bool  # it has to be looked up in the text before it
    details: list[list[str]]  # [label, value] rows of the card under the pointer
    top: list[list]  # [token, probability] of this model, most probable first
    base_top: list[list]  # the same of the base


class ColumnView(TypedDict, total=False):
    """One column of tokens as a component shows it; plain JSON.

    Texts that grow are long, and a page that is sent all of one for every token does nothing else: the tokens are one
    string that grows at its end, so that Gradio sends what was added to it and the page reads no more than that.
    """

    title: str
    note: str  # one line under the title
    status: str  # e.g. "42 tokens", "waiting", or why it failed
    busy: bool  # more is to come
    prompt: str  # the text before the tokens, never coloured
    prompt_tokens: int  # how many tokens it is
    lines: str  # a TokenView as JSON and a newline for each token
