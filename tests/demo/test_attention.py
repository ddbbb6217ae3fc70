"""The data of the attention views: passages, maps, thumbnails, parts, the cache."""

from base64 import b64decode
from dataclasses import replace
from urllib.parse import urlencode

import gradio as gr
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attention
import demo.attention
from attention.reference import effective_mask, softmax_weights
from demo.attention import AttentionViews, Look, Passage, Subject, ViewError, encode_text, passage
from demo.mechanisms import Change, as_variant
from demo.parts import explain, total_variation, weight_tables
from demo.reach import reach
from demo.runs import Column, Run, Settings
from demo.tabs.attention import Chosen, Handlers

from .conftest import Visit
from .zoo import SMALL, load_zoo

TEXT = "The old house stood at the end of the lane. Nobody had lived there for years; but it was not empty. " * 2


@pytest.fixture(scope="module")
def zoo(checkpoints):
    return load_zoo(checkpoints / "base")


class Views:
    """The views, asked for a model and a passage."""

    def __init__(self, cache_bytes: int = 256_000_000):
        self.views = AttentionViews(cache_bytes)

    def __getattr__(self, name):
        return lambda loaded, part, *place, **options: getattr(self.views, name)(
            Subject(loaded, part, **options), *place
        )


@pytest.fixture
def views():
    return Views()


@pytest.fixture
def restored():
    """Puts the weights of mechanisms back that a test changes."""
    before = []

    def keep(mechanism):
        before.append((mechanism, {name: t.clone() for name, t in mechanism.state_dict().items()}))
        return mechanism

    yield keep
    for mechanism, weights in before:
        mechanism.load_state_dict(weights)


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


@pytest.mark.parametrize("method", ["base", *SMALL])
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


@pytest.mark.parametrize("method", SMALL)
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


@pytest.mark.parametrize("method", SMALL)
def test_distances_of_a_part_are_those_of_whole_rows(zoo, views, method):
    loaded = zoo[method]
    part = passage(loaded, encode_text(loaded, TEXT, 10_000)[:46], 30, 16)
    ids = torch.tensor([part.token_ids])
    ours, theirs = (attention.attention_maps(model, ids)[1][0] for model in (loaded.model, zoo["base"].model))
    expected = total_variation(ours, theirs)[:, 30:]
    cut = total_variation(ours[:, 30:, 30:], theirs[:, 30:, 30:])
    if method != "softmax":
        assert (expected - cut).abs().max() > 0.1  # so that keys before the part matter
    rows = views.maps(loaded, part, 1, 1)["rows"]
    told = next(each for each in rows if "elsewhere" in each["title"])["series"][0]["values"]
    torch.testing.assert_close(torch.tensor(told), expected[1], atol=2e-3, rtol=0)
    torch.testing.assert_close(
        torch.tensor(views.heads(loaded, part, 0, 0)["distance"][1]), expected.mean(-1), atol=2e-3, rtol=0
    )
    numbers = views.numbers(loaded, part, 1, 1)
    torch.testing.assert_close(torch.tensor(numbers["elsewhere"]["base"]), expected[1], atol=2e-3, rtol=0)
    before = attention.attention_maps(loaded.model, ids)[1][0, 1, 30:, :30].sum(-1)
    torch.testing.assert_close(torch.tensor(numbers["before"]["model"]), before, atol=2e-3, rtol=0)
    outside = next(each for each in rows if "before the part shown" in each["title"])["series"][0]["values"]
    torch.testing.assert_close(torch.tensor(outside), before, atol=2e-3, rtol=0)


def test_gates_are_means_over_the_text_and_not_those_at_an_input_of_zero(zoo, views, restored):
    loaded = zoo["nsa"]
    mechanism = restored(loaded.model.mechanisms[1])
    torch.manual_seed(0)
    mechanism.gate_weight.data.normal_(std=3)
    part = read(loaded, start=5, count=30)
    view = views.maps(loaded, part, 1, 1)
    curves = {s["name"]: s["values"] for s in next(r for r in view["rows"] if r["title"] == "Gates")["series"]}
    by_layer, by_head = ({row["name"]: row["values"] for row in table["rows"]} for table in view["tables"])
    for name in mechanism.branches:
        mean = sum(curves[name]) / len(curves[name])
        assert by_head[f"{name} gate"][1] == pytest.approx(mean, abs=1e-3)
        assert abs(mean - mechanism.summary()[f"{name}_gate"][1]) > 0.02
        assert by_layer[f"{name} gate"][1] == pytest.approx(sum(by_head[f"{name} gate"]) / 2, abs=1e-3)


