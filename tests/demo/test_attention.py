"""The data of the attention views: passages, maps, thumbnails, parts, the cache."""

from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
from attention.reference import effective_mask, softmax_weights
from demo.attention import AttentionViews, Passage, ViewError, encode_text, passage
from demo.parts import explain, total_variation, weight_tables
from demo.runs import Column, Run, Settings
from demo.tabs.attention import Chosen, Handlers

from .zoo import SMALL, load_zoo

TEXT = "The old house stood at the end of the lane. Nobody had lived there for years; but it was not empty. " * 2
METHODS = [name for name in SMALL if name in attention.METHODS]


@pytest.fixture(scope="module")
def zoo(checkpoints):
    return load_zoo(checkpoints / "base")


@pytest.fixture
def views():
    return AttentionViews()


def read(loaded, text=TEXT, start=0, count=400) -> Passage:
    return passage(loaded, encode_text(loaded, text, 10_000), start, count)


def unpack(view: dict) -> torch.Tensor:
    """A packed map as (T, T)."""
    values = torch.from_numpy(np.frombuffer(b64decode(view["data"]), dtype="<f2").astype(np.float32))
    size = int((2 * len(values)) ** 0.5)
    matrix = torch.zeros(size, size)
    matrix[tuple(torch.tril_indices(size, size))] = values
    return matrix


def by_key(maps: list[dict]) -> dict[str, dict]:
    return {each["key"]: each for each in maps}


@given(total=st.integers(1, 300), start=st.integers(-20, 200), count=st.integers(-3, 200))
def test_a_passage_lies_inside_the_text_and_the_context(zoo, total, start, count):
    ids = [10 + i % 50 for i in range(total)]
    part = passage(zoo["base"], ids, start, count)
    assert 1 <= len(part.tokens) <= zoo["base"].context
    assert 0 <= part.start <= part.start + len(part.tokens) <= total == part.total
    stop = part.start + len(part.tokens)
    assert list(part.token_ids) == ids[max(0, stop - zoo["base"].context) : stop]
    assert list(part.token_ids)[part.shown] == ids[part.start : stop]


def test_tokens_of_a_passage_are_its_text(zoo):
    text = "naïve 漢字 ${x} <b>\n end"
    assert "".join(read(zoo["base"], text).tokens).replace("\ufffd", "") == text


@pytest.mark.parametrize("method", ["base", *METHODS])
def test_maps_are_the_models_own_and_the_bases(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded)
    maps = by_key(views.maps(loaded, part, 1, 1)["maps"])
    ids = torch.tensor([part.token_ids])
    expected = attention.attention_maps(loaded.model, ids)[1][0, 1]
    torch.testing.assert_close(unpack(maps["model"]), expected, atol=1e-3, rtol=1e-3)
    if method == "base":
        assert list(maps) == ["model"]
        return
    expected = attention.attention_maps(zoo["base"].model, ids)[1][0, 1]
    torch.testing.assert_close(unpack(maps["base"]), expected, atol=1e-3, rtol=1e-3)
    assert maps["difference"]["of"] == ["model", "base"]


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_a_text_is_cut_out_of_the_whole(zoo, views, method):
    loaded = zoo[method]
    ids = encode_text(loaded, TEXT, 10_000)[:40]
    whole = views.maps(loaded, passage(loaded, ids, 0, 40), 0, 0)
    part = views.maps(loaded, passage(loaded, ids, 12, 28), 0, 0)
    for key, view in by_key([*part["maps"], *part["parts"]]).items():
        if "data" in view:
            expected = unpack(by_key([*whole["maps"], *whole["parts"]])[key])[12:, 12:]
            torch.testing.assert_close(unpack(view), expected, atol=2e-3, rtol=2e-3)
    assert part["start"] == 12
    outside = next(rows for rows in part["rows"] if "before the part shown" in rows["title"])["series"][0]["values"]
    expected = 1 - unpack(part["maps"][0]).sum(-1)
    torch.testing.assert_close(torch.tensor(outside), expected, atol=5e-3, rtol=0)


