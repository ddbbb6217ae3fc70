"""What every method promises, over random shapes and configurations; the checks are those of `attention.contract`."""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention import contract_checks as contract
from attention.contract_checks import Inputs, Result, Subject, module_in_float64, nudged
from attention.mechanism import LayerShape, Mechanism, repeat_heads
from attention.registry import METHODS, config_from_dict
from attention.state import State

from .configs import CONFIGS

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


@dataclass
class Case:
    """A mechanism in evaluation mode with inputs for it: q, k, v, x and tokens."""

    mechanism: Mechanism
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    seed: int

    @property
    def length(self) -> int:
        return self.inputs[0].shape[2]

    def part(self, start: int, stop: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """Tokens `start` to `stop` of some rows of the inputs."""
        *heads, x, tokens = self.inputs
        return (*(t[rows, :, start:stop] for t in heads), x[rows, start:stop], tokens[rows, start:stop])

    def run(self, inputs: tuple[Tensor, ...], state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        *heads, x, tokens = inputs
        return self.mechanism(*heads, x, state, lengths, tokens)


class Mixer(Subject):
    """A mechanism as the contract sees it: of every input (q, k, v, x, tokens) the second dimension is time."""

    def __init__(self, mechanism: Mechanism):
        self.mechanism = mechanism
        self.dtype = torch.float32

    def run(self, inputs, memory=None, *, mask=None, positions=None):
        *floats, tokens = inputs
        q, k, v, x = (t.to(self.dtype) for t in floats)
        lengths = None if mask is None else mask.sum(1)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return self.mechanism(*heads, x, memory, lengths, tokens).transpose(1, 2)

    def memory(self) -> State:
        return self.mechanism.new_state()

    def record(self, memory: State) -> None:
        memory.activate_past_recording()

    def take_back(self, memory: State, count: int) -> None:
        memory.crop(-count)

    @contextmanager
    def float64(self):
        self.dtype = torch.float64
        with module_in_float64(self.mechanism):
            yield
        self.dtype = torch.float32

    def nudged(self):
        return nudged(self.mechanism)


def promised(case: Case, tolerance: float | None = None) -> contract.Case:
    """A case for the checks of the contract; the tolerance is what rounding makes of this mechanism, unless given."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    inputs = by_time(case.inputs)
    others = [7 * torch.randn(t.shape, generator=generator) for t in inputs[:4]]
    others.append(torch.randint(5, inputs[4].shape, generator=generator))
    mixer = Mixer(case.mechanism)
    if tolerance is None:
        tolerance = contract.precision(mixer, inputs)[1]
    return contract.Case(mixer, inputs, tuple(others), tolerance)


def by_time(inputs: Inputs) -> Inputs:
    """q, k, v, x and tokens with time as the second dimension, laid out as parts of them are: or bits might differ."""
    *heads, x, tokens = inputs
    return (*(t.transpose(1, 2).contiguous() for t in heads), x, tokens)


def hold(result: Result) -> None:
    assert result.holds, result.sentence


@st.composite
def cases(draw: st.DrawFn, method: str, max_length: int = 48, max_batch: int = 2) -> Case:
    kv_heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]))
    heads, width = kv_heads * groups, draw(st.sampled_from([4, 8]))
    length, batch = draw(st.integers(1, max_length)), draw(st.integers(1, max_batch))
    layer = LayerShape(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=width, hidden_size=heads * width, max_length=64, layer_idx=1
    )
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mechanism = draw(CONFIGS[method]).build(layer).eval()
    with torch.no_grad():  # away from the start, where gates and weights may hide mistakes
        for parameter in mechanism.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    q, k, v = (torch.randn(batch, n, length, width, generator=generator) for n in (heads, kv_heads, kv_heads))
    x = torch.randn(batch, length, layer.hidden_size, generator=generator)
    tokens = torch.randint(5, (batch, length), generator=generator)  # few, so that they come again
    return Case(mechanism, (q, k, v, x, tokens), seed)


every_method = pytest.mark.parametrize("method", sorted(METHODS))


def test_every_method_is_tested():
    assert set(CONFIGS) == set(METHODS)


@every_method
@given(data=st.data())
def test_config_survives_a_round_trip(method, data):
    config = data.draw(CONFIGS[method])
    assert config_from_dict(config.to_dict()) == config


@every_method
@given(data=st.data())
@torch.no_grad()
def test_strictly_causal(method, data):
    """What comes after a token changes nothing at it, to the last bit."""
    case = data.draw(cases(method))
    hold(contract.replaced_tokens(promised(case, tolerance=0), [data.draw(st.integers(0, case.length))]))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_a_start_gives_the_same_whatever_follows(method, data):
    """Its length is odd, prime or round: no size inside a method may come from the length of the text."""
    case = data.draw(cases(method))
    hold(contract.prefixes(promised(case)))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(method, data):
    hold(contract.batch(promised(data.draw(cases(method, max_batch=3)))))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_padding_behind_a_row_is_not_read(method, data):
    case = data.draw(cases(method, max_batch=3))
    lengths = [data.draw(st.integers(1, case.length)) for _ in range(case.inputs[0].shape[0])]
    hold(contract.padded(promised(case), "right", lengths))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_cached_equals_uncached_in_any_split(method, data):
    case = data.draw(cases(method))
    sizes = st.sampled_from([1, 1, 2, 5, 16, 40])
    hold(contract.cached(promised(case), contract.parts_of(case.length, [], iter(lambda: data.draw(sizes), None))))


@every_method
@pytest.mark.parametrize("split", ["one_by_one", "in_blocks", "after_short_prompt"])
@settings(max_examples=5)
@given(data=st.data())
@torch.no_grad()
def test_cached_equals_uncached_as_texts_are_written(method, split, data):
    hold(getattr(contract, f"cached_{split}")(promised(data.draw(cases(method)))))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_tokens_that_were_taken_back_leave_no_trace(method, data):
    hold(contract.rollback(promised(data.draw(cases(method)))))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_a_state_starts_anew_after_a_reset(method, data):
    case = data.draw(cases(method))
    state = case.mechanism.new_state()
    first = run_in_parts(case, state, data)
    assert state.seen == case.length
    state.reset()
    assert state.seen == 0
    torch.testing.assert_close(run_in_parts(case, state, data), first, **TOLERANCE)


def run_in_parts(case: Case, state: State, data: st.DataObject) -> Tensor:
    """What a case gives in any split of its tokens."""
    outputs, start = [], 0
    while start < case.length:
        stop = min(case.length, start + data.draw(st.sampled_from([1, 1, 2, 5, 16, 40])))
        outputs.append(case.run(case.part(start, stop), state))
        start = stop
    return torch.cat(outputs, 2)


@every_method
@given(data=st.data())
@torch.no_grad()
def test_rows_of_different_lengths_equal_each_row_alone(method, data):
    """A prefill with padding behind the rows, another such block, then single tokens."""
    case = data.draw(cases(method, max_batch=3))
    batch, total = case.inputs[0].shape[0], case.length
    singles = data.draw(st.sampled_from([2, 2, 15]))
    blocks = [data.draw(st.integers(1, total)), data.draw(st.integers(1, 6)), *[1] * singles]
    state, done = case.mechanism.new_state(), torch.zeros(batch, dtype=torch.long)
    outputs = [[] for _ in range(batch)]
    for number, block in enumerate(blocks):
        take = torch.tensor([data.draw(st.integers(0 if number < 2 else block, block)) for _ in range(batch)])
        take = torch.minimum(take, total - done)
        gathered = _ragged(case, done, block)
        out = case.run(gathered, state, None if (take == block).all() else take)
        assert torch.isfinite(out).all()
        for row in range(batch):
            outputs[row].append(out[row : row + 1, :, : take[row]])
        done = done + take
    for row in range(batch):
        alone = case.run(case.part(0, int(done[row]), slice(row, row + 1))) if done[row] else None
        if alone is not None:
            torch.testing.assert_close(torch.cat(outputs[row], 2), alone, **TOLERANCE)


def _ragged(case: Case, start: Tensor, block: int) -> tuple[Tensor, ...]:
    """`block` tokens of each row from its own start; past the end, the last token again."""
    index = (start[:, None] + torch.arange(block)).clamp(max=case.length - 1)
    *heads, x, tokens = case.inputs
    taken = [t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in heads]
    return (*taken, x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), tokens.gather(1, index))


@every_method
@given(data=st.data())
@torch.no_grad()
def test_reordered_states_continue_their_rows(method, data):
    """Beam search: after reordering, each row goes on as the row it was copied from."""
    case = data.draw(cases(method, max_batch=3))
    if case.length < 2:
        return
    cut = data.draw(st.integers(1, case.length - 1))
    batch = case.inputs[0].shape[0]
    order = torch.tensor([data.draw(st.integers(0, batch - 1)) for _ in range(batch)])
    expected = case.run([t[order] for t in case.inputs])[:, :, cut:]
    state = case.mechanism.new_state()
    case.run(case.part(0, cut), state)
    state.reorder_cache(order)
    actual = case.run([t[order] for t in case.part(cut, case.length)], state)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@every_method
@given(data=st.data())
@torch.no_grad()
def test_map_is_causal_and_never_negative(method, data):
    case = data.draw(cases(method))
    q, k, _, x, tokens = case.inputs
    weights = case.mechanism.attention_map(q, k, x, tokens)
    assert weights.shape == (*q.shape[:3], q.shape[2])
    assert (weights >= 0).all()
    assert torch.equal(weights, weights.tril())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"nsa"}))  # NSA compresses values: see its own tests
@given(data=st.data())
@torch.no_grad()
def test_map_times_values_is_the_output(method, data):
    case = data.draw(cases(method))
    q, k, v, x, tokens = case.inputs
    weights = case.mechanism.attention_map(q, k, x, tokens)
    torch.testing.assert_close(weights @ repeat_heads(v, q.shape[1]), case.run(case.inputs), **TOLERANCE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), **TOLERANCE)


@every_method
@given(data=st.data())
def test_gradients_are_finite_and_reach_every_input(method, data):
    case = data.draw(cases(method))
    *inputs, tokens = case.inputs
    inputs = [t.clone().requires_grad_() for t in inputs]
    output = case.run((*inputs, tokens))
    (output * torch.randn_like(output)).sum().backward()
    for name, tensor in zip("qkv", inputs, strict=False):
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
    for name, parameter in case.mechanism.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=10)
@given(data=st.data())
@torch.no_grad()
def test_half_precision_stays_near_float32(method, dtype, data):
    """Within 8 units in the last place of the largest value (2⁻⁸ for bfloat16, 2⁻¹¹ for float16), on average."""
    case = data.draw(cases(method))
    *inputs, tokens = case.inputs
    rounded = [t.to(dtype) for t in inputs]
    case.mechanism.to(dtype)
    actual = case.run((*rounded, tokens))
    assert actual.dtype == dtype
    case.mechanism.float()
    expected = case.run((*(t.float() for t in rounded), tokens))
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert (actual.float() - expected).abs().mean() <= 8 * unit


@every_method
@given(data=st.data())
def test_counts_are_positive_and_grow(method, data):
    mechanism = data.draw(cases(method)).mechanism
    reads = [mechanism.keys_read(position) for position in range(64)]
    assert reads[0] >= 1
    assert all(a <= b for a, b in itertools.pairwise(reads))
    assert 0 < mechanism.operations(8) < mechanism.operations(64)


COMPILED = {  # whatever options switch to another path
    "softmax": [{}],
    "masks": [
        {},
        {"candidates": ["window(4)", "first(2)"]},
        {"candidates": ["dilated(9, 4)", "first(2)"]},
        {"candidates": ["window(4)", "top(6)", "induction(2)"]},
    ],
    "performer": [{"feature_map": "favor"}, {"feature_map": "learned"}, {"window": 20}, {"feature_map": "relu"}],
    "nsa": [{}],
}


@pytest.mark.parametrize("length", [20, 1100])
@pytest.mark.parametrize(("method", "options"), [(name, options) for name in COMPILED for options in COMPILED[name]])
@torch.no_grad()
def test_compiles_into_one_graph_once_it_has_run(method, options, length):
    torch.compiler.reset()  # or other lengths before this one would make the graph one for any length, slow to trace
    shape = LayerShape(num_heads=12, num_kv_heads=12, head_dim=8, hidden_size=96, max_length=2048)
    mechanism = config_from_dict({"method": method, **options}).build(shape).eval()
    inputs = *(torch.randn(1, 12, length, 8) for _ in range(3)), torch.randn(1, length, 96)
    inputs = *inputs, None, None, torch.randint(9, (1, length))
    expected = mechanism(*inputs)
    compiled = torch.compile(mechanism, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)


@every_method
@given(data=st.data())
def test_unknown_branch_is_named(method, data):
    mechanism = data.draw(cases(method)).mechanism
    with pytest.raises(ValueError, match="nonsense"):
        mechanism.disable("nonsense")
