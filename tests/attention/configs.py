"""Random configurations of every method, for property tests."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from attention.masks import MasksConfig
from attention.mechanism import MechanismConfig
from attention.nsa import NSAConfig
from attention.performer import PerformerConfig
from attention.softmax import SoftmaxConfig

masks = st.one_of(
    st.integers(0, 9).map("last({})".format),
    st.integers(1, 20).map("window({})".format),
    st.integers(1, 9).map("first({})".format),
    st.tuples(st.integers(1, 4), st.integers(1, 5)).map(lambda numbers: "dilated({}, {})".format(*numbers)),
    st.just("causal"),
)
choosing_masks = st.one_of(st.integers(1, 9).map("top({})".format), st.integers(1, 4).map("induction({})".format))

mask_lists = st.lists(masks, min_size=1, max_size=5, unique=True).map(tuple)
choosing_mask_lists = st.tuples(
    st.lists(masks.filter(lambda text: text != "causal"), max_size=3, unique=True),
    st.lists(choosing_masks, min_size=1, max_size=3, unique=True),
).map(lambda lists: (*lists[0], *lists[1]))
strided_mask_lists = st.tuples(  # all distances multiples of one number
    st.sampled_from(["dilated(9, 2)", "dilated(2, 5)", "last(3)"]), st.integers(1, 9).map("first({})".format)
)


@st.composite
def nsa_configs(draw: st.DrawFn) -> NSAConfig:
    stride = draw(st.integers(1, 4))
    compress, select = sorted(stride * draw(st.integers(1, 4)) for _ in range(2))
    gates = st.floats(0.01, 0.99)
    return NSAConfig(
        compress_block=compress,
        compress_stride=stride,
        select_block=select,
        num_selected=draw(st.integers(3, 6)),
        window=draw(st.integers(1, 20)),
        select_every=draw(st.sampled_from([n for n in range(1, select + 1) if select % n == 0])),
        separate_kv=draw(st.booleans()),
        mlp_width=draw(st.integers(1, 4)),
        compressed_gate=draw(gates),
        selected_gate=draw(gates),
        window_gate=draw(gates),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def performer_configs(draw: st.DrawFn) -> PerformerConfig:
    window = draw(st.sampled_from([0, 0, 1, 3, 8, 20]))
    return PerformerConfig(
        feature_map=draw(st.sampled_from(["favor", "relu", "learned"])),
        num_features=draw(st.sampled_from([2, 8, 12, (4, 2), (2, 6, 12), *([0, (4, 0), (0, 2)] if window else [])])),
        hidden=draw(st.sampled_from([0, 4])),
        fade=draw(st.booleans()),
        orthogonal=draw(st.booleans()),
        hyperbolic=draw(st.booleans()),
        window=window,
        chunk_size=draw(st.sampled_from([1, 4, 7, 64])),
        seed=draw(st.integers(0, 99)),
    )


CONFIGS: dict[str, SearchStrategy[MechanismConfig]] = {
    "softmax": st.builds(SoftmaxConfig),
    "masks": st.builds(
        MasksConfig,
        candidates=st.one_of(mask_lists, choosing_mask_lists),
        first_layers=st.one_of(
            st.just(()), *(st.tuples(lists) for lists in (strided_mask_lists, mask_lists, choosing_mask_lists))
        ),
        per_head=st.booleans(),
        init=st.sampled_from(["zero", "random"]),
        scale=st.floats(0, 4),
        seed=st.integers(0, 99),
    ),
    "performer": performer_configs(),
    "nsa": nsa_configs(),
}
