"""Learning rates, parameter groups, Muon."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import attention
from trainer.config import DistilConfig, PretrainConfig, ScheduleConfig, TransferConfig
from trainer.optim import Muon, build_optimizers, lr_factor, orthogonalise, set_lr
from trainer.stages import build_learner


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    constant=st.floats(0, 0.5),
    decay=st.sampled_from(["cosine", "linear"]),
    final=st.floats(0, 1),
)
def test_the_rate_rises_stays_and_falls(steps, warmup, constant, decay, final):
    schedule = ScheduleConfig(warmup=warmup, constant=constant, decay=decay, final=final)
    factors = [lr_factor(schedule, step, steps) for step in range(steps)]
    rising = round(warmup * steps)
    assert all(0 < factor <= 1 for factor in factors[: rising + 1])
    assert factors[:rising] == sorted(factors[:rising])
    assert factors[rising:] == sorted(factors[rising:], reverse=True)
    if steps - rising - round(constant * steps) > 1:
        assert factors[-1] == pytest.approx(final)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_orthogonalised_matrices_have_singular_values_near_one(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(2, rows, columns, generator=generator), full_matrices=False)
    values = torch.linspace(0.3, 1, min(rows, columns))
    result = orthogonalise(left * values @ right)
    found = torch.linalg.svdvals(result)
    assert ((found > 0.6) & (found < 1.3)).all()
    torch.testing.assert_close(
        result, left * (left.mT @ result @ right.mT).diagonal(dim1=-2, dim2=-1)[:, None] @ right, atol=1e-3, rtol=0
    )


def test_muon_is_momentum_whose_update_is_orthogonalised():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 12))
    start, gradients = parameter.detach().clone(), torch.randn(2, 4, 12)
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5, parts=3)
    buffer, expected = torch.zeros(4, 12), start
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * buffer
        update = torch.cat([orthogonalise(part) for part in direction.split(4, dim=1)], dim=1)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
    torch.testing.assert_close(parameter.detach(), expected)


def test_every_trained_parameter_has_its_group(workplace):
    base = AutoModelForCausalLM.from_pretrained(workplace / "base")
    variant = attention.convert(
        base, attention.NSAConfig(compress_block=4, compress_stride=2, select_block=4, select_every=4, window=4)
    )

    def groups(stage, model, teacher) -> dict[str, set[str]]:
        learner = build_learner(stage, model, teacher)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found: dict[str, set[str]] = {}
        for optimizer in build_optimizers(stage, learner):
            for group in optimizer.param_groups:
                found.setdefault(group["name"], set()).update(names[id(parameter)] for parameter in group["params"])
        return found

    every = {name for name, _ in variant.named_parameters()}
    mechanism = {name for name in every if ".mechanism." in name}
    attentions = {name for name in every if ".attn." in name}
    assert groups(TransferConfig(steps=1), variant, base) == {"mechanism_lr": mechanism}
    for train, trained in (("mechanism", mechanism), ("attention", attentions), ("all", every)):
        found = groups(DistilConfig(steps=1, train=train), variant, base)
        assert found.pop("mechanism_lr") == mechanism
        assert found == ({"lr": trained - mechanism} if trained - mechanism else {})
    found = groups(PretrainConfig(steps=1, muon=True), base, None)
    assert found["muon_lr"] == {name for name, p in base.named_parameters() if ".h." in name and p.ndim == 2}
    assert found["lr"] == {name for name, _ in base.named_parameters()} - found["muon_lr"]


def test_rates_are_scaled_from_their_peaks():
    optimizers = build_optimizers(PretrainConfig(steps=1, lr=0.5), torch.nn.Linear(2, 2))
    for factor in (0.5, 0.1):
        set_lr(optimizers, factor)
    assert {group["lr"] for group in optimizers[0].param_groups} == {0.05}
