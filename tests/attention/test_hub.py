"""Pushing to and pulling from a Hub on the loopback interface, with the Hub's real client."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

import attention
from attention import checkpoint
from attention.errors import (
    BrokenCheckpointError,
    CheckpointError,
    MissingCheckpointError,
    MissingRevisionError,
    NetworkError,
    NotAModelError,
    PushError,
    WrongBaseError,
)
from attention.hub import HubOptions, HubSpec, cached_origin

from ..hub_server import HubServer
from .checkpoints import bare, make_variant, save_base, write_bert_vocabulary
from .models import small_config
from .test_checkpoint import assert_same, weights

COMMIT = "POST .*/commit/"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer() as server:
        yield server


@pytest.fixture
def api(server):
    return HfApi(endpoint=server.url, token="hf_mine")


@pytest.fixture
def hub(api, tmp_path):
    return HubOptions(api, cache_dir=tmp_path / "cache")


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def saved(tmp_path, base) -> Path:
    attention.save(make_variant(base), tmp_path / "variant", card="---\nlicense: mit\n---\n# A card\n", history=[])
    return tmp_path / "variant"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Names


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("gpt2", HubSpec("gpt2")),
        ("me/repo", HubSpec("me/repo")),
        ("me/repo@v1", HubSpec("me/repo", revision="v1")),
        ("me/repo/a/b@refs/pr/1", HubSpec("me/repo", "a/b", "refs/pr/1")),
    ],
)
def test_specs(text, spec):
    assert HubSpec.parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize("text", ["", "me/", "/me", "me//repo", "../repo", "me/re po", "me/repo/../other", "@v1"])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(MissingCheckpointError, match="neither a folder nor a name"):
        HubSpec.parse(text)


# Pushing


@pytest.mark.parametrize("place", ["me/new", "me/new/deep/sub", "me/old", "me/old/sub"])
def test_push_and_load(server, api, hub, saved, place):
    server.add("me/old", {"data.bin": b"1", "sub/notes.txt": b"2"})
    (saved / "curves.png").write_bytes(b"png")
    (saved / "private.txt").write_text("not for the Hub")
    done = attention.push(saved, place, api=api)
    assert server.count(COMMIT) == 1
    files = server.repos[HubSpec.parse(place).repo_id].files()
    if "old" in place:
        assert (files["data.bin"], files["sub/notes.txt"]) == (b"1", b"2")
    assert {path: len(content) for path, content in files.items() if path in done.files} == done.files
    names = {path.removeprefix(HubSpec.parse(place).path("")) for path in done.files}
    assert names >= {"README.md", "training.jsonl", "config.json", "model.safetensors", "variant.py", "curves.png"}
    assert "private.txt" not in names
    for spec in (place, done.spec):
        loaded, tokenizer = attention.load(spec, hub=hub)
        assert_same(loaded, attention.load(saved)[0])
        assert tokenizer("the cat")["input_ids"] == [1, 2]
    assert done.url.endswith(done.spec.partition("@")[2])


def test_the_card_says_where_it_lies(server, api, saved):
    card = (
        f"""---\nlicense: mit\n---\nattention.load("{saved}"), from_pretrained("user/repo"), attention.load("other")"""
    )
    (saved / "README.md").write_text(card)
    attention.push(saved, "me/repo/sub@next", api=api)
    pushed = server.repos["me/repo"].files("next")["sub/README.md"].decode()
    assert 'attention.load("me/repo/sub@next")' in pushed
    assert 'from_pretrained("me/repo", subfolder="sub", revision="next")' in pushed
    assert 'attention.load("other")' in pushed
    assert (saved / "README.md").read_text() == card


def test_a_second_push_replaces_the_first(server, api, hub, base, saved, tmp_path):
    variant = make_variant(base, "softmax")
    big = tmp_path / "big"
    attention.save(variant, big, dtype=None, self_contained=True, max_shard_size=8000)
    server.add("me/repo", {"model-other.safetensors": b"1", "sub/model-00001-of-00009.safetensors": b"2"})
    attention.push(big, "me/repo", api=api)
    assert "model.safetensors.index.json" in server.repos["me/repo"].files()
    attention.push(saved, "me/repo", api=api)
    assert {path for path in server.repos["me/repo"].files() if "safetensors" in path} == {
        *("model.safetensors", "model-other.safetensors", "sub/model-00001-of-00009.safetensors")
    }
    assert_same(attention.load("me/repo", hub=hub)[0], attention.load(saved)[0])


def test_nothing_new_makes_no_commit(server, api, saved):
    first = attention.push(saved, "me/repo", api=api)
    assert attention.push(saved, "me/repo", api=api) == first
    assert len(server.repos["me/repo"].commits) == 2


def test_branches_and_private_repositories(server, api, hub, saved):
    server.add("me/repo", {"a": b"1"})
    attention.push(saved, "me/repo", api=api, revision="next")
    assert server.repos["me/repo"].files() == {"a": b"1"}
    assert_same(attention.load("me/repo@next", hub=hub)[0], attention.load(saved)[0])
    attention.push(saved, "me/repo@next", api=api)
    for private in (True, False):
        attention.push(saved, f"me/{private}", api=api, private=private)
        assert server.repos[f"me/{private}"].private == private


def test_a_dry_run_says_what_a_push_does(server, api, saved):
    plan = attention.push(saved, "me/repo/sub", api=api, dry_run=True)
    assert server.requests == []
    assert (plan.spec, plan.url) == ("me/repo/sub", None)
    assert attention.push(saved, "me/repo/sub", api=api).files == plan.files


def test_the_commit_is_on_top_of_what_was_seen(server, api, saved):
    server.add("me/repo", {"a": b"1"})
    create_commit = api.create_commit

    def late(*args, **kwargs):  # somebody else is faster, once
        server.repos["me/repo"].commit({"a": b"2"})
        api.create_commit = create_commit
        return create_commit(*args, **kwargs)

    api.create_commit = late
    pauses = []
    attention.push(saved, "me/repo", api=api, sleep=pauses.append)
    assert pauses == [2.0]
    assert server.repos["me/repo"].files()["a"] == b"2"


@pytest.mark.parametrize("action", [412, 429, 500, 503, "refuse", "half", "lose"])
@pytest.mark.parametrize("times", [1, 2, 9])
def test_what_may_pass_is_tried_again(server, api, saved, action, times):
    before, pauses = contents(saved), []
    server.fail(COMMIT, action, times)
    if times < 3 or action == "lose":  # a commit whose answer got lost is found to be there
        attention.push(saved, "me/repo", api=api, tries=3, sleep=pauses.append)
        assert pauses == [2.0, 4.0][: 1 if action == "lose" else times]
        assert len(server.repos["me/repo"].commits) == 2
    else:
        with pytest.raises(PushError) as caught:
            attention.push(saved, "me/repo", api=api, tries=3, sleep=pauses.append)
        assert caught.value.retry
        assert "try later" in str(caught.value)
        assert caught.value.command == f"python -m attention.checkpoint push {saved} me/repo"
        assert server.count(COMMIT) == 3
        assert pauses == [2.0, 4.0]
        assert set(server.repos["me/repo"].files()) == {".gitattributes"}
    assert contents(saved) == before


def test_the_hub_says_how_long_to_wait(server, api, saved):
    pauses = []
    server.fail(COMMIT, 429, Retry_After="7")
    server.fail(COMMIT, 429, Retry_After="9999")
    attention.push(saved, "me/repo", api=api, sleep=pauses.append)
    assert pauses == [7.0, 60.0]


@pytest.mark.parametrize(
    ("route", "action", "says"),
    [
        ("POST /api/repos/create", 401, "hf auth login"),
        ("POST /api/repos/create", 403, "may not write"),
        (COMMIT, 401, "hf auth login"),
        (COMMIT, 403, "may not write"),
        (COMMIT, 404, "no such repository"),
        (COMMIT, 400, "refuses the commit"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(server, api, saved, route, action, says):
    server.fail(route, action)
    with pytest.raises(PushError, match=says) as caught:
        attention.push(saved, "me/repo", api=api, sleep=pytest.fail)
    assert not caught.value.retry
    assert caught.value.command in str(caught.value)


def test_a_token_that_may_not_write(server, saved):
    server.writers = {"hf_other"}
    for token, says in (("hf_mine", "may not write"), (False, "does not know who you are")):
        with pytest.raises(PushError, match=says):
            attention.push(saved, "me/repo", api=HfApi(endpoint=server.url, token=token), sleep=pytest.fail)


def test_no_network(server, api, saved, monkeypatch):
    server.__exit__()
    pauses = []
    with pytest.raises(PushError, match="could not be reached") as caught:
        attention.push(
            saved, "me/repo", revision="b", private=True, include_base=True, api=api, tries=2, sleep=pauses.append
        )
    assert caught.value.retry
    assert len(pauses) == 1
    assert caught.value.command.endswith(f"{saved} me/repo --private --revision b --include_base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE"):
        attention.push(saved, "me/repo", api=api, sleep=pytest.fail)


@pytest.mark.parametrize(
    "metadata",
    [
        "license: [mit",
        "model-index:\n- results: 3",
        "- a list",
        "license: nonsense",  # only the Hub knows
    ],
)
def test_wrong_metadata_is_not_pushed(server, api, saved, metadata):
    (saved / "README.md").write_text(f"---\n{metadata}\n---\n# A card\n")
    with pytest.raises(PushError, match=r"not valid|refuses") as caught:
        attention.push(saved, "me/repo", api=api, sleep=pytest.fail)
    assert not caught.value.retry
    assert server.count(COMMIT) == 0


def test_what_is_damaged_or_no_variant_is_not_pushed(server, api, base, saved):
    (saved / "model.safetensors").write_bytes(b"0")
    for folder in (base, saved):
        with pytest.raises(BrokenCheckpointError):
            attention.push(folder, "me/repo", api=api)
    with pytest.raises(MissingCheckpointError):
        attention.push(saved / "nothing", "me/repo", api=api)
    assert server.requests == []


def test_files_outside_the_folder_are_not_pushed(server, api, saved):
    (saved.parent / "secret").write_text("secret")
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"]["../secret"] = None
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(BrokenCheckpointError):
        attention.push(saved, "me/repo", api=api)


def test_a_variant_that_is_replaced_meanwhile_is_pushed_whole_or_not(server, api, base, saved, monkeypatch):
    copyfile, other = shutil.copyfile, make_variant(base, "softmax")

    def slow(source, target):
        monkeypatch.setattr("shutil.copyfile", copyfile)
        attention.save(other, saved)  # just before the first copy
        return copyfile(source, target)

    monkeypatch.setattr("shutil.copyfile", slow)
    with contextlib.suppress(CheckpointError):
        attention.push(saved, "me/repo", api=api)
    assert "me/repo" not in server.repos or attention.load(saved)[0].config.attention["method"] == "softmax"


# Bases


def test_a_base_on_the_hub_stays_there(server, api, hub, tmp_path, base):
    sha = server.add("me/base", contents(base))
    model, _ = attention.load("me/base", hub=hub)
    variant = attention.convert(model, small_config("masks"))
    attention.save(variant, tmp_path / "variant", hub=hub)
    recorded = json.loads((tmp_path / "variant" / "config.json").read_text())["base"]
    assert (recorded["id"], recorded["revision"]) == ("me/base", sha)
    server.add("me/base", {"config.json": b"{}"})  # later versions of the base do not matter
    attention.push(tmp_path / "variant", "me/repo", api=api)
    assert "transformer.wte.weight" not in weights(attention.locate("me/repo", hub))
    found = attention.describe("me/repo", hub)
    assert found.base == f"me/base@{sha}"
    assert_same(attention.load("me/repo", hub=hub)[0], variant)
    shared, _ = attention.load("me/repo", base=model, hub=hub)
    assert shared.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    attention.push(tmp_path / "variant", "me/whole", api=api, include_base=True)
    assert attention.describe("me/whole", hub).base is None
    assert_same(attention.load("me/whole", hub=hub)[0], variant)


def test_a_base_in_the_same_repository(server, api, hub, base, saved):
    server.add("me/all", {f"base/{name}": content for name, content in contents(base).items()})
    with pytest.raises(CheckpointError, match="outside the repository"):
        attention.push(saved, "me/all", api=api, include_base=False)
    attention.push(saved, "me/all/masks", api=api, include_base=False)
    expected, _ = attention.load(saved)
    size = attention.hub_size("me/all/masks", hub)
    assert size > sum(len(content) for content in contents(base).values())
    assert_same(attention.load("me/all/masks", hub=hub)[0], expected)
    assert attention.hub_size("me/all/masks", hub) == 0


def test_a_base_that_left_the_hub_is_named(server, hub, tmp_path, base):
    server.add("me/base", contents(base))
    model, _ = attention.load("me/base", hub=hub)
    attention.save(attention.convert(model, small_config("masks")), tmp_path / "variant", hub=hub)
    del server.repos["me/base"]
    with pytest.raises(WrongBaseError, match="needs its base, me/base@"):
        attention.load(tmp_path / "variant", hub=HubOptions(hub.api, cache_dir=tmp_path / "empty"))


# Pulling


def test_the_local_folder_wins(server, hub, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    (saved.parent / "me").mkdir()
    saved.rename(saved.parent / "me" / "repo")
    with pytest.raises(WrongBaseError):  # ../base was beside it
        attention.load("me/repo", hub=hub)
    assert server.requests == []


def test_only_what_is_read_is_pulled(server, api, hub, saved):
    attention.push(saved, "me/repo", api=api)
    others = {"pytorch_model.bin": b"pickle", "sub/model.safetensors": b"1", "consolidated.safetensors": b"2"}
    server.add("me/repo", {**server.repos["me/repo"].files(), **others})
    folder = attention.locate("me/repo", hub)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "training.jsonl"),
    }
    assert cached_origin(folder) == HubSpec("me/repo", "", server.repos["me/repo"].branches["main"])


def test_a_bases_table_of_pairs_is_pulled_with_it(server, hub, base):
    server.add("me/base", contents(base) | {"pairs.safetensors": b"table"})
    assert (attention.locate("me/base", hub) / "pairs.safetensors").read_bytes() == b"table"
    attention.load("me/base", hub=hub)


def test_size_and_progress(server, api, hub, saved):
    attention.push(saved, "me/repo", api=api)
    size = attention.hub_size("me/repo", hub)
    calls = []
    attention.load("me/repo", hub=hub, progress=lambda done, total: calls.append((done, total)))
    config = len(server.repos["me/repo"].files()["config.json"])  # to know the size, this was read
    assert calls[-1] == (size - config, size - config)
    assert calls == sorted(calls)
    assert attention.hub_size("me/repo", hub) == 0
    assert attention.hub_size(saved, hub) == 0


def test_errors_are_distinct(server, api, hub, saved, base):
    server.add("me/base", contents(base))
    server.add("me/text", {"README.md": b"text"})
    server.add("me/vit", {"config.json": b'{"model_type": "vit"}'})
    server.add("me/pickle", {"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b"1"})
    server.add("me/secret", contents(base), private=True)
    stranger = HubOptions(HfApi(endpoint=server.url, token=False), cache_dir=hub.cache_dir)
    for spec, options, error, says in (
        ("me/nothing", hub, MissingCheckpointError, "no folder 'me/nothing' here, and no repository"),
        ("me/secret", stranger, MissingCheckpointError, "hf auth login"),
        ("me/base@v9", hub, MissingRevisionError, "'v9'"),
        ("me/base@" + 40 * "0", hub, MissingRevisionError, "000"),
        ("me/base/sub", hub, MissingCheckpointError, "no folder 'sub'"),
        ("me/text", hub, MissingCheckpointError, r"no config\.json"),
        ("me/vit", hub, NotAModelError, "'vit'"),
        ("me/pickle", hub, NotAModelError, "pickles"),
        ("./nothing", hub, MissingCheckpointError, "no folder"),
    ):
        with pytest.raises(error, match=says):
            attention.load(spec, hub=options)
        if "pickle" not in spec and "vit" not in spec:
            with pytest.raises(error):
                attention.hub_size(spec, options)


TROUBLES = [
    (403, "answered 403"),
    (429, "asks for fewer requests"),
    (500, "problem of its own"),
    (502, "problem of its own"),
    (503, "not available at the moment"),
]


@pytest.mark.parametrize(("status", "says"), TROUBLES)
@pytest.mark.parametrize("measured", [False, True])
def test_a_hub_in_trouble(server, hub, base, status, says, measured):
    server.add("me/base", contents(base))
    server.fail("GET /api/models", status, 99)
    pauses = []
    hub = replace(hub, sleep=pauses.append)
    with pytest.raises(NetworkError, match=says) as caught:
        attention.hub_size("me/base", hub) if measured else attention.load("me/base", hub=hub)
    assert "cannot be reached" not in str(caught.value)
    assert pauses == ([] if status == 403 else [2.0, 4.0])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_recovers_is_asked_when_it_says(server, hub, base, status):
    server.add("me/base", contents(base))
    server.fail("GET /api/models", status, Retry_After="7")
    pauses = []
    assert_same(attention.load("me/base", hub=replace(hub, sleep=pauses.append))[0], attention.load(base)[0])
    assert pauses == [7.0]


@pytest.mark.parametrize("route", ["GET /api/models", "GET /api/models/.*/tree", "HEAD .*/resolve"])
def test_what_is_not_the_hub_is_said(server, hub, base, route):
    server.add("me/base", contents(base))
    server.fail(route, "html", 99)
    with pytest.raises(NetworkError, match=r"is not the Hub|could not be downloaded"):
        attention.load("me/base", hub=hub)


@pytest.mark.parametrize("reported", [False, True])
def test_a_download_stops_when_it_passes_its_size(server, hub, base, reported, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    server.add("me/base", {**contents(base), "tokenizer.json": 4_000_000 * b" "})
    server.fail("GET .*/tokenizer.json", "more")
    with pytest.raises(NetworkError, match=r"were announced"):
        attention.load("me/base", hub=hub, progress=(lambda done, total: None) if reported else None)
    assert server.sent < 40_000_000


@pytest.mark.parametrize("text", [300 * "x", "me/" + 5000 * "y", "me/repo@" + 400 * "z", "me/" + "/".join(200 * "s")])
def test_names_that_are_too_long_are_refused(text):
    with pytest.raises(MissingCheckpointError):
        attention.load(text)


def test_long_names_of_folders_are_no_surprise(tmp_path, base):
    for length in (250, 253, 300):
        with pytest.raises(MissingCheckpointError, match="there is no folder"):
            attention.load(tmp_path / (length * "x"))
    base.rename(tmp_path / (252 * "b"))  # too long for the name of its backup
    attention.load(tmp_path / (252 * "b"))


def test_a_tokenizer_that_the_cache_may_lack_is_said(server, hub, base):
    server.add("me/base", contents(base))
    for name in ("config.json", "model.safetensors"):  # as transformers fetches a model
        hub.client.hf_hub_download("me/base", name, cache_dir=hub.cache_dir)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        attention.load("me/base", hub=replace(hub, local_files_only=True))
    assert attention.load("me/base", hub=hub)[1] is not None
    server.add("me/bare", {name: content for name, content in contents(base).items() if "token" not in name})
    for options in (hub, replace(hub, local_files_only=True)):
        assert attention.load("me/bare", hub=options)[1] is None


def test_a_tokenizer_of_any_kind_is_pulled(server, hub, base, tmp_path):
    folder = bare(base)
    write_bert_vocabulary(folder)
    server.add("me/bert", contents(folder))
    assert attention.load("me/bert", hub=hub)[1].tokenize("the cat") == ["the", "cat"]


@pytest.mark.parametrize("xet", [False, True])
def test_a_server_without_a_place_for_large_files(server, api, saved, xet, monkeypatch):
    if not xet:
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    before, pauses = contents(saved), []
    server.upload_mode = "lfs"
    with pytest.raises(PushError) as caught:
        attention.push(saved, "me/repo", api=api, tries=2, sleep=pauses.append)
    assert caught.value.command == f"python -m attention.checkpoint push {saved} me/repo"
    assert len(pauses) == (1 if caught.value.retry else 0)
    assert server.count(COMMIT) == 0
    assert contents(saved) == before


@pytest.mark.parametrize("how", ["closed", "refuse", "offline", "local_files_only"])
def test_without_network_the_cache_is_enough(server, hub, base, how, monkeypatch):
    server.add("me/base", contents(base))
    expected, _ = attention.load("me/base", hub=hub)
    if how == "closed":
        server.__exit__()
    elif how == "refuse":
        server.fail(".*", "refuse", 99)
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub = HubOptions(hub.api, hub.cache_dir, local_files_only=True)
    seen = len(server.requests)
    assert_same(attention.load("me/base", hub=hub)[0], expected)
    with pytest.raises(NetworkError, match=r"me/other is not in the cache"):
        attention.load("me/other", hub=hub)
    if how in ("offline", "local_files_only"):
        assert len(server.requests) == seen


def test_by_commit_the_network_is_not_asked(server, api, hub, saved):
    spec = attention.push(saved, "me/repo", api=api).spec
    expected, _ = attention.load(spec, hub=hub)
    seen = len(server.requests)
    assert_same(attention.load(spec, hub=hub)[0], expected)
    assert len(server.requests) == seen


def test_a_download_that_breaks_off_goes_on(server, hub, base, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.add("me/base", contents(base))
    server.fail("GET .*/model.safetensors", "cut")
    assert_same(attention.load("me/base", hub=hub)[0], attention.load(base)[0])


def test_damage_on_the_way_is_refused(server, api, hub, saved):
    attention.push(saved, "me/repo", api=api)
    files = server.repos["me/repo"].files()
    server.add("me/repo", {**files, "model.safetensors": files["model.safetensors"][:-1] + b"?"})
    with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors has other content"):
        attention.load("me/repo", hub=hub)


# In a process of its own, whose endpoint is the server (transformers takes it from the environment alone)


def run(server, script, folder, *, installed):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if installed:
        environment["PYTHONPATH"] = str(Path(attention.__file__).parents[1])
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


NOT_INSTALLED = """
import importlib.util, json
assert importlib.util.find_spec("attention") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ids = torch.tensor([[1, 2, 3]])
try:
    AutoModelForCausalLM.from_pretrained("me/first")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code ran without consent")
