"""Random configurations of every method, for property tests."""

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from attention.mechanism import MechanismConfig
from attention.softmax import SoftmaxConfig

CONFIGS: dict[str, SearchStrategy[MechanismConfig]] = {
    "softmax": st.builds(SoftmaxConfig),
}
