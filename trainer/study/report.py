"""The study's page: its words, and the conclusions, each chosen by figures of the page's own table."""

from __future__ import annotations

import shlex
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import hypot
from pathlib import Path
from typing import Any, Literal

from ..card import with_error
from .figures import draw_curves, draw_masks, draw_pruning, draw_weights
from .results import Figure, Group, Result, Row, grouped

SAME = {"kl": 0.05, "perplexity": 0.005}  # a difference of less than this share of the larger figure is called none
COHERENT = 0.10  # texts are called as coherent as the base's if their perplexity under it differs by less than this
CHEAP = 0.10  # dropping masks is called free if it raises the KL by less than this share
FOLDER = "study"

# The words of the page. What is in braces is filled in from the results.

PAGE = """\
# The study, done again

A study swapped the attention of GPT-2 for learned masks, Performer and native sparse attention (NSA), and fitted \
each by distillation. This page asks its questions again: the code is tested against dense definitions, every variant \
starts from all of the base's weights, teacher and student are compared at the same positions, and all cells of the \
grid have the same budget. One command does all of it, from the runs to this page:

```bash
{command}
```

**Setting.** Base: `{base}`. Each cell: {tokens:,} tokens, a fifth of them in a transfer stage (each layer imitates \
the base's attention) and the rest in distillation, at context {context}, with the recipe of its method shortened to \
the budget; {seeds}. *kl* is KL(base ‖ variant) of the next-token distributions, *ce* the cross-entropy of the \
text, *l1* the sum of the masks' weights (times {l1:g}). *corpus* is the training text given; *sampled* is text that \
the base itself wrote at temperature 1, which by its making cannot mismatch the base. {cells} runs, {hours:.1f} h in \
all on {device}.

## Results

{table}

Measured on a text that no cell saw ({test_tokens:,} predicted tokens, blocks of {context}), where the base has a \
perplexity of {base_perplexity:.2f}{spread}. *Hits* are tokens that end a pair of tokens which the block has had \
before and which is rare in general, so that they must be looked up; a pair is rare if {rare}. By how many tokens back \
that was, the cross-entropy above the base's, nats per token; and the same for all *other* tokens. *Samples*: \
{samples} texts of {length} tokens, continuations of the same passages with the same random numbers as the base's own; \
their perplexity under the base, distinct pairs of tokens, share of 4-grams repeated inside a text, and names that are \
new after 50 tokens, each relative to the base's own ({base_samples}). *Keys*: the most that a query at the end of the \
context reads in any layer, or what takes as long.

![KL through training](study/curves.png)

*KL on the validation text through training; thin, on the text trained on. All start with the transfer stage.*

## Conclusions

{small}

{conclusions}
{masks}## What they write

The same prompts and the same random numbers; variants fitted with {sample_objective} on {sample_text}.

{texts}"""

MASKS = """\
## The masks

![mask weights through training](study/mask-weights.png)

*The weight of every mask through training, mean over heads, fitted on {text}. A factor common to all masks of a head \
cancels in the softmax, so that only the ratios of weights matter.*

![final masks](study/final-masks.png)

*The masks at the end, mean over heads, of the first {shown} positions; the largest entry of each layer is 1.*
"""

PRUNING = """
![pruning](study/pruning.png)

*What dropping masks costs: in every layer, all masks whose weight is less than a share of the layer's largest; the \
points are shares of {shares}. Nothing is trained afterwards. A key counts as read if any head of the layer reads it.*

"""

CONCLUSION = """\
### {question}

> The study: {claim}

**{verdict}** {evidence}
"""

UNANSWERED = "Not answered: the runs that would tell are missing."

SIMPLEST = {
    "question": "Is the simplest method the best?",
    "claim": "masks, the simplest of the three, came out best; Performer and NSA wrote incoherent text.",
    "lower": "Yes: masks are the closest to the base.",
    "equal": "As good as any: no method is closer to the base than masks.",
    "higher": "No: {best} is closer to the base than masks, whose KL is {ratio:.1f} times as high.",
    "evidence": "KL on the test text, with kl on the corpus: {figures}. Keys read: {keys}.",
}

