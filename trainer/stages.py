"""What each stage computes: a module from a batch of tokens to a loss summed over tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel

from attention import Mechanism, SoftmaxConfig, Variant, convert
from attention.mechanism import is_mechanism, repeat_heads
from attention.recording import Call, recorded
from attention.variant import attention_modules, mechanisms_of

from .config import DistilConfig, OnPolicyConfig, PretrainConfig, StageConfig, TextConfig, TransferConfig
from .losses import last_hidden, output_matrix, vocabulary_loss
from .optim import repeated_layers
from .positions import skipping_positions
from .samples import continue_texts
from .teacher_cache import TeacherCache

logger = logging.getLogger(__name__)


@dataclass
class Losses:
    """What a forward pass gives: the loss to minimise and its terms, without gradient, all summed over tokens."""

    loss: Tensor
    terms: dict[str, Tensor]

    def scaled(self, factor: float) -> Losses:
        return Losses(self.loss * factor, {name: value * factor for name, value in self.terms.items()})

    def plus(self, other: Losses) -> Losses:
        return Losses(self.loss + other.loss, {name: value + other.terms[name] for name, value in self.terms.items()})


class Learner(nn.Module):
    """A model with the loss that it learns from; everything trained is used inside `forward`, as DDP and FSDP ask.

    Attributes:
        model: what is trained.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Losses:
        """Losses of (B, T) tokens, over B · `stage.predicted(T)` predicted ones."""
        raise NotImplementedError

    def close(self) -> None:
        """Leaves the model as it would be without the learner."""


