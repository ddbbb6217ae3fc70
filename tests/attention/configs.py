"""Random configurations of every method, for property tests."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from attention.masks import MasksConfig
from attention.mechanism import MechanismConfig
from attention.softmax import SoftmaxConfig

masks = st.one_of(
    st.integers(0, 9).map("last({})".format),
    st.integers(1, 20).map("window({})".format),
    st.integers(1, 9).map("first({})".format),
    st.tuples(st.integers(1, 4), st.integers(1, 5)).map(lambda numbers: "dilated({}, {})".format(*numbers)),
    st.just("causal"),
)

CONFIGS: dict[str, SearchStrategy[MechanismConfig]] = {
    "softmax": st.builds(SoftmaxConfig),
    "masks": st.builds(
        MasksConfig,
        candidates=st.lists(masks, min_size=1, max_size=5, unique=True).map(tuple),
        per_head=st.booleans(),
        init=st.sampled_from(["zero", "random"]),
        scale=st.floats(0, 4),
        seed=st.integers(0, 99),
    ),
}
