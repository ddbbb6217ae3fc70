"""What readers say in the blind test, and what follows from it: `python -m demo.votes FILES` merges and reports.

A vote is about two texts that two models wrote from the same prompt with the same seed, whose names were hidden. Where
one of the two was the base, the reader also said which.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, quantiles
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

WORDS_PER_SECOND = 8.0  # twice as fast as people read
CONFIDENCE = 0.95
RESAMPLES = 500
PRIOR = 0.5  # of a win and of a loss against the reference, so that who always won is not infinitely better

Choice = Literal["first", "second"]


@dataclass(frozen=True)
class Text:
    """One of the two texts of a vote.

    Attributes:
        model: the name of the model that wrote it.
        method: the model's method; "softmax" is the base.
        kl: KL(base ‖ model) over its tokens, in nats per token, mean.
        perplexity: the base's, of the text.
        hits: how many of its tokens had to be looked up, see `demo.hits`; None where that is not known.
        hits_kl: the mean KL over these; None where there are none.
    """

    model: Annotated[str, Field(max_length=300)]
    method: Annotated[str, Field(max_length=100)]
    kl: float | None = None
    perplexity: float | None = None
    hits: int | None = None
    hits_kl: float | None = None


@dataclass(frozen=True)
class Vote:
    """What one reader said of one pair of texts.

    Attributes:
        id: random; the same vote in two files counts once.
        time: when, in UTC (ISO 8601).
        prompt, seed, tokens: what the texts were written from, and how long they could be.
        first, second: the texts in the order in which they were shown.
        base: which of them the reader took for the base; None where that was not asked.
        better: which read better to them.
        seconds: how long they had the texts before them.
    """

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    time: Annotated[str, Field(max_length=40)]
    prompt: Annotated[str, Field(max_length=200_000)]
    seed: int
    tokens: int
    first: Text
    second: Text
    base: Choice | None
    better: Literal["first", "second", "tie"]
    seconds: float

    @property
    def variant(self) -> Text | None:
        """The text that is not the base's, where the other one is."""
        plain = [text.method == "softmax" for text in (self.first, self.second)]
        return None if plain[0] == plain[1] else (self.second if plain[0] else self.first)

    @property
    def found(self) -> bool | None:
        """Whether the reader found the base; None where that was not asked."""
        if self.base is None or self.variant is None:
            return None
        return (self.first if self.base == "first" else self.second).method == "softmax"


_VOTE = TypeAdapter(Vote)


def reading_seconds(texts: Iterable[str]) -> float:
    """The least time in which texts can have been read."""
    return sum(len(text.split()) for text in texts) / WORDS_PER_SECOND


def dump(votes: Iterable[Vote]) -> str:
    """Votes as JSON lines."""
    return "".join(_VOTE.dump_json(vote).decode() + "\n" for vote in votes)


def read(text: str, source: str = "votes") -> tuple[list[Vote], list[str]]:
    """Votes out of JSON lines, and what is wrong with the lines that are none."""
    votes, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            votes.append(_VOTE.validate_json(line))
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(map(str, detail["loc"]))
            problems.append(f"{source}, line {number}: {where + ': ' if where else ''}{detail['msg']}")
    return votes, problems


def merged(votes: Iterable[Vote]) -> list[Vote]:
    """Each vote once, in the order of their times."""
    return sorted({vote.id: vote for vote in votes}.values(), key=lambda vote: vote.time)


