"""Variants on disk: what is written, what comes back, what is refused."""

import contextlib
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)

import attention
from attention import checkpoint, examine, files
from attention.errors import (
    BrokenCheckpointError,
    CheckpointError,
    MissingCheckpointError,
    NotAModelError,
    WrongBaseError,
)
from attention.hub import HubSpec
from attention.pushing import publish

from .checkpoints import bare, damage, make_variant, save_base, tiny_tokenizer, write_bert_vocabulary
from .models import ALL_METHODS, small_config, tiny_gpt2

every_method = pytest.mark.parametrize("method", ALL_METHODS)
IDS = torch.tensor([[1, 2, 3, 4, 1, 5]])


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def saved(tmp_path, base) -> Path:
    attention.save(make_variant(base), tmp_path / "variant", card="# A card\n", history=[{"step": 1, "loss": 0.5}])
    return tmp_path / "variant"


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# What is written and what comes back


@every_method
def test_round_trip(tmp_path, base, method):
    variant = make_variant(base, method)
    attention.save(variant, tmp_path / "variant", dtype=None)
    loaded, tokenizer = attention.load(tmp_path / "variant")
    assert_same(loaded, variant)
    assert torch.equal(loaded(IDS).logits, variant(IDS).logits)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert tokenizer("the cat")["input_ids"] == [1, 2]
    assert attention.config_from_dict(loaded.config.attention) == small_config(method)


@every_method
def test_only_what_differs_from_the_base_is_written(tmp_path, base, method):
    variant = make_variant(base, method)
    attention.save(variant, tmp_path / "variant")
    changed = {name for name in variant.state_dict() if name.startswith("transformer.h.0.attn.c_")}
    assert weights(tmp_path / "variant").keys() == changed | set(variant.new_parameters)


def test_float32_is_rounded_to_float16_and_nothing_more(tmp_path, base):
    variant = make_variant(base)
    variant.transformer.h[0].attn.c_attn.bias.data[0] = 1e6  # too large for float16
    attention.save(variant, tmp_path / "variant")
    loaded = attention.load(tmp_path / "variant")[0].state_dict()
    for name, tensor in variant.state_dict().items():
        exact = not tensor.is_floating_point() or "c_attn.bias" in name
        assert torch.equal(loaded[name], tensor if exact else tensor.half().float()), name
    assert weights(tmp_path / "variant")["transformer.h.0.attn.c_attn.weight"].dtype == torch.float16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(tmp_path, stored, computed):
    base = save_base(tmp_path / "base", stored)
    variant = attention.convert(attention.load(base, dtype=computed)[0], small_config("masks"))
    variant.transformer.h[1].attn.c_proj.bias.data += 1
    attention.save(variant, tmp_path / "variant", dtype=None)
    assert weights(tmp_path / "variant").keys() == {"transformer.h.1.attn.c_proj.bias", *variant.new_parameters}
    assert_same(attention.load(tmp_path / "variant", dtype=computed)[0], variant)
    assert attention.load(tmp_path / "variant")[0].dtype == torch.float32, "a CPU computes in float32"
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "variant", dtype="auto")
    assert_same(auto, variant)


def test_an_untied_head_is_kept(tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=False)
    variant = make_variant(base)
    variant.lm_head.weight.data += 1
    attention.save(variant, tmp_path / "variant", dtype=None)
    loaded, _ = attention.load(tmp_path / "variant")
    assert_same(loaded, variant)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "variant"), variant)


def test_a_trained_embedding_stays_tied(tmp_path, base):
    variant = make_variant(base)
    variant.transformer.wte.weight.data += 1
    attention.save(variant, tmp_path / "variant", dtype=None)
    assert "lm_head.weight" not in weights(tmp_path / "variant")
    for loaded in (
        attention.load(tmp_path / "variant")[0],
        attention.load(tmp_path / "variant", base=attention.load(base)[0])[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "variant"),
    ):
        assert_same(loaded, variant)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_variants_share_the_tensors_of_one_base(tmp_path, base, saved):
    attention.save(make_variant(base, "softmax", train=False), tmp_path / "other")  # nothing differs
    model, _ = attention.load(base)
    own = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for folder in (saved, tmp_path / "other"):
        variant, _ = attention.load(folder, base=model)
        new = weights(folder).keys()
        for name, tensor in variant.state_dict().items():
            assert (tensor.data_ptr() == own.get(name)) == (name not in new), name
    assert_same(model, attention.load(base)[0])


