"""The endpoints of the views, as `gradio_client` calls them."""

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

import attention
from demo.context import App
from demo.limits import Limits
from demo.models import Access, ModelStore
from demo.page import launch

from .conftest import free_port

TEXT = "Far away in the north a small ship lay in the ice."


@pytest.fixture(scope="module")
def served(checkpoints):
    limits = Limits(prompt_characters=2000, models_per_run=3, seconds=30)
    store = ModelStore([checkpoints / "base", checkpoints / "masks"], limits, Access(None, (checkpoints,)))
    app, url, _ = launch(App(store), port=free_port(), prevent_thread_lock=True, quiet=True)
    yield Client(url, verbose=False), store
    app.blocks.close()


def test_attention(served):
    client, store = served
    result = client.predict(TEXT, "masks", layer=1, head=1, api_name="/attention")
    assert "".join(result["tokens"]) == TEXT
    loaded = store.get("masks")
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with loaded.lock:
        expected = attention.attention_maps(loaded.model, ids)[1][0, 1]
    for i, row in enumerate(result["maps"]["model"]):
        torch.testing.assert_close(torch.tensor(row).float(), expected[i, : i + 1], atol=1e-3, rtol=1e-2)
    assert len(result["maps"]["base"]) == len(result["keys_read"]) == len(result["tokens"])


def test_a_part_of_a_long_text(served):
    client, store = served
    result = client.predict(TEXT * 20, "base", start=5, count=10**6, api_name="/attention")
    assert result["start"] + len(result["tokens"]) <= result["total_tokens"]
    assert len(result["tokens"]) == store.get("base").context
    assert set(result["maps"]) == {"model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "masks"), "text is empty"),
        (("x" * 3000, "masks"), "3,000 characters"),
        ((TEXT, "../../etc"), "No model"),
        ((TEXT, "masks", 9, 0), "layers 0 to 1"),
        ((TEXT, "masks", 0, -1), "heads 0 to 1"),
        ((TEXT, "masks", "<b>", 0), "layer is '<b>'"),
        ((TEXT, "masks", 0, 0, None, 1.5), "count is '1.5'"),
        (({"a": 1}, "masks"), "not text"),
    ],
)
def test_bad_requests_are_answered_with_what_is_wrong(served, arguments, message):
    with pytest.raises(AppError, match=message):
        served[0].predict(*arguments, api_name="/attention")


def test_parts_can_be_switched_off(served):
    whole, without = (
        served[0].predict(TEXT, "masks", layer=1, head=0, off=off, api_name="/attention")
        for off in (None, ["window(6)"])
    )
    assert without["maps"]["unchanged"] == whole["maps"]["model"]
    assert without["maps"]["model"] != whole["maps"]["model"]
    for options, message in (
        ({"off": ["nothing"]}, r"no part nothing; there are: last\(0\)"),
        ({"off": "window"}, "must be a list"),
        ({"window": 0}, "at least 1"),
        ({"blocks": 1}, "at least 3"),
    ):
        with pytest.raises(AppError, match=message):
            served[0].predict(TEXT, "masks", api_name="/attention", **options)


def test_odd_texts_come_back_as_they_are(served):
    text = "<b>${x} {{value}} \u202e\u0007 é"
    result = served[0].predict(text, "masks", api_name="/attention")
    assert "".join(result["tokens"]).replace("\ufffd", "") == text


def test_speed(served):
    result = served[0].predict(["masks"], "attention", 128, api_name="/speed")
    assert [(s["model"], s["length"]) for s in result["samples"]] == [
        (name, length) for length in (64, 128) for name in ("base", "masks")
    ]
    assert result["finished"]
    assert (result["asked"], result["reached"]) == (128, 128)
    assert result["counted"][-1]["length"] == 2**20
    assert result["counted_break_even"]["masks"]["operations"] > 1
    one = served[0].predict(["masks"], "attention", 64, 1, api_name="/speed")
    assert one["samples"][1]["state_bytes"] < result["samples"][1]["state_bytes"]
    assert set(result["break_even"]) == {"masks"}
    with pytest.raises(AppError, match="Choose 1 to 3"):
        served[0].predict([], "attention", 128, api_name="/speed")


def test_endpoints_are_described(served):
    endpoints = served[0].view_api(return_format="dict")["named_endpoints"]
    for name, words in (("/attention", "What one head"), ("/speed", "Measures and counts what models cost")):
        assert words in endpoints[name]["description"]
    parameters = {each["parameter_name"]: each for each in endpoints["/speed"]["parameters"]}
    assert parameters["level"]["parameter_default"] == "attention"
