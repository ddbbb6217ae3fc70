"""The model card of a variant: what it is, how it was made, what it measures, where its limits are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from attention.errors import CheckpointError
from attention.files import PAIRS, expanded
from attention.hub import HubSpec, cached_origin
from attention.mechanism import MechanismConfig
from attention.pushing import ANY_REPOSITORY
from attention.registry import CONFIGS, LayersConfig

from .card_words import (
    BEFORE,
    FURTHER,
    MADE,
    PAIRS_SECTION,
    POSITION_TABLE,
    RECALL_TABLE,
    USE,
    heading_and_text,
    section,
)
from .config import RunConfig
from .fidelity import Fidelity
from .recall import CANDIDATES, CHANCE

SLICE_COLUMNS = ["how many", "cross-entropy of the base", "above it", "KL"]
TAGS = ["efficient-attention", "distillation"]


@dataclass(frozen=True)
class Making:
    """How a variant was made.

    Attributes:
        config: the run's.
        method: the mechanism's config.
        family: the base's `model_type`.
        environment: see `setup.environment`.
        tokens, steps, seconds: what the training took.
        earlier: text of the card of the variant that it went on from, if that has one.
        changes: what was learnt or measured otherwise from a step on, after a restart with other options.
    """

    config: RunConfig
    method: MechanismConfig
    family: str
    environment: dict[str, Any]
    tokens: int
    steps: int
    seconds: float
    earlier: str | None = None
    changes: Mapping[int, Sequence[str]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base as a card names it: on the Hub as the config has it, else by its folder's name."""
        spec = self.config.base
        return spec if hub_id(spec) and not _is_here(spec) else _folder(spec).name


def write_card(making: Making, valid: Fidelity, test: tuple[str, Fidelity] | None) -> ModelCard:
    """The card, with metadata of the Hub's schema.

    Args:
        valid: what was measured on the validation text.
        test: name of a text that guided nothing and what was measured on it, if there is one.
    """
    measured = {"validation": ("validation text", valid)}
    if test is not None:
        measured["test"] = (making.config.card.eval_data or test[0], test[1])
    data = ModelCardData(
        model_name=_title(making),
        base_model=hub_id(making.config.base),
        datasets=[name for name in [hub_id(making.config.data.dataset)] if name] or None,
        tags=[*TAGS, making.family, making.method.method],
        library_name="transformers",
        pipeline_tag="text-generation",
        license=making.config.card.license,
        language=making.config.card.language,
        eval_results=[
            result for split, (name, figures) in measured.items() for result in _results(split, name, figures)
        ],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(making, dict(measured.values()))}")


def _results(split: str, name: str, figures: Fidelity) -> list[EvalResult]:
    shared = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": name, "dataset_split": split}
    values = {
        "kl": ("KL(base ‖ variant), nats per token", figures.kl),
        "perplexity": ("perplexity", figures.perplexity),
        "top1_agreement": ("share of tokens with the base's most likely one", figures.top1_agreement),
    }
    return [
        EvalResult(**shared, metric_type=kind, metric_name=title, metric_value=round(value, 5))
        for kind, (title, value) in values.items()
    ]


def _title(making: Making) -> str:
    base = (hub_id(making.config.base) or making.base).rpartition("/")[2]
    return making.config.card.name or f"{making.method.method}-{base}"


def hub_id(spec: str | None) -> str | None:
    """The repository on the Hub that a model or data set comes from, "user/name"; None for a local one."""
    if spec is None:
        return None
    if _is_here(spec):
        place = cached_origin(_folder(spec))
        return place and place.repo_id
    try:
        repo_id = HubSpec.parse(spec).repo_id
        validate_repo_id(repo_id)
    except (CheckpointError, HFValidationError):
        return None
    return repo_id


def _folder(spec: str) -> Path:
    return expanded(spec).resolve()