def test_the_base_decides_dtype_and_device(base, saved):
    model, _ = attention.load(base, dtype=torch.bfloat16)
    assert attention.load(saved, base=model)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"base is torch\.bfloat16"):
        attention.load(saved, base=model, dtype=torch.float32)
    with pytest.raises(ValueError, match="plain model"):
        attention.load(base, base=model)


def test_shards(tmp_path, base):
    variant = make_variant(base)
    attention.save(variant, tmp_path / "variant", dtype=None, self_contained=True, max_shard_size=8000)
    sizes = [path.stat().st_size for path in (tmp_path / "variant").glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 10_000
    assert_same(attention.load(tmp_path / "variant")[0], variant)


def test_card_history_and_versions_are_kept(tmp_path, base, saved):
    assert (saved / "README.md").read_text() == "# A card\n"
    assert attention.describe(saved).history.read_text() == '{"step": 1, "loss": 0.5}\n'
    assert json.loads((saved / "config.json").read_text())["versions"]["torch"] == torch.__version__
    copied = tmp_path / "copied"
    attention.save(make_variant(base), copied, history=saved / "training.jsonl")
    assert (copied / "training.jsonl").read_bytes() == (saved / "training.jsonl").read_bytes()


def test_the_generation_config_is_a_copy(base, saved):
    model, _ = attention.load(base)
    for variant in (attention.convert(model, small_config("masks")), attention.load(saved, base=model)[0]):
        variant.generation_config.max_new_tokens = 3
        assert model.generation_config.max_new_tokens is None


def test_a_base_is_not_saved_as_a_variant(tmp_path):
    with pytest.raises(CheckpointError, match=r"no variant: make one with attention\.convert"):
        attention.save(tiny_gpt2(), tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_given_tokenizer_wins_over_that_of_the_base(tmp_path, base):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["dog"])
    attention.save(make_variant(base), tmp_path / "variant", tokenizer=tokenizer)
    assert attention.load(tmp_path / "variant")[1]("dog")["input_ids"] == [7]


def test_describe(base, saved):
    found = attention.describe(saved)
    assert attention.config_from_dict({"method": found.method, **found.options}) == small_config("masks")
    assert found.is_variant
    assert found.base == str(base)
    plain = attention.describe(base)
    assert (plain.method, plain.options, plain.base) == ("softmax", {}, None)
    assert not plain.is_variant
    assert plain.history is None


# Tokenizers


def test_a_list_of_words_is_a_tokenizer(tmp_path, base):
    write_bert_vocabulary(bare(base))
    tokenizer = attention.load(base)[1]
    assert tokenizer.tokenize("the cat") == ["the", "cat"]
    attention.save(make_variant(base), tmp_path / "variant")
    assert attention.load(tmp_path / "variant")[1]("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]


def test_settings_alone_are_a_tokenizer_of_bytes(tmp_path, base):
    ByT5Tokenizer().save_pretrained(bare(base))
    (base / "added_tokens.json").unlink(missing_ok=True)
    attention.save(make_variant(base), tmp_path / "variant")
    for folder in (base, tmp_path / "variant"):
        assert attention.load(folder)[1].encode("hé", add_special_tokens=False) == [107, 198, 172]


def test_a_tokenizer_without_its_files_is_refused(tmp_path, base, caplog):
    variant = make_variant(base)
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(NotAModelError, match=r"vocab\.json"):
        attention.load(base)
    attention.save(variant, tmp_path / "variant")  # the weights are worth saving without
    assert "without a tokenizer" in caplog.text
    assert attention.load(tmp_path / "variant")[1] is None


def test_a_tokenizer_that_makes_no_sense_is_refused(base):
    for content in ("[]", "{", '{"model": {"type": "BPE"}}', 3000 * "["):
        (base / "tokenizer.json").write_text(content)
        with pytest.raises(NotAModelError, match="tokenizer"):
            attention.load(base)


def test_a_tokenizer_of_sentencepiece_names_the_package_that_it_takes(base, monkeypatch):
    (bare(base) / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(NotAModelError, match="pip install sentencepiece"):
        attention.load(base)


# Bases


@pytest.mark.parametrize(("name", "shape"), [("v_head.summary.weight", (1, 16)), ("score.weight", (2, 16))])
def test_tensors_that_the_base_has_no_place_for_are_left_out(tmp_path, base, name, shape):
    expected = attention.load(base)[0](IDS).logits
    save_file(weights(base) | {name: torch.full(shape, float("nan"))}, base / "model.safetensors")
    model, _ = attention.load(base)
    assert torch.equal(model(IDS).logits, expected)
    variant = make_variant(base)
    attention.save(variant, tmp_path / "variant", dtype=None)
    attention.save(variant, tmp_path / "whole", dtype=None, self_contained=True)
    assert name not in weights(tmp_path / "variant").keys() | weights(tmp_path / "whole").keys()
    for loaded in (
        attention.load(tmp_path / "variant")[0],
        attention.load(tmp_path / "variant", base=model)[0],
        attention.load(tmp_path / "whole")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "variant"),
    ):
        assert torch.equal(loaded(IDS).logits, variant(IDS).logits)


def ways_back(variant, folder):
    """A variant saved in each way and loaded in each."""
    attention.save(variant, folder / "part", dtype=None)
    attention.save(variant, folder / "whole", dtype=None, self_contained=True)
    variant.save_pretrained(folder / "own")
    for name in ("part", "whole", "own"):
        yield attention.load(folder / name)[0]
        yield AutoModelForCausalLM.from_pretrained(folder / name)
    publish(folder / "part", make(folder / "work"), HubSpec("me/repo"), True)
    yield attention.load(folder / "work")[0]


def make(folder):
    folder.mkdir()
    return folder


def test_a_head_that_differs_in_the_file_is_the_head(tmp_path, base):
    tensors = weights(base)
    save_file(tensors | {"lm_head.weight": -tensors["transformer.wte.weight"]}, base / "model.safetensors")
    model, _ = attention.load(base)
    expected = model(IDS).logits
    variant = attention.convert(model, attention.SoftmaxConfig())
    torch.testing.assert_close(variant(IDS).logits, expected)
    for loaded in ways_back(variant, tmp_path):
        torch.testing.assert_close(loaded(IDS).logits, expected)


@pytest.mark.parametrize("after", [False, True])
def test_a_head_changed_in_memory_is_kept(tmp_path, base, after):
    model, _ = attention.load(base)
    variant = attention.convert(model, attention.SoftmaxConfig()) if after else None
    changed = variant if after else model
    changed.lm_head.weight = torch.nn.Parameter(1.5 * changed.lm_head.weight.detach())
    expected = changed(IDS).logits
    variant = variant or attention.convert(model, attention.SoftmaxConfig())
    for loaded in ways_back(variant, tmp_path):
        torch.testing.assert_close(loaded(IDS).logits, expected)
        assert loaded.lm_head.weight is not loaded.transformer.wte.weight


def test_a_head_tied_in_memory_stays_tied(tmp_path):
    model, _ = attention.load(save_base(tmp_path / "base", tie_word_embeddings=False))
    model.lm_head.weight = model.transformer.wte.weight
    variant = attention.convert(model, attention.SoftmaxConfig())
    for loaded in ways_back(variant, tmp_path):
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 62}, {"n_ctx": 64, "n_positions": None}, {"n_embd": 32}, {"n_inner": 8}]
)
def test_sizes_that_are_not_the_files_are_named(base, change):
    config = json.loads((base / "config.json").read_text()) | change
    files.write_json(base / "config.json", {name: value for name, value in config.items() if value is not None})
    with pytest.raises(BrokenCheckpointError, match=r"transformer\.\S+ is \[.*the config asks for"):
        attention.load(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of_base", [False, True])
def test_numbers_that_are_none_are_named(base, saved, value, of_base):
    folder = base if of_base else saved
    tensors, name = weights(folder), "transformer.h.0.attn.c_attn.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if not of_base:
        files.write_manifest(saved)
    with pytest.raises(BrokenCheckpointError, match=re.escape(name) + " holds numbers that are infinite or none"):
        attention.load(folder)


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    base = save_base(tmp_path / "base", torch.float32)
    tensors = weights(base)
    tensors["transformer.wte.weight"][3, 5] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    attention.load(base)
    with pytest.raises(BrokenCheckpointError, match=r"wte\.weight holds 1e\+06, which is infinite in torch\.float16"):
        attention.load(base, dtype=torch.float16)


def test_a_model_for_which_the_memory_does_not_suffice_is_refused(base, monkeypatch):
    monkeypatch.setattr(examine, "free_memory", lambda device: 1000)
    with pytest.raises(CheckpointError, match="GB of memory on cpu"):
        attention.load(base)


def test_a_base_made_in_memory_is_saved_with_the_variant(tmp_path):
    variant = attention.convert(tiny_gpt2(), small_config("masks"))
    attention.save(variant, tmp_path / "variant", dtype=None)
    assert json.loads((tmp_path / "variant" / "config.json").read_text()).get("base") is None
    loaded, tokenizer = attention.load(tmp_path / "variant")
    assert_same(loaded, variant)
    assert tokenizer is None
    assert attention.describe(tmp_path / "variant").base is None


def test_a_base_that_vanished_is_saved_with_the_variant(tmp_path, base, caplog):
    variant = make_variant(base)
    shutil.rmtree(base)
    attention.save(variant, tmp_path / "variant", dtype=None)
    assert "all weights are saved" in caplog.text
    assert_same(attention.load(tmp_path / "variant")[0], variant)


def test_folders_can_move_together(tmp_path, base, saved):
    expected, _ = attention.load(saved)
    (tmp_path / "elsewhere").mkdir()
    for folder in (base, saved):
        shutil.move(folder, tmp_path / "elsewhere")
    loaded, _ = attention.load(tmp_path / "elsewhere" / "variant")
    assert_same(loaded, expected)
    assert loaded.config.base["id"] == str(tmp_path / "elsewhere" / "base")
    attention.save(loaded, tmp_path / "elsewhere" / "deep" / "again")
    assert_same(attention.load(tmp_path / "elsewhere" / "deep" / "again")[0], expected)


def test_a_base_in_memory_may_come_from_another_place(tmp_path, base, saved):
    expected, _ = attention.load(saved)
    base.rename(tmp_path / "moved")
    assert_same(attention.load(saved, base=attention.load(tmp_path / "moved")[0])[0], expected)


def test_a_base_in_other_shards_is_the_same_base(base, saved):
    expected, _ = attention.load(saved)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size=4000)
    assert_same(attention.load(saved)[0], expected)


