"""Learning rates, parameter groups, Muon."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attention
from trainer.config import DistilConfig, PretrainConfig, ScheduleConfig, TransferConfig
from trainer.optim import Layout, Muon, build_optimizers, lr_factor, orthogonalise, set_lr
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


@pytest.mark.parametrize("layout", [Layout(parts=3), Layout(out_first=True, parts=3, heads=2), Layout(out_first=True)])
def test_muon_is_momentum_whose_update_is_orthogonalised(layout: Layout):
    torch.manual_seed(0)
    shape = (12, 4) if layout.out_first else (4, 12)
    parameter = torch.nn.Parameter(torch.randn(shape))
    start, gradients = parameter.detach().clone(), torch.randn(2, *shape)
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5, layout=layout)
    buffer, expected = torch.zeros(shape), start
    columns = torch.arange(12).view(layout.heads, layout.parts, -1)  # of queries, keys and values
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * buffer
        update = torch.empty(4, 12)
        for part in range(layout.parts):
            own = columns[:, part].flatten()
            scale = max(1, len(own) / 4) ** 0.5
            update[:, own] = scale * orthogonalise((direction.mT if layout.out_first else direction)[:, own])
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * (update.mT if layout.out_first else update)
    torch.testing.assert_close(parameter.detach(), expected)


def test_gpt2_is_trained_bit_for_bit_as_by_its_names():
    """What the first versions did: `.h.` for the layers, `c_attn.weight` for three matrices side by side."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=50)).eval()
    twin, tokens = copy.deepcopy(model), torch.randint(50, (2, 16))
    stage = PretrainConfig(steps=1, muon=True, lr=0.01, weight_decay=0.1)
    learner = build_learner(stage, model, None)
    optimizers = build_optimizers(stage, learner)
    matrices = {name: p for name, p in twin.named_parameters() if ".h." in name and p.ndim == 2}
    rest = [p for name, p in twin.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim == ndim], "weight_decay": decay} for ndim, decay in ((2, 0.1), (1, 0))
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=stage.betas, fused=True)
    buffers = {name: torch.zeros_like(p) for name, p in matrices.items()}
    for _ in range(3):
        for one, own in ((model, optimizers), (twin, [adamw])):
            learner.model = one
            learner(tokens).loss.backward()
            for optimizer in own:
                optimizer.step()
        with torch.no_grad():
            for name, p in matrices.items():
                buffer = buffers[name].lerp_(p.grad, 1 - 0.95)
                parts = torch.stack(p.grad.lerp(buffer, 0.95).chunk(3 if name.endswith("c_attn.weight") else 1, dim=1))
                update = torch.cat(orthogonalise(parts).unbind(), dim=1)
                scale = max(1.0, parts.shape[-1] / parts.shape[-2]) ** 0.5
                p.mul_(1 - 0.02 * 0.1).add_(update, alpha=-0.02 * scale)
        model.zero_grad()
        twin.zero_grad()
    for (name, trained), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(trained, expected), name


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
FAMILIES = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, 4),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "multi_query": False}, 4),
    "gpt_neox": (SIZES, 4),
    "phi3": ({**SIZES, "pad_token_id": 0}, 4),
    "llama": ({**SIZES, "num_key_value_heads": 2}, 7),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, 4),
    "mixtral": ({**SIZES, "num_local_experts": 2}, 4),
}


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FAMILIES[name][0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_muon_trains_the_linear_maps_of_the_layers_and_nothing_else(name: str):
    model, stage = family(name), PretrainConfig(steps=1, muon=True)
    adamw, muon = build_optimizers(stage, build_learner(stage, model, None))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = (
        [names[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)
    )
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    assert len(by_muon) == 2 * FAMILIES[name][1]
    assert all(re.search(r"\.\d+\..*weight$", name) and "norm" not in name for name in by_muon)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_neox", "phi3"])
def test_the_parts_of_a_fused_projection_are_its_queries_keys_and_values(name: str, monkeypatch: pytest.MonkeyPatch):
    model, stage, seen = family(name), PretrainConfig(steps=1, muon=True), []
    _, muon = build_optimizers(stage, build_learner(stage, model, None))
    (group,) = [group for group in muon.param_groups if group["layout"].parts == 3]
    inputs = {}
    fused = next(module for module in model.modules() if getattr(module, "weight", None) is group["params"][0])
    fused.register_forward_pre_hook(lambda _, given: inputs.setdefault("x", given[0]))

    def attend(module, query, key, value, *_, **__):
        seen.append(value)
        return torch.zeros_like(query.transpose(1, 2)), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "seen", attend)
    model.config._attn_implementation = "seen"
    model(torch.randint(50, (1, 6)))
    with torch.no_grad():
        values = inputs["x"] @ group["layout"].split(fused.weight)[2]
    if fused.bias is not None:
        assert not fused.bias.any()
    torch.testing.assert_close(values, seen[0].transpose(1, 2).flatten(2))


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
