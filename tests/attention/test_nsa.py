"""Native sparse attention: the definition, its traps, and that the fast code computes it."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attention import nsa
from attention.mechanism import ConfigError, LayerShape, repeat_heads
from attention.nsa import BRANCHES, NativeSparseAttention, NSAConfig
from attention.nsa_kernel import choose_blocks, masked_attention, selection_scores
from attention.reference import (
    nsa_selected_blocks,
    nsa_selection_scores,
    nsa_visible,
    nsa_window,
    softmax_weights,
    visible_weights,
)

from .configs import nsa_configs

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
SMALL = {
    "compress_block": 4,
    "compress_stride": 2,
    "select_block": 4,
    "num_selected": 3,
    "window": 5,
    "select_every": 2,
    "mlp_width": 3,
}


def layer(heads: int = 2, kv_heads: int | None = None, width: int = 4, dropout: float = 0.0) -> LayerShape:
    return LayerShape(
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=width,
        hidden_size=heads * width,
        max_length=64,
        dropout=dropout,
    )


def build(shape: LayerShape | None = None, **options) -> NativeSparseAttention:
    return NSAConfig(**{**SMALL, **options}).build(shape or layer()).eval()


def inputs(length: int, shape: LayerShape | None = None, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    shape, generator = shape or layer(), torch.Generator().manual_seed(seed)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(batch, n, length, shape.head_dim, generator=generator) for n in heads)
    return q, k, v, torch.randn(batch, length, shape.hidden_size, generator=generator)


def perturb(mechanism: NativeSparseAttention, seed: int = 0) -> NativeSparseAttention:
    """Moves every parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mechanism.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mechanism