def _is_here(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or Path(spec).exists()


def _body(making: Making, measured: dict[str, Fidelity]) -> str:
    return "\n\n".join(
        [
            f"# {_title(making)}",
            _what(making),
            f"## What it measures\n\n{_figures(making, measured)}",
            "![curves](curves.png)",
            f"## {USE}\n\n{_usage(making)}",
            f"## {MADE}\n\n{_how(making)}",
            f"## Limits\n\n{_limits(making)}",
            "",
        ]
    )


def _what(making: Making) -> str:
    return (
        f"`{making.base}` with its softmax attention swapped for **{making.method.method}**. "
        f"{making.method.description} The swapped model was fitted to predict what the original predicts; weights that "
        "no stage below trains are the original's."
    )


def _figures(making: Making, measured: dict[str, Fidelity]) -> str:
    rows = [
        "| text | tokens | KL(base ‖ variant), nats/token | perplexity | perplexity of the base | same top token |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {figures.tokens:,} | {figures.kl:.4f} | {figures.perplexity:.2f} | "
            f"{figures.base_perplexity:.2f} | {figures.top1_agreement:.1%} |"
            for name, figures in measured.items()
        ),
    ]
    context = making.config.eval.context
    note = (
        f"Means over the predicted tokens of blocks of {context}; in each block every token but the first is predicted "
        "once, from those before it. The validation text may have guided choices"
        + ("; the other did not." if len(measured) > 1 else ".")
    )
    return "\n".join(rows) + f"\n\n{note}"


def _usage(making: Making) -> str:
    to = making.config.push_to
    repository = HubSpec.parse(to).arguments if to else ANY_REPOSITORY
    place = to or making.config.output + "/variant"
    generate = (
        'inputs = tokenizer("The old man looked at the sea and", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
    )
    return (
        "In a clone of the project that made it:\n\n"
        "```python\n"
        "import attention\n\n"
        f"model, tokenizer = attention.load({json.dumps(place, ensure_ascii=False)})\n"
        f"{generate}```\n\n"
        "From the Hub, where its code travels with it, with transformers alone:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({repository}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({repository}, trust_remote_code=True)\n"
        f"{generate}```"
    )


def _options(config: MechanismConfig) -> str:
    """All options of a method; where each layer has its own, those that are not the method's defaults."""
    if not isinstance(config, LayersConfig):
        options = {name: value for name, value in config.to_dict().items() if name != "method"}
        return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "none"
    said = []
    for choice in config.to_dict()["layers"]:
        fields = dataclasses.fields(CONFIGS[choice["method"]])
        own = [f"{field.name}={choice[field.name]!r}" for field in fields if choice[field.name] != field.default]
        said.append(f"layers {', '.join(map(str, choice['layers']))}: {choice['method']}({', '.join(own)})")
    return "; ".join(said)


def _how(making: Making) -> str:
    config, environment = making.config, making.environment
    data = config.data
    paths = data.train or ([data.dataset] if data.dataset and not hub_id(data.dataset) else [])
    sources = [Path(path).name for path in paths] or ([data.dataset] if data.dataset else [])
    text = config.card.train_data or ", ".join(sources) or "sampled from the base itself at temperature 1"
    text += ", its names exchanged" if data.rename else ""
    libraries = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "accelerate"))
    stages = "\n".join(f"- {_stage(stage)}" for stage in config.stages)
    return (
        f"```\n{environment['command']}\n```\n\n"
        f"{stages}\n\n"
        f"Method options: `{_options(making.method)}`. Text: {text}. In all {making.steps:,} steps, {making.tokens:,} "
        f"tokens, {making.seconds:,.0f} s on {environment['device']} ({environment['threads']} threads), "
        f"seed {config.seed}; {libraries}, Python {environment['python']}"
        + (f", code at {environment['commit']}" if environment["commit"] else "")
        + "."
        + "".join(f" Changed from step {step:,} on: {'; '.join(what)}." for step, what in making.changes.items())
        + _before(making)
    )


def _before(making: Making) -> str:
    """How the variant was made that the run went on from, in its own card's words; empty where that says nothing."""
    said = section(making.earlier or "", MADE).strip()
    if not said:
        return ""
    where = ", on another base," if making.config.move else ""
    return f"\n\n{BEFORE}, the variant that it goes on from was made{where} like this:\n\n{said}"