logits = []
for name, options in ("me/first", {}), ("me/all", {"subfolder": "second"}):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **options)
    assert tokenizer("the cat")["input_ids"] == [1, 2]
    logits.append(model(ids).logits.tolist())
generate = pipeline("text-generation", model="me/first", trust_remote_code=True)
text = generate("the cat", max_new_tokens=3, do_sample=False)[0]["generated_text"]
print()
print(json.dumps({"logits": logits, "text": text}))
"""


def test_pushed_code_works_where_this_package_is_missing(server, api, tmp_path, base, saved):
    attention.save(make_variant(base, "softmax"), tmp_path / "second")
    attention.push(saved, "me/first", api=api)
    attention.push(tmp_path / "second", "me/all/second", api=api)
    answer = run(server, NOT_INSTALLED, tmp_path / "work", installed=False)
    for found, folder in zip(answer["logits"], (saved, tmp_path / "second"), strict=True):
        logits = attention.load(folder)[0](torch.tensor([[1, 2, 3]])).logits
        torch.testing.assert_close(torch.tensor(found), logits, atol=1e-6, rtol=1e-6)
    assert answer["text"].startswith("the cat")


INSTALLED = """
import json
import attention, torch
from attention import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ids = torch.tensor([[1, 2, 3]])
model = AutoModelForCausalLM.from_pretrained("me/all", subfolder="masks")
tokenizer = AutoTokenizer.from_pretrained("me/all", subfolder="masks")
url = model.push_to_hub("me/again", commit_message="A test")
tokenizer.push_to_hub("me/again")
generate = pipeline("text-generation", model="me/again")
assert isinstance(generate.model, attention.Variant)
base = AutoModelForCausalLM.from_pretrained("me/base")
attention.save(attention.convert(base, attention.SoftmaxConfig()), "variant")
assert AutoTokenizer.from_pretrained("variant")("the cat")["input_ids"] == [1, 2]
assert checkpoint.main(["push", "variant", "me/private", "--private", "--revision", "next"]) == 0
print()
assert checkpoint.main(["pull", "me/private@next"]) == 0
answer = {
    "logits": [model(ids).logits.tolist(), generate.model(ids).logits.tolist()],
    "url": url,
    "base": json.loads(open("variant/config.json").read())["base"],
}
print(json.dumps(answer))
"""


def test_transformers_ways_with_this_package(server, api, tmp_path, base, saved):
    sha = server.add("me/base", contents(base))
    server.add("me/all", {f"base/{name}": content for name, content in contents(base).items()})
    attention.push(saved, "me/all/masks", api=api, include_base=False)
    answer = run(server, INSTALLED, tmp_path / "work", installed=True)
    expected = attention.load(saved)[0](torch.tensor([[1, 2, 3]])).logits
    for found in answer["logits"]:
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=1e-6)
    assert answer["url"].startswith(f"{server.url}/me/again/commit/")
    assert (answer["base"]["id"], answer["base"]["revision"]) == ("me/base", sha)
    assert server.repos["me/private"].private
    assert "config.json" in server.repos["me/private"].files("next")


# The command


def test_the_command_pushes(server, saved, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert checkpoint.main(["push", str(saved), "me/repo/sub", "--dry_run"]) == 0
    assert "sub/model.safetensors" in capsys.readouterr().out
    assert server.requests == []
    assert checkpoint.main(["push", str(saved), "me/repo/sub"]) == 0
    assert server.url in capsys.readouterr().out
    server.fail(COMMIT, 403)
    (saved / "README.md").write_text("# Another card\n")
    assert checkpoint.main(["push", str(saved), "me/repo/sub"]) == 1
    assert "may not write" in capsys.readouterr().err
