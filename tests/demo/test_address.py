"""What the page's address says, and what is said of its mistakes."""

from starlette.datastructures import QueryParams

from demo.address import number_in, unknown_models


def test_a_number_in_an_address_is_a_whole_number_or_a_mistake():
    query = QueryParams("layer=3&head=-1&start=1e3&count=%D9%A3")
    problems: list[str] = []
    found = [number_in(query, name, 9, problems) for name in ("layer", "head", "start", "count", "gone")]
    assert found == [3, 9, 9, 9, 9]
    assert [problem.split(";")[0] for problem in problems] == [
        "In the link head is '-1'",
        "In the link start is '1e3'",
        "In the link count is '٣'",
    ]


def test_models_that_are_not_here_are_named():
    assert unknown_models(["base"], ["base", "nsa"]) == []
    assert unknown_models(["<b>", "base"], ["base", "nsa"]) == ["The link asks for '<b>'; there are: base, nsa."]