def test_texts_longer_than_the_context_are_windowed(zoo, views):
    loaded = zoo["base"]
    ids = encode_text(loaded, TEXT * 6, 10_000)
    assert len(ids) > 2 * loaded.context
    part = passage(loaded, ids, len(ids), 30)
    assert len(part.token_ids) == loaded.context
    view = views.maps(loaded, part, 0, 0)
    assert view["start"] == len(ids) - 30
    assert f"of {len(ids):,}" in view["title"]


@pytest.mark.parametrize("method", METHODS)
def test_thumbnails_and_distances_of_all_heads(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded)
    grid = views.heads(loaded, part, 7, 7)
    assert (grid["layers"], grid["heads"], grid["layer"], grid["head"]) == (2, 2, 1, 1)
    assert len(b64decode(grid["pixels"])) == 2 * 2 * grid["size"] ** 2
    ids = torch.tensor([part.token_ids])
    ours, theirs = (attention.attention_maps(model, ids)[1][0, 0] for model in (loaded.model, zoo["base"].model))
    assert grid["distance"][1][0] == pytest.approx(float(total_variation(ours, theirs).mean()), abs=2e-3)
    if method == "softmax":
        assert grid["distance"] == [[0, 0], [0, 0]]


def test_a_base_has_no_distance_from_itself(zoo, views):
    assert "distance" not in views.heads(zoo["base"], read(zoo["base"]), 0, 0)


def test_masks_show_their_weights_and_the_effective_mask(zoo, views):
    loaded = zoo["masks"]
    view = views.maps(loaded, read(loaded), 0, 0)
    mask = unpack(by_key(view["parts"])["mask"])
    assert mask[20, 20] == pytest.approx(1.0)  # last(0) and window(6), σ(0) each
    assert mask[20, 18] == pytest.approx(1.0)  # last(2) and window(6)
    assert mask[20, 1] == pytest.approx(0.5)  # first(2)
    assert mask[20, 10] == 0
    by_layer, by_head = view["tables"]
    of_layer = [*SMALL["masks"]["first_layers"], SMALL["masks"]["candidates"]]
    assert {row["name"] for row in by_layer["rows"]} == set().union(*of_layer)
    assert by_layer["columns"] == ["layer 0", "layer 1"]
    for row in by_layer["rows"]:
        assert row["values"] == [0.5 * (row["name"] in names) for names in of_layer]
    assert by_head["columns"] == ["head 0", "head 1"]
    assert {value for row in by_head["rows"] for value in row["values"]} == {0.0, 0.5}


def test_the_effective_mask_shows_the_keys_that_the_text_decides(zoo, views):
    loaded = zoo["masks"]
    part = read(loaded, "the old man and the old man and the sea")
    mask = unpack(by_key(views.maps(loaded, part, 1, 0)["parts"])["mask"])
    expected = effective_mask(
        [("window", (6,)), ("top", (4,)), ("induction", (2,))],
        torch.full((2, 3), 0.5),
        len(part.token_ids),
        torch.zeros(1, 2, len(part.token_ids)),  # as they start: of equal scores the first ones
        torch.tensor([part.token_ids]),
    )
    torch.testing.assert_close(mask, expected[0, 0], atol=1e-3, rtol=0)


