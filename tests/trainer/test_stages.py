"""What each stage computes, against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from transformers import AutoModelForCausalLM

import attention
from attention.families import TESTED
from attention.recording import recorded
from attention.variant import attention_modules, mechanisms_of
from tests.attention.families import tiny
from trainer.config import DistilConfig, Objective, PretrainConfig, TransferConfig
from trainer.stages import build_learner, name_layers


@pytest.fixture
def base(workplace):
    return AutoModelForCausalLM.from_pretrained(workplace / "base", attn_implementation="eager").eval()


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))


MASKS = attention.MasksConfig(candidates=("window(4)", "first(2)"), init="random")
PERFORMER = attention.PerformerConfig(num_features=4)
NSA = attention.NSAConfig(compress_block=4, compress_stride=2, select_block=4, select_every=4, window=4)


@pytest.mark.parametrize("family", TESTED)
def test_what_fsdp_wraps_is_found_in_the_model(family):
    variant = attention.convert(tiny(family), MASKS)
    variant._no_split_modules = ["ALayerOfAnotherModel"]
    learner = build_learner(PretrainConfig(steps=1), variant, None)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    name_layers(plugin, learner)
    wrap = fsdp2_prepare_auto_wrap_policy(plugin, learner)
    wrapped = {name for name, module in learner.named_modules() if wrap(module)}
    assert len(wrapped) == variant.config.num_hidden_layers
    inside = [
        {layer for layer in wrapped if f"model.{name}".startswith(f"{layer}.")} for name in attention_modules(variant)
    ]
    assert set.union(*inside) == wrapped
    assert all(len(layers) == 1 for layers in inside)


def test_pretraining_is_cross_entropy(base, ids):
    base.config.resid_pdrop = 0.0
    losses = build_learner(PretrainConfig(steps=1), base, None).eval()(ids)
    logits = base(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(losses.loss, F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))


def test_distillation_compares_the_same_positions(base, ids):
    variant = attention.convert(base, MASKS)
    stage = DistilConfig(steps=1, objective=Objective(kl=2, ce=0.5, l1=0.1))
    losses = build_learner(stage, variant, base).train()(ids)
    log_q, log_p = (model(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for model in (variant, base))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    ce = -log_q.gather(2, ids[:, 1:, None]).sum()
    l1 = 3 * 19 * sum(mechanism.penalty() for mechanism in variant.mechanisms)
    torch.testing.assert_close(losses.loss, 2 * kl + 0.5 * ce + 0.1 * l1, rtol=1e-4, atol=1e-3)
    for name, value in {"kl": kl, "ce": ce, "l1": l1}.items():
        torch.testing.assert_close(losses.terms[name], value.detach(), rtol=1e-4, atol=1e-3)


def test_distillation_reads_pieces_as_texts_of_their_own(base, ids):
    """Base and variant alike, and a sequence in pieces weighs what a whole one weighs."""
    variant = attention.convert(base, MASKS)
    objective = Objective(kl=2, ce=0.5, l1=0.1)
    whole = DistilConfig(steps=1, context=20, objective=objective)
    pieces = DistilConfig(steps=1, context=20, objective=objective, short_context=5, short_share=1.0)
    read = build_learner(pieces, variant, base).train()(ids)
    alone = build_learner(whole, variant, base).train()(ids.reshape(12, 5)).scaled(3 * 19 / (12 * 4))
    torch.testing.assert_close(read.loss, alone.loss)
    assert read.terms.keys() == alone.terms.keys()
    for name, value in alone.terms.items():
        torch.testing.assert_close(read.terms[name], value)
    mixed = DistilConfig(steps=1, context=20, objective=objective, short_context=5, short_share=1 / 3)
    torch.manual_seed(0)
    both = build_learner(mixed, variant, base).train()(ids)
    last = build_learner(whole, variant, base).train()(ids[1:])
    first = build_learner(pieces, variant, base).train()(ids[:1])
    torch.testing.assert_close(both.loss, first.loss + last.loss)


def test_a_student_that_is_its_base_has_no_loss_though_the_base_has_dropout(base, ids):
    assert base.config.resid_pdrop > 0
    variant = attention.convert(base, attention.SoftmaxConfig())
    loss = build_learner(DistilConfig(steps=1), variant, base).train()(ids).loss
    torch.testing.assert_close(loss.detach(), torch.tensor(0.0), atol=1e-3, rtol=0)


def test_what_has_nothing_to_train_is_said(base):
    variant = attention.convert(base, attention.SoftmaxConfig())
    with pytest.raises(ValueError, match="has nothing to train"):
        build_learner(TransferConfig(steps=1), variant, base)


@pytest.mark.parametrize("config", [MASKS, PERFORMER, NSA], ids=lambda config: config.method)
def test_transfer_trains_every_method(config, base, ids):
    learner = build_learner(TransferConfig(steps=1, output=1.0, weights=0.5), attention.convert(base, config), base)
    losses = learner.train()(ids)
    assert losses.terms["output"] > 0
    torch.testing.assert_close(losses.loss.detach(), losses.terms["output"] + 0.5 * losses.terms["weights"])
    losses.loss.backward()
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


CHOOSING = attention.MasksConfig(first_layers=(("window(4)",),), candidates=("window(4)", "top(3)", "induction(1)"))


def test_what_chooses_keys_learns_in_transfer_alone(base, ids):
    variant = attention.convert(base, CHOOSING)
    scores = variant.mechanisms[1].to_scores
    losses = build_learner(TransferConfig(steps=1, selection=2.0), variant, base).train()(ids)
    torch.testing.assert_close(losses.loss.detach(), losses.terms["output"] + 2 * losses.terms["selection"])
    losses.loss.backward()
    assert scores.grad.abs().sum() > 0
    build_learner(DistilConfig(steps=1, train="all"), variant, base)
    assert not scores.requires_grad
    learner = build_learner(TransferConfig(steps=1, output=0.0), variant, base)
    assert learner(ids).terms.keys() == {"selection"}
    with pytest.raises(ValueError, match="has nothing to train"):
        build_learner(TransferConfig(steps=1, output=0.0), attention.convert(base, MASKS), base)


STAGES = [
    TransferConfig(steps=1),
    TransferConfig(steps=1, output=0.0),
    TransferConfig(steps=1, output=0.0, selection=0.0, weights=1.0),
    DistilConfig(steps=1),
    DistilConfig(steps=1, train="all"),
    DistilConfig(steps=1, train="mechanism"),
]


@pytest.mark.parametrize("without", ["nothing", "pruned", "disabled"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: str(stage.model_dump(exclude_defaults=True)))
def test_all_that_is_trained_has_a_gradient(stage, without, base, ids):
    """As DDP asks; also where the only mask that chooses by scores is gone from its layer."""
    variant = attention.convert(base, CHOOSING)
    mechanism = variant.mechanisms[1]
    if without == "pruned":
        with torch.no_grad():
            mechanism.alpha[:, mechanism.branches.index("top(3)")] = -9.0
        mechanism.prune(0.01)
    if without == "disabled":
        mechanism.disable("top(3)")
    try:
        learner = build_learner(stage, variant, base).train()
    except ValueError:
        assert without != "nothing"
        assert (stage.stage, stage.output, stage.weights) == ("transfer", 0.0, 0.0)
        return
    learner(ids).loss.backward()
    missed = [name for name, each in learner.named_parameters() if each.requires_grad and each.grad is None]
    assert missed == []


@pytest.mark.parametrize("kind", [TransferConfig, DistilConfig])
def test_layers_that_are_not_named_stay_as_they_are(kind, base, ids):
    learner = build_learner(kind(steps=1, layers=[1]), attention.convert(base, PERFORMER), base).train()
    learner(ids).loss.backward()
    trained = {name for name, each in learner.named_parameters() if each.requires_grad}
    assert trained
    assert all(".h.1." in name and learner.get_parameter(name).grad is not None for name in trained)


def test_transfer_of_some_layers_is_the_mean_over_these(base, ids):
    def output(layers: list[int] | None) -> torch.Tensor:
        variant = attention.convert(base, PERFORMER)
        return build_learner(TransferConfig(steps=1, layers=layers), variant, base)(ids).terms["output"]

    torch.testing.assert_close(output(None), (output([0]) + output([1])) / 2)


def test_transfer_output_is_the_relative_error_of_mixed_values(base, ids):
    masks = attention.MasksConfig(candidates=("causal",))
    learner = build_learner(TransferConfig(steps=1), attention.convert(base, masks), base)
    torch.testing.assert_close(learner(ids).loss.detach(), torch.tensor(0.0), atol=1e-4, rtol=0)
    learner = build_learner(TransferConfig(steps=1), attention.convert(base, MASKS), base)
    teacher = attention.convert(base, attention.SoftmaxConfig())
    with torch.no_grad(), recorded(teacher.mechanisms) as calls:
        teacher(ids, use_cache=False)
    errors = [
        ((student(call.q, call.k, call.v, call.x) - call.mixed) ** 2).mean((1, 2, 3)) / (call.mixed**2).mean((1, 2, 3))
        for student, call in zip(mechanisms_of(learner.model), calls, strict=True)
    ]
    torch.testing.assert_close(learner(ids).loss.detach(), 3 * 19 * torch.stack(errors).mean().detach())


def test_a_batch_costs_what_its_parts_cost(base, ids):
    for stage in (TransferConfig(steps=1, weights=0.3), DistilConfig(steps=1)):
        learner = build_learner(stage, attention.convert(base, MASKS), base).train()
        parts = sum(learner(part).loss for part in ids.split(1))
        torch.testing.assert_close(learner(ids).loss, parts, rtol=1e-4, atol=1e-4)
