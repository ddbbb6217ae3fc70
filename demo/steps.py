"""How a token reads, step by step, in words with the numbers of the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from attention import Mechanism

from .parts import Parts, total_variation

FORCED = ("the first", "the one before its own", "its own")  # blocks that native sparse attention always reads


class StepView(TypedDict):
    """A sentence with gaps, and what fills them for each token shown.

    Attributes:
        text: each {} is a gap.
        values: for each gap, what stands there by token.
    """

    text: str
    values: list[list[Any]]


@dataclass(frozen=True)
class Reading:
    """What the sentences are about: one head of one layer, for the W tokens shown.

    Attributes:
        positions: (W,) of the tokens among those that the model reads.
        rows: (W, T) the head's attention.
        away: (W,) how far its output is from the mean of the values, in spreads of the values.
        read, scored: keys that it reads, and that it goes through to choose them.
    """

    mechanism: Mechanism
    parts: Parts
    positions: Tensor
    rows: Tensor
    away: Tensor
    read: list[int]
    scored: list[int]

    @property
    def so_far(self) -> list[int]:
        """Tokens up to each token, itself among them."""
        return (self.positions + 1).tolist()

    def half(self) -> list[int]:
        """The fewest tokens that hold half of the weight."""
        share = self.rows.sort(dim=-1, descending=True).values.cumsum(-1)
        return ((share < share[:, -1:] / 2).sum(-1) + 1).tolist()

    def largest(self) -> list[str]:
        return percent(self.rows.max(-1).values)

    def shares(self) -> dict[str, list[str]]:
        """For each branch its part of the weight."""
        total = self.rows.sum(-1).clamp(min=1e-12)
        return {name: percent(share.sum(-1) / total) for name, share in self.parts.branches.items()}


def percent(shares: Tensor) -> list[str]:
    """Shares in words; those that are all but nothing say so."""
    return [
        "none" if share == 0 else "under 1 %" if share < 0.005 else f"{100 * share:.0f} %" for share in shares.tolist()
    ]


def reading_steps(reading: Reading) -> list[StepView]:
    """One sentence that sums up what a token reads, then the steps by which it comes to that."""
    return [*METHODS.get(reading.parts.method, _any)(reading), _output(reading)]


def _step(text: str, *values: Sequence[Any]) -> StepView:
    return {"text": text, "values": [list(column) for column in values]}


def _output(reading: Reading) -> StepView:
    away = [f"{value:.2f}" for value in reading.away.tolist()]
    return _step(
        "Its output is the sum of the values with these weights, {} of their spread away from the plain mean of all "
        "values so far.",
        away,
    )


def _softmax(reading: Reading) -> list[StepView]:
    count = reading.so_far
    return [
        _step("It reads all {} tokens up to itself; {} of them hold half of its weight.", count, reading.half()),
        _step("Its query is compared with the keys of all {} tokens: a score for each.", count),
        _step("The softmax of the scores makes weights that sum to 1; the largest is {}.", reading.largest()),
    ]


def _any(reading: Reading) -> list[StepView]:
    return [_step("It reads {} of {} keys.", reading.read, reading.so_far)]


def _listing(shares: dict[str, list[str]], names: dict[str, str]) -> tuple[str, list[list[str]]]:
    """A list of shares with gaps: "{} in its window, {} in …", and what fills the gaps."""
    parts = [f"{{}} {names.get(name, f'in {name}')}" for name in shares]
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1], list(shares.values())


def _masks(reading: Reading) -> list[StepView]:
    support = (reading.parts.told["mask"][reading.positions] > 0).sum(-1).tolist()
    names = {
        "Near places": "on near places",
        "First tokens": "on the first tokens",
        "Highest scores": "on the tokens with the highest scores",
        "What followed before": "on what followed this token before",
    }
    shares = reading.shares()
    where, values = _listing(shares, names) if shares else ("{} on one token", [reading.largest()])
    steps = [
        _step(f"It reads {{}} of {{}} tokens; of its weight {where}.", support, reading.so_far, *values),
        _step(
            "Its masks hold for {} of the {} tokens so far; each mask has a learned weight.", support, reading.so_far
        ),
    ]
    if any(reading.scored):
        steps.append(
            _step(
                "The text decides on some of these: {} tokens are gone through, for their scores or for what followed "
                "this token before.",
                reading.scored,
            )
        )
    return [
        *steps,
        _step("Its query is compared with the keys of these {}; no other score is ever computed.", support),
        _step(
            "The softmax of the scores, times the masks' weights, makes weights that sum to 1; the largest is {}.",
            reading.largest(),
        ),
    ]


def _nsa(reading: Reading) -> list[StepView]:
    config, told = reading.mechanism.config, reading.parts.told
    blocks = (reading.positions // config.select_block + 1).tolist()
    chosen = told["selected_blocks"][reading.positions].sum(-1).tolist()
    always = [min(len(FORCED), count) for count in blocks]
    summaries = [config.visible(position) for position in reading.positions.tolist()]
    near = [min(count, config.window) for count in reading.so_far]
    gates = [[f"{value:.2f}" for value in column] for column in told["gates"][reading.positions].float().T.tolist()]
    shares = reading.shares()
    names = {"compressed": "in the summaries", "selected": "in the blocks", "window": "in the window"}
    where, values = _listing(shares, names)
    return [
        _step(
            f"It read {{}} of {{}} blocks, {{}} of them always; of its weight {where}.", chosen, blocks, always, *values
        ),
        _step(
            f"The {{}} tokens so far are {{}} blocks of {config.select_block}; {{}} summaries of "
            f"{config.compress_block} tokens each are complete.",
            reading.so_far,
            blocks,
            summaries,
        ),
        _step(
            "Its query is compared with the {} summaries. Their weights choose {} blocks beside the {} that are always "
            f"read ({', '.join(FORCED)}). {config.select_every} tokens in a row share the choice of the first of them.",
            summaries,
            [count - fixed for count, fixed in zip(chosen, always, strict=True)],
            always,
        ),
        _step(
            "Three times softmax: over the summaries, over the tokens of the {} blocks, over the latest {} tokens.",
            chosen,
            near,
        ),
        _step(
            "Gates, made from the token's input, weigh the three: summaries {}, blocks {}, window {}. They need not "
            "sum to 1.",
            *gates,
        ),
    ]


def _performer(reading: Reading) -> list[StepView]:
    config = reading.mechanism.config
    window = 0 if "window" in reading.mechanism.disabled else config.window
    features, shares = config.num_features, reading.shares()
    older = [max(count - window, 0) for count in reading.so_far]
    near = [min(count, window) for count in reading.so_far]
    error = percent(total_variation(reading.rows, reading.parts.exact))
    if window:
        where, values = _listing(shares, {"window": "in the window", "linear": "in the summary"})
        first = _step(
            f"It read {{}} tokens one by one and {{}} older ones through a summary of {features} rows; of its weight "
            f"{where}.",
            near,
            older,
            *values,
        )
    else:
        first = _step(
            f"It read a summary of {features} rows that all {{}} tokens were added to; {{}} of them hold half of its "
            "weight.",
            reading.so_far,
            reading.half(),
        )
    width = reading.mechanism.layer.head_dim
    steps = [first]
    if features:
        steps += [
            _step(f"A feature map turns its query, and every key before it, into {features} positive numbers."),
            _step(
                f"{{}} tokens were added to a summary of {features} × {width + 1} numbers, which does not grow; the "
                "query's numbers weigh its rows.",
                older,
            ),
        ]
    else:
        steps.append(_step("This layer has no summary: what has left the window is gone."))
    if window:
        steps.append(_step("Its query is compared with the keys of the latest {} tokens one by one.", near))
    return [
        *steps,
        _step("Softmax over the same queries and keys would put {} of the weight elsewhere.", error),
    ]


METHODS: dict[str, Callable[[Reading], list[StepView]]] = {
    "softmax": _softmax,
    "masks": _masks,
    "nsa": _nsa,
    "performer": _performer,
}