def test_nsa_shows_branches_gates_and_blocks(zoo, views):
    loaded = zoo["nsa"]
    part = read(loaded)
    view = views.maps(loaded, part, 0, 1)
    parts = by_key(view["parts"])
    assert {"compressed", "selected", "window", "selected_blocks", "exact"} <= set(parts)
    gates = next(rows for rows in view["rows"] if rows["title"] == "Gates")["series"]
    assert [series["name"] for series in gates] == ["compressed", "selected", "window"]
    mixed = sum(torch.tensor(series["values"])[:, None] * unpack(parts[series["name"]]) for series in gates)
    torch.testing.assert_close(mixed, unpack(view["maps"][0]), atol=2e-3, rtol=1e-2)
    blocks = unpack(parts["selected_blocks"])
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}
    last = len(part.tokens) - 1
    assert blocks[last, : SMALL["nsa"]["select_block"]].all()  # the first block is always read
    assert blocks[last].sum() <= SMALL["nsa"]["num_selected"] * SMALL["nsa"]["select_block"]
    torch.testing.assert_close(unpack(parts["selected"])[blocks == 0], torch.zeros(int((blocks == 0).sum())))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "softmax"])
def test_every_method_is_compared_with_softmax_over_its_own_keys(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded)
    view = views.maps(loaded, part, 1, 1)
    _, q, k, _ = attention.mechanism_inputs(loaded.model, torch.tensor([part.token_ids]))[1]
    exact = softmax_weights(q, k)[0, 1]
    torch.testing.assert_close(unpack(by_key(view["parts"])["exact"]), exact, atol=1e-3, rtol=1e-3)
    series = next(rows for rows in view["rows"] if "elsewhere" in rows["title"])["series"]
    error = torch.tensor(next(s for s in series if "same queries" in s["name"])["values"])
    torch.testing.assert_close(error, total_variation(unpack(view["maps"][0]), exact), atol=3e-3, rtol=0)


def test_share_of_keys_read(zoo, views):
    loaded = zoo["masks"]
    part = read(loaded)
    mechanism = loaded.model.mechanisms[0]
    shares = views.maps(loaded, part, 0, 0)["rows"][0]["series"][0]["values"]
    assert shares == [round(mechanism.keys_read(i) / (i + 1), 5) for i in range(len(part.tokens))]


def test_a_method_that_nobody_knows_is_shown_by_shapes(zoo):
    loaded = zoo["softmax"]
    mechanism, q, k, x = attention.mechanism_inputs(loaded.model, torch.arange(20)[None])[0]
    length = 20
    generator = torch.Generator().manual_seed(0)
    told = {
        "square": torch.rand(1, 2, length, length, generator=generator),
        "signed": torch.randn(1, 1, length, length, generator=generator),
        "curve": torch.rand(1, 2, length, generator=generator),
        "several": torch.rand(1, 2, length, 3, generator=generator),
        "blocks": torch.rand(1, 2, length, 5, generator=generator) > 0.5,
        "unknown": torch.rand(1, 2, 3, 4, 5, generator=generator),
    }
    mechanism.attention_parts = lambda *_: told
    mechanism.summary = lambda: {"weight": [0.25, 0.75], "scalar": [0.5]}
    parts = explain(mechanism, q, k, x, torch.arange(20)[None], head=1, shown=slice(4, length))
    maps, rows = by_key(parts.maps), {each["title"]: each for each in parts.rows}
    torch.testing.assert_close(unpack(maps["square"]), told["square"][0, 1, 4:, 4:].tril(), atol=1e-3, rtol=1e-3)
    assert maps["signed"]["kind"] == "difference"
    assert unpack(maps["blocks"])[-1, -1] == told["blocks"][0, 1, -1, -1]
    assert rows["Curve"]["series"][0]["values"] == pytest.approx(told["curve"][0, 1, 4:].tolist(), abs=1e-4)
    assert [series["name"] for series in rows["Several"]["series"]] == ["0", "1", "2"]
    assert set(maps) == {"square", "signed", "blocks"}
    assert weight_tables([mechanism], 0)[0]["rows"][0] == {"name": "weight", "values": [0.5]}


