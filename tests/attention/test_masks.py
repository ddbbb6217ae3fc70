"""The masks method: its syntax, its mathematics, pruning, and what its states cost."""

import copy
import dataclasses
import itertools
import re
from itertools import pairwise, product
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.block_attention import _block_attention_at_once, block_attention
from attention.masks import MasksAttention, MasksConfig
from attention.masks_plan import BLOCKS, Candidate, Plan
from attention.mechanism import ConfigError, LayerShape, repeat_heads
from attention.reference import (
    candidate_mask,
    effective_mask,
    induction_mask,
    masked_softmax_weights,
    softmax_weights,
    top_mask,
)
from attention.registry import config_from_dict

from .configs import CONFIGS

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def layer(heads: int = 2, kv_heads: int | None = None, width: int = 4, dropout: float = 0.0) -> LayerShape:
    return LayerShape(
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=width,
        hidden_size=heads * width,
        max_length=64,
        dropout=dropout,
    )


def build(*candidates: str, shape: LayerShape | None = None, **options) -> MasksAttention:
    return MasksConfig(candidates=candidates, **options).build(shape or layer()).eval()


def inputs(length: int, shape: LayerShape | None = None, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    shape, generator = shape or layer(), torch.Generator().manual_seed(seed)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(batch, n, length, shape.head_dim, generator=generator) for n in heads)
    return q, k, v, torch.randn(batch, length, shape.hidden_size, generator=generator)


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Tokens that come again and again."""
    return torch.randint(5, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference(
    mechanism: MasksAttention, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None, tokens: Tensor | None = None
) -> Tensor:
    """The definition, with weights and scores computed here: σ(α), 0 where a candidate is pruned or disabled."""
    candidates = mechanism.candidates
    enabled = torch.tensor([c.name not in mechanism.disabled for c in candidates])
    weights = (mechanism.alpha.sigmoid() * mechanism.active * enabled).view(-1, len(candidates))
    scores = torch.einsum("bte,he->bht", x, mechanism.to_scores) if hasattr(mechanism, "to_scores") else None
    used = [i for i, candidate in enumerate(candidates) if scores is not None or candidate.kind != "top"]
    kinds = [(candidates[i].kind, candidates[i].numbers) for i in used]
    mask = effective_mask(kinds, weights[:, used], q.shape[2], scores, tokens)
    return masked_softmax_weights(q, repeat_heads(k, q.shape[1]), mask) @ repeat_heads(v, q.shape[1])


# Configuration.


@pytest.mark.parametrize(
    ("text", "kind", "numbers"),
    [
        ("last(0)", "last", (0,)),
        (" window( 8 ) ", "window", (8,)),
        ("first(1)", "first", (1,)),
        ("dilated(4,16)", "dilated", (4, 16)),
        ("causal", "causal", ()),
        ("causal()", "causal", ()),
        ("top(3)", "top", (3,)),
        ("induction(1)", "induction", (1,)),
    ],
)
def test_syntax(text, kind, numbers):
    assert Candidate.parse(text) == Candidate(kind, numbers)
    assert Candidate.parse(Candidate.parse(text).name) == Candidate(kind, numbers)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("latest(3)", "unknown"),
        ("last 3", "unknown"),
        ("window(3", "unknown"),
        ("", "unknown"),
        ("last", "needs 1 whole number"),
        ("causal(3)", "needs no whole number"),
        ("dilated(3)", "needs 2 whole number"),
        ("window(1.5)", "needs 1 whole number"),
        ("window(0)", "between 1 and"),
        ("top(0)", "between 1 and"),
        ("top(2000)", "between 1 and 1024"),
        ("induction", "needs 1 whole number"),
        ("last(-1)", "between 0 and"),
        ("dilated(2, 0)", "between 1 and"),
        ("window(99999999)", "between 1 and 65536"),
        ("dilated(300, 300)", "reaches 89700 back"),
    ],
)
def test_mistakes_are_named_with_the_candidate(text, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        MasksConfig(candidates=("causal", text))
    assert [repr(text) in problem for problem in caught.value.problems] == [True]


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        MasksConfig(candidates=("window(0)", "nonsense", "first(2)", "first( 2 )"), scale=-1.0, seed=-1)
    assert len(caught.value.problems) == 5
    with pytest.raises(ConfigError, match="candidates is empty"):
        MasksConfig(candidates=())
    with pytest.raises(ConfigError) as caught:
        MasksConfig(first_layers=(("window(1)",), (), ("last(1)", "last(1)", "last")))
    assert [re.match(r"first_layers\[\d\]", problem)[0][-2] for problem in caught.value.problems] == ["1", "2", "2"]
    with pytest.raises(ConfigError, match="candidates lists causal beside masks that choose keys"):
        MasksConfig(candidates=("causal", "top(3)"), first_layers=(("causal",), ("top(3)",)))


def test_start_is_zero_or_a_seeded_draw_that_differs_between_layers():
    assert not build("window(2)", "first(1)").alpha.any()
    config = MasksConfig(candidates=("window(2)", "first(1)"), init="random", scale=2.0, seed=5)
    shapes = [LayerShape(2, 2, 4, 8, 64, layer_idx=i) for i in (0, 0, 1)]
    first, again, other = (config.build(shape).alpha for shape in shapes)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = MasksConfig(candidates=tuple(f"last({i})" for i in range(500)), init="random", scale=2.0).build(layer())
    assert many.alpha.std().item() == pytest.approx(2.0, rel=0.1)


def test_weights_are_per_head_or_per_layer():
    assert build("window(2)", "first(1)", per_head=True).alpha.shape == (2, 2)
    assert build("window(2)", "first(1)", per_head=False).alpha.shape == (2,)


def test_first_layers_have_their_own_masks():
    config = MasksConfig(candidates=["last(0)", "window(3)"], first_layers=[["dilated(3, 2)", "last(0)"], ["first(1)"]])
    assert hash(config) == hash(config_from_dict(config.to_dict()))
    layers = [config.build(dataclasses.replace(layer(), layer_idx=i)) for i in range(3)]
    expected = [["last(0)", "dilated(3, 2)"], ["first(1)"], ["last(0)", "window(3)"]]
    for mechanism, names in zip(layers, expected, strict=True):
        assert mechanism.branches == ("last(0)", "window(3)", "dilated(3, 2)", "first(1)")
        assert [name for name, weights in mechanism.summary().items() if any(weights)] == names
    assert [mechanism.keys_read(60) for mechanism in layers] == [3, 1, 3]


def test_defaults_read_at_most_72_keys():
    assert MasksConfig().build(layer()).keys_read(1023) == 72


# The mathematics.


@given(data=st.data())
def test_equals_the_reference_in_outputs_and_gradients(data):
    """Also with candidates pruned, per head, and others disabled."""
    kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    shape = layer(kv_heads * groups, kv_heads)
    mechanism = data.draw(CONFIGS["masks"]).build(shape)
    length, batch, seed = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99))
    tensors, tokens = inputs(length, shape, batch, seed), ids(length, batch, seed)
    with torch.no_grad():
        mechanism.alpha += torch.randn_like(mechanism.alpha)
        for parameter in mechanism.choosing_parameters():
            parameter += torch.randn_like(parameter)
    mechanism.prune(data.draw(st.sampled_from([0.0, 0.4])))
    mechanism.disable(*data.draw(st.sets(st.sampled_from(mechanism.branches), max_size=1)))
    variables = [t.requires_grad_() for t in tensors[:3]]
    actual = mechanism(*tensors, tokens=tokens)
    expected = reference(mechanism, *variables, tensors[3], tokens)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    direction = torch.randn_like(actual)
    variables.append(mechanism.alpha)
    grads = torch.autograd.grad((actual * direction).sum(), variables, allow_unused=True)
    expected_grads = torch.autograd.grad((expected * direction).sum(), variables, materialize_grads=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        grad = torch.zeros_like(expected_grad) if grad is None else grad  # where α cancels
        torch.testing.assert_close(grad, expected_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [701, 1100])
@pytest.mark.parametrize("numbers", [1 << 16, 1 << 18], ids=["parts of a head", "heads"])
@pytest.mark.parametrize("per_head", [False, True])
def test_equals_the_reference_over_many_pieces(per_head, numbers, length, monkeypatch):
    """Long enough that the kernel takes several pieces, the last of them one short block; or that blocks share keys."""
    monkeypatch.setattr("attention.block_attention.CPU_NUMBERS", numbers)
    shape = layer(heads=8, width=8)
    mechanism = build(
        *("window(64)", "last(0)", "last(7)", "first(4)", "dilated(5, 20)"),
        **{"shape": shape, "per_head": per_head, "init": "random"},
    )
    assert mechanism.plan().cut(length, torch.device("cpu"))[1] == (length > 1000)
    tensors = inputs(length, shape, batch=2)
    variables = [*(t.requires_grad_() for t in tensors[:3]), mechanism.alpha]
    actual, expected = mechanism(*tensors), reference(mechanism, *tensors[:3])
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    direction = torch.randn_like(actual)
    grads, expected_grads = (torch.autograd.grad((out * direction).sum(), variables) for out in (actual, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-4 * expected_grad.abs().max().item(), rtol=1e-4)


@given(st.integers(1, 40), st.floats(-9, 9), st.booleans())
def test_only_causal_equals_softmax_whatever_its_weight(length, alpha, per_head):
    mechanism = build("causal", per_head=per_head)
    torch.nn.init.constant_(mechanism.alpha, alpha)
    q, k, v, x = inputs(length)
    torch.testing.assert_close(mechanism(q, k, v, x), softmax_weights(q, k) @ v, **TOLERANCE)


def test_causal_left_over_by_pruning_is_softmax_again():
    mechanism = build("causal", "window(3)")
    with torch.no_grad():
        mechanism.alpha[:, 1] = -9.0
    mechanism.prune(0.01)
    q, k, v, x = inputs(20)
    torch.testing.assert_close(mechanism(q, k, v, x), scaled_dot_product_attention(q, k, v, is_causal=True))
    assert mechanism.operations(64) == 2 * 2 * 2 * 4 * 64 * 65 // 2


def test_a_row_with_empty_support_reads_itself():
    q, k, v, x = inputs(8)
    out = build("last(3)")(q, k, v, x)
    torch.testing.assert_close(out[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(out[:, :, 3:], v[:, :, :5])  # exactly three back, and nothing else


def test_without_any_candidate_every_row_reads_itself():
    mechanism = build("window(3)", "first(2)", "causal")
    mechanism.disable("window(3)", "first(2)", "causal")
    q, k, v, x = inputs(8)
    torch.testing.assert_close(mechanism(q, k, v, x), v)
    assert mechanism.keys_read(7) == 1


@pytest.mark.parametrize("candidates", [("window(3)", "first(2)"), ("causal", "window(3)")])
def test_underflowing_weights_keep_the_support(candidates):
    """σ(−200) is 0 in float32: rows must neither lose their keys nor become NaN, forwards or backwards."""
    mechanism = build(*candidates)
    torch.nn.init.constant_(mechanism.alpha, -200.0)
    q, k, v, x = inputs(8)
    out = mechanism(q, k, v, x)
    out.sum().backward()
    assert torch.isfinite(mechanism.alpha.grad).all()
    torch.nn.init.constant_(mechanism.alpha, 0.0)  # equal weights in both cases
    torch.testing.assert_close(out, mechanism(q, k, v, x), **TOLERANCE)


def test_a_larger_weight_draws_more_attention():
    mechanism = build("window(6)", "last(2)", per_head=False)
    q, k, _, x = inputs(12)
    before = mechanism.attention_map(q, k, x).diagonal(-2, 2, 3)
    with torch.no_grad():
        mechanism.alpha[1] = 3.0
    assert (mechanism.attention_map(q, k, x).diagonal(-2, 2, 3) > before).all()


@pytest.mark.parametrize(
    ("kind", "numbers", "row"),
    [
        ("last", (2,), [0, 0, 0, 1, 0, 0]),
        ("window", (3,), [0, 0, 0, 1, 1, 1]),
        ("first", (2,), [1, 1, 0, 0, 0, 0]),
        ("dilated", (2, 3), [0, 0, 1, 0, 0, 1]),
        ("causal", (), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_reference_masks_read_what_their_names_say(kind, numbers, row):
    assert candidate_mask(kind, numbers, 6)[5].int().tolist() == row


def test_reference_of_top_reads_the_best_so_far():
    scores = torch.tensor([[[1.0, 3.0, 2.0, 3.0, 0.0, 5.0]]])
    expected = [[1], [1, 1], [0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]]  # of equal ones the earlier
    assert [row[: i + 1] for i, row in enumerate(top_mask(scores, 2)[0, 0].int().tolist())] == expected
    assert not top_mask(scores, 2).triu(1).any()


def test_reference_of_induction_reads_what_followed():
    rows = induction_mask(torch.tensor([[7, 8, 7, 9, 7, 7]]), 2)[0, 0]
    read = [row.nonzero().flatten().tolist() for row in rows]
    assert read == [[], [], [1], [], [1, 3], [3, 5]]


def test_parts_hold_the_effective_mask():
    mechanism = build("window(2)", "first(1)", per_head=False)
    q, k, _, x = inputs(4)
    expected = torch.tensor([[1.0, 0, 0, 0], [1, 0.5, 0, 0], [0.5, 0.5, 0.5, 0], [0.5, 0, 0.5, 0.5]])
    torch.testing.assert_close(mechanism.attention_parts(q, k, x)["mask"], expected[None, None])


# Masks that depend on the text.


@given(data=st.data())
def test_long_texts_choose_as_the_reference_does(data):
    """Scores with many equal ones, tokens that come often, and blocks of every size."""
    mechanism = build("window(3)", "top(2)", "top(7)", "induction(1)", "induction(5)", init="random")
    length = data.draw(st.sampled_from([1, 17, 130, 401]))
    tensors, tokens = inputs(length, batch=2, seed=data.draw(st.integers(0, 99))), ids(length, batch=2)
    x = tensors[3].round()
    with torch.no_grad():
        mechanism.to_scores.fill_(data.draw(st.sampled_from([0.0, 1.0, -1.0])))
        actual = mechanism(*tensors[:3], x, tokens=tokens)
        torch.testing.assert_close(actual, reference(mechanism, *tensors[:3], x, tokens), **TOLERANCE)


@pytest.mark.parametrize("prompt", [1, 6, 33])
@torch.no_grad()
def test_long_decoding_chooses_the_same_keys(prompt):
    mechanism = build("window(4)", "first(9)", "top(5)", "induction(2)", init="random")
    mechanism.to_scores.normal_(generator=torch.Generator().manual_seed(0))
    (*heads, x), tokens, state = inputs(90, batch=2), ids(90, batch=2), mechanism.new_state()
    out = [
        mechanism(*(t[:, :, a:b] for t in heads), x[:, a:b], state, tokens=tokens[:, a:b])
        for a, b in pairwise([0, *range(prompt, 91)])
    ]
    torch.testing.assert_close(torch.cat(out, 2), mechanism(*heads, x, tokens=tokens), **TOLERANCE)


def test_induction_needs_ids():
    with pytest.raises(ValueError, match="give their input_ids, too"):
        build("induction(2)")(*inputs(5))


@torch.no_grad()
def test_without_an_earlier_occurrence_a_row_reads_itself():
    q, k, v, x = inputs(6)
    out = build("induction(2)")(q, k, v, x, tokens=torch.tensor([[1, 2, 3, 2, 4, 5]]))
    torch.testing.assert_close(out[:, :, [0, 1, 2, 4, 5]], v[:, :, [0, 1, 2, 4, 5]])
    torch.testing.assert_close(out[:, :, 3], v[:, :, 2])


def test_scores_learn_which_keys_matter_beyond_the_fixed_places():
    """All queries look for keys whose input has a mark; scores that know the mark's direction must come out."""
    shape, generator = layer(), torch.Generator().manual_seed(0)
    mechanism = build("window(3)", "top(4)", shape=shape)
    marked = torch.rand(4, 40, generator=generator) < 0.1
    x = torch.randn(4, 40, 8, generator=generator)
    x[..., 0] = 4.0 * marked
    q, k = torch.ones(4, 2, 40, 4), 0.1 * torch.randn(4, 2, 40, 4, generator=generator)
    k = k + 3.0 * marked[:, None, :, None]
    assert mechanism.choosing_parameters() == [mechanism.to_scores]
    assert not mechanism.to_scores.requires_grad  # until a stage asks for it
    mechanism.to_scores.requires_grad_()
    optimizer = torch.optim.Adam(mechanism.choosing_parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = mechanism.selection_loss(q, k, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert mechanism.alpha.grad is None
    chosen = top_mask(mechanism._scores(x), 4)[:, :, -1]
    assert (chosen | ~marked[:, None]).float().mean() > 0.97  # hardly a marked key is missed


@pytest.mark.parametrize("others", [(), ("window(2)", "induction(1)"), ("last(3)",)], ids=str)
def test_selection_loss_is_a_cross_entropy_over_the_keys_that_are_left(others):
    mechanism = build("top(3)", *others)
    mechanism.to_scores.normal_(generator=torch.Generator().manual_seed(0))
    (q, k, _, x), tokens = inputs(12, batch=2), ids(12, batch=2)
    weights, expected = softmax_weights(q, k), 0.0
    for b, h, i in itertools.product(range(2), range(2), range(12)):
        read = {"window(2)": {i, i - 1}, "last(3)": {i - 3}}
        taken = set().union(*(read.get(name, set()) for name in others))
        if "induction(1)" in others:
            taken |= {max([p + 1 for p in range(i) if tokens[b, p] == tokens[b, i]], default=-1)}
        left = [j for j in range(i + 1) if j not in taken]
        if left:
            logs = (x[b, left] @ mechanism.to_scores[h]).log_softmax(0)
            expected -= (weights[b, h, i, left] * logs).sum() / (2 * 2 * 12)
    torch.testing.assert_close(mechanism.selection_loss(q, k, x, tokens), expected)


def test_maps_need_ids_too():
    q, k, _, x = inputs(5)
    with pytest.raises(ValueError, match="give their input_ids, too"):
        build("induction(2)").attention_map(q, k, x)


@torch.no_grad()
def test_a_state_starts_anew_after_a_reset():
    mechanism = build("window(3)", "top(2)", "induction(1)", init="random")
    mechanism.to_scores.normal_(generator=torch.Generator().manual_seed(0))
    (*heads, x), tokens, state = inputs(20), ids(20), mechanism.new_state()

    def decoded() -> Tensor:
        parts = [
            (*(t[:, :, i : i + 1] for t in heads), x[:, i : i + 1], state, None, tokens[:, [i]]) for i in range(20)
        ]
        return torch.cat([mechanism(*part) for part in parts], 2)

    decoded()
    mechanism.alpha += 1.0 + torch.arange(3)
    mechanism.to_scores.neg_()
    state.reset()
    torch.testing.assert_close(decoded(), mechanism(*heads, x, tokens=tokens), **TOLERANCE)


@given(config=CONFIGS["masks"], seed=st.integers(0, 99))
@torch.no_grad()
def test_no_head_reads_more_keys_than_it_says(config, seed):
    mechanism = config.build(layer()).eval()
    (q, k, _, x), tokens = inputs(30, seed=seed), ids(30, seed=seed)
    read = (mechanism.attention_parts(q, k, x, tokens)["mask"] > 0).sum(-1).flatten(0, 1)
    assert (read <= torch.tensor([mechanism.keys_read(position) for position in range(30)])).all()


def test_a_method_that_learns_no_choice_has_no_loss_for_it():
    mechanism = build("window(3)", "induction(2)")
    q, k, _, x = inputs(9)
    assert mechanism.selection_loss(q, k, x, ids(9)) is None
    assert mechanism.choosing_parameters() == []


# The kernel.


RUNS = {
    1: [[[0, 1, 2, 2], [0, 3, 2, 1], [5, 4, 1, 0]]],
    2: [[[0, 1], [2, 1], [0, 0]], [[1, 0], [1, 2], [0, 2]], [[2, 2], [0, 1], [1, 2]], [[0, 2], [1, 0], [2, 1]]],
}


JOINED = {
    1: [[[0, 1, 2], [2, 5, 4], [3, 0, 1], [1, 2, 2], [5, 5, 0]]],
    2: [[[0, 1], [1, 2], [2, 0], [0, 0], [1, 2]]] * 4,
}


def kernel_inputs() -> list[Tensor]:
    """q, k, v and bias for three blocks of two queries, the last one short, that read four keys each."""
    torch.manual_seed(0)
    shapes = [(2, 2, 5, 3), (2, 2, 6, 3), (2, 2, 6, 3), (4, 2, 2, 4)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("numbers", [1, 1 << 18], ids=["small pieces", "large pieces"])
@pytest.mark.parametrize(("run", "joined", "skip"), [(1, 1, 0), (2, 1, 0), (1, 3, 0), (1, 3, 2), (2, 3, 1)])
def test_gradients_of_the_kernel_equal_finite_differences(run, joined, skip, numbers, dropout, monkeypatch):
    monkeypatch.setattr("attention.block_attention.CPU_NUMBERS", numbers)
    index = torch.tensor((RUNS if joined == 1 else JOINED)[run])

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        return block_attention(*tensors, index, run, dropout, joined, skip)

    assert torch.autograd.gradcheck(function, kernel_inputs())


@pytest.mark.parametrize(("run", "joined", "skip"), [(1, 1, 0), (1, 3, 0), (1, 3, 2), (2, 3, 1)])
def test_blocks_read_the_keys_of_the_lists_that_they_join(run, joined, skip):
    (q, k, v, bias), lists = kernel_inputs(), (RUNS if joined == 1 else JOINED)[run]
    actual = block_attention(q, k, v, bias, torch.tensor(lists), run, 0.0, joined, skip)
    in_a_graph = _block_attention_at_once(q, k, v, bias, torch.tensor(lists), run, 0.0, joined, skip)
    torch.testing.assert_close(in_a_graph, actual)
    for head, query in product(range(4), range(5)):
        block, own = query // 2, lists[head if len(lists) > 1 else 0]
        listed = [each * run + i for part in own[block : block + joined] for each in part for i in range(run)]
        keys, values = (t.flatten(0, 1)[head, listed[skip : skip + 4]] for t in (k, v))
        scores = keys @ q.flatten(0, 1)[head, query] * 3**-0.5 + bias[head, min(block, 1), query % 2]
        torch.testing.assert_close(actual.flatten(0, 1)[head, query], scores.softmax(-1) @ values)


def test_shared_lists_add_up_gradients_in_float32():
    """In half precision as well, as lists of each block's own do."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 96, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    lists = torch.arange(-24, 96).clamp(min=0).view(1, 15, 8)
    own = lists.unfold(1, 4, 1).transpose(2, 3).flatten(2)
    bias = torch.zeros(1, 1, 8, 32)
    shared = block_attention(q, k, v, bias, lists, joined=4)
    alone = block_attention(q, k, v, bias, own)
    grads, expected = (torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (shared, alone))
    assert torch.equal(shared, alone)
    assert all(map(torch.equal, grads, expected))


def test_a_block_reads_no_more_than_its_lists_have():
    q, k, v, bias = kernel_inputs()
    with pytest.raises(ValueError, match="reads 4 keys from key 3 on, and its lists have 6"):
        block_attention(q, k, v, bias, torch.tensor([[[0, 1], [1, 2], [2, 0], [0, 0], [1, 2]]]), 1, 0.0, 3, 3)


@given(data=st.data())
def test_blocks_that_share_what_they_read_equal_the_reference(data):
    """Also with holes between the places, in several pieces of a head, and after tokens that a state has seen."""
    drawn = st.tuples(st.integers(1, 40), st.integers(0, 12), st.integers(0, 50))
    window, sinks, back = data.draw(drawn)
    candidates = (f"window({window})", f"last({back})", *([f"first({sinks})"] if sinks else []))
    per_head, block = data.draw(st.booleans()), data.draw(st.sampled_from(BLOCKS))
    shape = layer(heads=2, width=4)
    mechanism = build(*candidates, shape=shape, per_head=per_head, init="random", scale=2.0)
    assume(mechanism.plan().stride == 1)
    length, batch, seed = data.draw(st.integers(2, 150)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 99))
    tensors, state, split = inputs(length, shape, batch, seed), mechanism.new_state(), data.draw(st.integers(1, length))
    variables = [*(t.requires_grad_() for t in tensors[:3]), mechanism.alpha]
    expected = reference(mechanism, *tensors[:3])
    numbers = patch("attention.block_attention.CPU_NUMBERS", data.draw(st.sampled_from([1 << 11, 1 << 18])))
    with numbers, patch.object(Plan, "cut", lambda *_: (block, True)):
        actual = mechanism(*tensors)
        parts = [t.split([split, length - split], dim) for t, dim in zip(tensors, (2, 2, 2, 1), strict=True)]
        continued = [mechanism(*part, state) for part in zip(*parts, strict=True) if part[0].shape[2]]
        torch.testing.assert_close(torch.cat(continued, 2), expected, **TOLERANCE)
        torch.testing.assert_close(actual, expected, **TOLERANCE)
        direction = torch.randn_like(actual)
        grads = torch.autograd.grad((actual * direction).sum(), variables)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * direction).sum(), variables), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=1e-4)


def test_long_texts_share_what_blocks_read_where_that_costs_less():
    near, far = (build(*names).plan() for names in (("window(64)", "first(4)"), ("last(0)", "last(1000)")))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert near.cut(4096, cpu)[1]
    assert not any(shares for _, shares in (near.cut(512, cpu), near.cut(4096, gpu), far.cut(4096, cpu)))
    assert near.columns(*near.cut(4096, cpu)) < near.columns(*near.cut(512, cpu))
    assert not build("window(8)", "first(256)").plan().cut(4096, cpu)[1]  # each list would hold all of the first


def test_long_texts_in_wide_strides_have_no_larger_blocks_than_they_need():
    plan = build("dilated(16, 256)").plan()
    sizes = [plan.cut(length, torch.device("cpu"))[0] for length in (1024, 4096, 16384)]
    assert sizes == [8, 16, 32]


def test_dropout_keeps_the_mean_and_stops_in_evaluation():
    shape = layer(dropout=0.25)
    mechanism = build("window(8)", "first(1)", shape=shape).train()
    q, k, _, x = inputs(900, shape)
    ones = torch.ones_like(k)
    torch.manual_seed(0)
    out = mechanism(q, k, ones, x)
    assert out.std() > 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(mechanism.eval()(q, k, ones, x), ones)


def test_training_after_use_in_inference_mode():
    mechanism = build("window(4)", "first(2)")
    tensors = inputs(20)
    with torch.inference_mode():
        mechanism(*tensors)
    mechanism(*tensors).sum().backward()
    assert mechanism.alpha.grad is not None


# Pruning and ablation.


def pruned(per_head: bool) -> tuple[MasksAttention, list[str]]:
    mechanism = build("window(20)", "last(1)", "first(2)", per_head=per_head)
    with torch.no_grad():
        mechanism.alpha[..., 0] = -16.0
        if per_head:
            mechanism.alpha[0, 2] = -16.0
    return mechanism, mechanism.prune(1e-3)


def test_prune_names_what_it_drops():
    assert pruned(per_head=False)[1] == ["window(20)"]
    mechanism, dropped = pruned(per_head=True)
    assert dropped == ["head 0: window(20)", "head 0: first(2)", "head 1: window(20)"]
    assert mechanism.prune(1e-3) == []


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_prune_refuses_thresholds_that_are_no_weights(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        build("window(3)").prune(threshold)


def test_pruning_makes_the_kernel_cheaper_and_changes_little():
    mechanism = build("window(20)", "last(0)", "last(1)", "first(2)")
    with torch.no_grad():
        mechanism.alpha[:, 0] = -16.0
    tensors = inputs(40)
    before, keys, operations = mechanism(*tensors), mechanism.keys_read(39), mechanism.operations(40)
    large = mechanism.new_state()
    mechanism(*tensors, large)
    mechanism.prune(1e-3)
    small = mechanism.new_state()
    torch.testing.assert_close(mechanism(*tensors, small), before, atol=1e-4, rtol=1e-4)
    assert (keys, mechanism.keys_read(39)) == (22, 4)
    assert mechanism.operations(40) < operations
    assert small.nbytes() < large.nbytes() / 4


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_pruning_survives_saving_and_loading(assign, used):
    """Also into a mechanism that ran before, and so has a plan for what it was."""
    mechanism, _ = pruned(per_head=True)
    fresh = mechanism.config.build(layer()).eval()
    tensors = inputs(30)
    if used:
        fresh(*tensors)
    fresh.load_state_dict(copy.deepcopy(mechanism.state_dict()), assign=assign)
    assert torch.equal(fresh.active, mechanism.active)
    assert fresh.keys_read(29) == mechanism.keys_read(29) == 3
    torch.testing.assert_close(fresh(*tensors), mechanism(*tensors))


def test_plan_is_made_once_for_each_set_of_candidates(monkeypatch):
    made = []
    monkeypatch.setattr(Plan, "__post_init__", lambda self: made.append(self))
    mechanism = build("window(3)", "first(2)")
    for length in (5, 5, 9):
        mechanism(*inputs(length))
    assert len(made) == 1
    mechanism.disable("first(2)")
    mechanism(*inputs(5))
    assert len(made) == 2


def test_disabling_removes_from_the_support_and_comes_back():
    mechanism = build("window(3)", "first(2)")
    assert mechanism.branches == ("window(3)", "first(2)")
    mechanism.disable("first(2)")
    assert mechanism.keys_read(20) == 3
    mechanism.disable()
    assert mechanism.keys_read(20) == 5


def test_penalty_is_the_sum_of_weights_meaned_over_heads_and_pulls_them_down():
    mechanism, _ = pruned(per_head=True)
    penalty = mechanism.penalty()
    assert penalty.item() == pytest.approx((0.5 + 1.0) / 2)  # last(1) in head 0; last(1) and first(2) in head 1
    penalty.backward()
    assert (mechanism.alpha.grad > 0).tolist() == mechanism.active.tolist()
    assert build("window(3)", "first(2)", per_head=False).penalty().item() == pytest.approx(1.0)


def test_summary_names_the_weights():
    assert build("window(3)", "first(2)", per_head=False).summary() == {"window(3)": [0.5], "first(2)": [0.5]}
    assert pruned(per_head=True)[0].summary() == {
        "window(20)": [0.0, 0.0],
        "last(1)": [0.5, 0.5],
        "first(2)": [0.0, 0.5],
    }


# States and counts.


def test_keys_that_are_scored_are_counted_beside_those_that_are_read():
    def scored(*candidates: str, disabled: tuple[str, ...] = ()) -> list[int]:
        mechanism = MasksConfig(candidates=candidates).build(layer())
        mechanism.disable(*disabled)
        return [mechanism.keys_scored(position) for position in (0, 5, 999)]

    assert scored("window(8)", "first(2)") == [0, 0, 0]
    assert scored("window(8)", "top(4)") == [1, 5, 5]  # the best four so far, and the new one
    assert scored("top(4)", "induction(2)") == [1, 6, 1000]  # every earlier token is compared with the query's
    assert scored("window(8)", "top(4)", "induction(2)", disabled=("induction(2)",)) == [1, 5, 5]


@given(config=CONFIGS["masks"], position=st.integers(0, 40))
def test_keys_read_is_the_size_of_the_support(config, position):
    assume(not config.build(layer()).plan().by_content)
    masks = [candidate_mask(c.kind, c.numbers, position + 1)[position] for c in config.of_layer(0)]
    assert config.build(layer()).keys_read(position) == max(1, int(torch.stack(masks).any(0).sum()))


@torch.no_grad()
def test_state_has_constant_size():
    mechanism = build("window(8)", "first(2)", "dilated(3, 6)")
    state = mechanism.new_state()
    sizes = []
    for length in (1, 30, 200, 1, 1):
        mechanism(*inputs(length), state)
        sizes.append(state.keys.shape[2])
    assert sizes == [2 + 13] * 5
    assert state.nbytes() <= 2 * 2 * (15 + 8) * 4 * 4 + 2 * 15 * 4  # half as many places more, to slide along


@torch.no_grad()
def test_one_token_costs_few_operations():
    """The hot path: what the state holds is shifted, and SDPA runs on it; nothing is computed from α again."""
    mechanism = build("window(8)", "first(2)")
    state = mechanism.new_state()
    mechanism(*inputs(20), state)
    mechanism(*inputs(1), state)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mechanism(*inputs(1), state)
    assert not {"aten::sigmoid", "aten::log", "aten::addmm", "aten::gather"} & {e.key for e in profile.key_averages()}


@torch.no_grad()
def test_state_is_refused_after_the_candidates_changed():
    mechanism = build("window(3)", "first(2)")
    state = mechanism.new_state()
    mechanism(*inputs(5), state)
    mechanism.disable("first(2)")
    with pytest.raises(ValueError, match="start with a new one"):
        mechanism(*inputs(1), state)


@torch.no_grad()
def test_reset_and_copied_states_start_and_continue_as_they_should():
    mechanism = build("window(3)", "first(2)", init="random")
    tensors = inputs(9)
    state = mechanism.new_state()
    first = mechanism(*tensors, state)
    copied = copy.deepcopy(state)
    next_token = inputs(1, seed=1)
    torch.testing.assert_close(mechanism(*next_token, copied), mechanism(*next_token, state))
    state.reset()
    parts = [[*(t[:, :, a:b] for t in tensors[:3]), tensors[3][:, a:b]] for a, b in ((0, 1), (1, 2), (2, 9))]
    torch.testing.assert_close(torch.cat([mechanism(*part, state) for part in parts], 2), first)


@pytest.mark.parametrize(
    "candidates",
    [
        ("window(5)", "first(2)", "dilated(3, 7)", "last(2)"),
        ("first(9)",),  # more sinks than the tail is long
        ("first(6)", "last(0)", "last(1)"),
        ("last(4)", "last(9)"),  # empty support first
    ],
)
@pytest.mark.parametrize("prompt", [1, 6, 9])
@torch.no_grad()
def test_long_decoding_equals_one_forward(candidates, prompt):
    """Past every window, token by token."""
    mechanism = build(*candidates, init="random")
    tensors = inputs(40)
    state = mechanism.new_state()
    cuts = [0, *range(prompt, 41)]
    out = [mechanism(*(t[:, :, a:b] for t in tensors[:3]), tensors[3][:, a:b], state) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(out, 2), mechanism(*tensors), **TOLERANCE)


@torch.no_grad()
def test_rows_of_different_lengths_step_like_each_row_alone_with_many_sinks():
    """The shortest row still lacks sinks when the state knows only that it has some tokens."""
    mechanism = build("first(9)", "last(1)", init="random")
    tensors = inputs(30, batch=2)
    expected = mechanism(*tensors)
    state, lengths = mechanism.new_state(), torch.tensor([2, 7])
    mechanism(*(t[:, :, :7] for t in tensors[:3]), tensors[3][:, :7], state, lengths)
    for step in range(20):
        place = (lengths + step)[:, None, None, None].expand(2, 2, 1, 4)
        out = mechanism(*(t.gather(2, place) for t in tensors[:3]), tensors[3][:, :1], state)
        torch.testing.assert_close(out, expected.gather(2, place), **TOLERANCE)