def _stage(stage: Any) -> str:
    trained = "mechanism" if stage.stage == "transfer" else stage.train
    if stage.layers:
        trained += f" of layers {', '.join(map(str, stage.layers))}"
    terms = " + ".join(f"{weight:g} {name}" for name, weight in stage.terms.items() if weight)
    if stage.stage == "on_policy":
        terms += f" (β {stage.beta:g}) in what the variant writes after {stage.prompt} tokens"
    sizes = f"{stage.batch_size} × {stage.context} tokens"
    if stage.final_context:
        last = stage.batch_size * stage.context // stage.final_context
        sizes += f", the last {stage.final_fraction:.0%} of {last} × {stage.final_context}"
    if getattr(stage, "short_context", None):
        sizes += f", {stage.short_share:.0%} of the sequences in pieces of {stage.short_context}"
    return (
        f"**{stage.stage}**: {stage.steps:,} steps of {sizes}, objective {terms}, "
        f"training {trained}, learning rates {stage.lr:g} (base's weights) and {stage.mechanism_lr:g} (mechanism's)"
    )


def _limits(making: Making) -> str:
    context = max(stage.final_context or stage.context for stage in making.config.stages)
    return (
        "It inherits whatever the base knows, gets wrong and is biased towards, and adds the differences measured "
        f"above. It was fitted at contexts of up to {context} tokens; beyond that, expect larger differences. It does "
        "not follow instructions, and what it writes is not fit to be relied on."
    )


def with_measurement(card: str, row: dict[str, Any]) -> str:
    """A card with what `trainer/evaluate.py` measured at a context, in place of what it said of that context before.

    Args:
        card: the text of a card.
        row: what was measured.

    Raises:
        ValueError: see `with_part`.
    """
    return with_part(card, f"Context {row['context']}", _measurement(row))


def with_part(card: str, title: str, text: str) -> str:
    """A card with a part of that title among what was measured further, in place of the one it had.

    Raises:
        ValueError: if the card has no section on its use, before which the figures go.
    """
    before, use, after = card.partition(f"\n## {USE}\n")
    if not use:
        raise ValueError(f"the card has no section '## {USE}', before which the figures go")
    before, _, further = before.partition(f"\n## {FURTHER}\n")
    found = (part.partition("\n") for part in re.split(r"^### ", further, flags=re.M)[1:])
    parts = {name.strip(): said.strip() for name, _, said in found} | {title: text}
    sections = "\n\n".join(f"### {name}\n\n{parts[name]}" for name in sorted(parts, key=_by_number))
    return f"{before}\n## {FURTHER}\n\nBy `trainer/evaluate.py`.\n\n{sections}\n{use}{after}"


def with_tasks(card: str, row: dict[str, Any]) -> str:
    """A card with what `trainer/tasks.py` measured, in place of what it said of tasks before.

    Raises:
        ValueError: see `with_part`.
    """
    some = f", on the first {row['limit']} examples of each" if row["limit"] else ""
    text = (
        f"By `trainer/tasks.py`: tasks of lm_eval {row['lm_eval']}{some}, with standard errors over examples.\n\n"
        + _table(["task", "examples", "shots", "metric", "variant", "base"], task_cells(row["tasks"]))
    )
    return with_part(card, "Tasks", text)


