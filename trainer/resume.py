"""What a run that goes on may be told anew: its record of then compared with that of now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from transformers import PreTrainedModel

import attention
from attention.files import OWN_WEIGHTS, fingerprint, read_manifest

from .config import RunConfig

Record = dict[str, Any]  # plain data, as JSON has it


class Kind(Enum):
    """What it means that an option is another when a run goes on."""

    FREE = "touches neither what is learnt nor what is measured, but for rounding: said in the log"
    NOTED = "said in the log and in the history; refused in a stage that is over"
    TEXT = "what a text is made of: noted where its tokens are others, which their fingerprint decides"
    MODEL = "what a model is made of: refused where it is another, which its fingerprint decides"
    STAGE = "what a stage is: refused once the stage has begun"
    FIGURE = "what validation measures: noted; refused where the best weights are kept, as figures would not compare"
    FIXED = "refused"


OPTIONS = {
    Kind.FREE: """
        output resume max_steps log_every gradient_checkpointing trackers push_to push_every private
        stages.micro_batch_size eval.batch_size checkpoint.every checkpoint.keep
        card.name card.license card.language card.train_data card.eval_data""",
    Kind.NOTED: """
        seed precision cpu eval.every eval.keep samples.prompts samples.length samples.temperature samples.every
        stages.steps stages.batch_size stages.final_context stages.final_fraction
        data.teacher_cache data.teacher_error stages.position_lr stages.skip_positions stages.beta
        stages.short_context stages.short_share
        stages.lr stages.mechanism_lr stages.weight_decay stages.betas stages.clip stages.muon_lr stages.muon_momentum
        stages.schedule.warmup stages.schedule.constant stages.schedule.decay stages.schedule.final
        stages.output stages.weights stages.selection
        stages.objective.kl stages.objective.ce stages.objective.reverse_kl stages.objective.jsd stages.objective.l1""",
    Kind.TEXT: """
        new.tokenizer data.train data.valid data.dataset data.name data.revision data.train_split data.valid_split
        data.test_split data.column data.rename data.documents data.sampled_tokens data.sample_batch
        data.valid_fraction data.cache eval.text""",
    Kind.MODEL: "base variant attention",
    Kind.STAGE: "stages.stage stages.train stages.layers stages.muon stages.context stages.prompt",
    Kind.FIGURE: "eval.tokens eval.context",
    Kind.FIXED: "new.family new.config positions positions_start move dry_run",
}
KINDS = {option: kind for kind, options in OPTIONS.items() for option in options.split()}
SECTIONS = ("new", "data", "eval", "samples", "checkpoint", "card", "schedule", "objective")  # the rest are values
TEXTS = {"train": "training", "valid": "validation", "test": "test"}
NOT_THE_MODEL = ("transformers_version", "architectures", "dtype", "base", "versions")  # of what its config says


@dataclass
class Verdict:
    """What is said when a run goes on, a sentence each.

    Attributes:
        refused: why it cannot go on like this; then the rest does not matter.
        noted: changes of what is learnt or measured from here.
        harmless: other changes.
    """

    refused: list[str] = field(default_factory=list)
    noted: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a run is: `done` ≥ 1 steps of stage number `stage`, counted from 0."""

    stage: int
    done: int


def record(
    config: RunConfig, model: PreTrainedModel, base: PreTrainedModel | None, texts: Mapping[str, np.ndarray]
) -> Record:
    """What a run is made from, with fingerprints where names say little.

    Args:
        model: what is trained, before it is.
        base: the teacher; None in pretraining.
        texts: streams of tokens, under keys of `TEXTS`.
    """
    source = model if base is None else base
    parts = {
        "config": config.model_dump(mode="json"),
        "base": None if config.new is not None else fingerprint(source.state_dict()),
        "base_config": json.loads(source.config.to_json_string(use_diff=False)),
        "variant": None if config.variant is None else _stored_weights(config.variant),
        "attention": getattr(model.config, "attention", None),
        "texts": {name: [len(tokens), hashlib.sha256(tokens.tobytes()).hexdigest()] for name, tokens in texts.items()},
    }
    return json.loads(json.dumps(parts))


