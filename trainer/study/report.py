"""The study's page: its words, and the conclusions, each chosen by figures of the page's own table."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import draw_curves, draw_masks, draw_pruning, draw_weights
from .results import Result

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
the budget; seed {seed}. *kl* is KL(base ‖ variant) of the next-token distributions, *ce* the cross-entropy of the \
text, *l1* the sum of the masks' weights (times {l1:g}). *corpus* is the training text given; *sampled* is text that \
the base itself wrote at temperature 1, which by its making cannot mismatch the base. {cells} runs, {hours:.1f} h in \
all on {device}.

## Results

{table}

Measured on a text that no cell saw ({test_tokens:,} predicted tokens, blocks of {context}), where the base has a \
perplexity of {base_perplexity:.2f}. *Samples*: {samples} texts of {length} tokens, continuations of the same passages \
with the same random numbers as the base's own; their perplexity under the base, distinct pairs of tokens, and share \
of 4-grams repeated inside a text, each relative to the base's own ({base_samples}). *Keys*: the most that a query at \
the end of the context reads in any layer, or what takes as long.

![KL through training](study/curves.png)

*KL on the validation text through training; thin, on the text trained on. All start with the transfer stage.*

## Conclusions

These are single runs of one seed, so small differences are called none: less than {same[kl]:.0%} of a KL, less than \
{same[perplexity]:.1%} of a perplexity.

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
    shown = _comparable(results)
    return PAGE.format(
        command=_command(first, results),
        base=_base(config.base),
        tokens=first.tokens,
        context=row["context"],
        seed=config.seed,
        l1=max(result.config.stages[-1].objective.l1 for result in results),
        cells=len(results),
        hours=sum(map(_seconds, results)) / 3600,
        device=first.environment["device"],
        table=table(results),
        test_tokens=row["tokens"],
        base_perplexity=row["base_perplexity"],
        samples=row["samples"]["samples"],
        length=row["samples"]["length"],
        base_samples=_base_samples(row["samples"]),
        same=SAME,
        conclusions="\n".join(CONCLUSION.format(**vars(one)).rstrip() + "\n" for one in conclusions(results)),
        masks=masks,
        sample_objective=shown[0].cell.objective,
        sample_text={"corpus": "the corpus", "sampled": "sampled text"}[shown[0].cell.text],
        texts=_texts(shown),
    )


def _command(first: Result, results: Sequence[Result]) -> str:
    methods = list(dict.fromkeys(result.cell.method for result in results))
    base = "" if first.config.base == "checkpoints/base" else f" --base {shlex.quote(_base(first.config.base))}"
    return (
        "python -m trainer.study --data.train TRAIN.txt --data.valid VALID.txt --eval.text TEST.txt \\\n"
        f"  --tokens {first.tokens}{base} --methods {' '.join(methods)}"
    )


def _base(spec: str) -> str:
    """A base as the page may name it: not by a place on this machine."""
    return Path(spec).name if Path(spec).is_absolute() else spec


def _comparable(results: Sequence[Result]) -> list[Result]:
    """One result of each method, alike in the rest."""
    first = results[0].cell
    return [one for one in results if (one.cell.objective, one.cell.text) == (first.objective, first.text)]


def _seconds(result: Result) -> float:
    return result.rows("eval")[-1]["seconds"]


def table(results: Sequence[Result]) -> str:
    """The results as a table, sorted by method and KL."""
    lines = [
        "| method | objective | text | KL, nats/token | perplexity | over the base's | same top token "
        "| samples: perplexity | distinct-2 | repetition | keys | minutes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    methods = list(dict.fromkeys(result.cell.method for result in results))
    for result in sorted(results, key=lambda one: (methods.index(one.cell.method), one.row["kl"])):
        cell, row, samples = result.cell, result.row, result.row["samples"]
        differences = [
            _percent(samples[name]["difference"]) for name in ("sample_perplexity", "distinct_2", "repetition")
        ]
        lines.append(
            f"| {cell.method} | {cell.objective} | {cell.text} | {row['kl']:.4f} | {row['perplexity']:.2f} | "
            f"{_percent(_over_base(row))} | {row['top1_agreement']:.1%} | {' | '.join(differences)} | "
            f"{row['keys_read']} | {_seconds(result) / 60:.1f} |"
        )
    return "\n".join(lines)


def _over_base(row: dict[str, Any]) -> float:
    return row["perplexity"] / row["base_perplexity"] - 1


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f} %"


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
    text = pruned[0].cell.text
    learned = [one for one in pruned if one.cell.text == text]
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
    return [_simplest(results), _data(results), _cross_entropy(results), _pruned(results)]


def compared(figure: str, one: float, other: float) -> str:
    """Whether a figure of that name is "lower" or "higher" than another, or "equal"."""
    if abs(one - other) <= SAME[figure] * max(abs(one), abs(other)):
        return "equal"
    return "lower" if one < other else "higher"


def _by_method(results: Sequence[Result], objective: str, text: str) -> dict[str, dict[str, Any]]:
    """What was measured of each method, with an objective on a text."""
    return {one.cell.method: one.row for one in results if (one.cell.objective, one.cell.text) == (objective, text)}


def _conclusion(words: dict[str, str], verdict: str | None, evidence: str = "") -> Conclusion:
    return Conclusion(words["question"], words["claim"], verdict or UNANSWERED, evidence)


def _simplest(results: Sequence[Result]) -> Conclusion:
    rows = _by_method(results, "kl", "corpus")
    if "masks" not in rows or len(rows) < 2:
        return _conclusion(SIMPLEST, None)
    kl = {method: row["kl"] for method, row in rows.items()}
    best = min((method for method in kl if method != "masks"), key=kl.__getitem__)
    verdict = SIMPLEST[compared("kl", kl["masks"], kl[best])].format(best=best, ratio=kl["masks"] / kl[best])
    figures = _listed({method: f"{value:.4f}" for method, value in sorted(kl.items(), key=lambda item: item[1])})
    keys = _listed({method: rows[method]["keys_read"] for method in rows})
    return _conclusion(SIMPLEST, verdict, SIMPLEST["evidence"].format(figures=figures, keys=keys))


def _data(results: Sequence[Result]) -> Conclusion:
    corpus, sampled = (_by_method(results, "kl", text) for text in ("corpus", "sampled"))
    pairs = {method: (corpus[method]["kl"], sampled[method]["kl"]) for method in corpus if method in sampled}
    if not pairs:
        return _conclusion(DATA, None)
    texts = {method: row["samples"]["sample_perplexity"]["difference"] for method, row in corpus.items()}
    incoherent = [method for method, difference in texts.items() if difference >= COHERENT]
    helped = [
        method for method, (on_corpus, on_sampled) in pairs.items() if compared("kl", on_sampled, on_corpus) == "lower"
    ]
    case = ("blame" if helped else "other") if incoherent else ("helps" if helped else "no")
    verdict = DATA[case].format(incoherent=_joined(incoherent), helped=_joined(helped))
    samples = _listed({method: _percent(difference) for method, difference in texts.items()})
    figures = _listed({method: f"{one:.4f} → {other:.4f}" for method, (one, other) in pairs.items()})
    return _conclusion(DATA, verdict, DATA["evidence"].format(coherent=COHERENT, samples=samples, figures=figures))


def _cross_entropy(results: Sequence[Result]) -> Conclusion:
    pairs = {
        f"{method} on {text}": (row, with_ce[method])
        for text in ("corpus", "sampled")
        for with_ce in [_by_method(results, "kl+ce", text)]
        for method, row in _by_method(results, "kl", text).items()
        if method in with_ce
    }
    if not pairs:
        return _conclusion(CE, None)
    signs, kl_signs = (
        [compared(key, with_ce[key], without[key]) for without, with_ce in pairs.values()]
        for key in ("perplexity", "kl")
    )
    lower = signs.count("lower")
    case = "all" if lower == len(pairs) else "some" if lower else "none"
    counts = {"lower": lower, "higher": signs.count("higher"), "pairs": len(pairs)}
    verdict = (CE[case] + CE["cost"]).format(**counts, kl_higher=kl_signs.count("higher"))
    figures, kls = (
        _listed({name: f"{one[key]:{form}} → {other[key]:{form}}" for name, (one, other) in pairs.items()})
        for key, form in (("perplexity", ".2f"), ("kl", ".4f"))
    )
    return _conclusion(CE, verdict, CE["evidence"].format(figures=figures, kls=kls))


def _pruned(results: Sequence[Result]) -> Conclusion:
    swept = {one.cell.objective: one for one in results if one.pruning and one.cell.text == "corpus"}
    if not swept:
        return _conclusion(PRUNED, None)
    borne = {objective: most_dropped(result.pruning) for objective, result in swept.items()}
    best = max(borne, key=lambda objective: borne[objective]["dropped"])
    dropped = borne[best]["dropped"]
    case = "most" if dropped >= 0.5 else "some" if dropped else "none"
    if not any(row["dropped"] for result in swept.values() for row in result.pruning):
        case = "unknown"
    figures = "; ".join(_bears(objective, swept[objective].pruning, row) for objective, row in borne.items())
    evidence = PRUNED["evidence"].format(figures=figures)
    if set(swept) >= {"kl", "kl+l1"}:
        plain, penalised = (swept[objective].row["kl"] for objective in ("kl", "kl+l1"))
        evidence += PRUNED["penalty"].format(plain=plain, penalised=penalised)
    verdict = PRUNED[case].format(dropped=dropped, cheap=CHEAP)
    if dropped:
        fewer = 1 - borne[best]["keys_read"] / swept[best].pruning[0]["keys_read"]
        verdict += PRUNED["fewer" if fewer >= 0.005 else "as_many"].format(fewer=fewer)
    return _conclusion(PRUNED, verdict, evidence)


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