def task_cells(tasks: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Lines of a table: task, examples, shots, metric, figures of the variant and of the base."""
    return [
        [
            task,
            as_number(one["examples"], ","),
            as_number(one["shots"], ","),
            metric,
            with_error(one["variant"], one["error"], ".4f"),
            with_error(one["base"], one["base_error"], ".4f"),
        ]
        for task, metrics in tasks.items()
        for metric, one in metrics.items()
    ]


def _by_number(title: str) -> list[tuple[bool, int, str]]:
    """Sorts titles that end in numbers by these."""
    return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in title.split()]


def with_pairs(card: str, said: str) -> str:
    """A base's card with a section about its table of pairs at the end, in place of the one it had."""
    rest = heading_and_text(PAIRS_SECTION).sub("", card).rstrip()
    return (
        f"{rest}\n\n## {PAIRS_SECTION}\n\n`{PAIRS}`, made by `python -m trainer.pairs`, holds {said}. For "
        "`trainer/evaluate.py` a token that ends a rare pair which its block has had before is one that must be looked "
        "up.\n"
    )


def _measurement(row: dict[str, Any]) -> str:
    name = ", ".join(Path(text).name for text in row["text"])
    over = row["perplexity"] / row["base_perplexity"] - 1
    paragraphs = [
        f"{row['tokens']:,} predicted tokens of {name}: KL {row['kl']:.4f} nats/token, perplexity "
        f"{row['perplexity']:.2f} (base {row['base_perplexity']:.2f}, {over:+.1%}), same top token "
        f"{row['top1_agreement']:.1%}. The last query of a block reads at most {row['keys_read']} keys, or what takes "
        "as long.",
        "In nats per token, with standard errors over blocks. A hit ends a pair of tokens that its block has had "
        f"before, so many tokens back, and that is rare: {row['rare']}.",
        _table([RECALL_TABLE, *SLICE_COLUMNS], slice_cells(row["slices"])),
        _table([POSITION_TABLE, *SLICE_COLUMNS], slice_cells(row["positions"])),
    ]
    if asked := row.get("recall"):
        paragraphs += [
            f"Questions whose answer stands in the text (`trainer/recall.py`; {asked['recall']} texts a line, seed "
            f"{asked['seed']}): mean log-probability of the right answer among {CANDIDATES} candidates, in nats, and "
            f"the share of right choices; by chance {CHANCE:.1%}.",
            _table(["task", "tokens between", "variant", "base", "difference", ""], _recall_cells(asked)),
        ]
    if written := row.get("samples"):
        paragraphs += [
            f"{written['samples']} texts of {written['length']} tokens at temperature 1, each after "
            f"{written['prompt_length']} tokens of that text, beside the base's own, and the difference with its "
            "standard error:",
            _table(["", "variant", "base", "difference"], _writing_cells(written)),
        ]
    if drafting := row.get("drafting"):
        paragraphs.append(
            f"As an assistant that drafts {drafting['draft']} tokens at a time for the base, both greedy, it gives "
            f"{with_error(drafting['tokens_a_round'], drafting['error'], '.2f')} tokens a round, the base's own among "
            f"them, in {drafting['prompts']} texts of {drafting['length']} tokens; at most {drafting['draft'] + 1}. "
            "What is written is what the base writes alone."
        )
    if parts := row.get("ablations"):
        cells = [
            [name, f"{one['kl']:.4f}", f"{one['kl_change']:+.4f}", "does nothing" if one["does_nothing"] else ""]
            for name, one in parts.items()
        ]
        paragraphs += [
            f"With a part switched off in every layer, on {row['ablated_tokens']:,} tokens of that text:",
            _table(["without", "KL, nats/token", "change", ""], cells),
        ]
    return "\n\n".join(paragraphs)


def slice_cells(slices: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Lines of a table with a slice's name and `SLICE_COLUMNS`."""
    return [
        [
            name,
            f"{one['tokens']:,}",
            as_number(one["base_loss"], ".3f"),
            with_error(one["ce_excess"], one["ce_excess_error"], "+.3f"),
            with_error(one["kl"], one["kl_error"], ".4f"),
        ]
        for name, one in slices.items()
    ]


def as_number(value: float | None, form: str) -> str:
    """A number in that form; empty for None."""
    return "" if value is None else f"{value:{form}}"


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A number in that form, as text like "+0.012 ± 0.003"; empty for None."""
    return as_number(value, form) + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")


def _recall_cells(asked: dict[str, Any]) -> list[list[str]]:
    return [
        [
            task,
            between,
            *(f"{one[who]['score']:.2f}, {one[who]['right']:.0%}" for who in ("variant", "base")),
            with_error(one["difference"], one["error"], "+.2f"),
            "the base is at chance" if one["at_chance"] else "",
        ]
        for task, rows in asked["tasks"].items()
        for between, one in rows.items()
    ]


def as_difference(figures: dict[str, float | None]) -> str:
    """What `Writing.beside` gives for a figure, as text like "+1.2% ± 0.8%"; empty where there is no difference."""
    if figures["difference"] is None:
        return ""
    error = "" if figures["error"] is None else f" ± {figures['error']:.1%}"
    return f"{figures['difference']:+.1%}{error}"


def _writing_cells(written: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name.replace("_", " "),
            f"{figures['variant']:.4g}",
            f"{figures['base']:.4g}",
            as_difference(figures),
        ]
        for name, figures in written.items()
        if isinstance(figures, dict)
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
