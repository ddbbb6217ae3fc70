"""Which models there are, which may be added, and which stay in memory."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch

import attention
from demo.engine import Generation
from demo.limits import Limits
from demo.models import Access, LoadError, ModelStore, bundled, is_local, short_name
from demo.runs import Settings
from demo.views import what_it_reads


def test_entries_are_known_without_loading(store, checkpoints):
    assert store.names() == ["base", "masks"]
    assert store.loaded() == []
    base, masks = store.entry("base"), store.entry("masks")
    assert (base.method, base.is_base, base.base) == ("softmax", True, None)
    assert (masks.method, masks.is_base, masks.base) == ("masks", False, "base")
    assert masks.options["candidates"] == ("last(0)", "window(6)", "first(2)")
    assert 0 < masks.size < base.size


def test_variants_share_the_tensors_of_their_base(store):
    masks, base = store.get("masks"), store.get("base")
    assert masks.base is base
    assert base.base is base
    shared = masks.model.transformer.h[0].mlp.c_fc.weight
    assert shared.data_ptr() == base.model.transformer.h[0].mlp.c_fc.weight.data_ptr()


def test_a_model_is_loaded_once_however_many_ask(store, monkeypatch):
    calls = []
    load = attention.load
    monkeypatch.setattr(attention, "load", lambda *args, **kwargs: calls.append(args) or load(*args, **kwargs))
    threads = [threading.Thread(target=store.get, args=("masks",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2


def test_the_base_of_a_variant_is_added_with_it(checkpoints):
    store = ModelStore([checkpoints / "masks"], access=Access())
    assert store.names() == ["base", "masks"]


def test_what_cannot_be_loaded_is_named_and_the_rest_works(checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(checkpoints / "masks", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "vit"}))
    sources = [checkpoints / "base", tmp_path / "nowhere", tmp_path / "empty", broken, foreign]
    store = ModelStore(sources, access=Access())
    assert store.names() == ["base"]
    assert set(store.problems) == {str(source) for source in sources[1:]}
    assert all(source in text for source, text in store.problems.items())


def test_least_recently_used_goes_but_a_base_stays_while_its_variant_does(checkpoints, tmp_path):
    copies = [shutil.copytree(checkpoints / "base", tmp_path / f"base{i}") for i in range(2)]
    sources = [checkpoints / "base", checkpoints / "masks", *copies]
    store = ModelStore(sources, Limits(loaded_models=2), Access())
    store.get("masks")
    store.get("base0")
    assert store.loaded() == ["base", "base0"]  # masks went; the base was older, but in use
    store.get("base1")
    assert store.loaded() == ["base0", "base1"]
    assert store.get("masks").base.name == "base"


def test_names_stay_unique(checkpoints, tmp_path):
    other = shutil.copytree(checkpoints / "base", tmp_path / "base")
    store = ModelStore([checkpoints / "base", other, checkpoints / "base"], access=Access())
    assert store.names() == ["base", "base-2"]


def test_a_full_list_takes_no_more(checkpoints, tmp_path):
    other = shutil.copytree(checkpoints / "base", tmp_path / "other")
    store = ModelStore([checkpoints / "base"], Limits(listed_models=1), Access(None, (tmp_path,)))
    with pytest.raises(LoadError, match="full with 1"):
        store.add(str(other))


def test_visitors_reach_only_what_is_allowed(checkpoints, tmp_path):
    inside = shutil.copytree(checkpoints / "base", tmp_path / "inside" / "model")
    outside = shutil.copytree(checkpoints / "base", tmp_path / "outside")
    (tmp_path / "inside" / "link").symlink_to(outside)
    store = ModelStore([checkpoints / "base"], access=Access(None, (tmp_path / "inside",)))
    for source in (outside, tmp_path / "inside" / ".." / "outside", tmp_path / "inside" / "link"):
        with pytest.raises(LoadError, match="may not be read"):
            store.add(str(source))
    assert store.add(str(inside)).name == "inside"


@pytest.mark.parametrize(
    "source", ["", "x" * 301, "a/" + "b" * 290, "a\x00b", "~nobody-here/x", "../" * 99, "a b", None]
)
def test_nonsense_is_no_source(checkpoints, source):
    store = ModelStore([checkpoints / "base"], access=Access(None, (checkpoints,)))
    for ask in (store.add, store.download_size):
        with pytest.raises(LoadError):
            ask(source)


def test_a_space_allows_only_its_list(monkeypatch, checkpoints):
    monkeypatch.setenv("SPACE_ID", "someone/space")
    monkeypatch.setenv("ALLOWED_MODELS", "good/model also/good")
    access = Access.from_environment()
    access.check("good/model/sub@main")
    for source in ("bad/model", str(checkpoints / "base"), "../x", "a b", "good/model\x00", "https://x.y/good/model"):
        with pytest.raises(LoadError):
            access.check(source)
    monkeypatch.setenv("ALLOWED_MODELS", """'good/model'\n "also/good"\t""")
    for source in ("good/model", "also/good/sub"):
        Access.from_environment().check(source)
    monkeypatch.setenv("ALLOWED_MODELS", "*")
    Access.from_environment().check("any/model")


def test_a_variant_that_carries_all_weights_has_no_base(checkpoints, tmp_path):
    base, _ = attention.load(checkpoints / "base")
    variant = attention.convert(base, attention.METHODS["masks"]())
    attention.save(variant, tmp_path / "alone", self_contained=True)
    store = ModelStore([tmp_path / "alone"], access=Access())
    assert store.get("alone").base is None


def test_a_model_whose_layers_differ_is_one_like_others(checkpoints, tmp_path):
    base, _ = attention.load(checkpoints / "base")
    choices = [{"layers": [1], "method": "softmax"}, {"layers": [0], "method": "masks", "candidates": ["window(6)"]}]
    mix = attention.convert(base, attention.config_from_dict({"method": "layers", "layers": choices}))
    attention.save(mix, tmp_path / "mixed", dtype=None)
    store = ModelStore([checkpoints / "base", tmp_path / "mixed"], Limits(), Access(None, (checkpoints, tmp_path)))
    assert store.problems == {}
    assert what_it_reads("mixed", store) == "softmax in layer 1, masks in layer 0"
    assert store.entry("mixed").description == attention.LayersConfig.description
    generation = Generation(store, Settings("The old man", ("base", "mixed"), max_new_tokens=4))
    list(generation.stream())
    assert [column.generated for column in generation.run.columns] == [4, 4]


def test_layers_of_one_method_are_described_as_that_method(checkpoints, tmp_path):
    base, _ = attention.load(checkpoints / "base")
    choices = [{"layers": [i], "method": "masks", "candidates": [f"window({6 + i})"]} for i in range(2)]
    variant = attention.convert(base, attention.config_from_dict({"method": "layers", "layers": choices}))
    attention.save(variant, tmp_path / "masks", dtype=None)
    store = ModelStore([checkpoints / "base", tmp_path / "masks"], Limits(), Access(None, (checkpoints, tmp_path)))
    assert store.entry("masks").description == attention.MasksConfig.description


def test_bundled_folders_come_base_first(checkpoints):
    assert [folder.name for folder in bundled(checkpoints)] == ["base", "masks"]


def test_loaded_models_are_ready_to_read(store):
    model = store.get("masks").model
    assert not model.training
    assert model.dtype == torch.float32


def test_a_folder_that_may_not_be_read_says_which_may(checkpoints, tmp_path):
    store = ModelStore([checkpoints / "base"], access=Access(None, (tmp_path / "a", tmp_path / "b")))
    with pytest.raises(LoadError) as caught:
        store.add(str(checkpoints / "masks"))
    for root in (tmp_path / "a", tmp_path / "b"):
        assert f"{root}/" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/mine/variant", "mine"),
        ("runs/mine/checkpoint-200", "mine-checkpoint-200"),
        ("runs/mine/200", "mine-200"),
        ("runs/final/best", "final"),
        ("runs/nsa", "nsa"),
    ],
)
def test_a_model_is_called_by_a_name_that_says_something(folder, name):
    assert short_name(Path(folder)) == name


@pytest.mark.parametrize(
    "config",
    ["[" * 100_000, "{", "[]", "null", '{"model_type": []}', '{"model_type": "gpt2", "n_layer": "six"}', "\x00"],
)
def test_a_broken_config_is_a_problem_that_is_named(checkpoints, tmp_path, config):
    broken = shutil.copytree(checkpoints / "masks", tmp_path / "broken")
    (broken / "config.json").write_text(config)
    store = ModelStore([*bundled(tmp_path), checkpoints / "base", "/" + "x" * 5000], access=Access())
    if "broken" in store.names():  # it is only found out when it is loaded
        with pytest.raises(LoadError, match="broken"):
            store.get("broken")
    else:
        assert str(broken) in store.problems
    assert "base" in store.names()
    assert "/" + "x" * 5000 in store.problems
    assert not is_local("x" * 5000)