def wilson(successes: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927, Journal of the American Statistical Association 22, 209).

    Raises:
        ValueError: if there was no trial.
    """
    if total <= 0:
        raise ValueError("an interval needs at least one trial")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - half if successes else 0.0), (centre + half if successes < total else 1.0)


def bradley_terry(games: Sequence[tuple[str, str, float]], reference: str, steps: int = 200) -> dict[str, float]:
    """The chance that each is preferred to `reference`, in the model of Bradley and Terry.

    Fitted by minorization and maximization (Hunter 2004, Annals of Statistics 32, 384); a tie is half a win for either,
    and each has `PRIOR` wins and losses against the reference beforehand.

    Args:
        games: who met whom, and the share of the first in the win: 1, 0, or ½ for a tie.
    """
    names = sorted({name for first, second, _ in games for name in (first, second)} | {reference})
    prior = [(name, reference, 0.5) for name in names if name != reference]
    weighted = [(*game, 1.0) for game in games] + [(*game, 2 * PRIOR) for game in prior]
    wins = dict.fromkeys(names, 0.0)
    for first, second, share, weight in weighted:
        wins[first] += weight * share
        wins[second] += weight * (1 - share)
    strength = dict.fromkeys(names, 1.0)
    for _ in range(steps):
        met = dict.fromkeys(names, 0.0)
        for first, second, _, weight in weighted:
            each = weight / (strength[first] + strength[second])
            met[first] += each
            met[second] += each
        strength = {name: wins[name] / met[name] if met[name] else 1.0 for name in names}
        scale = strength[reference] or 1.0
        strength = {name: value / scale for name, value in strength.items()}
    return {name: value / (1 + value) for name, value in strength.items() if name != reference}


@dataclass(frozen=True)
class Standing:
    """What all votes say of one variant.

    Attributes:
        asked, found: how often a reader was asked which text is the base's beside one of this variant, and knew.
        found_interval: of the share; 0.5 is chance, and what is below all of it reads like the base.
        votes: how often a text of it was compared.
        preferred: the chance that it is preferred to the base.
        preferred_interval: of that, by resampling the votes; None where there are too few.
    """

    model: str
    asked: int
    found: int
    found_interval: tuple[float, float] | None
    votes: int
    preferred: float
    preferred_interval: tuple[float, float] | None


def standings(votes: Sequence[Vote], resamples: int = RESAMPLES, seed: int = 0) -> list[Standing]:
    """What votes say of each variant, by name."""
    games = [_game(vote) for vote in votes]
    if not games:
        return []
    reference = next((t.model for v in votes for t in (v.first, v.second) if t.method == "softmax"), games[0][0])
    preferred = bradley_terry(games, reference)
    draw = random.Random(seed)
    samples = [bradley_terry(draw.choices(games, k=len(games)), reference, 50) for _ in range(resamples)]
    return [_standing(name, votes, preferred[name], samples) for name in sorted(preferred)]


def _game(vote: Vote) -> tuple[str, str, float]:
    return vote.first.model, vote.second.model, {"first": 1.0, "second": 0.0, "tie": 0.5}[vote.better]


def _standing(name: str, votes: Sequence[Vote], preferred: float, samples: list[dict[str, float]]) -> Standing:
    own = [vote for vote in votes if name in (vote.first.model, vote.second.model)]
    asked = [vote.found for vote in own if vote.found is not None and vote.variant and vote.variant.model == name]
    drawn = [sample.get(name, 0.5) for sample in samples]
    cuts = quantiles(drawn, n=40) if len(own) > 1 and len(drawn) > 1 else None  # in steps of 2.5 %
    return Standing(
        name,
        len(asked),
        sum(asked),
        wilson(sum(asked), len(asked)) if asked else None,
        len(own),
        preferred,
        (cuts[0], cuts[-1]) if cuts else None,
    )


def verdict(standing: Standing) -> str:
    """Whether readers can tell a variant from the base, in words."""
    if standing.found_interval is None:
        return "not asked"
    low, high = standing.found_interval
    if low > 0.5:
        return "told from the base"
    return "taken for the base" if high < 0.5 else "not told from chance so far"


HEADERS = ["Model", "Base found", "95 % interval", "Chance is 50 %", "Preferred to the base", "95 % interval", "Votes"]


def table(votes: Sequence[Vote]) -> dict[str, Any]:
    """The standings as `TextTable` shows them."""
    rows = [_row(standing) for standing in standings(votes)]
    return {"headers": HEADERS if rows else [], "rows": rows}


def _row(standing: Standing) -> list[str]:
    asked = f"{standing.found} of {standing.asked}" if standing.asked else "–"
    return [
        standing.model,
        asked,
        _interval(standing.found_interval),
        verdict(standing),
        f"{standing.preferred:.0%}",
        _interval(standing.preferred_interval),
        str(standing.votes),
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"


def report(votes: Sequence[Vote]) -> str:
    """The standings as text."""
    rows = [HEADERS, *table(votes)["rows"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    found = [vote.found for vote in votes if vote.found is not None]
    lines += [
        "",
        f"{len(votes)} votes; the base was found in {sum(found)} of {len(found)} pairs in which it was asked for.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Merges files of votes and reports; the exit status is 2 if a file or a line of one could not be read."""
    parser = argparse.ArgumentParser(description="Merges votes of the blind test and reports what they say.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines, as the app gives them")
    parser.add_argument("--output", type=Path, help="where to write all votes, each once")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    options = parser.parse_args(arguments)
    votes, problems = [], []
    for file in options.files:
        try:
            some, wrong = read(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            some, wrong = [], [f"{file}: {error}"]
        votes += some
        problems += wrong
    votes = merged(votes)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    if options.output:
        options.output.write_text(dump(votes), encoding="utf-8")
    if options.json:
        print(json.dumps([{**vars(standing), "verdict": verdict(standing)} for standing in standings(votes)], indent=1))
    else:
        print(report(votes))
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
