"""Untrusted values into settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from demo.request import OPTIONS, RequestError, from_query, in_address, read_settings
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


def test_a_link_is_read_as_it_was_written(store):
    settings = Settings("Hi\x00 & ä", ("masks", "base"), temperature=0.5, top_k=7, max_new_tokens=9)
    written = in_address(settings)["parameters"]
    query = QueryParams([(name, value) for name, values in written.items() for value in values])
    link = from_query(query, store)
    assert Settings(**{**link.settings, "models": tuple(link.settings["models"])}) == settings
    assert link.runs


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("prompt=", "prompt is empty"),
        ("prompt=x&seed=-3", "Seed"),
        ("prompt=x&models=masks&models=gone", "No model gone"),
        ("prompt=x&temperature=abc", "Temperature"),
        ("prompt=x&top_p=2", "Top p"),
    ],
)
def test_a_link_with_a_mistake_says_which_and_is_not_run(store, query, problem):
    link = from_query(QueryParams(query + "&top_k=7"), store)
    assert not link.runs
    assert link.prompt_given
    assert link.settings["top_k"] == 7
    assert [problem in said for said in link.problems] == [True]


def test_an_address_that_asks_for_nothing(store):
    link = from_query(QueryParams("__theme=dark&tab=speed"), store)
    assert (link.settings, link.problems, link.runs) == ({}, [], False)