def test_old_files_of_gpt2_are_a_base(tmp_path, base):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights(base).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 48, 48).tril() for layer in (0, 1)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    variant = make_variant(base)
    attention.save(variant, tmp_path / "variant", dtype=None)
    assert "transformer.wte.weight" not in weights(tmp_path / "variant")
    assert_same(attention.load(tmp_path / "variant")[0], variant)
    assert_same(attention.load(tmp_path / "variant", base=attention.load(base)[0])[0], variant)


def test_a_missing_base_is_named(base, saved):
    shutil.rmtree(base)
    for load in (attention.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(WrongBaseError, match=re.escape(f"needs its base, {base}")):
            load(saved)


def test_another_base_is_refused(base, saved):
    right, _ = attention.load(base)
    other = tiny_gpt2(torch.float16)
    other.transformer.ln_f.bias.data[3] = 0.5
    other.save_pretrained(base)
    for load in (attention.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(WrongBaseError, match="SHA-256"):
            load(saved)
    with pytest.raises(WrongBaseError, match="SHA-256"):
        attention.load(saved, base=right)


def test_a_base_changed_in_memory_is_refused(base, saved):
    model, _ = attention.load(base)
    model.transformer.ln_f.bias.data[3] = 0.5
    with pytest.raises(WrongBaseError, match=r"differs in \['transformer\.ln_f\.bias'\]"):
        attention.load(saved, base=model)


# Damage


@pytest.mark.parametrize("seed", range(40))
def test_damage_is_refused(saved, seed):
    damage(saved, seed, spared="README.md")
    for read in (attention.load, attention.describe, attention.Variant.from_pretrained):
        with pytest.raises((BrokenCheckpointError, NotAModelError), match=r"variant|damaged"):
            read(saved)


@pytest.mark.parametrize(
    "name", ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "training.jsonl"]
)
def test_missing_files_are_refused(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        attention.load(saved)


def test_a_manifest_of_another_shape_is_refused(saved):
    path = saved / "manifest.json"
    content = path.read_text()
    for old, new in (('"size"', '"sizd"'), ('"sha256"', '"sha257"'), ('"config.json"', '"/config.json"')):
        path.write_text(content.replace(old, new, 1))
        with pytest.raises(BrokenCheckpointError, match=r"manifest\.json was changed"):
            attention.load(saved)


def test_all_damage_is_listed(saved):
    (saved / "tokenizer.json").unlink()
    (saved / "training.jsonl").write_text("")
    with pytest.raises(BrokenCheckpointError) as caught:
        attention.load(saved)
    assert len(caught.value.problems) == 2


def test_the_card_may_be_edited(saved):
    (saved / "README.md").write_text("better words")
    attention.load(saved)


def test_a_plain_model_that_is_cut_short_is_refused(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpointError, match="cannot be read"):
        attention.load(base)


def test_a_plain_model_without_all_weights_is_refused(base):
    tensors = weights(base)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotAModelError, match=r"transformer\.ln_f\.bias"):
        attention.load(base)


def test_what_is_no_model_is_refused(tmp_path, base):
    with pytest.raises(MissingCheckpointError, match="no folder"):
        attention.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAModelError, match=r"no config\.json"):
        attention.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(NotAModelError, match="'vit'"):
        attention.load(tmp_path / "empty")
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(NotAModelError, match="pickles"):
        attention.load(base)