DATA = {
    "question": "Is a mismatch of data to blame for incoherent text?",
    "claim": "the text was incoherent because the fit used other data than the base's training; text sampled from the "
    "base was proposed instead.",
    "no": "No: fitted on the corpus, every variant writes text that the base finds about as likely as its own.",
    "helps": "Not for incoherence, which there is none of; but the base's own text makes a closer fit for {helped}.",
    "blame": "In part: the text of {incoherent} is less likely than the base's own, and training on the base's own "
    "text makes a closer fit for {helped}.",
    "other": "No: the text of {incoherent} is not as likely as the base's own, but training on the base's own text "
    "does not make a closer fit, either.",
    "evidence": "Samples' perplexity beside the base's own, fitted on the corpus ({coherent:.0%} more is called "
    "incoherent): {samples}. KL on the test text, "
    "fitted on the corpus → on sampled text: {figures}.",
}

CE = {
    "question": "Does cross-entropy beside KL help?",
    "claim": "cross-entropy beside KL helps.",
    "all": "Yes, for perplexity: it is lower with it in {lower} of {pairs} comparisons.",
    "some": "Not as a rule: perplexity is lower with it in {lower} of {pairs} comparisons, higher in {higher}.",
    "none": "No: perplexity is lower with it in none of {pairs} comparisons, higher in {higher}.",
    "cost": " The KL to the base is higher with it in {kl_higher} of them.",
    "evidence": "Perplexity on the test text, kl → kl+ce: {figures}. KL: {kls}.",
}

SEEDS = """\
A difference counts only if the figures of all seeds of the one lie on one side of all those of the other, and small \
ones are called none:"""

ONE_SEED = """\
These are single runs of one seed, so small differences are called none:"""

SMALL = """ \
less than {kl:.0%} of a KL, less than {perplexity:.1%} of a perplexity, less than two standard errors of a figure on \
hits or samples."""

NEARNESS = {
    "question": "Is nearness in KL quality?",
    "claim": "variants near the base in KL wrote incoherent text, so that the distance did not tell the quality.",
    "no": "Not by itself: {inversions}.",
    "inversion": "{near} is nearer than {far}, and worse at {measures}",
    "yes": "As far as these measures tell: of two methods that differ in KL, the nearer one is worse at none of them.",
    "evidence": "With kl on the corpus, by KL: {figures}.",
    "figures": "{method} (KL {kl:.4f}; {measures})",
}

PRUNED = {
    "question": "Can unimportant masks go?",
    "claim": "masks with small weights are unimportant and can be pruned.",
    "most": "Yes: {dropped:.0%} of the masks can go at a cost of less than {cheap:.0%} of the KL.",
    "some": "Some: {dropped:.0%} of the masks can go at a cost of less than {cheap:.0%} of the KL, not more.",
    "none": "No: dropping even the lightest raises the KL by more than {cheap:.0%}.",
    "unknown": "Not answered: no mask became light enough to be dropped.",
    "fewer": " A query then reads {fewer:.0%} fewer keys.",
    "as_many": " But a query reads as many keys as before: what one head drops, another still needs.",
    "evidence": "The most that each run bears: {figures}.",
    "penalty": " The penalty itself changed the KL of the whole variant on the test text from {plain:.4f} to "
    "{penalised:.4f}.",
    "bears": "{name}: {dropped:.0%} at a threshold of {threshold:g}, KL {before:.4f} → {after:.4f}, keys read "
    "{keys_before:.0f} → {keys_after:.0f}",
    "bears_nothing": "{name}: nothing (without the lightest {dropped:.0%} the KL goes {before:.4f} → {after:.4f})",
    "has_nothing": "{name}: nothing falls below a threshold of {threshold:g}",
}


def _slice(name: str, figure: str = "ce_excess") -> Figure:
    return lambda row: row.get("slices", {}).get(name, {}).get(figure)


def _sample(name: str, figure: str = "difference") -> Figure:
    return lambda row: row["samples"].get(name, {}).get(figure)


