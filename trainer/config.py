"""What a run is told: a YAML recipe with overrides from the command line, checked as a whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from attention.errors import CheckpointError
from attention.hub import HubSpec
from attention.mechanism import ConfigError
from attention.registry import config_from_dict
from attention.variant import causal_models

OPTION = re.compile(r"--[A-Za-z_]")
# What the configs of transformers call a model's sizes, all families alike, and its activation function.
SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")
ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation")
Fraction = Annotated[float, Field(ge=0, le=1)]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # no shell has looked at what stands in a recipe


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 has them: `no`, `on`, 0123 and dates are text, 1e-3 is a number."""

    yaml_implicit_resolvers: ClassVar = {}


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?|[-+]?[0-9]+[eE][-+]?[0-9]{1,3}|[-+]?\.inf|\.nan",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def read_yaml(text: str) -> Any:
    """A value from YAML.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, Loader=_Loader)


class Section(BaseModel):
    """A part of a config: no unknown options, no silent conversions."""

    model_config = ConfigDict(extra="forbid", validate_default=True, coerce_numbers_to_str=True)


class DataConfig(Section):
    """The text to train and validate on; all tokens are joined into one stream, each document ended by eos.

    Attributes:
        train: files, or patterns of files, of text, JSON or Parquet, packed or not; see `documents`. None, with no
            `dataset`: text sampled from the base.
        valid: the same for validation. None: the last `valid_fraction` of the training tokens.
        dataset: a data set on the Hub, for example Salesforce/wikitext.
        name: its configuration, for example wikitext-2-raw-v1.
        revision: its git revision.
        train_split, valid_split: its splits; without a `valid_split` see `valid`.
        test_split: its split to measure on once, at the end, for the card, where there is no `eval.text`.
        column: the field that holds the text, of a Hub data set, JSON or Parquet.
        rename: exchange the names in the training text for others, another choice in each passage, so that a variant
            learns to look them up where the base knows its own text's by heart; see `names.rename`. Needs a text.
        documents: where a document of a text file ends: at an empty line ("paragraph"), at every line ("line"), or at
            the end of the file ("document"). The rows of a Hub data set, JSON and Parquet are documents,
            unless this is "document", which joins them as they stand.
        sampled_tokens: how much text to sample from the base.
        sample_batch: how many texts to sample at a time.
        valid_fraction: share of the training tokens kept for validation where there is no other text for it.
        cache: folder for sampled text, and for what the base expects.
        teacher_cache: keep what the base expects of the training text, its likeliest tokens at each place, so that
            further fits to it need not compute it; for stages distil with kl and ce alone.
        teacher_error: about the largest share of KL that is lost by that; see `teacher_cache.open_cache`.
    """

    train: list[str] | None = None
    valid: list[str] | None = None
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    valid_split: str | None = "validation"
    test_split: str | None = None
    column: str = "text"
    rename: bool = False
    documents: Literal["paragraph", "line", "document"] | None = None
    sampled_tokens: Annotated[int, Field(ge=1024)] = 524_288
    sample_batch: Annotated[int, Field(ge=1)] = 64
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    cache: Folder = "runs/cache"
    teacher_cache: bool = False
    teacher_error: Annotated[float, Field(gt=0, lt=1)] = 0.05

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {
                key: [value] if key in ("train", "valid") and isinstance(value, str) else value
                for key, value in values.items()
            }
        return values

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.train and self.dataset:
            raise ValueError("give either train (files) or dataset (on the Hub), not both")
        if empty := [name for name in ("train", "valid") if getattr(self, name) == []]:
            raise ValueError(f"{' and '.join(empty)} must name a file, or be null")
        if self.test_split and not self.dataset:
            raise ValueError("test_split is a split of dataset; for a file there is eval.text")
        return self


class ScheduleConfig(Section):
    """The learning rate over a stage, as a factor: linear warm-up, a constant part, decay to `final`.

    Attributes:
        warmup: share of the stage for warm-up.
        constant: share of the stage at full rate before decay begins (after the warm-up).
        decay: shape of the decay.
        final: the factor at the end.
    """

    warmup: Fraction = 0.05
    constant: Fraction = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    final: Fraction = 0.05

    @model_validator(mode="after")
    def _fits(self) -> ScheduleConfig:
        if self.warmup + self.constant > 1:
            raise ValueError("warmup and constant are shares of the stage; together they must not exceed 1")
        return self


class StageConfig(Section):
    """What all stages have.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences of a step, over all processes and micro-batches.
        micro_batch_size: sequences of one forward pass on one process; None: as few passes as there can be, one.
        context: tokens of a sequence.
        final_context: context of the last part of the stage, with as many tokens a step; None: the same.
        final_fraction: share of the steps that the last part takes.
        lr: learning rate of weights that the base has too.
        mechanism_lr: learning rate of the mechanisms' own parameters.
        weight_decay: decoupled, on matrices only, not on the mechanisms' parameters.
        betas: of AdamW.
        clip: largest norm of the gradient; None: not clipped.
        schedule: the learning rate over the stage.
    """

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)] = 4
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    context: Annotated[int, Field(ge=2)] = 512
    final_context: Annotated[int, Field(ge=2)] | None = None
    final_fraction: Fraction = 0.15
    lr: Annotated[float, Field(gt=0)] = 5e-4
    mechanism_lr: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _final_batch(self) -> StageConfig:
        tokens = self.batch_size * self.context
        if self.final_context and tokens % self.final_context:
            raise ValueError(f"final_context must divide the {tokens} tokens of a step (batch_size × context)")
        return self

    def predicted(self, context: int) -> int:
        """How many tokens of a sequence of `context` the loss is a mean over."""
        return context - 1


class TextConfig(StageConfig):
    """What the stages have that learn next tokens from a text.

    Attributes:
        short_context: read some sequences in pieces of this many tokens, each as a text of its own, so that a model
            that learns long texts keeps to short ones; None: none.
        short_share: share of the sequences of a forward pass that are read so; what is left of a whole one, by chance.
    """

    short_context: Annotated[int, Field(ge=2)] | None = None
    short_share: Fraction = 0.5

    @model_validator(mode="after")
    def _whole_pieces(self) -> TextConfig:
        contexts = [self.context, self.final_context or self.context]
        if self.short_context and any(context % self.short_context for context in contexts):
            raise ValueError(f"short_context must divide the contexts {sorted(set(contexts))}")
        return self


class PretrainConfig(TextConfig):
    """Cross-entropy on text.

    Attributes:
        muon: train the blocks' matrices by Muon at `muon_lr`, and only the rest by AdamW.
        position_lr: learning rate of the learned position embeddings; None: `lr`.
        skip_positions: let positions skip inside each sequence, up to the model's last; see
            `positions.skipping_positions`. Needs a learned table of positions.
    """

    stage: Literal["pretrain"] = "pretrain"
    muon: bool = False
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    muon_momentum: Fraction = 0.95
    position_lr: Annotated[float, Field(gt=0)] | None = None
    skip_positions: bool = False


class FitConfig(StageConfig):
    """What the stages have that fit a variant to its base.

    Attributes:
        layers: numbers of the layers to train, from 0; None: all. The others stay as they are, which saves time where
            they are the first ones.
    """

    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    @property
    def terms(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        raise NotImplementedError


class TransferConfig(FitConfig):
    """Each layer's mechanism learns that layer's softmax attention, on what the base itself computes.

    Attributes:
        output: weight of the squared error of the mixed values, in each sequence over the mean square of the base's.
        weights: weight of the cross-entropy of the attention weights; needs (T, T) matrices.
        selection: weight of the loss of what chooses keys, where a method learns that; needs (T, T) matrices there.
    """

    stage: Literal["transfer"] = "transfer"
    output: Annotated[float, Field(ge=0)] = 1.0
    weights: Annotated[float, Field(ge=0)] = 0.0
    selection: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _has_objective(self) -> TransferConfig:
        if not (self.output or self.weights or self.selection):
            raise ValueError("output, weights and selection are all 0: there is nothing to learn")
        return self

    @property
    def terms(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("output", "weights", "selection")}


class Objective(Section):
    """Weights of the terms of the distillation loss, each in nats per token; `l1` weighs the mechanisms' penalty.

    Attributes:
        kl: KL(base ‖ variant).
        ce: cross-entropy of the text.
        reverse_kl: KL(variant ‖ base).
        jsd: Jensen–Shannon divergence.
        l1: the sum of the mechanisms' `penalty`.
    """

    kl: Annotated[float, Field(ge=0)] = 1.0
    ce: Annotated[float, Field(ge=0)] = 0.0
    reverse_kl: Annotated[float, Field(ge=0)] = 0.0
    jsd: Annotated[float, Field(ge=0)] = 0.0
    l1: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _has_objective(self) -> Objective:
        if not (self.kl or self.ce or self.reverse_kl or self.jsd):
            raise ValueError("kl, ce, reverse_kl and jsd are all 0: there is nothing to learn")
        return self


class DistilConfig(FitConfig, TextConfig):
    """The variant learns the base's next-token distributions.

    Attributes:
        train: the mechanisms' own parameters, all of the attention layers, or all weights.
        objective: the terms of the loss.
    """

    stage: Literal["distil"] = "distil"
    train: Literal["mechanism", "attention", "all"] = "attention"
    objective: Objective = Objective()

    @property
    def terms(self) -> dict[str, float]:
        return self.objective.model_dump()


class OnPolicyConfig(FitConfig):
    """Base and variant are compared in texts that the variant itself writes, against drift in what it writes.

    The divergence is the generalised Jensen–Shannon one, β KL(base ‖ mix) + (1 − β) KL(variant ‖ mix) with the mix
    β base + (1 − β) variant (arXiv 2306.13649), and at the ends of β, where that is 0, what its gradient comes near.

    Attributes:
        prompt: tokens at the beginning of each sequence that are the text's; the variant writes the others, and the
            loss is a mean over these.
        beta: from 0, KL(base ‖ variant), over 0.5, the Jensen–Shannon divergence, to 1, KL(variant ‖ base).
        train: as in distil.
    """

    stage: Literal["on_policy"] = "on_policy"
    prompt: Annotated[int, Field(ge=1)] = 64
    beta: Fraction = 1.0
    train: Literal["mechanism", "attention", "all"] = "attention"

    @model_validator(mode="after")
    def _leaves_room(self) -> OnPolicyConfig:
        shortest = min(self.context, self.final_context or self.context)
        if self.prompt >= shortest:
            raise ValueError(f"prompt must leave the variant something to write in {shortest} tokens")
        return self

    @property
    def terms(self) -> dict[str, float]:
        return {{0.0: "kl", 1.0: "reverse_kl"}.get(self.beta, "jsd"): 1.0}

    def predicted(self, context: int) -> int:
        return context - self.prompt


KINDS = ("pretrain", "transfer", "distil", "on_policy")
AnyStage = Annotated[PretrainConfig | TransferConfig | DistilConfig | OnPolicyConfig, Field(discriminator="stage")]


class EvalConfig(Section):
    """Measuring.

    Attributes:
        every: steps between validations; also at the start and the end. None: only there.
        tokens: validation tokens to measure on, from the beginning; None: all.
        context: tokens of a block.
        batch_size: blocks of a forward pass.
        text: a text to measure on once, at the end, for the card; never used to choose anything.
        keep: which weights a run ends with: those of the last step or the best on the validation text.
    """

    every: Annotated[int, Field(ge=1)] | None = 100
    tokens: Annotated[int, Field(ge=2)] | None = 32_768
    context: Annotated[int, Field(ge=2)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 8
    text: str | None = None
    keep: Literal["last", "best"] = "last"


class SampleConfig(Section):
    """Texts written from fixed prompts by base and variant, greedily for temperature 0, otherwise with a fixed seed.

    Attributes:
        every: steps between samples; also at the end. None: only there.
    """

    prompts: list[str] = ["", "The old man looked at the sea and"]
    length: Annotated[int, Field(ge=1)] = 60
    temperature: Annotated[float, Field(ge=0)] = 0.8
    every: Annotated[int, Field(ge=1)] | None = None


class CheckpointConfig(Section):
    """Checkpoints to resume from: every `every` steps (None: only when stopped), of which the last `keep` remain."""

    every: Annotated[int, Field(ge=1)] | None = 200
    keep: Annotated[int, Field(ge=1)] = 2


class CardConfig(Section):
    """What the model card cannot know by itself.

    Attributes:
        name: the variant's name; None: the method and the base's name.
        license: an SPDX identifier that the Hub knows.
        language: ISO 639-1 code of the text.
        train_data, eval_data: what the training text and the text measured at the end are, in a few words.
    """

    name: str | None = None
    license: str = "mit"
    language: str = "en"
    train_data: str | None = None
    eval_data: str | None = None


class NewModel(Section):
    """A new model to pretrain.

    Attributes:
        tokenizer: a folder or Hub id that has the tokenizer.
        family: the `model_type` of a causal language model of transformers.
        config: options of that type's config; the vocabulary is the tokenizer's.
    """

    tokenizer: str
    family: str
    config: dict[str, Any] = {}

    @field_validator("family")
    @classmethod
    def _exists(cls, value: str) -> str:
        try:
            causal_models(value)
        except CheckpointError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("config")
    @classmethod
    def _fits(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        family = info.data.get("family")
        if family is not None and (problems := _unusable(CONFIG_MAPPING[family], value)):
            raise ValueError("\n".join(problems))
        return value


def _unusable(kind: type[PreTrainedConfig], options: dict[str, Any]) -> list[str]:
    """Sentences on options of a new model that its family's config has not, or that have other values."""
    known = [name for name in signature(kind).parameters if name != "kwargs"] + [*kind.attribute_map]
    problems = []
    for name in options.keys() - known:
        close = get_close_matches(name, known, 1)
        problems.append(f"{name!r} is not an option of {kind.__name__}" + (f"; is {close[0]} meant?" if close else ""))
    if problems:
        return sorted(problems)
    try:
        config = kind(**options)
    except (StrictDataclassError, TypeError, ValueError) as error:
        return [str(error.__cause__ or error)]
    sizes = {name: getattr(config, name, None) for name in SIZES}
    problems += [
        f"{kind.attribute_map.get(name, name)} must be at least 1 (got {size})"
        for name, size in sizes.items()
        if isinstance(size, int) and size < 1
    ]
    activations = {name: getattr(config, name, None) for name in ACTIVATIONS}
    problems += [
        f"{name} {value!r} is not one that transformers has"
        for name, value in activations.items()
        if isinstance(value, str) and value not in ACT2FN
    ]
    return problems