@pytest.mark.parametrize("ask", [attention.load, attention.describe, attention.hub_size, attention.locate])
def test_the_home_folder_of_nobody_is_no_folder(ask, base):
    with pytest.raises(MissingCheckpointError, match=r"no folder ~no-such-user/x|neither a folder"):
        ask("~no-such-user/x")


def test_paths_below_a_home_folder_mean_it(tmp_path, base, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    variant = make_variant(Path("~/base"))
    attention.save(variant, "~/variant")
    attention.load("~/variant")
    assert (tmp_path / "variant" / "manifest.json").is_file()
    variant.config.name_or_path = "~no-such-user/x"
    assert attention.convert(variant, small_config("softmax")).config.base["id"] == str(base)
    plain, _ = attention.load(base)
    plain.config.name_or_path = "~no-such-user/x"
    assert attention.convert(plain, small_config("softmax")).config.base["id"] == "~no-such-user/x"


def test_a_method_of_a_later_version_is_named(saved):
    config = json.loads((saved / "config.json").read_text())
    config["attention"] = {"method": "telepathy"}
    files.write_json(saved / "config.json", config)
    files.write_manifest(saved)
    with pytest.raises(NotAModelError, match="telepathy"):
        attention.load(saved)


def test_code_in_a_checkpoint_is_not_run(tmp_path, base, saved):
    marker = tmp_path / "ran"
    for folder in (base, saved):
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        files.write_json(folder / "config.json", config)
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        files.write_json(folder / "tokenizer_config.json", tokenizer)
    files.write_manifest(saved)
    attention.load(base)
    attention.load(saved)
    AutoModelForCausalLM.from_pretrained(saved)
    assert not marker.exists()


# Writing is complete or not at all


@contextlib.contextmanager
def no_file_larger_than(size):
    """As a full disk: writing past `size` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [100, 2000])
def test_a_full_disk_leaves_the_old_variant(tmp_path, base, saved, size):
    before = tree(tmp_path)
    variant = make_variant(base, "softmax")
    with no_file_larger_than(size), pytest.raises(CheckpointError, match=r"could not be written.*is untouched"):
        attention.save(variant, saved)
    assert tree(tmp_path) == before
    with no_file_larger_than(size), pytest.raises(CheckpointError, match="could not be written"):
        attention.save(variant, tmp_path / "new")
    assert tree(tmp_path) == before


def test_an_interrupted_replacement_loses_nothing(tmp_path, base, saved):
    expected, _ = attention.load(saved)
    saved.rename(tmp_path / ".variant.old")  # a crash between the two renames
    (tmp_path / ".variant.new-1234").mkdir()
    assert_same(attention.load(saved)[0], expected)
    assert_same(attention.Variant.from_pretrained(saved), expected)
    variant = make_variant(base, "softmax")
    attention.save(variant, saved, dtype=None)
    assert_same(attention.load(saved)[0], variant)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "variant"]


def test_a_failure_between_the_renames_is_undone(tmp_path, base, saved, monkeypatch):
    before, rename = tree(tmp_path), Path.rename

    def failing(path, target):
        if ".new-" in path.name:
            raise OSError("unplugged")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="unplugged"):
        attention.save(make_variant(base, "softmax"), saved)
    assert tree(tmp_path) == before


def test_other_things_are_not_overwritten(tmp_path, base):
    variant = make_variant(base)
    (tmp_path / "work" / "src").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    before = tree(tmp_path)
    for folder in (base, tmp_path / "work", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=r"not a variant|is the variant.s base"):
            attention.save(variant, folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", ["attention.save", "save_pretrained"])
@pytest.mark.parametrize("place", ["itself", "a link", "broken"])
def test_a_base_with_a_manifest_is_not_saved_over(tmp_path, base, way, place):
    files.write_manifest(base)  # as one that was trained from nothing
    variant = make_variant(base)
    folder = base
    if place == "a link":
        folder = tmp_path / "link"
        folder.symlink_to(base)
    elif place == "broken":
        (base / "model.safetensors").write_bytes(b"")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is the variant's base"):
        attention.save(variant, folder) if way == "attention.save" else variant.save_pretrained(folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_link_as_target_is_kept(tmp_path, base, saved, there):
    link, target = tmp_path / "link", saved if there else tmp_path / "elsewhere" / "new"
    link.symlink_to(target)
    variant = make_variant(base, "softmax")
    attention.save(variant, link, dtype=None)
    assert link.is_symlink()
    assert not target.is_symlink()
    for folder in (link, target):
        assert_same(attention.load(folder)[0], variant)
    target.rename(target.with_name(f".{target.name}.old"))  # a crash between the two renames
    assert_same(attention.load(link)[0], variant)


def test_saving_again_replaces_the_variant_and_keeps_the_rest(base, saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "plots").mkdir()
    (saved / "plots" / "loss.png").write_bytes(b"png")
    variant = make_variant(base, "softmax")
    attention.save(variant, saved, dtype=None, self_contained=True, max_shard_size=8000)
    attention.save(variant, saved, dtype=None)
    assert_same(attention.load(saved)[0], variant)
    assert {path.name for path in saved.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "manifest.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "notes.txt", "plots"),
    }


CLAIMS = """---
license: mit
model-index:
- name: mine
  results:
  - metrics:
    - type: kl
      value: 0.02
tags:
- masks
---

# Mine

KL 0.02
"""


def test_a_card_does_not_claim_figures_of_other_weights(base, saved):
    attention.save(make_variant(base), saved, card=CLAIMS)
    attention.save(make_variant(base), saved)
    assert (saved / "README.md").read_text() == CLAIMS  # of the same weights, which it is still right about
    for variant in (make_variant(base, "softmax"), make_variant(base, train=False)):
        attention.save(variant, saved)
        card = (saved / "README.md").read_text()
        assert card.startswith(
            "---\nlicense: mit\ntags:\n- masks\n---\n\n> This card, its figures included, is of weights"
        )
        assert card.endswith("\n\n# Mine\n\nKL 0.02\n")
    assert card.count("> This card") == 1
    make_variant(base).save_pretrained(saved)
    assert (saved / "README.md").read_text() == card
    attention.save(make_variant(base), saved, card=CLAIMS)
    assert (saved / "README.md").read_text() == CLAIMS


def test_a_damaged_variant_can_be_replaced(base, saved):
    (saved / "manifest.json").write_text("{")
    variant = make_variant(base, "softmax")
    attention.save(variant, saved, dtype=None)
    assert_same(attention.load(saved)[0], variant)


# transformers' own ways


@every_method
def test_auto_classes(tmp_path, base, method):
    variant = make_variant(base, method)
    attention.save(variant, tmp_path / "variant", dtype=None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "variant")
    assert_same(loaded, variant)
    assert torch.equal(loaded(IDS).logits, variant(IDS).logits)
    assert loaded.config.name_or_path == str(tmp_path / "variant")
    assert AutoTokenizer.from_pretrained(tmp_path / "variant")("the mat")["input_ids"] == [1, 6]
    generate = pipeline("text-generation", model=str(tmp_path / "variant"))
    text = generate("the cat", max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = variant.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False)[:, 2:]
    assert text == attention.load(base)[1].decode(ids[0])


def test_from_pretrained_takes_what_transformers_takes(saved):
    expected, _ = attention.load(saved, dtype=torch.bfloat16)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        saved.parent, subfolder="variant", dtype="bfloat16", device_map="cpu", output_loading_info=True
    )
    assert_same(loaded, expected)
    assert not any(report.values())
    config = AutoConfig.from_pretrained(saved, resid_pdrop=0.5)
    assert attention.Variant.from_pretrained(saved, config=config).config.resid_pdrop == 0.5
    assert attention.Variant.from_pretrained(saved, resid_pdrop=0.25).config.resid_pdrop == 0.25


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    files.write_json(folder / files.INDEX, {"weight_map": {}})


def without_a_tensor(folder):
    tensors = weights(folder)
    del tensors["transformer.h.1.attn.mechanism.alpha"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(folder):
    save_file({name: tensor * float("nan") for name, tensor in weights(folder).items()}, folder / "model.safetensors")


def with_option(name, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_weights, r"the tensor transformer\.h\.0\.attn\.mechanism\.alpha is missing"),
        (without_a_tensor, r"the tensor transformer\.h\.1\.attn\.mechanism\.alpha is missing"),
        (with_nan, "numbers that are infinite or none"),
        (with_option("n_layer", 5), "is missing"),
        (with_option("attention", {"method": "masks", "candidates": ["window(1000000000)"]}), "window"),
        (with_option("attention", 5), "does not say what attention"),
        (with_option("n_embd", [1]), "n_embd"),
        (with_option("vocab_size", 3), "cannot be used: RuntimeError"),
    ],
)
def test_from_pretrained_refuses_what_load_does(saved, change, message):
    change(saved)
    files.write_manifest(saved)
    with pytest.raises(CheckpointError, match=message):
        attention.Variant.from_pretrained(saved)
    with pytest.raises(CheckpointError):
        attention.load(saved)


def test_from_pretrained_refuses_a_plain_model(base):
    with pytest.raises(NotAModelError, match=r"attention\.convert"):
        attention.Variant.from_pretrained(base)


@pytest.mark.parametrize("model_first", [True, False])
def test_save_pretrained(tmp_path, saved, model_first):
    model, tokenizer = attention.load(saved)
    model.generation_config.max_new_tokens = 7
    for part in (model, tokenizer) if model_first else (tokenizer, model):
        part.save_pretrained(tmp_path / "again")
    loaded, again = attention.load(tmp_path / "again")
    assert_same(loaded, model)
    assert again("a mat")["input_ids"] == [5, 6]
    assert loaded.generation_config.max_new_tokens == 7
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.max_new_tokens == 7
    assert weights(tmp_path / "again").keys() == weights(saved).keys()


def test_save_pretrained_on_other_processes_writes_nothing(tmp_path, saved):
    attention.load(saved)[0].save_pretrained(tmp_path / "again", is_main_process=False)
    assert not (tmp_path / "again").exists()


def test_gathered_weights_are_saved(tmp_path, base):
    variant = make_variant(base)
    gathered = {name: tensor + 1 if "ln_f" in name else tensor for name, tensor in variant.state_dict().items()}
    attention.save(variant, tmp_path / "variant", state_dict=gathered, dtype=None)
    loaded = attention.load(tmp_path / "variant")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in gathered.items())


def test_the_loss_needs_no_guess(base):
    variant = make_variant(base)
    assert variant.loss_type == "ForCausalLM"
    assert torch.isclose(variant(IDS, labels=IDS).loss, attention_loss(variant))


def attention_loss(variant):
    logits = variant(IDS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


# The command


def test_info(saved, capsys):
    assert checkpoint.main(["info", str(saved)]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "masks"
    (saved / "config.json").unlink()
    assert checkpoint.main(["info", str(saved)]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False], ids=["of a folder", "of nothing yet"])
def test_a_link_as_a_target_is_kept(there, tmp_path, base):
    disk = tmp_path / "disk" / "masks"
    disk.parent.mkdir()
    if there:
        attention.save(make_variant(base), disk)
    (tmp_path / "variant").symlink_to(disk)
    attention.save(variant := make_variant(base), tmp_path / "variant")
    assert (tmp_path / "variant").is_symlink()
    assert not disk.is_symlink()
    assert_same(attention.load(tmp_path / "variant")[0].half(), variant.half())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "disk", "variant"]
    assert [path.name for path in disk.parent.iterdir()] == ["masks"]


def test_what_an_interruption_left_behind_a_link_is_found(tmp_path, base):
    (tmp_path / "disk").mkdir()
    (tmp_path / "variant").symlink_to(tmp_path / "disk" / "masks")
    attention.save(variant := make_variant(base), tmp_path / "variant")
    (tmp_path / "disk" / "masks").rename(tmp_path / "disk" / ".masks.old")
    assert_same(attention.load(tmp_path / "variant")[0].half(), variant.half())
    attention.save(variant, tmp_path / "variant")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["masks"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to("real")
    files.write_file(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "after"

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_file(tmp_path / "link", b"later")
    assert (tmp_path / "real").read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_outweighs_all_else_is_loaded_around_a_base_in_memory(tmp_path, tied):
    """Tied matrices come several times while a model is built; they count once against what the files hold."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 60_000}
    GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    base, _ = attention.load(tmp_path / "base")
    student = attention.convert(base, attention.MasksConfig(candidates=("window(4)",)))
    attention.save(student, tmp_path / "variant", base=tmp_path / "base")
    for options in ({"base": base}, {}):
        loaded, _ = attention.load(tmp_path / "variant", **options)
        assert_same(loaded, student)


@pytest.mark.parametrize("size", [53, 71])
@pytest.mark.parametrize("own", [False, True], ids=["attention.save", "save_pretrained"])
def test_a_variant_of_another_vocabulary_than_its_base_carries_all_weights(tmp_path, caplog, size, own):
    variant = make_variant(save_base(tmp_path / "base"))
    variant.resize_token_embeddings(size)
    variant.save_pretrained(tmp_path / "variant") if own else attention.save(variant, tmp_path / "variant", dtype=None)
    assert "other sizes than its base" in caplog.text
    again, _ = attention.load(tmp_path / "variant")
    ids = torch.arange(1, 20)[None]
    assert torch.equal(again(ids).logits, variant(ids).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "variant").config.vocab_size == size