@dataclass(frozen=True)
class Measure:
    """A figure of quality, higher where a variant is worse.

    Attributes:
        name: in words.
        figure: of a row.
        error: its standard error over the text, the same for all seeds.
        share: shown as a share, else in nats.
    """

    name: str
    figure: Figure
    error: Figure
    share: bool = False

    @classmethod
    def of_slice(cls, name: str) -> Measure:
        return cls(name, _slice(name), _slice(name, "ce_excess_error"))

    @classmethod
    def of_samples(cls, key: str, name: str) -> Measure:
        return cls(name, _sample(key), _sample(key, "error"), share=True)

    def shown(self, group: Group) -> str:
        if not (values := group.values(self.figure)):
            return "–"
        return f"{_spread(values, 100, '+.1f')} %" if self.share else _spread(values, 1, "+.3f")

    def worse(self, one: Group, other: Group) -> bool:
        """Whether one is, by more than chance."""
        ones, others = one.values(self.figure), other.values(self.figure)
        if not ones or not others or min(ones) <= max(others):
            return False
        errors = [max(group.values(self.error), default=0.0) for group in (one, other)]
        return statistics.fmean(ones) - statistics.fmean(others) >= 2 * hypot(*errors)


HITS = ("hits, 65 to 256 back", "hits, over 256 back")
WRITTEN = Measure.of_samples("sample_perplexity", "samples' perplexity")
MEASURES = [*map(Measure.of_slice, HITS), WRITTEN, Measure.of_samples("new_names", "new names")]


@dataclass(frozen=True)
class Conclusion:
    """A question of the study, what the study said, and what the results say."""

    question: str
    claim: str
    verdict: str
    evidence: str = ""


def write_report(results: Sequence[Result], output: Path) -> Path:
    """Writes `study.md` and the figures beside it into a folder; returns the page's path.

    Args:
        results: at least one.
    """
    draw_curves(results, output / FOLDER / "curves.png")
    page = output / "study.md"
    page.write_text(compose(results, _masks_section(results, output / FOLDER)), encoding="utf-8")
    return page


def compose(results: Sequence[Result], masks: str) -> str:
    """The page's text.

    Args:
        masks: the section on masks, or nothing.
    """
    first = results[0]
    config, row = first.config, first.row
    shown, several = _comparable(results), len({one.cell.seed for one in results}) > 1
    return PAGE.format(
        command=_command(first, results),
        base=_base(config.base),
        tokens=first.tokens,
        context=row["context"],
        seeds=_seeds(results),
        l1=max(result.config.stages[-1].objective.l1 for result in results),
        cells=len(results),
        hours=sum(map(_seconds, results)) / 3600,
        device=first.environment["device"],
        table=table(results),
        test_tokens=row["tokens"],
        base_perplexity=row["base_perplexity"],
        spread="; means over seeds ± their standard deviation" if several else "",
        rare=row.get("rare", ""),
        samples=row["samples"]["samples"],
        length=row["samples"]["length"],
        base_samples=_base_samples(row["samples"]),
        small=(SEEDS if several else ONE_SEED) + SMALL.format(**SAME),
        conclusions="\n".join(CONCLUSION.format(**vars(one)).rstrip() + "\n" for one in conclusions(results)),
        masks=masks,
        sample_objective=shown[0].cell.objective,
        sample_text={"corpus": "the corpus", "sampled": "sampled text"}[shown[0].cell.text],
        texts=_texts(shown),
    )


def _seeds(results: Sequence[Result]) -> str:
    seeds = sorted({one.cell.seed for one in results})
    return f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"


def _command(first: Result, results: Sequence[Result]) -> str:
    methods = list(dict.fromkeys(result.cell.method for result in results))
    seeds = len({one.cell.seed for one in results})
    base = "" if first.config.base == "checkpoints/base" else f" --base {shlex.quote(_base(first.config.base))}"
    precision = "" if first.config.precision == "no" else f" --precision {first.config.precision}"
    budget = f"--tokens {first.tokens} --context {first.row['context']}{precision}"
    return (
        "python -m trainer.study --data.train TRAIN.txt --data.valid VALID.txt --eval.text TEST.txt \\\n"
        f"  {budget}{base} --methods {' '.join(methods)} --seeds {seeds}"
    )


def _base(spec: str) -> str:
    """A base as the page may name it: not by a place on this machine."""
    return Path(spec).name if Path(spec).is_absolute() else spec


def _comparable(results: Sequence[Result]) -> list[Result]:
    """One result of each method, alike in the rest."""
    first = results[0].cell
    alike = (first.objective, first.text, first.seed)
    return [one for one in results if (one.cell.objective, one.cell.text, one.cell.seed) == alike]