class RunConfig(Section):
    """A whole run.

    Attributes:
        base: folder or Hub id of the pretrained model: teacher of variants, start of pretrain.
        new: a model to pretrain from random weights instead.
        positions: how many positions the base is given before it is pretrained further; None: those that it has.
        positions_start: where the new position embeddings start: the old ones stretched over them ("interpolate"), the
            last half of them stretched ("stretch"), or all kept and repeated ("repeat"); see
            `positions.extend_positions`.
        variant: a variant to continue with, instead of a fresh one.
        move: take the variant's mechanisms, and what its fit changed, over to `base`, which is another than its own.
        attention: method and its options; see `attention.CONFIGS`. With `variant`, in place of the variant's own, whose
            weights must fit it; None: the variant's own.
        stages: what to do, in this order.
        max_steps: steps in all, shared among the stages in proportion; None: as the stages say.
        output: folder of the run.
        resume: go on from the newest intact checkpoint in `output`, if there is one.
        seed: of everything random.
        precision: "auto" is bf16 where the device has it in hardware, otherwise float32.
        cpu: use the CPU even where there is a GPU.
        gradient_checkpointing: recompute activations in the backward pass.
        push_to: repository on the Hub, "user/repo[/subfolder][@revision]", to push the variant to at the end.
        push_every: steps between pushes while training, in the background; None: only at the end.
        private: whether a repository that is created is private.
        card: what the model card cannot know by itself.
        trackers: trackers of Accelerate, for example tensorboard, wandb or trackio.
        dry_run: one step of each stage, one evaluation, one save, and an estimate for the whole run.
        log_every: steps between rows of the history.
    """

    base: str | None = None
    new: NewModel | None = None
    positions: Annotated[int, Field(ge=2)] | None = None
    positions_start: Literal["interpolate", "stretch", "repeat"] = "interpolate"
    variant: str | None = None
    move: bool = False
    attention: dict[str, Any] | None = None
    data: DataConfig = DataConfig()
    stages: Annotated[list[AnyStage], Field(min_length=1)]
    eval: EvalConfig = EvalConfig()
    samples: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_steps: Annotated[int, Field(ge=1)] | None = None
    output: Annotated[Folder, Field(min_length=1)]
    resume: bool = False
    seed: int = 0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    cpu: bool = False
    gradient_checkpointing: bool = False
    push_to: str | None = None
    push_every: Annotated[int, Field(ge=1)] | None = None
    private: bool = False
    card: CardConfig = CardConfig()
    trackers: list[str] = []
    dry_run: bool = False
    log_every: Annotated[int, Field(ge=1)] = 10

    @property
    def pretrains(self) -> bool:
        return self.stages[0].stage == "pretrain"

    @property
    def text_files(self) -> list[str]:
        """All local files of text, or patterns of some, that the run reads."""
        return [*(self.data.train or []), *(self.data.valid or []), *([self.eval.text] if self.eval.text else [])]

    def to_yaml(self) -> str:
        """The config as a recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("push_to")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                owned = "/" in HubSpec.parse(value).repo_id
            except CheckpointError:
                owned = False
            if not owned:
                raise ValueError("must be user/repo[/subfolder][@revision]")
        return value

    @field_validator("attention")
    @classmethod
    def _attention_exists(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                config_from_dict(value)
            except ConfigError as error:
                raise ValueError("\n".join(error.problems)) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := contradictions(self.model_dump()):
            raise ValueError("\n".join(problems))
        if self.max_steps is not None:
            shares = share_steps([stage.steps for stage in self.stages], self.max_steps)
            for stage, steps in zip(self.stages, shares, strict=True):
                stage.steps = steps
            self.max_steps = None
        return self


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """Sentences on options of a run that do not go together; `values` may be wrong in other ways, too."""
    stages = values.get("stages")
    kinds = [stage.get("stage") for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    data = values.get("data") if isinstance(values.get("data"), Mapping) else {}
    has = {name: values.get(name) is not None for name in ("base", "new", "variant", "attention")}
    problems = []
    if "pretrain" in kinds:
        if set(kinds) != {"pretrain"}:
            problems.append("stages: pretrain cannot be mixed with stages that fit a variant; make two runs")
        if has["base"] == has["new"]:
            problems.append("pretrain starts either from base or from new: give one of the two")
        if has["attention"] or has["variant"]:
            problems.append("pretrain trains a base: attention and variant have no meaning there")
        if has["new"] and not (data.get("train") or data.get("dataset")):
            problems.append("a new model cannot write its own training text: give data.train or data.dataset")
        if values.get("push_to"):
            problems.append("push_to is for variants; push a base with `hf upload`")
    elif kinds:
        if not has["base"] or has["new"]:
            problems.append("stages that fit a variant need base, a pretrained model, and no new")
        if not has["attention"] and not has["variant"]:
            problems.append("give attention (method and options), or variant (a folder to continue with), or both")
    if values.get("positions") is not None and ("pretrain" not in kinds or has["new"]):
        problems.append(
            "positions gives a base more of them before it is pretrained further; a new model is told by "
            "new.config, a variant has its base's"
        )
    if values.get("move") and not has["variant"]:
        problems.append("move takes a variant over to another base: give variant")
    if data.get("teacher_cache"):
        problems += _teacher_cache_problems(stages if isinstance(stages, list) else [])
    steps = values.get("max_steps")
    if isinstance(steps, int) and steps < len(kinds):
        problems.append(f"max_steps: {len(kinds)} stages need at least as many steps; got {steps}")
    return problems


def _teacher_cache_problems(stages: list[Any]) -> list[str]:
    distils = [stage for stage in stages if isinstance(stage, Mapping) and stage.get("stage") == "distil"]
    if not distils:
        return ["data.teacher_cache keeps what the base expects for a stage distil, and there is none"]
    if any(stage.get("short_context") for stage in distils):
        return ["data.teacher_cache keeps what the base expects in whole sequences; leave out short_context"]
    objectives = [stage.get("objective") for stage in distils]
    whole = {
        name for goal in objectives if isinstance(goal, Mapping) for name in ("reverse_kl", "jsd") if goal.get(name)
    }
    if whole:
        return [
            f"data.teacher_cache keeps the likeliest tokens, and {', '.join(sorted(whole))} need all: leave one out"
        ]
    return []


def share_steps(steps: Sequence[float], total: int) -> list[int]:
    """Shares `total` ≥ len(steps) steps in the proportions of `steps`, at least 1 each."""
    shares = [max(1, round(total * part / sum(steps))) for part in steps]
    while (excess := sum(shares) - total) != 0:
        largest = max(range(len(shares)), key=shares.__getitem__)
        shares[largest] -= 1 if excess > 0 else -1
    return shares


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe and applies overrides such as `["--data.train", "book.txt", "--stages.distil.steps", "50"]`.

    A stage is named by its place (from 0); its kind names all stages of that kind. Text is taken as it is, other values
    are YAML, and a switch without a value is true.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    try:
        values = read_yaml(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(str(path), [f"is not YAML: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["must be a mapping of options to values"])
    problems = apply_overrides(values, overrides)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [*_sentences(error), *contradictions(values)]
    if problems:
        raise ConfigError(str(path), list(dict.fromkeys(problems)))
    return config


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets dotted options in `values`; returns sentences about those that could not be set.

    An option that is text, or a list of texts, takes its words as they are; all others take YAML.
    """
    problems = []
    for option, words in _options(overrides, problems):
        path = option.split(".")
        try:
            _set(values, path, _value(_annotation(path), words))
        except (yaml.YAMLError, RecursionError):
            problems.append(f"--{option} {words[0]}: the value is not YAML")
        except (LookupError, TypeError, ValueError) as error:
            why = f": {error}" if type(error) is ValueError else " has no place in the recipe"
            problems.append(f"--{option}{why}")
    return problems


