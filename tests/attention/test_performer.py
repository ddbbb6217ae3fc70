"""The performer method: its mathematics, its numerical traps, its window, and what its state costs."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import performer
from attention.mechanism import ConfigError, LayerShape, repeat_heads
from attention.performer import PerformerAttention, PerformerConfig
from attention.performer_features import KEY_CAP, RELU_EPSILON, random_projections
from attention.reference import (
    favor_log_features,
    learned_log_features,
    performer_weights,
    relu_log_features,
    softmax_weights,
)

from .configs import CONFIGS

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
MAPS = pytest.mark.parametrize("feature_map", ["favor", "relu", "learned"])


def layer(heads: int = 2, kv_heads: int | None = None, width: int = 8, dropout: float = 0.0) -> LayerShape:
    return LayerShape(
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=width,
        hidden_size=heads * width,
        max_length=64,
        dropout=dropout,
    )


def build(shape: LayerShape | None = None, **options) -> PerformerAttention:
    """A mechanism away from its start."""
    mechanism = PerformerConfig(**{"num_features": 16, **options}).build(shape or layer()).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mechanism


def inputs(length: int, shape: LayerShape | None = None, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    shape, generator = shape or layer(), torch.Generator().manual_seed(seed)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(batch, n, length, shape.head_dim, generator=generator) for n in heads)
    return q, k, v, torch.zeros(batch, length, shape.hidden_size)


def log_features(mechanism: PerformerAttention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """By the reference, of queries and keys (B, H, T, D)."""
    config, features = mechanism.config, mechanism.features
    if features is None:
        return tuple(x.new_empty(*x.shape[:3], 0) for x in (q, k))
    if config.feature_map == "favor":
        return tuple(favor_log_features(x, features.omega, config.hyperbolic) for x in (q, k))
    if config.feature_map == "relu":
        return tuple(relu_log_features(x, features.omega, RELU_EPSILON) for x in (q, k))
    names = ("weight", "bias", "inner", "outer") if config.hidden else ("weight", "bias")
    for_queries, for_keys = zip(*(getattr(features, name).chunk(2) for name in names), strict=True)
    return learned_log_features(q, *for_queries), learned_log_features(k, *for_keys).clamp(-KEY_CAP, KEY_CAP)


def reference(mechanism: PerformerAttention, q: Tensor, k: Tensor) -> Tensor:
    """The attention weights by definition (B, H, T, T)."""
    config, k = mechanism.config, repeat_heads(k, q.shape[1])
    fades = config.feature_map == "learned" and config.fade and config.num_features
    rates = 0.7 * mechanism.features.rate[:, 0].sigmoid() if fades else None
    mix = mechanism.mix if config.window and config.num_features else None
    absolute = config.feature_map == "favor"
    return performer_weights(q, k, *log_features(mechanism, q, k), config.window, mix, rates, absolute)


# The fast form is the definition.


@given(data=st.data())
def test_equals_the_reference_in_outputs_and_gradients(data):
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    shape = layer(kv_heads * groups, kv_heads, data.draw(st.sampled_from([2, 4, 8])))
    mechanism = data.draw(CONFIGS["performer"]).build(shape)
    tensors = inputs(data.draw(st.integers(1, 40)), shape, data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99)))
    q, k, v = (t.requires_grad_() for t in tensors[:3])
    leaves = {"q": q, "k": k, "v": v, **dict(mechanism.named_parameters())}

    actual = mechanism(q, k, v, tensors[3])
    expected = reference(mechanism, q, k) @ repeat_heads(v, q.shape[1])
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    direction = torch.randn_like(actual)
    found, wanted = (
        torch.autograd.grad((out * direction).sum(), leaves.values(), allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    )
    for name, one, other in zip(leaves, found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@given(data=st.data())
@torch.no_grad()
def test_map_is_the_reference(data):
    mechanism = data.draw(CONFIGS["performer"]).build(layer())
    q, k, _, x = inputs(data.draw(st.integers(1, 40)))
    torch.testing.assert_close(mechanism.attention_map(q, k, x), reference(mechanism, q, k), **TOLERANCE)


@MAPS
@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_neither_chunks_nor_segments_change_results(feature_map, window, monkeypatch):
    q, k, v, x = inputs(100)
    expected = build(feature_map=feature_map, window=window, chunk_size=100)(q, k, v, x)
    monkeypatch.setattr(performer, "CPU_SEGMENT", 24)
    for size in (1, 8, 24, 64):
        actual = build(feature_map=feature_map, window=window, chunk_size=size)(q, k, v, x)
        torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_segments_pass_gradients_on(monkeypatch):
    q, k, v, x = inputs(50)
    mechanism = build(hidden=4, window=3)
    k.requires_grad_()
    whole = torch.autograd.grad(mechanism(q, k, v, x).square().sum(), k)
    monkeypatch.setattr(performer, "CPU_SEGMENT", 16)
    torch.testing.assert_close(torch.autograd.grad(mechanism(q, k, v, x).square().sum(), k), whole, **TOLERANCE)


# Random features.


def favor_estimates(q: Tensor, k: Tensor, draws: int = 4000, num_features: int = 8, **options) -> Tensor:
    """(draws,) estimates φ(q)·φ(k) of exp(q·k/√D)."""
    config = PerformerConfig(feature_map="favor", num_features=num_features, **options)
    features = config.build(layer(width=q.shape[0])).features
    estimates = []
    for seed in range(draws):
        features.redraw(seed)
        q_log, k_log = features(q[None, None, None], k[None, None, None])
        estimates.append((q_log + k_log).exp().sum())
    return torch.stack(estimates)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("hyperbolic", [False, True])
@torch.no_grad()
def test_favor_is_unbiased(orthogonal, hyperbolic):
    """Within 4 standard errors of exp(q·k/√D) (arXiv 2009.14794, Lemma 1)."""
    q, k = torch.tensor([0.8, -0.4, 1.0, 0.2]), torch.tensor([0.5, 0.9, -0.3, -0.7])
    estimates = favor_estimates(q, k, orthogonal=orthogonal, hyperbolic=hyperbolic)
    error = estimates.mean() - (q @ k / 2).exp()
    assert error.abs() < 4 * estimates.std() / math.sqrt(len(estimates))


@torch.no_grad()
def test_orthogonal_and_hyperbolic_features_vary_less():
    q, k = torch.tensor([0.8, -0.4, 1.0, 0.2]), torch.tensor([0.5, 0.9, -0.3, -0.7])
    plain = favor_estimates(q, k, orthogonal=False, hyperbolic=False).var()
    orthogonal = favor_estimates(q, k, orthogonal=True, hyperbolic=False).var()
    both = favor_estimates(q, k, orthogonal=True, hyperbolic=True).var()
    assert both < 0.9 * orthogonal
    assert orthogonal < 0.95 * plain


def test_orthogonal_projections_are_orthogonal_in_blocks_and_long_as_gaussian_ones():
    omega = random_projections(4000, 8, orthogonal=True, generator=torch.Generator().manual_seed(0))
    first = omega[:8] / omega[:8].norm(dim=1, keepdim=True)
    torch.testing.assert_close(first @ first.T, torch.eye(8), atol=1e-5, rtol=0)
    squares = omega.square().sum(1)  # χ² with 8 degrees of freedom: mean 8, variance 16
    assert abs(squares.mean() - 8) < 0.3
    assert abs(squares.var() - 16) < 2
    assert omega.mean(0).abs().max() < 0.1


def test_layers_and_seeds_draw_differently_and_repeatably():
    def omega(seed: int, layer_idx: int) -> Tensor:
        shape = LayerShape(num_heads=1, num_kv_heads=1, head_dim=4, hidden_size=4, max_length=8, layer_idx=layer_idx)
        return PerformerConfig(feature_map="relu", seed=seed).build(shape).features.omega

    assert torch.equal(omega(0, 0), omega(0, 0))
    assert not torch.equal(omega(0, 0), omega(0, 1))
    assert not torch.equal(omega(0, 0), omega(1, 0))


def test_redraws_on_schedule_and_keeps_the_draw_with_the_weights():
    mechanism = build(feature_map="favor", redraw_every=3)
    draws = []
    for step in range(1, 8):
        mechanism.after_step(step)
        draws.append(mechanism.features.omega.clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(draws)]
    assert changed == [False, True, False, False, True, False]
    fresh = build(feature_map="favor")
    fresh.load_state_dict(mechanism.state_dict())
    assert torch.equal(fresh.features.omega, draws[-1])


# Numerical traps.


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("hyperbolic", [False, True])
@torch.no_grad()
def test_favor_survives_keys_of_any_norm(scale, hyperbolic):
    """Features far under or over what float32 holds; their ratios are what counts."""
    q, k, v, x = inputs(60)
    q, k = scale * q, scale * k
    mechanism = build(feature_map="favor", hyperbolic=hyperbolic, chunk_size=16)
    weights = reference(mechanism.double(), q.double(), k.double())
    torch.testing.assert_close(mechanism.float()(q, k, v, x), (weights @ v.double()).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("position", [7, 16, 39])
@torch.no_grad()
def test_a_key_that_dwarfs_the_others_leaves_the_past_alone(position):
    """One maximum over all keys would round every earlier feature to zero."""
    q, k, v, x = inputs(40)
    k = 8 * k
    k[:, :, position] = 0.0  # |k|²/2 is lost from the exponent: e^100 times the others
    mechanism = build(feature_map="favor", chunk_size=16)
    weights = reference(mechanism.double(), q.double(), k.double())
    torch.testing.assert_close(mechanism.float()(q, k, v, x), (weights @ v.double()).float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tiny", [0, 1, 5, 20])
@pytest.mark.parametrize("window", [0, 3])
@torch.no_grad()
def test_favor_finds_its_scale_when_keys_stop_being_tiny(tiny, window, monkeypatch):
    """Keys of large norm have tiny features; after them the scale goes up, and stays."""
    monkeypatch.setattr(performer, "CPU_SEGMENT", 8)
    q, k, v, x = inputs(40)
    k[:, :, :tiny] *= 10
    mechanism = build(feature_map="favor", window=window, chunk_size=4)
    weights = reference(mechanism.double(), q.double(), k.double())
    state = mechanism.float().new_state()
    steps = [mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], state) for i in range(40)]
    for out in (mechanism(q, k, v, x), torch.cat(steps, 2)):
        torch.testing.assert_close(out, (weights @ v.double()).float(), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_favor_needs_no_peaks_once_its_scale_is_the_usual_one():
    mechanism = build(feature_map="favor")
    state = mechanism.new_state()
    assert not state.settled
    q, k, v, x = inputs(10)
    mechanism(q, 30 * k, v, x, state)
    assert not state.settled
    mechanism(q, k, v, x, state)
    assert state.settled
    before = state.peaks.clone()
    mechanism(q, 0 * k, v, x, state)
    assert torch.equal(state.peaks, before)


@MAPS
@torch.no_grad()
def test_a_row_without_tokens_is_finite(feature_map):
    q, k, v, x = inputs(6, batch=2)
    mechanism = build(feature_map=feature_map)
    state = mechanism.new_state()
    out = mechanism(q, k, v, x, state, torch.tensor([0, 6]))
    assert torch.isfinite(out).all()
    later = mechanism(q, k, v, x, state, torch.tensor([6, 6]))
    torch.testing.assert_close(later[:1], mechanism(q[:1], k[:1], v[:1], x[:1]), **TOLERANCE)


@torch.no_grad()
def test_learned_keys_cannot_overflow():
    mechanism = build(fade=True, hidden=4)
    for parameter in mechanism.parameters():
        parameter *= 100
    q, k, v, x = inputs(60)
    assert torch.isfinite(mechanism(10 * q, 10 * k, v, x)).all()


@MAPS
@torch.no_grad()
def test_mixed_precision_leaves_the_sums_in_float32(feature_map):
    q, k, v, x = inputs(40)
    mechanism = build(feature_map=feature_map, window=4, chunk_size=8)
    expected = mechanism(q, k, v, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mechanism(q, k, v, x), expected)


# The learned map.


@torch.no_grad()
def test_learned_map_starts_near_the_exponentials_of_its_input():
    """φ(q)·φ(k) ≈ Σ_d 2 cosh(q_d + k_d), large where q and k are alike (arXiv 2402.04347)."""
    shape = layer(heads=1, width=16)
    mechanism = PerformerConfig(num_features=32, fade=False).build(shape)
    q, k, *_ = inputs(200, shape)
    q_log, k_log = mechanism.features(q, k)
    learned = (q_log[..., :, None, :] + k_log[..., None, :, :]).logsumexp(-1).flatten()
    exact = (q @ k.mT / 4).flatten()
    assert torch.corrcoef(torch.stack([learned, exact]))[0, 1] > 0.3


@torch.no_grad()
def test_fading_features_forget():
    """With one feature, weights are e^−r(i−j)."""
    mechanism = PerformerConfig(num_features=1, chunk_size=4).build(layer(heads=1))
    features = mechanism.features
    features.weight.zero_()
    features.rate.fill_(0.5)
    rate = 0.7 * torch.tensor(0.5).sigmoid()
    q, k, _, x = inputs(12, layer(heads=1))
    row = mechanism.attention_map(q, k, x)[0, 0, -1]
    torch.testing.assert_close(row[:-1] / row[1:], (-rate).exp().expand(11))


# The window.


@MAPS
@torch.no_grad()
def test_a_window_over_everything_is_softmax_attention(feature_map):
    q, k, v, x = inputs(20)
    mechanism = build(feature_map=feature_map, window=20, chunk_size=8)
    torch.testing.assert_close(mechanism(q, k, v, x), softmax_weights(q, k) @ v, **TOLERANCE)
    parts = mechanism.attention_parts(q, k, x)
    torch.testing.assert_close(parts["exact"], softmax_weights(q, k))
    assert parts["error"].abs().max() < 1e-5


@pytest.mark.parametrize("feature_map", ["relu", "learned"])
@torch.no_grad()
def test_what_all_keys_share_does_not_move_weight_to_the_window(feature_map):
    """Softmax does not see it either: exp(q·c) multiplies all weights of a query alike."""
    q, k, v, x = inputs(30)
    mechanism = build(feature_map=feature_map, window=4, chunk_size=8)
    features = mechanism.features
    (features.omega if feature_map == "relu" else features.weight).zero_()
    expected = mechanism(q, k, v, x)
    torch.testing.assert_close(mechanism(q, k + 5 * torch.randn(8), v, x), expected, **TOLERANCE)


@MAPS
@torch.no_grad()
def test_error_is_the_share_of_attention_that_went_elsewhere(feature_map):
    q, k, _, x = inputs(20)
    error = build(feature_map=feature_map).attention_parts(q, k, x)["error"]
    assert error.shape == (1, 2, 20)
    assert error[..., 0].abs().max() < 1e-6  # the first token has one key
    assert 0 < error[..., 1:].max() <= 1


@torch.no_grad()
def test_branches_switch_off():
    q, k, v, x = inputs(20)
    mechanism = build(window=4, chunk_size=8)
    assert mechanism.branches == ("linear", "window")
    mechanism.disable("linear")
    distance = torch.arange(20)[:, None] - torch.arange(20)
    near = (q @ k.mT / math.sqrt(8)).masked_fill((distance < 0) | (distance >= 4), -torch.inf).softmax(-1)
    torch.testing.assert_close(mechanism(q, k, v, x), near @ v, **TOLERANCE)
    mechanism.disable("window")
    alone = build(chunk_size=8)
    alone.features.load_state_dict(mechanism.features.state_dict())
    torch.testing.assert_close(mechanism(q, k, v, x), alone(q, k, v, x), **TOLERANCE)
    mechanism.disable()
    assert not torch.allclose(mechanism(q, k, v, x), alone(q, k, v, x), atol=1e-2)


@pytest.mark.parametrize("options", [{"window": 4}, {}])
@torch.no_grad()
def test_branches_off_hold_in_decoding(options):
    q, k, v, x = inputs(12)
    mechanism = build(**options)
    for off in mechanism.branches:
        mechanism.disable(off)
        state = mechanism.new_state()
        steps = [mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], state) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, 2), mechanism(q, k, v, x), **TOLERANCE)


def test_dropout_falls_on_the_window_alone():
    q, k, v, x = inputs(20)
    linear, hybrid = build(layer(dropout=0.5)).train(), build(layer(dropout=0.5), window=4).train()
    assert torch.equal(linear(q, k, v, x), linear(q, k, v, x))
    assert not torch.equal(hybrid(q, k, v, x), hybrid(q, k, v, x))
    assert torch.equal(hybrid.eval()(q, k, v, x), hybrid(q, k, v, x))
    assert torch.equal(hybrid.attention_map(q, k, x), hybrid.train().attention_map(q, k, x))


@MAPS
@torch.no_grad()
def test_reordered_rows_go_on_with_single_tokens(feature_map):
    """Also between two single tokens, whose views are of memory that the reordered state no longer uses."""
    shape = layer(4, 2)
    q, k, v, x = inputs(30, shape, batch=3)
    mechanism, order = build(shape, feature_map=feature_map, window=5), torch.tensor([2, 0, 0])
    state = mechanism.new_state()
    for i in range(20):
        mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], state)
    state.reorder_cache(order)
    q, k, v, x = (t[order] for t in (q, k, v, x))
    steps = [mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], state) for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(steps, 2), mechanism(q, k, v, x)[:, :, 20:], **TOLERANCE)


# What it costs.


@MAPS
@pytest.mark.parametrize("window", [0, 8])
@torch.no_grad()
def test_state_does_not_grow(feature_map, window):
    mechanism = build(feature_map=feature_map, window=window)
    state, sizes = mechanism.new_state(), []
    for _ in range(3):
        mechanism(*inputs(30), state)
        sizes.append(state.nbytes())
        held = sum(t.untyped_storage().nbytes() for t in state._tensors().values())
        assert held <= state.nbytes()
    assert len(set(sizes)) == 1
    heads, width, num = 2, 8, 16
    rows = num * (width + (2 if feature_map == "favor" else 1)) + 2 * window * width
    assert sizes[0] == 4 * heads * rows


def test_keys_read_counts_the_window_and_the_state():
    assert [build().keys_read(position) for position in (0, 1, 500)] == [16, 16, 16]
    assert [build(window=4).keys_read(position) for position in (0, 3, 4, 500)] == [1, 4, 20, 20]


def test_operations_grow_linearly():
    for options in ({}, {"window": 8}, {"hidden": 8}, {"feature_map": "favor"}):
        mechanism = build(**options)
        assert mechanism.operations(4096) == 4 * mechanism.operations(1024)


# Configuration.


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        PerformerConfig(
            feature_map="favor", num_features=-3, hidden=-1, redraw_every=-2, window=-1, chunk_size=129, seed=-1
        )
    found = "\n".join(error.value.problems)
    for name in ("num_features", "hidden", "redraw_every", "window", "chunk_size", "seed"):
        assert name in found
    assert len(error.value.problems) == 7  # num_features is negative and odd


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"feature_map": "cosine"}, "feature_map"),
        ({"num_features": 6.5}, "num_features"),
        ({"num_features": []}, "num_features"),
        ({"num_features": [8, 0]}, "num_features"),
        ({"num_features": [8, -1], "window": 8}, "num_features"),
        ({"feature_map": "favor", "num_features": 7}, "num_features"),
        ({"redraw_every": 5}, "redraw_every"),
        ({"window": "8"}, "window"),
    ],
)
def test_wrong_options_are_named(options, name):
    with pytest.raises(ConfigError, match=name):
        PerformerConfig(**options)


def test_layers_can_have_numbers_of_features_of_their_own():
    config = PerformerConfig(num_features=[4, 16])
    sizes = [config.build(dataclasses.replace(layer(), layer_idx=i)).features.weight.shape[-1] for i in range(3)]
    assert sizes == [4, 16, 16]
    assert config.to_dict()["num_features"] == (4, 16)


@pytest.mark.parametrize("options", [{}, {"hidden": 5}, {"window": 3, "fade": False}], ids=str)
def test_a_mechanism_with_more_features_takes_up_what_a_smaller_one_learned(options):
    small, q, k = build(num_features=6, **options), *inputs(20)[:2]
    large = PerformerConfig(num_features=15, **options).build(layer())
    large.load_state_dict(large.resized(small.state_dict()))
    x = torch.zeros(1, 20, 16)
    expected, found = small.attention_map(q, k, x), large.attention_map(q, k, x)
    assert 0 < (found - expected).abs().sum(-1).mean() < 0.1
    weight = large.features.weight
    assert torch.equal(weight[..., :6], small.features.weight)
    assert (weight[..., 6:12] - weight[..., :6]).abs().min() > 0
    assert small.resized(small.state_dict()).keys() == small.state_dict().keys()
    if small.config.window:
        none = PerformerConfig(num_features=0, window=small.config.window).build(layer())
        none.load_state_dict(none.resized(small.state_dict()))
        assert not none.state_dict()


def test_a_layer_without_features_is_its_window_alone():
    mechanism, (q, k, v, x) = PerformerConfig(num_features=0, window=5).build(layer()), inputs(40)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    near = (distance >= 0) & (distance < 5)
    expected = scaled_dot_product_attention(q, *(repeat_heads(t, q.shape[1]) for t in (k, v)), near)
    torch.testing.assert_close(mechanism(q, k, v, x), expected, **TOLERANCE)
    assert not list(mechanism.parameters())
    assert mechanism.keys_read(39) == 5


@pytest.mark.parametrize("shift", [-200.0, 200.0])
@torch.no_grad()
def test_the_window_and_the_linear_part_may_be_worlds_apart(shift):
    mechanism, (q, k, v, x) = build(window=4), inputs(30)
    mechanism.features.bias[:2] += shift  # of the queries
    state = mechanism.new_state()
    cached = torch.cat([mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x, state) for i in range(30)], 2)
    torch.testing.assert_close(cached, mechanism(q, k, v, x), **TOLERANCE)
    assert cached.isfinite().all()


@torch.no_grad()
def test_a_long_text_without_the_linear_part_is_zero(monkeypatch):
    monkeypatch.setattr(performer, "CPU_SEGMENT", 16)
    mechanism, (q, k, v, x) = build(), inputs(50)
    mechanism.disable("linear")
    assert not mechanism(q, k, v, x).any()
