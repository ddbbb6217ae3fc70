"""The stage in which a variant learns from texts that it writes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import attention
from tests.trainer.conftest import recipe, write_recipe
from tests.trainer.test_resume import outcome
from trainer import train
from trainer.config import DistilConfig, OnPolicyConfig, load_config
from trainer.loop import Loop
from trainer.setup import build, recompute_activations
from trainer.stages import build_learner

PROMPT, LENGTH = 6, 20
MASKS = attention.MasksConfig(candidates=("window(4)", "first(2)"), init="random")
METHODS = [
    MASKS,
    attention.PerformerConfig(num_features=4),
    attention.NSAConfig(compress_block=4, compress_stride=2, select_block=4, select_every=4, window=4),
]


@pytest.fixture
def base(workplace):
    return AutoModelForCausalLM.from_pretrained(workplace / "base").eval().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(0, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def stage(**options: object) -> OnPolicyConfig:
    return OnPolicyConfig(steps=1, context=LENGTH, prompt=PROMPT, **options)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The definition, summed over tokens."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="sum")

    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_mix = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_mix) + (1 - beta) * kl(log_q, log_mix)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_loss_is_the_divergence_over_what_was_written(beta, base, ids):
    variant = attention.convert(base, MASKS)
    learner = build_learner(stage(beta=beta), variant, base).train()
    torch.manual_seed(3)
    texts = learner.write(ids)
    torch.manual_seed(3)
    losses = learner(ids)
    log_p, log_q = (
        model(texts, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1) for model in (base, variant)
    )
    wanted = divergence(log_p, log_q, beta)
    assert len(losses.terms) == 1
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-4, atol=1e-4)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(loss, trained) for loss in (losses.loss, wanted))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_every_method_writes_after_its_prompt_what_it_would_without_a_cache(config, base, ids):
    learner = build_learner(stage(), attention.convert(base, config), base).train()
    torch.manual_seed(1)
    texts = learner.write(ids)
    assert learner.model.training
    assert texts.shape == ids.shape
    assert (texts[:, :PROMPT] == ids[:, :PROMPT]).all()
    torch.manual_seed(1)
    text = ids[:, :PROMPT]
    for _ in range(LENGTH - PROMPT):
        logits = learner.model.eval()(text, use_cache=False).logits[:, -1]
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], 1)
    assert (texts == text).all()


def test_only_the_beginning_of_the_text_matters(base, ids):
    learner = build_learner(stage(), attention.convert(base, MASKS), base).train()
    other = ids.clone()
    other[:, PROMPT:] = 7
    found = []
    for each in (ids, other):
        torch.manual_seed(2)
        found.append(learner(each).loss)
    assert found[0] == found[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_learns_in_bfloat16(checkpointing, base, ids):
    """What autocast keeps of the weights from writing, without gradients, must not be trained with."""

    def gradients(enabled: bool) -> Tensor:
        learner = build_learner(stage(train="all"), attention.convert(base, MASKS), base).train()
        if checkpointing:
            recompute_activations(learner.model)
        torch.manual_seed(4)
        texts = learner.write(ids)
        learner.write = lambda _: (torch.manual_seed(4), type(learner).write(learner, ids), texts)[
            -1
        ]  # the same in both
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = learner(ids).loss
        assert loss.isfinite()
        loss.backward()
        missed = [name for name, each in learner.named_parameters() if each.requires_grad and each.grad is None]
        assert missed == []
        return torch.cat([each.grad.flatten() for each in learner.parameters() if each.requires_grad])

    assert F.cosine_similarity(gradients(True), gradients(False), dim=0) > 0.99


def on_policy(workplace: Path) -> dict[str, object]:
    """A few steps, after distillation, with everything on schedule."""
    distil = DistilConfig(steps=2, batch_size=2, context=16).model_dump(mode="json")
    stages = [distil, {"stage": "on_policy", "steps": 6, "batch_size": 4, "micro_batch_size": 2, "context": 24}]
    stages[1] |= {"prompt": 8, "final_context": 48, "final_fraction": 0.5, "train": "all"}
    return recipe(workplace, stages=stages)


def test_the_loss_of_a_step_is_a_mean_over_what_was_written(workplace, tmp_path, monkeypatch):
    stages = [{"stage": "on_policy", "steps": 1, "batch_size": 4, "micro_batch_size": 2, "context": 24, "prompt": 8}]
    path = write_recipe(tmp_path, recipe(workplace, stages=stages, output=str(tmp_path / "run")))
    assert train.main(["--config", str(path)]) == 0
    setup = build(load_config(path, ["--output", str(tmp_path / "again")]))
    learner = build_learner(setup.config.stages[0], setup.model, setup.base).train()
    loop = Loop(setup)
    loop.observer.open(None, None)
    sums = []
    original = learner.forward
    monkeypatch.setattr(learner, "forward", lambda ids: (sums.append(original(ids)), sums[-1])[-1])
    batch = torch.from_numpy(setup.train[:96].astype("int64")).reshape(4, 24)
    loop.train_step(setup.config.stages[0], learner, [], batch, 0)
    total = sum(float(losses.loss.detach()) for losses in sums)
    assert loop.observer._sums["loss"][0] == pytest.approx(total / (4 * 16), rel=1e-5)


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_run_that_died_writes_the_same_texts_again(step, workplace, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, on_policy(workplace) | {"output": str(tmp_path / "whole")})
    assert train.main(["--config", str(path)]) == 0
    original = Loop.train_step

    def dies(self: Loop, *given: object) -> None:
        original(self, *given)
        if self.step == step:
            raise Killed

    arguments = ["--config", str(path), "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_step", dies)
        with pytest.raises(Killed):
            train.main(arguments)
    assert train.main([*arguments, "--resume"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_prompt_leaves_something_to_write(workplace, tmp_path):
    options = on_policy(workplace) | {"output": str(tmp_path / "run")}
    options["stages"][1]["prompt"] = 24
    with pytest.raises(attention.ConfigError, match="must leave the variant something to write in 24 tokens"):
        load_config(write_recipe(tmp_path, options))