def test_layers_of_different_methods_leave_each_others_weights_empty(zoo):
    mechanisms = [zoo["masks"].model.mechanisms[0], zoo["nsa"].model.mechanisms[1]]
    rows = {row["name"]: row["values"] for row in weight_tables(mechanisms, 1)[0]["rows"]}
    assert rows["first(2)"] == [0.5, None]
    assert rows["window gate"][0] is None
    assert rows["window gate"][1] == pytest.approx(0.6)


@pytest.mark.parametrize("method", ["masks", "nsa", "performer", "layers"])
@torch.inference_mode()
def test_the_parts_of_a_method_add_up_to_its_map(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded, start=9, count=30)
    for layer in (0, 1):
        look = views.views._look(Subject(loaded, part), "model")
        parts = look.parts(layer, 1)
        assert len(parts.branches) > 1
        torch.testing.assert_close(sum(parts.branches.values()), look.rows(layer)[1], atol=3e-3, rtol=1e-2)
        if method == "masks" and layer == 0:
            near, first = parts.branches["Near places"], parts.branches["First tokens"]
            assert not near[20, : 20 + 9 - 6].any()
            assert not first[:, 2:].any()
            assert first[20, :2].min() > 0


def test_heads_are_found_by_what_they_look_at(zoo, views):
    loaded = zoo["base"]
    part = read(loaded, "the old man and the old man and the sea and the old man")
    ids = torch.tensor(part.token_ids)
    maps = attention.attention_maps(loaded.model, ids[None])
    measures = {each["key"]: each["values"] for each in views.heads(loaded, part, 0, 0)["measures"]}
    assert set(measures) == {"previous", "first", "followed", "mean"}  # a base has no distance from itself
    for layer, head in ((0, 0), (1, 1)):
        rows = maps[layer][0, head]
        assert measures["previous"][layer][head] == pytest.approx(float(rows.diagonal(-1).mean()), abs=2e-3)
        assert measures["first"][layer][head] == pytest.approx(float(rows[1:, 0].mean()), abs=2e-3)
        shares = []
        for i in range(len(ids)):
            after = [j + 1 for j in range(i) if ids[j] == ids[i]]
            shares += [float(rows[i, after].sum())] if after else []
        assert measures["followed"][layer][head] == pytest.approx(sum(shares) / len(shares), abs=2e-3)


def test_a_head_that_reads_all_tokens_alike_says_that_it_is_near_the_mean(zoo, views, restored):
    loaded = zoo["softmax"]
    view = views.maps(loaded, read(loaded), 1, 0)
    assert view["says"] == []
    even = restored(loaded.model.mechanisms[1])
    look = Views()
    try:
        rows = torch.ones(1, 2, len(read(loaded).tokens), len(read(loaded).tokens)).tril()
        even.attention_map = lambda *_: rows / rows.sum(-1, keepdim=True)
        assert "near the running mean of the values" in look.maps(loaded, read(loaded), 1, 0)["says"][0]
        assert look.heads(loaded, read(loaded), 0, 0)["measures"][-1]["values"][1] == pytest.approx([0, 0], abs=1e-2)
    finally:
        del even.attention_map


@pytest.mark.parametrize("method", ["base", *SMALL])
def test_every_token_has_a_sentence_and_steps_with_its_own_numbers(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded, start=6, count=20)
    steps = views.maps(loaded, part, 1, 0)["steps"]
    assert len(steps) >= 4
    for step in steps:
        assert step["text"].count("{}") == len(step["values"])
        assert all(len(column) == 20 for column in step["values"])
        assert "{" not in step["text"].replace("{}", "")