def dense(mechanism: NativeSparseAttention, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Σ_c g_c · A_c v_c from dense maps, v_c being the values of the branch."""
    parts, v = mechanism.attention_parts(q, k, x), repeat_heads(v, q.shape[1])
    output = torch.zeros_like(q)
    for i, name in enumerate(BRANCHES):
        values = v
        if mechanism.config.separate_kv:
            values = v @ mechanism.value_maps[i].repeat_interleave(q.shape[1] // k.shape[1], 0)
        output = output + parts["gates"][..., i, None] * (parts[name] @ values)
    return output


shapes = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]).map(lambda heads: layer(*heads))


# Configuration.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"compress_block": 8}, ["compress_block is 8", "select_block=4"]),
        ({"compress_stride": 3}, ["compress_block=4", "select_block=4"]),
        ({"select_every": 3}, ["select_every is 3", "select_block=4"]),
        ({"num_selected": 2}, ["num_selected is 2", "at least 3"]),
        ({"window": 0}, ["window is 0"]),
        ({"window_gate": 1.0}, ["window_gate is 1.0", "between 0 and 1"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"compress_stride": 0, "mlp_width": -2}, ["compress_stride is 0", "mlp_width is -2"]),
    ],
)
def test_problems_are_named(options, named):
    with pytest.raises(ConfigError) as raised:
        NSAConfig(**{**SMALL, **options})
    for text in named:
        assert text in str(raised.value)


@torch.no_grad()
def test_masked_attention_is_what_pytorch_computes():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.arange(5) <= torch.arange(9)[:, None]
    expected = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(masked_attention(q, k, v, mask, 0.0), expected, atol=1e-6, rtol=1e-5)


def test_defaults_read_few_enough_keys_of_a_full_context():
    assert NSAConfig().build(layer()).keys_read(1023) <= 320


# The definition.


def test_a_block_is_visible_once_its_last_token_is():
    visible = nsa_visible(12, 4, block=4, stride=2)
    assert visible.sum(1).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]


def test_scores_of_selection_blocks_by_hand():
    """l = 4, d = 2, l' = 6: block j gathers p[3j − 1] + 2 p[3j] + 2 p[3j + 1] + p[3j + 2] (Eq. 9)."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    expected = [2 * 0.1 + 2 * 0.2 + 0.3, 0.3 + 2 * 0.4 + 2 * 0.5]
    scores = nsa_selection_scores(weights.expand(1, 1, 12, 5), 1, block=4, stride=2, select_block=6)
    torch.testing.assert_close(scores[0, 0, 0], torch.tensor(expected))


def test_forced_blocks_count_and_ties_go_to_the_earlier_block():
    scores = torch.zeros(1, 1, 24, 6)
    scores[..., 3] = 1.0
    chosen = nsa_selected_blocks(scores, select_block=4, number=5, select_every=1)[0, 0]
    blocks = [row.nonzero().flatten().tolist() for row in chosen]
    assert blocks[3] == [0]
    assert blocks[7] == [0, 1]
    assert blocks[19] == [0, 1, 2, 3, 4]
    assert blocks[23] == [0, 1, 3, 4, 5]


@given(
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 2),
    length=st.integers(1, 40),
    overlap=st.integers(1, 3),
    more=st.integers(0, 3),
    number=st.integers(3, 6),
    equal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_fast_choice_is_the_definition(kv_heads, groups, length, overlap, more, number, equal, seed):
    """Scores as Eq. 9 has them; the same blocks, also where scores are equal."""
    stride, generator = 2, torch.Generator().manual_seed(seed)
    block, size = stride * overlap, stride * (overlap + more)
    compressed = max(0, (length - block) // stride + 1)
    q = torch.randn(1, kv_heads * groups, length, 4, generator=generator)
    keys = torch.randn(1, kv_heads, compressed, 4, generator=generator) * (not equal)
    visible = nsa_visible(length, compressed, block, stride)
    weights = visible_weights(q, repeat_heads(keys, q.shape[1]), visible)
    expected = nsa_selection_scores(weights, kv_heads, block, stride, size)
    scores = selection_scores(q, keys, visible.sum(1)[None], overlap, overlap + more, number=-(-length // size))
    torch.testing.assert_close(scores, expected)
    own = torch.arange(length)[None] // size
    exact = scores if equal else expected
    slots = choose_blocks(exact, own, number)
    exists = torch.arange(number - 1, -1, -1) <= own[0, :, None]
    chosen = torch.zeros_like(expected, dtype=torch.long)
    chosen.scatter_add_(-1, slots, exists.long().expand_as(slots).contiguous())
    assert torch.equal(chosen == 1, nsa_selected_blocks(exact, size, number, 1))
    assert chosen.max() <= 1


# Fast code against the definition.


@given(
    config=nsa_configs(),
    shape=shapes,
    batch=st.integers(1, 2),
    length=st.integers(1, 48),
    chunk=st.sampled_from([1, 16, 512]),
    seed=st.integers(0, 99),
)
def test_equals_the_reference_in_outputs_and_gradients(config, shape, batch, length, chunk, seed):
    mechanism = perturb(config.build(shape).eval(), seed)
    tensors = [t.requires_grad_() for t in inputs(length, shape, batch, seed)]
    pieces = patch("attention.block_attention.CPU_NUMBERS", 256 * chunk)
    with patch.object(nsa, "CHUNK", chunk), patch.object(nsa, "SEGMENT", chunk), pieces:
        actual = mechanism(*tensors)
        with torch.no_grad():
            torch.testing.assert_close(mechanism(*tensors), actual.detach(), **TOLERANCE)
    expected = dense(mechanism, *tensors)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(seed))
    wanted = [*tensors, *mechanism.parameters()]
    gradients = [torch.autograd.grad(out, wanted, direction, materialize_grads=True) for out in (actual, expected)]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@given(config=nsa_configs(), shape=shapes, length=st.integers(1, 48), seed=st.integers(0, 99))
@torch.no_grad()
def test_map_times_values_is_the_output_and_rows_sum_to_the_gates(config, shape, length, seed):
    mechanism = perturb(config.build(shape).eval(), seed)
    q, k, v, x = inputs(length, shape, seed=seed)
    weights, parts = mechanism.attention_map(q, k, x), mechanism.attention_parts(q, k, x)
    gates = parts["gates"].clone()
    gates[:, :, : config.compress_block - 1, BRANCHES.index("compressed")] = 0
    torch.testing.assert_close(weights.sum(-1), gates.sum(-1), **TOLERANCE)
    if not config.separate_kv:
        torch.testing.assert_close(weights @ repeat_heads(v, shape.num_heads), mechanism(q, k, v, x), **TOLERANCE)


@torch.no_grad()
def test_every_branch_is_softmax_where_it_sees_everything():
    """Blocks of one token, and a window and a number of blocks that cover the text."""
    mechanism = build(compress_block=1, compress_stride=1, select_block=4, num_selected=6, window=24, select_every=4)
    q, k, v, x = inputs(24)
    expected = softmax_weights(q, k) @ v
    for name in BRANCHES:
        mechanism.disable(*(other for other in BRANCHES if other != name))
        gate = getattr(mechanism.config, f"{name}_gate")
        torch.testing.assert_close(mechanism(q, k, v, x) / gate, expected, **TOLERANCE)


@torch.no_grad()
def test_starts_with_the_mean_of_a_block_and_the_gates_of_the_config():
    mechanism = build(window_gate=0.7, selected_gate=0.2, compressed_gate=0.1)
    q, k, v, x = inputs(16)
    keys, values = mechanism.compression(k, v)
    torch.testing.assert_close(keys, k.unfold(2, 4, 2).mean(-1))
    torch.testing.assert_close(values, v.unfold(2, 4, 2).mean(-1))
    gates = mechanism.attention_parts(q, k, x)["gates"]
    torch.testing.assert_close(gates, torch.tensor([0.1, 0.2, 0.7]).expand_as(gates))
    for name, gate in zip(BRANCHES, (0.1, 0.2, 0.7), strict=True):
        assert mechanism.summary()[f"{name}_gate"] == pytest.approx([gate, gate])


def test_every_parameter_can_leave_its_start():
    """What starts at zero gets a gradient; what only acts through it, once it has moved."""
    mechanism = build(separate_kv=True)
    mechanism(*inputs(16)).square().sum().backward()
    late = {"compression.hidden", "compression.position"}
    moved = {name for name, parameter in mechanism.named_parameters() if parameter.grad.abs().max() > 0}
    assert moved == {name for name, _ in mechanism.named_parameters()} - late
    mechanism = perturb(build(separate_kv=True))
    mechanism(*inputs(16)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in mechanism.parameters())


@torch.no_grad()
def test_compressed_branch_is_zero_before_the_first_block_is_complete():
    mechanism = build()
    mechanism.disable("selected", "window")
    out = mechanism(*inputs(9))
    assert (out[:, :, :3] == 0).all()
    assert (out[:, :, 3:].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_a_group_shares_the_choice_of_its_first_query():
    options = {"select_block": 4, "num_selected": 4}
    q, k, _, x = inputs(48)
    alone = build(select_every=1, **options).attention_parts(q, k, x)["selected_blocks"]
    shared = build(select_every=4, **options).attention_parts(q, k, x)["selected_blocks"]
    assert not torch.equal(alone, shared)
    assert torch.equal(shared, alone[:, :, torch.arange(48) // 4 * 4])


@torch.no_grad()
def test_query_heads_of_a_key_head_choose_together():
    shape = layer(heads=4, kv_heads=2)
    q, k, _, x = inputs(48, shape)
    assert build(shape).attention_parts(q, k, x)["selected_blocks"].shape[1] == 2


@given(seed=st.integers(0, 99))
@torch.no_grad()
def test_separate_maps_are_maps_of_the_keys_and_values(seed):
    shape = layer(heads=4, kv_heads=2)
    mechanism = perturb(build(shape, separate_kv=True), seed)
    q, k, v, x = inputs(20, shape, seed=seed)
    mechanism.disable("compressed", "selected")
    own = [t @ maps[BRANCHES.index("window")] for t, maps in ((k, mechanism.key_maps), (v, mechanism.value_maps))]
    keys, values = (repeat_heads(t, 4) for t in own)
    expected = scaled_dot_product_attention(q, keys, values, nsa_window(20, 5))
    gates = mechanism.attention_parts(q, k, x)["gates"][..., BRANCHES.index("window"), None]
    torch.testing.assert_close(mechanism(q, k, v, x), gates * expected, **TOLERANCE)


@torch.no_grad()
def test_separate_maps_start_as_shared_ones():
    tensors = inputs(20)
    torch.testing.assert_close(build(separate_kv=True)(*tensors), build()(*tensors), **TOLERANCE)


def test_dropout_falls_on_weights_in_training_only():
    mechanism, tensors = build(layer(dropout=0.5)), inputs(12)
    assert torch.equal(mechanism(*tensors), build()(*tensors))
    torch.manual_seed(0)
    dropped = torch.stack([mechanism.train()(*tensors) for _ in range(200)])
    assert dropped.std(0).min() > 0
    spread = dropped.std(0) / 200**0.5  # of the mean
    assert ((dropped.mean(0) - build()(*tensors)).abs() < 5 * spread).all()


@torch.no_grad()
def test_a_single_token_chooses_as_a_block_does_where_scores_are_equal():
    """Keys that are all zero: every block weighs the same, and the earlier ones are chosen."""
    mechanism = perturb(build(num_selected=4, select_every=4))
    q, k, v, x = inputs(48)
    k[:, :, :] = 0
    for parameter in (mechanism.compression.position, mechanism.compression.to_key):
        parameter.zero_()
    state = mechanism.new_state()
    steps = [mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], state) for i in range(48)]
    torch.testing.assert_close(torch.cat(steps, 2), mechanism(q, k, v, x), **TOLERANCE)


# What it costs.


@given(config=nsa_configs(), position=st.integers(0, 60))
@torch.no_grad()
def test_keys_read_are_those_the_maps_show(config, position):
    """Of a query that ends its block, or comes before all blocks can be read; the others count theirs as whole."""
    if position >= config.num_selected * config.select_block:
        position = config.whole_blocks(position + 1) - 1
    shape = layer(heads=1)
    q, k, _, x = inputs(position + 1, shape)
    parts = config.build(shape).attention_parts(q, k, x)
    visible = nsa_visible(position + 1, position + 1, config.compress_block, config.compress_stride)[-1].sum()
    seen = visible + sum((parts[name][0, 0, -1] > 0).sum() for name in ("selected", "window"))
    assert config.build(shape).keys_read(position) == seen


@torch.no_grad()
def test_a_state_has_little_room_that_is_empty():
    """However a text came in, at once or a token at a time."""
    mechanism = build(select_block=12, compress_block=12, compress_stride=12)
    q, k, v, x = inputs(700)
    at_once, stepwise = mechanism.new_state(), mechanism.new_state()
    mechanism(*(t[:, :, :699] for t in (q, k, v)), x[:, :699], at_once)
    mechanism(*(t[:, :, 699:] for t in (q, k, v)), x[:, 699:], at_once)
    for i in range(700):
        mechanism(*(t[:, :, i : i + 1] for t in (q, k, v)), x[:, i : i + 1], stepwise)
    for state in (at_once, stepwise):
        capacity = state.keys.shape[2]
        assert 700 <= capacity <= 700 * 9 / 8 + 12
        assert capacity % 12 == 0
        assert state.nbytes() < 2 * 1.5 * k.nbytes


@given(config=nsa_configs(), length=st.integers(0, 90))
def test_keys_of_a_whole_text_are_summed_without_going_through_it(config, length):
    mechanism = config.build(layer())
    assert mechanism._keys_read_before(length) == sum(mechanism.keys_read(position) for position in range(length))
    assert [mechanism.keys_scored(position) for position in range(length)] == [
        config.visible(position) for position in range(length)
    ]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest result of an operation."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@torch.no_grad()
def test_no_tensor_grows_faster_than_the_length():
    largest = []
    for length in (2048, 4096):
        mechanism, tensors = NSAConfig().build(layer(heads=1)).eval(), inputs(length, layer(heads=1))
        with LargestTensor() as mode:
            mechanism(*tensors)
        largest.append(mode.numel)
    assert largest[1] <= 2.1 * largest[0]


@torch.no_grad()
def test_state_holds_the_keys_of_tokens_and_of_complete_blocks():
    mechanism = build()
    state = mechanism.new_state()
    mechanism(*inputs(10), state)
    assert state.keys.shape == (1, 2, 12, 4)
    assert state.compressed_keys.shape == (1, 2, 4, 4)
    assert state.selected.shape == (1, 2, 3)


@torch.no_grad()
def test_rows_of_different_lengths_step_like_each_row_alone_without_asking_the_device():
    """Past every block and window; where a row stands is fetched once, and again after rows were moved about."""
    config = NSAConfig(**SMALL | {"window": 11, "num_selected": 4, "select_every": 2, "select_block": 8})
    mechanism = perturb(config.build(layer(4, 2)).eval())
    tensors = inputs(75, layer(4, 2), batch=3)
    state, lengths, order = mechanism.new_state(), torch.tensor([2, 9, 0]), torch.tensor([1, 1, 2])
    mechanism(*(t[:, :, :9] for t in tensors[:3]), tensors[3][:, :9], state, lengths)
    fetched, fetch = [], Tensor.tolist
    with patch.object(Tensor, "tolist", lambda tensor: fetched.append(tensor) or fetch(tensor)):
        for step in range(65):
            if step == 30:
                state.reorder_cache(order)
                tensors, lengths = tuple(t[order] for t in tensors), lengths[order]
            rows = torch.arange(3)
            token = [t[rows, :, lengths + step][:, :, None] for t in tensors[:3]]
            out = mechanism(*token, tensors[3][rows, lengths + step][:, None], state)
            alone = mechanism(*tensors)[rows, :, lengths + step][:, :, None]
            torch.testing.assert_close(out, alone, **TOLERANCE)
    assert len(fetched) == 2