def name_layers(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Has Accelerate wrap a model's layers for FSDP, unless its own settings say what to wrap.

    A class's own list may name layers that this model has not, and Accelerate 1.10 reads none.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in repeated_layers(model)})


class TextLearner(Learner):
    """Learns from whole sequences, and from pieces of others (`TextConfig.short_context`)."""

    def __init__(self, model: PreTrainedModel, stage: TextConfig):
        super().__init__(model)
        self.short, self.short_share = stage.short_context, stage.short_share

    def forward(self, input_ids: Tensor) -> Losses:
        if not self.short:
            return self._read(input_ids)
        count = int(self.short_share * len(input_ids) + torch.rand(()))
        read = []
        for part, length in zip(input_ids.tensor_split([count]), (self.short, input_ids.shape[1]), strict=True):
            if len(part):  # no piece's first token is predicted, and yet all sequences weigh the same
                scale = part[:, 1:].numel() / (part.numel() - part.numel() // length)
                read.append(self._read(part.reshape(-1, length)).scaled(scale))
        return read[0] if len(read) == 1 else read[0].plus(read[1])

    def _read(self, input_ids: Tensor) -> Losses:
        """Losses summed over the predicted tokens of (B, T) sequences."""
        raise NotImplementedError


class Pretrain(TextLearner):
    """Cross-entropy of the next token."""

    def __init__(self, model: PreTrainedModel, stage: PretrainConfig):
        super().__init__(model, stage)
        self.skips = stage.skip_positions

    def _read(self, input_ids: Tensor) -> Losses:
        inputs = {}
        if self.skips:
            # With a mask, as transformers takes positions that skip without one for several sequences side by side.
            positions = skipping_positions(input_ids, self.model.config.max_position_embeddings)
            inputs = {"position_ids": positions, "attention_mask": torch.ones_like(input_ids)}
        hidden = last_hidden(self.model, input_ids, **inputs)[:, :-1].flatten(0, 1)
        return Losses(*vocabulary_loss(hidden, output_matrix(self.model), {"ce": 1.0}, labels=_labels(input_ids)))


class Distil(TextLearner):
    """The base's distributions of the next token, and what else the objective asks for."""

    def __init__(
        self,
        model: Variant,
        base: PreTrainedModel,
        stage: DistilConfig,
        cache: TeacherCache | None = None,
    ):
        super().__init__(model, stage)
        self.objective = stage.objective
        self.base = (base,)  # in a tuple, so that it is neither trained, nor saved, nor moved
        self.cache = cache
        # Taken while the mechanisms run: then FSDP has their parameters whole, and recomputed activations fit.
        self.penalties: list[Tensor] = []
        self.hooks = [mechanism.register_forward_hook(self._collect) for mechanism in model.mechanisms]

    def _collect(self, mechanism: Mechanism, *_: object) -> None:
        if mechanism.training and (penalty := mechanism.penalty()) is not None:
            self.penalties.append(penalty)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.cache is not None:
            self.cache.store()
            logger.info("%s", self.cache.describe())

    def _teacher(self, input_ids: Tensor) -> dict[str, Any]:
        """What the base expects, as `vocabulary_loss` takes it."""
        if self.cache is not None:
            return {"teacher_top": self.cache(input_ids)}
        base = self.base[0]
        with torch.no_grad():
            hidden = last_hidden(base, input_ids)[:, :-1].flatten(0, 1)
        return {"teacher_hidden": hidden, "teacher_weight": output_matrix(base)}

    def _read(self, input_ids: Tensor) -> Losses:
        terms = self.objective.model_dump(exclude={"l1"})
        self.penalties.clear()
        hidden = last_hidden(self.model, input_ids)[:, :-1].flatten(0, 1)
        loss, sums = vocabulary_loss(
            hidden,
            output_matrix(self.model),
            terms,
            labels=_labels(input_ids),
            **self._teacher(input_ids),
        )
        if self.penalties:
            penalty = len(hidden) * torch.stack(self.penalties).sum()
            loss = loss + self.objective.l1 * penalty
            sums["l1"] = penalty.detach()
        return Losses(loss, sums)


class Transfer(Learner):
    """Each mechanism on the queries, keys, values and inputs that the base itself computes in that layer."""

    def __init__(self, model: Variant, base: PreTrainedModel, stage: TransferConfig):
        super().__init__(model.base_model)
        self.stage = stage
        self.teacher = (convert(base, SoftmaxConfig(), share=True).eval(),)

    def forward(self, input_ids: Tensor) -> Losses:
        teacher = self.teacher[0]
        with torch.no_grad(), recorded(teacher.mechanisms) as calls:
            teacher.base_model(input_ids, use_cache=False)
        tokens = input_ids.shape[0] * (input_ids.shape[1] - 1)
        students = zip(mechanisms_of(self.model), teacher.mechanisms, calls, strict=True)
        wanted = self.stage.layers
        layers = [
            self._layer(*student, input_ids)
            for number, student in enumerate(students)
            if wanted is None or number in wanted
        ]
        terms = {name: [layer[name] for layer in layers if name in layer] for name in self.stage.terms}
        sums = {name: tokens * torch.stack(values).mean() for name, values in terms.items() if values}
        loss = sum(self.stage.terms[name] * value for name, value in sums.items())
        return Losses(loss, {name: value.detach() for name, value in sums.items()})

    def _layer(self, student: Mechanism, teacher: Mechanism, call: Call, input_ids: Tensor) -> dict[str, Tensor]:
        """The terms that one layer has, each a mean over its tokens."""
        terms = {}
        if self.stage.output:
            mixed = student(call.q, call.k, call.v, call.x, tokens=input_ids)
            errors, scales = ((part.square().mean((1, 2, 3))) for part in (mixed - call.mixed, call.mixed))
            terms["output"] = (errors / scales).mean()
        if self.stage.weights:
            wanted = teacher.attention_map(call.q, repeat_heads(call.k, call.q.shape[1]), call.x)
            learned = student.attention_map(call.q, call.k, call.x, input_ids)
            terms["weights"] = -(wanted * learned.clamp_min(1e-6).log()).sum(-1).mean()
        if self.stage.selection:
            selection = student.selection_loss(call.q, call.k, call.x, input_ids)
            terms |= {} if selection is None else {"selection": selection}
        return terms


class OnPolicy(Learner):
    """What base and variant expect in texts that the variant itself writes (arXiv 2306.13649).

    Each sequence's first tokens are the text's, a prompt; the rest the variant writes, at temperature 1 from the whole
    distribution, with random numbers from torch's global generator. No gradient flows through the choice of tokens,
    and the prompt's own tokens are not in the loss.
    """

    def __init__(self, model: Variant, base: PreTrainedModel, stage: OnPolicyConfig):
        super().__init__(model)
        self.base = (base,)  # as in `Distil`
        self.stage = stage

    def write(self, input_ids: Tensor) -> Tensor:
        """(B, T) the first tokens of (B, T) sequences, and what the variant writes after them."""
        prompt, training = self.stage.prompt, self.model.training
        self.model.eval()  # in training it would keep no cache with recomputed activations
        written = continue_texts(self.model, input_ids[:, :prompt], input_ids.shape[1] - prompt)
        self.model.train(training)
        torch.clear_autocast_cache()  # its copies of weights have no gradients; older torch trains with them (#165068)
        return written

    def forward(self, input_ids: Tensor) -> Losses:
        base, texts = self.base[0], self.write(input_ids)
        counted = slice(self.stage.prompt - 1, -1)  # what predicts the tokens after the prompt
        with torch.no_grad():
            teacher = last_hidden(base, texts)[:, counted].flatten(0, 1)
        loss, sums = vocabulary_loss(
            last_hidden(self.model, texts)[:, counted].flatten(0, 1),
            output_matrix(self.model),
            self.stage.terms,
            teacher_hidden=teacher,
            teacher_weight=output_matrix(base),
            beta=self.stage.beta,
        )
        return Losses(loss, sums)


def _labels(input_ids: Tensor) -> Tensor:
    return input_ids[:, 1:].flatten()


def build_learner(
    stage: StageConfig, model: PreTrainedModel, base: PreTrainedModel | None, cache: TeacherCache | None = None
) -> Learner:
    """The learner of a stage; only what the stage trains requires gradients afterwards.

    Args:
        cache: what the base expects, for a stage that can take it from there.

    Raises:
        ValueError: if the stage would train nothing.
    """
    trained = trained_names(stage, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for mechanism in getattr(model, "mechanisms", []):
        _only_used(stage, mechanism)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"stage {stage.stage} has nothing to train: no parameter of the mechanisms is in its loss")
    if isinstance(stage, PretrainConfig):
        return Pretrain(model, stage)
    without_dropout(model)
    if isinstance(stage, DistilConfig):
        return Distil(model, base, stage, cache)
    return (OnPolicy if isinstance(stage, OnPolicyConfig) else Transfer)(model, base, stage)


def _only_used(stage: StageConfig, mechanism: Mechanism) -> None:
    """Of a mechanism's parameters, leaves only those that require gradients which the stage's loss depends on."""
    transfers = isinstance(stage, TransferConfig)
    choosing = {id(parameter) for parameter in mechanism.choosing_parameters()}
    for name, parameter in mechanism.named_parameters():
        if id(parameter) in choosing:
            parameter.requires_grad_(transfers and stage.selection > 0)
        elif name in mechanism.choosing or (transfers and not (stage.output or stage.weights)):
            parameter.requires_grad_(False)


def trained_names(stage: StageConfig, model: PreTrainedModel) -> set[str]:
    """The names of the parameters that a stage trains."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if isinstance(stage, PretrainConfig):
        return names
    places = list(attention_modules(model))
    if stage.layers is not None:
        places = [places[number] for number in stage.layers]
        layers = tuple(place.rpartition(".")[0] + "." for place in places)
        names = {name for name in names if name.startswith(layers)}
    if isinstance(stage, TransferConfig) or stage.train == "mechanism":
        return {name for name in names if is_mechanism(name)}
    inside = tuple(place + "." for place in places)
    return names if stage.train == "all" else {name for name in names if name.startswith(inside)}


def without_dropout(model: Variant) -> None:
    """Switches dropout off for good: a student that drops what its teacher keeps learns something else."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Mechanism):
            module.dropout = 0.0