def test_numbers_for_the_endpoint(zoo, views):
    loaded = zoo["masks"]
    part = read(loaded, start=3, count=9)
    numbers = views.numbers(loaded, part, 1, 0)
    assert [len(row) for row in numbers["maps"]["model"]] == list(range(1, 10))
    torch.testing.assert_close(
        torch.tensor(numbers["maps"]["base"][-1]), unpack(views.maps(loaded, part, 1, 0)["maps"][1])[-1],
        atol=1e-3, rtol=1e-3,
    )  # fmt: skip
    assert (numbers["start"], numbers["layers"], numbers["heads"]) == (3, 2, 2)
    assert len(numbers["keys_read"]) == len(numbers["tokens"]) == 9


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 2), (-1, 0), (0, -1)])
def test_layers_and_heads_that_do_not_exist(zoo, views, layer, head):
    with pytest.raises(ViewError, match=r"layers 0 to 1 and heads 0 to 1"):
        views.maps(zoo["masks"], read(zoo["masks"]), layer, head)


def test_texts_that_cannot_be_read(zoo):
    with pytest.raises(ViewError, match="empty"):
        passage(zoo["base"], [], 0, 10)
    with pytest.raises(ViewError, match="1,000,000 characters; at most 2,000"):
        encode_text(zoo["base"], "x" * 1_000_000, 2000)
    assert encode_text(zoo["base"], "a\ud800b", 10)  # a lone surrogate is no reason to fail


def test_a_model_without_its_base_is_shown_alone(zoo, views):
    alone = replace(zoo["masks"], made_from=None)
    view = views.maps(alone, read(alone), 0, 0)
    assert [each["key"] for each in view["maps"]] == ["model"]
    assert "distance" not in views.heads(alone, read(alone), 0, 0)


def test_a_passage_is_computed_once_and_memory_is_bounded(zoo, monkeypatch):
    calls = []
    original = attention.mechanism_inputs
    monkeypatch.setattr("demo.attention.mechanism_inputs", lambda *args: calls.append(args) or original(*args))
    views = AttentionViews(cache_bytes=1)
    loaded = zoo["masks"]
    part = read(loaded)
    for layer in (0, 1):
        views.heads(loaded, part, layer, 0)
        views.maps(loaded, part, layer, 1)
    assert len(calls) == 2  # the model and its base
    for text in ("One.", "Two.", "Three."):
        views.heads(loaded, read(loaded, text), 0, 0)
    assert len(views._looks) == 2


@pytest.fixture
def handlers(store):
    return Handlers(store)


def column(name: str, ids: list[int], tokens: list[str]) -> Column:
    return Column(name, "", ids, tokens, prompt_length=1)


def run(*columns: Column) -> Run:
    return Run(Settings("x", tuple(each.name for each in columns)), list(columns))


def test_a_generated_text_keeps_its_own_tokens(handlers, store):
    loaded = store.get("masks")
    whole = encode_text(loaded, " the", 100)
    letters = [encode_text(loaded, letter, 10)[0] for letter in (" t", "h", "e")]
    assert letters != whole
    runs = [run(column("masks", letters, [" t", "h", "e"]))]
    _, part = handlers._read("base", " the", 0, 10, runs)
    assert list(part.token_ids) == letters
    _, part = handlers._read("base", " the", 0, 10, [])
    assert list(part.token_ids) == whole


def test_the_text_of_the_newest_run_is_taken(handlers):
    new = run(column("base", [1], ["base's"]), column("masks", [1], ["masks'"]))
    old = run(column("base", [1], ["old"]))
    assert handlers.take_text([new, old], "base")[:2] == ("base's", "base")
    assert handlers.take_text([new, old], "gone")[:2] == ("masks'", "masks")
    assert isinstance(handlers.take_text([], "base")[0], dict)  # nothing changes


def test_what_is_shown_already_is_not_computed_again(handlers):
    heads, maps, chosen = handlers.show("masks", TEXT, 0, 50, [], Chosen())
    assert heads["layers"] == 2
    assert len(maps["tokens"]) > 10
    assert handlers.show_if_any("masks", TEXT, 0, 50, [], chosen)[0] != heads
    assert handlers.show_if_any("base", TEXT, 0, 50, [], chosen)[1]["title"].startswith("base")
