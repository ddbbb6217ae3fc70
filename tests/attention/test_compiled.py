"""Decoding by one compiled graph: the same texts as without, one graph for every length, and what does not use it."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import attention

from .test_rollback import GREEDY, base_of, tokens

STEADY = {
    "masks": {"method": "masks", "candidates": ["window(5)", "first(2)"]},
    "masks-dilated": {"method": "masks", "candidates": ["dilated(3, 3)", "first(1)"]},
    "performer": {"method": "performer", "num_features": 8},
    "favor": {"method": "performer", "num_features": 8, "feature_map": "favor"},
    "performer-window": {"method": "performer", "num_features": [8, 0], "window": 4, "feature_map": "relu"},
    "favor-window": {"method": "performer", "num_features": 8, "window": 4, "feature_map": "favor"},
    "mix": {
        "method": "layers",
        "layers": [
            {"layers": [0], "method": "performer", "num_features": 8, "window": 3},
            {"layers": [1], "method": "masks", "candidates": ["window(4)"]},
        ],
    },
}
every_method = pytest.mark.parametrize("name", STEADY)
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()


def pair(name, family="gpt2", **options):
    """A variant, and the same with compiled decoding."""
    plain = attention.convert(base_of(family), attention.config_from_dict(STEADY[name]))
    return plain, attention.compile_decoding(copy.deepcopy(plain), **{"backend": "aot_eager", **options})


def graphs():
    return counters["stats"]["unique_graphs"]


@every_method
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_text_is_the_same_by_one_graph_for_every_length(family, name):
    plain, compiled = pair(name, family)
    for prompt in (1, 9, 14):
        options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
        one, other = (model.generate(tokens(1, prompt), **options) for model in (plain, compiled))
        assert torch.equal(one.sequences, other.sequences)
        torch.testing.assert_close(torch.cat(other.logits), torch.cat(one.logits), **TOLERANCE)
    assert compiled.forward.steps > 40  # of 69 tokens after a prompt
    assert graphs() == (2 if name == "favor-window" else 1)  # another while its scale has not settled


@every_method
def test_padded_rows_and_beams_are_continued_alike(name):
    plain, compiled = pair(name)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    for options in ({}, {"num_beams": 2}):
        one, other = (model.generate(ids, attention_mask=mask, **GREEDY | options) for model in (plain, compiled))
        assert torch.equal(one, other)
    assert compiled.forward.steps > 20


@every_method
@torch.no_grad()
def test_tokens_may_come_by_graph_and_without_in_turn(name):
    """Blocks, and what the graph does not give, go through the plain forward, on the same states."""
    plain, compiled = pair(name)
    ids, caches = tokens(2, 30), (plain.new_cache(), compiled.new_cache())
    steps = []
    for part in ids.split([8, 1, 1, 1, 3, 1, 1, 2, 1, 1, 1, 9], 1):
        found = [m(part, cache=c, use_cache=True).logits for m, c in zip((plain, compiled), caches, strict=True)]
        torch.testing.assert_close(found[1], found[0], **TOLERANCE)
        steps.append(compiled.forward.steps)
        with torch.enable_grad():
            compiled(ids[:, :1]).logits.sum().backward()
    assert 4 <= steps[-1] < 9
    assert steps[-1] == steps[-2]  # a block
    assert [cache.get_seq_length() for cache in caches] == [30, 30]


def test_maps_records_and_training_do_not_use_the_graph():
    _, compiled = pair("masks")
    with torch.no_grad():
        cache = compiled.new_cache()
        compiled(tokens(1, 9), cache=cache, use_cache=True)
        compiled(tokens(1, 1), cache=cache, use_cache=True)
        assert compiled(tokens(1, 1), cache=cache, use_cache=True, output_hidden_states=True).hidden_states
        compiled.train()(tokens(1, 1), cache=cache, use_cache=True)
        compiled.eval()
        cache.activate_past_recording()
        compiled(tokens(1, 1), cache=cache, use_cache=True)
        cache.crop(-1)
    compiled(tokens(1, 1), cache=cache, use_cache=True)  # with gradients
    assert compiled.forward.steps == graphs() == 0


def test_prompt_lookup_writes_the_same():
    plain, compiled = pair("performer-window")
    prompt = tokens(1, 5).repeat(1, 3)
    assert torch.equal(
        compiled.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY), plain.generate(prompt, **GREEDY)
    )


def test_the_last_position_is_still_checked():
    _, compiled = pair("masks")
    limit = compiled.config.max_position_embeddings
    with torch.no_grad():
        cache = compiled.new_cache()
        for length in (limit - 2, 1, 1):
            compiled(tokens(1, length), cache=cache, use_cache=True)
        with pytest.raises(ValueError, match=f"position {limit} is past the last one"):
            compiled(tokens(1, 1), cache=cache, use_cache=True)
    assert compiled.forward.steps == 1


def test_a_state_that_grows_is_refused_with_its_layers():
    mix = {
        "method": "layers",
        "layers": [
            {"layers": [0], "method": "masks", "candidates": ["window(4)"]},
            {"layers": [1], "method": "masks", "candidates": ["window(4)", "top(2)"]},
        ],
    }
    for config, layers in ((mix, r"layers 1 \(masks\)"), ({"method": "nsa"}, r"layers 0 \(nsa\), 1 \(nsa\)")):
        student = attention.convert(base_of("gpt2"), attention.config_from_dict(config))
        with pytest.raises(ValueError, match=layers):
            attention.compile_decoding(student)


def test_a_copy_computes_with_its_own_weights():
    plain, compiled = pair("performer")
    twin = copy.deepcopy(compiled)
    assert twin.forward.model is twin
    assert attention.compile_decoding(twin).forward is twin.forward
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(compiled.generate(tokens(1, 4), **GREEDY), plain.generate(tokens(1, 4), **GREEDY))
    assert not torch.equal(twin.generate(tokens(1, 4), **GREEDY), plain.generate(tokens(1, 4), **GREEDY))


def test_a_variant_with_a_graph_is_saved_as_without(tmp_path):
    plain, compiled = pair("performer-window")
    attention.save(compiled, tmp_path / "variant", dtype=None)
    again, _ = attention.load(tmp_path / "variant")
    assert torch.equal(again.generate(tokens(1, 4), **GREEDY), plain.generate(tokens(1, 4), **GREEDY))


def test_without_a_compiler_a_warning_says_so_and_the_text_is_the_same():
    from torch._inductor import config

    plain, compiled = pair("masks", backend="inductor")
    without = config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with without, pytest.warns(RuntimeWarning, match="not compiled, and goes on without: .*C\\+\\+ compiler"):
        found = compiled.generate(tokens(1, 9), **GREEDY)
    assert torch.equal(found, plain.generate(tokens(1, 9), **GREEDY))
    assert compiled.forward.steps == 0