def _seconds(result: Result) -> float:
    return result.rows("eval")[-1]["seconds"]


def table(results: Sequence[Result]) -> str:
    """The results as a table, a line for all seeds of a cell, sorted by method and KL."""
    names = ["method", "objective", "text", *COLUMNS, "keys", "minutes"]
    lines = [f"| {' | '.join(names)} |", f"|---|---|---|{'---:|' * (len(names) - 3)}"]
    methods = list(dict.fromkeys(result.cell.method for result in results))
    for group in sorted(grouped(results), key=lambda one: (methods.index(one.cell.method), one.mean(_kl))):
        figures = [_spread(group.values(figure), scale, form) for figure, scale, form in COLUMNS.values()]
        keys = max(result.row["keys_read"] for result in group.results)
        minutes = statistics.fmean(map(_seconds, group.results)) / 60
        lines.append(f"| {' | '.join([*group.cell.setting, *figures, str(keys), f'{minutes:.1f}'])} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], scale: float, form: str) -> str:
    """The mean of a figure over seeds, and where there are several its standard deviation."""
    if not values:
        return "–"
    deviation = scale * statistics.stdev(values) if len(values) > 1 else None
    return with_error(scale * statistics.fmean(values), deviation, form)


def _over_base(row: Row) -> float:
    return row["perplexity"] / row["base_perplexity"] - 1


def _kl(row: Row) -> float:
    return row["kl"]


def _perplexity(row: Row) -> float:
    return row["perplexity"]


# The table's columns: of a row, times what, in which form.
COLUMNS: dict[str, tuple[Figure, float, str]] = {
    "KL, nats/token": (_kl, 1, ".4f"),
    "perplexity": (_perplexity, 1, ".2f"),
    "over the base's, %": (_over_base, 100, "+.1f"),
    "same top token, %": (lambda row: row["top1_agreement"], 100, ".1f"),
    **{name: (_slice(name), 1, "+.3f") for name in (*HITS, "other")},
    "samples: perplexity, %": (WRITTEN.figure, 100, "+.1f"),
    "distinct-2, %": (_sample("distinct_2"), 100, "+.1f"),
    "repetition, %": (_sample("repetition"), 100, "+.0f"),
    "new names, %": (_sample("new_names"), 100, "+.0f"),
}


def _base_samples(samples: dict[str, Any]) -> str:
    names = {
        "sample_perplexity": "perplexity {:.2f}",
        "distinct_2": "distinct-2 {:.3f}",
        "repetition": "repetition {:.4f}",
    }
    return ", ".join(words.format(samples[name]["base"]) for name, words in names.items())


def _masks_section(results: Sequence[Result], folder: Path) -> str:
    """Figures of the masks' weights and of pruning, and the words around them; nothing if there are no masks."""
    pruned = [result for result in results if result.pruning]
    if not pruned:
        return ""
    text, seed = pruned[0].cell.text, pruned[0].cell.seed
    learned = [one for one in pruned if (one.cell.text, one.cell.seed) == (text, seed)]
    draw_weights(learned, folder / "mask-weights.png")
    shown = draw_masks(learned, folder / "final-masks.png")
    draw_pruning(pruned, folder / "pruning.png")
    shares = ", ".join(f"{row['threshold']:g}" for row in pruned[0].pruning)
    return MASKS.format(text=text, shown=shown) + PRUNING.format(shares=shares)


def _texts(results: Sequence[Result]) -> str:
    """For each prompt, what the base writes and what the variants write."""
    written = {result.cell.method: result.rows("samples")[-1]["texts"] for result in results}
    parts = []
    for place, text in enumerate(next(iter(written.values()))):
        parts.append(f"### {_quoted(text['prompt'])}")
        parts.append(_text("base", text["base"]))
        parts += [_text(method, texts[place]["variant"]) for method, texts in written.items()]
    return "\n\n".join(parts) + "\n"


def _quoted(prompt: str) -> str:
    return f"“{prompt} …”" if prompt.strip() else "No prompt"


def _text(name: str, text: str) -> str:
    """A heading and an indented block, which nothing in the text can leave."""
    wrapped = [part for line in text.splitlines() for part in textwrap.wrap(line.strip(), 100)]
    return f"{name}:\n\n" + "\n".join(f"    {line}" for line in wrapped)


def conclusions(results: Sequence[Result]) -> list[Conclusion]:
    """What the results say to each of the study's questions."""
    groups = grouped(results)
    return [_simplest(groups), _data(groups), _cross_entropy(groups), _pruned(groups), _nearness(groups)]


def compared(figure: str, ones: Sequence[float], others: Sequence[float]) -> Literal["lower", "equal", "higher"]:
    """Where a figure's values with some seeds lie, seen from those of something else.

    "equal" unless all of one lie on one side of all of the other and the means are further apart than `SAME` of the
    larger.
    """
    one, other = statistics.fmean(ones), statistics.fmean(others)
    apart = max(ones) < min(others) or min(ones) > max(others)
    if not apart or abs(one - other) <= SAME[figure] * max(abs(one), abs(other)):
        return "equal"
    return "lower" if one < other else "higher"


def _compared(figure: Literal["kl", "perplexity"], one: Group, other: Group) -> str:
    values = {"kl": _kl, "perplexity": _perplexity}[figure]
    return compared(figure, one.values(values), other.values(values))


def _by_method(groups: Sequence[Group], objective: str, text: str) -> dict[str, Group]:
    """What was measured of each method, with an objective on a text."""
    return {one.cell.method: one for one in groups if (one.cell.objective, one.cell.text) == (objective, text)}


def _conclusion(words: dict[str, str], verdict: str | None, evidence: str = "") -> Conclusion:
    return Conclusion(words["question"], words["claim"], verdict or UNANSWERED, evidence)


def _simplest(groups: Sequence[Group]) -> Conclusion:
    found = _by_method(groups, "kl", "corpus")
    if "masks" not in found or len(found) < 2:
        return _conclusion(SIMPLEST, None)
    kl = {method: group.mean(_kl) for method, group in found.items()}
    best = min((method for method in kl if method != "masks"), key=kl.__getitem__)
    case = _compared("kl", found["masks"], found[best])
    verdict = SIMPLEST[case].format(best=best, ratio=kl["masks"] / kl[best])
    figures = _listed(
        {method: _spread(found[method].values(_kl), 1, ".4f") for method in sorted(kl, key=kl.__getitem__)}
    )
    keys = _listed({method: group.first.row["keys_read"] for method, group in found.items()})
    return _conclusion(SIMPLEST, verdict, SIMPLEST["evidence"].format(figures=figures, keys=keys))


def _data(groups: Sequence[Group]) -> Conclusion:
    corpus, sampled = (_by_method(groups, "kl", text) for text in ("corpus", "sampled"))
    pairs = {method: (corpus[method], sampled[method]) for method in corpus if method in sampled}
    if not pairs:
        return _conclusion(DATA, None)
    incoherent = [method for method, group in corpus.items() if group.mean(WRITTEN.figure) >= COHERENT]
    helped = [method for method, (one, other) in pairs.items() if _compared("kl", other, one) == "lower"]
    case = ("blame" if helped else "other") if incoherent else ("helps" if helped else "no")
    verdict = DATA[case].format(incoherent=_joined(incoherent), helped=_joined(helped))
    samples = _listed({method: WRITTEN.shown(group) for method, group in corpus.items()})
    figures = _listed({method: _arrow(one, other, _kl, ".4f") for method, (one, other) in pairs.items()})
    return _conclusion(DATA, verdict, DATA["evidence"].format(coherent=COHERENT, samples=samples, figures=figures))


def _arrow(one: Group, other: Group, figure: Figure, form: str) -> str:
    return " → ".join(_spread(group.values(figure), 1, form) for group in (one, other))


def _cross_entropy(groups: Sequence[Group]) -> Conclusion:
    pairs = {
        f"{method} on {text}": (group, with_ce[method])
        for text in ("corpus", "sampled")
        for with_ce in [_by_method(groups, "kl+ce", text)]
        for method, group in _by_method(groups, "kl", text).items()
        if method in with_ce
    }
    if not pairs:
        return _conclusion(CE, None)
    signs, kl_signs = (
        [_compared(figure, with_ce, without) for without, with_ce in pairs.values()] for figure in ("perplexity", "kl")
    )
    lower = signs.count("lower")
    case = "all" if lower == len(pairs) else "some" if lower else "none"
    counts = {"lower": lower, "higher": signs.count("higher"), "pairs": len(pairs)}
    verdict = (CE[case] + CE["cost"]).format(**counts, kl_higher=kl_signs.count("higher"))
    figures, kls = (
        _listed({name: _arrow(*pair, figure, form) for name, pair in pairs.items()})
        for figure, form in ((_perplexity, ".2f"), (_kl, ".4f"))
    )
    return _conclusion(CE, verdict, CE["evidence"].format(figures=figures, kls=kls))


def _pruned(groups: Sequence[Group]) -> Conclusion:
    swept = {one.cell.objective: one for one in groups if one.pruning and one.cell.text == "corpus"}
    if not swept:
        return _conclusion(PRUNED, None)
    sweeps = {objective: group.pruning for objective, group in swept.items()}
    borne = {objective: most_dropped(sweep) for objective, sweep in sweeps.items()}
    best = max(borne, key=lambda objective: borne[objective]["dropped"])
    dropped = borne[best]["dropped"]
    case = "most" if dropped >= 0.5 else "some" if dropped else "none"
    if not any(row["dropped"] for sweep in sweeps.values() for row in sweep):
        case = "unknown"
    figures = "; ".join(_bears(objective, sweeps[objective], row) for objective, row in borne.items())
    evidence = PRUNED["evidence"].format(figures=figures)
    if set(swept) >= {"kl", "kl+l1"}:
        plain, penalised = (swept[objective].mean(_kl) for objective in ("kl", "kl+l1"))
        evidence += PRUNED["penalty"].format(plain=plain, penalised=penalised)
    verdict = PRUNED[case].format(dropped=dropped, cheap=CHEAP)
    if dropped:
        fewer = 1 - borne[best]["keys_read"] / sweeps[best][0]["keys_read"]
        verdict += PRUNED["fewer" if fewer >= 0.005 else "as_many"].format(fewer=fewer)
    return _conclusion(PRUNED, verdict, evidence)


def _nearness(groups: Sequence[Group]) -> Conclusion:
    found = sorted(_by_method(groups, "kl", "corpus").values(), key=lambda group: group.mean(_kl))
    pairs = [(near, far) for near, far in combinations(found, 2) if _compared("kl", near, far) == "lower"]
    if not pairs:
        return _conclusion(NEARNESS, None)
    inversions = "; ".join(
        NEARNESS["inversion"].format(near=near.cell.method, far=far.cell.method, measures=_joined(names))
        for near, far in pairs
        if (names := [measure.name for measure in MEASURES if measure.worse(near, far)])
    )
    verdict = NEARNESS["no" if inversions else "yes"].format(inversions=inversions)
    figures = "; ".join(
        NEARNESS["figures"].format(
            method=group.cell.method,
            kl=group.mean(_kl),
            measures=_listed({measure.name: measure.shown(group) for measure in MEASURES}),
        )
        for group in found
    )
    return _conclusion(NEARNESS, verdict, NEARNESS["evidence"].format(figures=figures))


def most_dropped(pruning: list[dict[str, float]]) -> dict[str, float]:
    """The row of a sweep that drops most of those whose KL is free; the first, where nothing is dropped, always is."""
    free = [row for row in pruning if row["kl"] <= (1 + CHEAP) * pruning[0]["kl"]]
    return max(free, key=lambda row: row["dropped"])


def _bears(name: str, pruning: list[dict[str, float]], row: dict[str, float]) -> str:
    whole, drops = pruning[0], [other for other in pruning if other["dropped"]]
    if row["dropped"]:
        return PRUNED["bears"].format(
            name=name,
            **row,
            before=whole["kl"],
            after=row["kl"],
            keys_before=whole["keys_read"],
            keys_after=row["keys_read"],
        )
    if drops:
        return PRUNED["bears_nothing"].format(
            name=name, dropped=drops[0]["dropped"], before=whole["kl"], after=drops[0]["kl"]
        )
    return PRUNED["has_nothing"].format(name=name, threshold=pruning[-1]["threshold"])


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