def _options(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words that are its value; words that belong to none go to `problems`."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not OPTION.match(word):
            problems.append(f"{word!r} is not an option; options are written --name value")
            continue
        option, given, text = word[2:].partition("=")
        value = [text] if given else []
        most = sys.maxsize if _is_texts(_annotation(option.split("."))) else 1
        while not given and rest and len(value) < most and not OPTION.match(rest[0]):
            value.append(rest.pop(0))
        yield option, value


def _value(annotation: Any, words: list[str]) -> Any:
    """The value that words are for an option of a type.

    Raises:
        ValueError, yaml.YAMLError: if they are none.
    """
    if words == ["null"] and NoneType in get_args(annotation):
        return None
    if not words:
        if annotation not in (bool, None):
            raise ValueError("needs a value")
        return True
    if _is_texts(annotation):
        return _texts(words)
    if _is_text(annotation):
        return words[0]
    value = read_yaml(words[0])
    return words[0] if isinstance(value, str) and words[0][0] not in "'\"" else value


def _texts(words: list[str]) -> list[str]:
    """A list from words, or from one that is a list in YAML and not a file."""
    if len(words) == 1 and words[0].startswith("[") and not Path(words[0]).exists():
        try:
            items = read_yaml(words[0])
        except yaml.YAMLError:
            return words
        return items if isinstance(items, list) else words
    return words


def _annotation(path: list[str]) -> Any:
    """The type of a dotted option; None where it is free, or there is no such option."""
    sections: list[type[Section]] = [RunConfig]
    found = None
    for name in path:
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        if fields:
            found = fields[0].annotation
            sections = list(_sections(found))
        elif not (name.isdigit() or name in KINDS):  # which name one of several, of the same type
            return None
    return found


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _is_text(annotation: Any) -> bool:
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return all(part in (str, NoneType) or get_origin(part) is Literal for part in parts)


def _is_texts(annotation: Any) -> bool:
    return annotation in (list[str], list[str] | None)


def _set(values: Any, path: list[str], value: Any) -> None:
    name, *rest = path
    for place in _places(values, name):
        if not rest:
            values[place] = value
            continue
        if isinstance(values, dict) and values.get(place) is None:
            values[place] = {}
        _set(values[place], rest, value)


def _places(values: Any, name: str) -> list[str] | list[int]:
    """The key of a mapping; of a list the number of an item, or those of all stages of a kind.

    Raises:
        LookupError, TypeError, ValueError: if there is none.
    """
    if isinstance(values, dict):
        return [name]
    if not isinstance(values, list):
        raise TypeError(f"{values!r} has no parts")
    if name.isdigit():
        return [range(len(values))[int(name)]]
    kinds = [item.get("stage") if isinstance(item, dict) else None for item in values]
    if name not in kinds:
        raise ValueError(f"there is no {name!r} among {', '.join(f'{at} ({kind})' for at, kind in enumerate(kinds))}")
    return [place for place, kind in enumerate(kinds) if kind == name]


def _sentences(error: ValidationError) -> list[str]:
    sentences = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if part not in KINDS)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "is not an option"
        given = f" (got {item['input']!r})" if isinstance(item["input"], str | int | float | bool | None) else ""
        sentences += [f"{place}: {line}{given}" if place else line for line in message.splitlines()]
    return sentences
