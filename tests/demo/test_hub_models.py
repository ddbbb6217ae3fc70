"""Models that are pulled from a Hub, here one on the loopback interface."""

import time

import pytest
from huggingface_hub import HfApi, constants

import attention
from demo.limits import Limits
from demo.models import Access, LoadError, ModelStore
from demo.tabs.models import Handlers

from ..hub_server import HubServer


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(server, checkpoints, tmp_path):
    """A Hub with a base, and a variant that names it."""
    hub = attention.HubOptions(HfApi(endpoint=server.url), cache_dir=tmp_path / "cache")
    server.add("some/base", files_in(checkpoints / "base"))
    base, _ = attention.load("some/base", hub=hub)
    attention.save(attention.convert(base, attention.METHODS["masks"]()), tmp_path / "variant", hub=hub)
    server.add("some/masks", files_in(tmp_path / "variant"))
    return attention.HubOptions(hub.api, cache_dir=tmp_path / "fresh")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_variant_is_pulled_with_its_base_and_runs(hub):
    store = ModelStore(access=Access(), hub=hub)
    size = store.download_size("some/masks")
    reports = []
    entry = store.add("some/masks", lambda done, total: reports.append((done, total)))
    assert store.names() == [entry.base, "some/masks"]
    assert entry.base.startswith("some/base")
    assert reports
    assert sum(store.entry(name).size for name in store.names()) < size
    assert store.download_size("some/masks") == 0
    assert store.get("some/masks").base is store.get(entry.base)


def test_what_is_too_large_is_not_pulled(hub, server):
    store = ModelStore(limits=Limits(download_bytes=1000), access=Access(), hub=hub)
    with pytest.raises(LoadError, match="at most"):
        store.add("some/masks")
    assert server.count("GET .*model.*safetensors") == 1  # when the variant was made


def test_a_base_that_is_not_allowed_comes_not_with_a_variant_that_is(hub):
    store = ModelStore(access=Access(frozenset(["some/masks"])), hub=hub)
    with pytest.raises(LoadError, match="some/base may not be loaded"):
        store.add("some/masks")
    with pytest.raises(LoadError, match="some/base may not be loaded"):
        store.add("some/base")
    assert store.names() == []


def test_sources_named_at_the_start_are_pulled_in_the_background(hub, server):
    store = ModelStore(["some/masks", "some/nothing"], access=Access(frozenset()), hub=hub)
    deadline = time.monotonic() + 30
    while store.pulling and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "some/masks" in store.names()
    assert list(store.problems) == ["some/nothing"]


def test_the_page_says_the_size_the_progress_and_the_end(hub):
    handlers = Handlers(ModelStore(access=Access(), hub=hub))
    assert "MB to download, its base included" in handlers.look_up("some/masks")[0]["text"]
    *_, (news, table, names) = handlers.add(" some/masks ")
    assert news == [{"level": "info", "text": "some/masks can be chosen now, on every tab."}]
    assert len(table["rows"]) == len(names) == 2
    assert handlers.look_up("some/masks")[0]["text"] == "some/masks is here."
    assert handlers.look_up("some/nothing")[0]["level"] == "warning"
    *_, (news, _, _) = handlers.add("../../etc")
    assert news[0]["level"] == "warning"