def test_the_sentence_of_nsa_counts_blocks_and_weight(zoo, views):
    loaded = zoo["nsa"]
    part = read(loaded)
    view = views.maps(loaded, part, 0, 1)
    last = len(part.tokens) - 1
    sentence = view["steps"][0]
    said = sentence["text"].format(*(column[last] for column in sentence["values"]))
    config = loaded.model.mechanisms[0].config
    read_blocks = int(unpack(by_key(view["parts"])["selected_blocks"])[last].sum() // config.select_block)
    assert said.startswith(f"It read 3 of {last // config.select_block + 1} blocks, 3 of them always; of its weight")
    assert read_blocks in (2, 3)  # the last one may be incomplete
    gates = {s["name"]: s["values"][last] for s in next(r for r in view["rows"] if r["title"] == "Gates")["series"]}
    share = gates["window"] / sum(gates.values())
    assert f"{100 * share:.0f} % in the window" in said


@torch.no_grad()
def test_what_a_part_is_worth_shows_in_maps_and_predictions(zoo, views):
    loaded = zoo["nsa"]
    part = read(loaded)
    change = Change(off=frozenset({"window"}), blocks=3)
    view = views.maps(loaded, part, 1, 0, change=change)
    assert [each["key"] for each in view["maps"]] == [
        "model", "unchanged", "base", "difference-unchanged", "difference",
    ]  # fmt: skip
    assert "without window" in view["title"]
    gates = {s["name"]: s["values"] for s in next(r for r in view["rows"] if r["title"] == "Gates")["series"]}
    assert set(gates["window"]) == {0}
    mechanism, q, k, x = attention.mechanism_inputs(loaded.model, torch.tensor([part.token_ids]))[0]
    mechanism.disable("window")
    try:
        expected = mechanism.attention_map(q, k, x)[0, 1]
        logits = loaded.model(torch.tensor([part.token_ids])).logits[0]
    finally:
        mechanism.disable()
    first = views.maps(loaded, part, 0, 1, change=Change(off=frozenset({"window"}), layers=frozenset({0})))
    torch.testing.assert_close(unpack(first["maps"][0]), expected, atol=1e-3, rtol=1e-3)
    off, as_it_is, base = first["next"]["models"]
    theirs = zoo["base"].model(torch.tensor([part.token_ids])).logits[0].log_softmax(-1)
    kl = (theirs.exp() * (theirs - logits.log_softmax(-1))).sum(-1)
    assert off["kl"] == pytest.approx(float(kl.mean()), rel=1e-2, abs=1e-4)
    assert off["kl"] != as_it_is["kl"]
    assert base["kl"] is None
    assert not loaded.model.mechanisms[0].disabled


@pytest.mark.parametrize("method", ["base", "nsa", "performer", "masks", "layers"])
def test_silent_heads_and_layers_add_nothing(zoo, views, method):
    loaded = zoo[method]
    part = read(loaded)
    silent = views.maps(loaded, part, 0, 0, change=Change(silent_heads=frozenset({(0, 0)})))
    assert not unpack(silent["maps"][0]).any()
    assert unpack(views.maps(loaded, part, 0, 1, change=Change(silent_heads=frozenset({(0, 0)})))["maps"][0]).any()
    whole = Change(silent_layers=frozenset({0, 1}))
    look = Look(loaded, part, whole)
    body = as_variant(loaded).transformer
    ids = torch.tensor([part.token_ids])
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for block in body.h:
        x = x + block.attn.c_proj.bias
        x = x + block.mlp(block.ln_2(x))
    expected = loaded.model.lm_head(body.ln_f(x))[0].detach()
    torch.testing.assert_close(look.predictions.logits, expected, atol=1e-4, rtol=1e-4)


def test_a_smaller_window_is_the_models_own_with_another_config(zoo, views):
    loaded = zoo["performer"]
    small = attention.convert(zoo["base"].model, attention.PerformerConfig(num_features=8, window=2)).eval()
    weights = {name: t for name, t in loaded.model.state_dict().items() if "mechanism" in name}
    small.load_state_dict(weights, strict=False)
    part = read(loaded)
    changed = views.maps(loaded, part, 1, 0, change=Change(window=2))
    expected = attention.attention_maps(small, torch.tensor([part.token_ids]))[1][0, 0]
    torch.testing.assert_close(unpack(changed["maps"][0]), expected, atol=2e-3, rtol=2e-3)
    assert loaded.model.mechanisms[0].config.window == 4


def test_two_variants_stand_beside_the_base(zoo, views):
    part = read(zoo["nsa"])
    view = views.maps(zoo["nsa"], part, 1, 1, beside=zoo["masks"])
    maps = by_key(view["maps"])
    assert list(maps) == ["model", "beside", "base", "difference-beside", "difference"]
    for key, name in (("beside", "masks"), ("base", "base"), ("model", "nsa")):
        expected = attention.attention_maps(zoo[name].model, torch.tensor([part.token_ids]))[1][0, 1]
        torch.testing.assert_close(unpack(maps[key]), expected, atol=1e-3, rtol=1e-3)
    assert [model["name"] for model in view["next"]["models"]] == ["nsa", "masks", "base"]


def test_a_map_names_the_method_of_its_layer(zoo, views):
    loaded = zoo["layers"]
    notes = [by_key(views.maps(loaded, read(loaded), layer, 0)["maps"])["model"]["note"] for layer in range(2)]
    assert notes == [attention.PerformerConfig.description, attention.NSAConfig.description]


def test_a_prediction_reaches_what_changes_it(zoo):
    loaded = zoo["masks"]
    ids = tuple(encode_text(loaded, TEXT, 10_000)[:40])
    narrow = Change(off=frozenset({"first(2)", "window(6)", "top(4)", "induction(2)"}))
    found = list(reach(loaded, ids, narrow))[-1]
    # Layer 0 then reads the token itself and the one two back; layer 1 has nothing left and reads the token itself.
    assert found.reached.nonzero().flatten().tolist() == [37, 39]
    whole = list(reach(zoo["base"], ids, Change()))[-1]
    assert whole.reached.all()
    assert whole.together == 1


def test_neighbours_are_changed_together_in_a_long_text(zoo, monkeypatch):
    monkeypatch.setattr("demo.reach.BUDGET", 400)
    found = list(reach(zoo["base"], tuple(range(10, 50)), Change()))[-1]
    assert found.together == 4
    assert len(found.effects) == 40
    assert len(set(found.effects[:4].tolist())) == 1


def test_texts_longer_than_the_context_are_windowed(zoo, views):
    loaded = zoo["base"]
    ids = encode_text(loaded, TEXT * 6, 10_000)
    assert len(ids) > 2 * loaded.context
    part = passage(loaded, ids, len(ids), 30)
    assert len(part.token_ids) == loaded.context
    view = views.maps(loaded, part, 0, 0)
    assert view["start"] == len(ids) - 30
    assert f"of {len(ids):,}" in view["title"]


@pytest.mark.parametrize("method", SMALL)
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
        assert row["values"] == [0.5 if row["name"] in names else None for names in of_layer]
    assert by_head["columns"] == ["head 0", "head 1"]
    assert {row["name"] for row in by_head["rows"]} == set(of_layer[0])  # no row for what the layer does not have
    assert {value for row in by_head["rows"] for value in row["values"]} == {0.5}


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


@pytest.mark.parametrize("method", [name for name in SMALL if name != "softmax"])
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
    rows = torch.rand(length - 4, length, generator=generator)
    parts = explain(mechanism, q, k, x, torch.arange(20)[None], head=1, shown=slice(4, length), rows=rows)
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
    original = demo.attention.recorded
    monkeypatch.setattr("demo.attention.recorded", lambda *args: calls.append(args) or original(*args))
    views = Views(cache_bytes=1)
    loaded = zoo["masks"]
    part = read(loaded)
    for layer in (0, 1):
        views.heads(loaded, part, layer, 0)
        views.maps(loaded, part, layer, 1)
    assert len(calls) == 2  # the model and its base
    for text in ("One.", "Two.", "Three."):
        views.heads(loaded, read(loaded, text), 0, 0)
    assert len(views.views._looks) == 4


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
    assert handlers.take_text([new, old], "base", Visit(""))[:2] == ("base's", "base")
    assert handlers.take_text([new, old], "gone", Visit(""))[:2] == ("masks'", "masks")
    assert isinstance(handlers.take_text([], "base", Visit(""))[0], dict)  # nothing changes


def test_the_first_run_leaves_a_text_in_the_address_as_it_is(handlers):
    runs = [run(column("masks", [1], ["x"])), run(column("masks", [1], ["y"]))]
    linked = Visit("attention_model=masks&attention_text=mine")
    assert isinstance(handlers.take_text(runs[:1], "masks", linked)[0], dict)
    assert handlers.take_text(runs, "masks", linked)[0] == "x"
    assert handlers.take_text(runs[:1], "masks", Visit("attention_model=masks"))[0] == "x"


def asked(model: str, text: str = TEXT, start: int = 0, count: int = 50, **options) -> list:
    """Values of the controls, in their order."""
    own = {
        "beside": "none",
        "offered": model,
        "off": [],
        "off_in": [],
        "silent": [],
        "window": None,
        "blocks": None,
        **options,
    }
    return [model, text, start, count, *own.values()]


def last(steps) -> tuple:
    return list(steps)[-1]


def test_what_is_shown_already_is_not_computed_again(handlers):
    steps = list(handlers.show(*asked("masks"), [], Chosen()))
    meters = [step[0] for step in steps]
    assert meters[-1] is None
    assert [meter["share"] for meter in meters[:-1]] == sorted(meter["share"] for meter in meters[:-1])
    assert "masks: layer 1 of 2" in {meter["text"] for meter in meters[:-1]}
    _, heads, maps, chosen, address = steps[-1]
    assert address["parameters"]["attention_model"] == ["masks"]
    assert address["parameters"]["attention_text"] == [TEXT]
    assert address["parameters"]["attention_if_off"] == []
    assert heads["layers"] == 2
    assert len(maps["tokens"]) > 10
    assert last(handlers.show_if_any(*asked("masks"), [], chosen))[1] != heads
    assert last(handlers.show_if_any(*asked("base"), [], chosen))[2]["title"].startswith("base")


def test_controls_that_are_not_the_models_yet_switch_nothing_off(handlers):
    before = asked("masks", offered="", off=["window(6)"], window=1, blocks=3)
    _, _, maps, chosen, _ = last(handlers.show(*before, [], Chosen()))
    assert not chosen.change
    assert maps["title"].startswith("masks · layer 0 · head 0 · tokens 0 to 49")
    assert handlers.offer_parts("masks", "")[0] == "masks"


def test_a_model_that_is_loaded_for_its_parts_is_waited_for_in_sight(handlers):
    assert handlers.begin_to_offer("masks", "base", True)["text"] == "Loading the models"
    *_, meter = handlers.offer_parts("masks", "base")
    assert meter is None
    for shown in (("masks", "masks", True), ("masks", "base", False)):
        assert handlers.begin_to_offer(*shown) == gr.skip()


def test_what_is_shown_comes_back_from_the_address(handlers):
    values = asked("masks", off=["window(6)"], silent=["0.1", "1"], start=3, count=20)
    *_, chosen, address = last(handlers.show(*values, [], Chosen(layer=1, head=1)))
    query = urlencode(address["parameters"], doseq=True)
    model, text, start, count, place, offered, beside, off, off_in, silent, *_ = handlers.open_link(Visit(query))
    assert (model, text, start, count, offered) == ("masks", TEXT, 3, 20, "masks")
    assert (place.layer, place.head) == (1, 1)
    assert (beside.value, off.value, off_in.value, silent.value) == ("none", ["window(6)"], [], ["0.1", "1"])
    again = asked("masks", text, start, count, off=off.value, silent=silent.value)
    assert last(handlers.show(*again, [], place))[3] == chosen


@pytest.mark.parametrize(
    "query",
    ["", "attention_model=<b>", "attention_text=x", "attention_model=masks&attention_layer=-1&attention_count=9e9",
     "attention_model=masks&attention_if_off=<b>&attention_if_window=x&attention_if_silent=9.9&attention_beside=nsa"],
)  # fmt: skip
def test_addresses_that_anyone_may_have_written(handlers, query):
    found = handlers.open_link(Visit(query))
    assert len(found) == 13
    if query.startswith("attention_model=masks"):
        assert found[0] == "masks"
        assert (found[4].layer, found[3]) == (0, handlers.store.limits.view_tokens)
    if "if_off" in query:
        assert (found[6].value, found[7].value, found[9].value) == ("none", [], [])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("attention_model=masks&attention_text=mine&attention_layer=1", []),
        ("attention_text=x", []),
        ("attention_model=<b>", ["asks for '<b>'; there are: base, masks"]),
        ("attention_model=masks&attention_layer=-1&attention_count=x", ["attention_layer is '-1'", "count is 'x'"]),
        ("attention_model=masks&attention_if_off=<b>", ["'<b>' (if_off), which masks does not have"]),
        ("attention_model=masks&attention_if_silent=9.9&attention_beside=nsa", ["'nsa' (beside)", "'9.9' (if_silent)"]),
        ("attention_model=masks&attention_if_window=x", ["attention_if_window is 'x'"]),
    ],
)
def test_mistakes_in_an_address_are_said(handlers, query, words):
    said = [notice["text"] for notice in handlers.open_link(Visit(query))[-1]]
    assert [word in text for word, text in zip(words, said, strict=True)] == [True] * len(words)


def test_a_head_that_does_not_exist_is_said_where_another_is_shown(handlers):
    meter, *_, chosen, _ = last(handlers.show(*asked("masks"), [], Chosen(layer=9, head=1)))
    assert meter["text"] == "masks has no layer 9 with a head 1: layer 1, head 1 is shown."
    assert (chosen.layer, chosen.head) == (1, 1)