def _stored_weights(variant: str) -> str:
    """A fingerprint of a variant's own weights files, by its manifest."""
    files = read_manifest(attention.locate(variant))
    own = {name: entry for name, entry in files.items() if OWN_WEIGHTS.fullmatch(name)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def compare(then: Record, now: Record, place: Place) -> Verdict:
    """What to say when the run that `then` is a record of goes on from `place` as the one of `now`."""
    verdict = Verdict()
    _compare_models(then, now, verdict)
    has_other_text = _compare_texts(then, now, verdict)
    before, after = (dict(_options(one["config"])) for one in (then, now))
    keeps_best = before["eval.keep"] == after["eval.keep"] == "best"
    for path, new in after.items():
        old = before.get(path, new)  # what another version did not know, or what stood elsewhere, says nothing
        if old == new:
            continue
        line, kind = _change(path, old, new), KINDS[path]
        if kind is Kind.FIXED:
            verdict.refused.append(f"{line}: cannot change on the way")
        elif kind is Kind.FIGURE and keeps_best:
            verdict.refused.append(f"{line}: with eval.keep best, figures before and after would not compare")
        elif kind in (Kind.NOTED, Kind.FIGURE) or (kind is Kind.TEXT and has_other_text):
            verdict.noted.append(line)
        elif path != "resume":
            verdict.harmless.append(line)
    if keeps_best and then["texts"]["valid"] != now["texts"]["valid"]:
        verdict.refused.append("validation text: with eval.keep best, figures before and after would not compare")
    _compare_stages(then["config"]["stages"], now["config"]["stages"], place, verdict)
    return verdict


def compare_trained(then: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> list[str]:
    """Why the optimisers' memory does not fit what is trained now, a sentence each.

    Args:
        then, now: see `checkpointing.trained_shapes`.
    """
    parts = {
        "no longer trained": [name for name in then if name not in now],
        "newly trained": [name for name in now if name not in then],
        "of another shape": [name for name in now if name in then and now[name] != then[name]],
    }
    return [
        f"parameters {what} in the middle of the stage: {', '.join(names)}" for what, names in parts.items() if names
    ]


def _compare_models(then: Record, now: Record, verdict: Verdict) -> None:
    for name in ("base", "variant"):
        old, new = then[name], now[name]
        if old != new:
            verdict.refused.append(f"{name}: its weights are others (SHA-256 {_short(old)} -> {_short(new)})")
    old, new = then["base_config"], now["base_config"]
    for name in sorted(old.keys() & new.keys()):  # those that one version of transformers alone knows say nothing
        if old[name] != new[name] and name not in NOT_THE_MODEL and not name.startswith("_"):
            verdict.refused.append(f"base: {_change(name, old[name], new[name])} in its config")
    old, new = then["attention"] or {}, now["attention"] or {}
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            verdict.refused.append(f"{_change(f'attention.{name}', old.get(name), new.get(name))}: another model")


def _compare_texts(then: Record, now: Record, verdict: Verdict) -> bool:
    """Notes the texts that are others; returns whether there are any."""
    others = [name for name in TEXTS if then["texts"].get(name) != now["texts"].get(name)]
    for name in others:
        (size, digest), (new_size, new_digest) = (one["texts"].get(name, [0, None]) for one in (then, now))
        verdict.noted.append(
            f"{TEXTS[name]} text {size:,} tokens ({_short(digest)}) -> {new_size:,} tokens ({_short(new_digest)})"
        )
    return bool(others)


def _compare_stages(old: list[Record], new: list[Record], place: Place, verdict: Verdict) -> None:
    kinds = [", ".join(stage["stage"] for stage in stages) for stages in (old, new)]
    if len(new) <= place.stage:
        verdict.refused.append(
            f"stages {kinds[0]} -> {kinds[1]}: the run is in stages.{place.stage}, which is not there any more"
        )
        return
    moved = [(p, q) for p, q in _moved(old, new) if min(p, q) <= place.stage]
    if moved:
        p, q = moved[0]
        verdict.refused.append(
            f"stages.{p} is now what stages.{q} was: up to stages.{place.stage}, where the run is, none can be taken "
            "out, put in or swapped"
        )
        return
    if kinds[0] != kinds[1]:
        verdict.noted.append(f"stages {kinds[0]} -> {kinds[1]}")
    for number, (before, after) in enumerate(zip(old, new, strict=False)):
        _compare_stage(number, before, after, place, verdict)


def _moved(old: list[Record], new: list[Record]) -> Iterator[tuple[int, int]]:
    """Places p of the new stages and q of the old where p is now what q was, and q is not so any more."""
    for p, stage in enumerate(new):
        for q, other in enumerate(old):
            if p != q and stage == other and (p >= len(old) or old[p] != stage) and (q >= len(new) or new[q] != other):
                yield p, q


def _compare_stage(number: int, old: Record, new: Record, place: Place, verdict: Verdict) -> None:
    begun = number <= place.stage
    done = old["steps"] if number < place.stage else place.done if begun else 0
    over = number < place.stage or (begun and done == new["steps"])
    if old["stage"] != new["stage"]:
        if begun:
            verdict.refused.append(f"{_change(f'stages.{number}.stage', old['stage'], new['stage'])}: it has begun")
        return
    before, after = dict(_options(old)), dict(_options(new))
    for name, value in after.items():
        if before.get(name, value) == value:
            continue
        line, kind = _change(f"stages.{number}.{name}", before[name], value), KINDS[f"stages.{name}"]
        if name == "steps" and new["steps"] < done:
            verdict.refused.append(f"{line}: it has made {done} already")
        elif name == "steps":
            verdict.noted.append(f"{line} (without effect: it ended after {done})" if number < place.stage else line)
        elif kind is Kind.FREE:
            verdict.harmless.append(line)
        elif over:
            verdict.refused.append(f"{line}: the stage is over, and keeps what it was made with")
        elif begun and (kind is Kind.STAGE or (name == "final_context" and done > _first_part(old))):
            verdict.refused.append(f"{line}: the stage has begun, and goes on with what it is")
        else:
            verdict.noted.append(line)


def _first_part(stage: Record) -> int:
    """Steps of a stage before its `final_context`; see `data.StageBatches`."""
    final = round(stage["final_fraction"] * stage["steps"]) if stage["final_context"] else 0
    return stage["steps"] - final


def _options(values: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of all options but the stages, those of sections included."""
    for name, value in values.items():
        if name in SECTIONS and isinstance(value, dict):
            yield from _options(value, f"{prefix}{name}.")
        elif name != "stages":
            yield prefix + name, value


def some(names: list[str], limit: int = 8) -> str:
    """Names as text, no more than so many of them."""
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join([*names[:limit], *more])


def _change(name: str, old: Any, new: Any) -> str:
    return f"{name} {json.dumps(old, ensure_ascii=False)} -> {json.dumps(new, ensure_ascii=False)}"


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."
