"""Untrusted values into settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from demo.request import OPTIONS, RequestError, from_query, read_settings
from demo.runs import Settings

GOOD = {"prompt": "Hello", "models": ["base", "masks"]}


def test_what_is_not_given_takes_its_default(store):
    assert read_settings(GOOD, store) == Settings("Hello", ("base", "masks"), max_new_tokens=24)


def test_everything_wrong_is_said_at_once(store):
    bad = {
        "prompt": "", "models": ["nothing"], "temperature": -1, "top_k": 1.5, "top_p": 0,
        "repetition_penalty": float("nan"), "seed": None,
    }  # fmt: skip
    with pytest.raises(RequestError) as caught:
        read_settings(bad, store)
    text = str(caught.value)
    for part in ("prompt is empty", "No model nothing", "Temperature", "Top k", "Top p", "Repetition", "Seed"):
        assert part in text
    assert len(caught.value.problems) == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "x" * 2001}, "2,001 characters; at most 2,000"),
        ({"prompt": None}, "empty"),
        ({"models": []}, "No model is chosen"),
        ({"models": ["base"] * 2}, "different models"),
        ({"models": ["a", "b", "c", "d"]}, "up to 3"),
        ({"max_new_tokens": 25}, "at most 24"),
        ({"temperature": float("inf")}, "finite"),
    ],
)
def test_limits(store, values, message):
    with pytest.raises(RequestError, match=message):
        read_settings({**GOOD, "max_new_tokens": 5, **values}, store)


@given(
    values=st.dictionaries(
        st.sampled_from(["prompt", "models", *OPTIONS]),
        st.none() | st.text(st.characters()) | st.floats() | st.integers() | st.lists(st.text(st.characters())),
    )
)
def test_nothing_but_a_request_error_comes_of_rubbish(small_store, values):
    try:
        settings = read_settings(values, small_store)
    except RequestError as error:
        str(error).encode()
    else:
        settings.prompt.encode()


@pytest.fixture(scope="module")
def small_store(checkpoints):
    from demo.models import Access, ModelStore

    return ModelStore([checkpoints / "base"], access=Access())


def test_links(store):
    link = QueryParams("prompt=Hi%00there&models=masks&models=gone&temperature=0.5&seed=abc&top_k=7&other=1")
    given_, run_it = from_query(link, store)
    assert given_ == {"prompt": "Hi\x00there", "models": ["masks"], "temperature": 0.5, "top_k": 7}
    assert run_it
    assert from_query(QueryParams("__theme=dark"), store) == ({}, False)
