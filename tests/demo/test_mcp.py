"""What becomes of the tools where Gradio's server is not built as expected."""

import logging
from types import SimpleNamespace

import pytest

from demo.mcp import speak_json


def server(**parts) -> SimpleNamespace:
    """A server of Gradio, as far as it is used."""
    types = SimpleNamespace(CallToolRequest="call", TextContent=SimpleNamespace)
    whole = {
        "types": types,
        "postprocess_output_data": lambda data, root: [str(output) for output in data],
        "get_input_schema": lambda tool, parameters=None: ({"properties": {"seed": {}}}, []),
        "mcp_server": SimpleNamespace(request_handlers={"call": None}),
        "api_info": {"named_endpoints": {}},
        "tool_to_endpoint": {},
    }
    return SimpleNamespace(**{name: part for name, part in {**whole, **parts}.items() if part is not None})


@pytest.mark.parametrize("name", ["types", "postprocess_output_data", "get_input_schema", "mcp_server"])
def test_a_server_built_in_another_way_stays_as_it_is(name, caplog):
    other = server(**{name: None})
    before = dict(vars(other))
    with caplog.at_level(logging.WARNING):
        speak_json(other)
    assert vars(other) == before
    assert name in caplog.text


def test_a_schema_without_its_endpoint_stays_as_it_is():
    other = server()
    speak_json(other)
    assert other.get_input_schema("gone") == ({"properties": {"seed": {}}}, [])
    assert [each.text for each in other.postprocess_output_data([{"a": 1}], "")] == ['{"a": 1}']
    assert other.postprocess_output_data([1], "") == ["1"]
