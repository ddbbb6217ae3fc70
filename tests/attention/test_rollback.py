"""Tokens taken back from a cache: crop, prompt lookup and assisted decoding, for every method."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import attention
from attention.state import StateCache

from .configs import CONFIGS
from .families import tiny
from .models import SMALL_OPTIONS, tiny_gpt2

NSA = {"method": "nsa", **SMALL_OPTIONS["nsa"]}
VARIANTS = {
    "softmax": {"method": "softmax"},
    "masks": {"method": "masks", "candidates": ["window(5)", "first(2)", "dilated(3, 3)"]},
    "masks-content": {"method": "masks", "candidates": ["window(3)", "first(1)", "top(4)", "induction(2)"]},
    "masks-dense": {"method": "masks", "candidates": ["causal", "last(1)"]},
    "performer": {"method": "performer", "num_features": 8},
    "performer-window": {"method": "performer", "num_features": [8, 0], "window": 4, "feature_map": "favor"},
    "nsa": NSA,
    "mix": {
        "method": "layers",
        "layers": [{"layers": [0], "method": "performer", "num_features": 8, "window": 3}, {"layers": [1], **NSA}],
    },
}
GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_family = pytest.mark.parametrize("family", ["gpt2", "llama"])


def base_of(family: str) -> PreTrainedModel:
    return tiny_gpt2() if family == "gpt2" else tiny(family)


def variant_of(family: str, name: str) -> PreTrainedModel:
    """Random, with scores for `top` that are not all alike."""
    student = attention.convert(base_of(family), attention.config_from_dict(VARIANTS[name]))
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in student.named_parameters():
        if parameter_name.endswith("to_scores"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return student


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


def feed(model: PreTrainedModel, ids: Tensor, cache: StateCache) -> Tensor:
    return model(ids, cache=cache, use_cache=True).logits


@every_variant
@every_family
def test_prompt_lookup_writes_the_plain_text(family, name):
    student, prompt = variant_of(family, name), tokens(1, 5).repeat(1, 3)
    plain = student.generate(prompt, **GREEDY)
    assert torch.equal(student.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY), plain)


@every_variant
@every_family
def test_assisted_decoding_writes_the_text_of_its_target_and_drafts_as_the_assistant_does_alone(
    family, name, monkeypatch
):
    base, student, prompt = base_of(family), variant_of(family, name), tokens(1, 7)
    drafts = []

    def noting(self, input_ids, **kwargs):
        candidates, logits = get_candidates(self, input_ids, **kwargs)
        if self.assistant_model is student:
            drafts.append((input_ids, candidates))
        return candidates, logits

    get_candidates = AssistedCandidateGenerator.get_candidates
    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", noting)
    for target, assistant in ((student, base), (base, student)):
        assistant.generation_config.num_assistant_tokens = 4
        assistant.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(
            target.generate(prompt, assistant_model=assistant, **GREEDY), target.generate(prompt, **GREEDY)
        )
    assert len(drafts) > 4
    for written, candidates in drafts:
        count = candidates.shape[1] - written.shape[1]
        if count:
            alone = student.generate(written, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
            assert torch.equal(candidates, alone)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Sizes of blocks, and after each how many tokens are taken back, one crop after another, within the block."""
    history = []
    for _ in range(draw(st.integers(2, 6))):
        size = draw(st.sampled_from([1, 1, 2, 3, 5, 9]))
        most, crops = size, []
        while most and draw(st.booleans()):
            crops.append(draw(st.integers(0, most)))
            most -= crops[-1]
        history.append((size, crops))
    return history


@pytest.mark.parametrize("method", sorted(CONFIGS))
@settings(max_examples=20)
@given(data=st.data(), history=histories(), seed=st.integers(0, 99))
@torch.no_grad()
def test_any_blocks_with_tokens_taken_back_give_what_is_left_in_one_piece(method, data, history, seed):
    config = data.draw(CONFIGS[method])
    student = attention.convert(base_of("gpt2"), config)
    cache, kept, batch = student.new_cache(), tokens(2, 0), 2
    cache.activate_past_recording()
    for step, (size, crops) in enumerate(history):
        new = tokens(batch, size, seed=seed + step)
        logits = feed(student, new, cache)
        kept = torch.cat([kept, new], 1)
        torch.testing.assert_close(logits, student(kept, use_cache=False).logits[:, -size:], **TOLERANCE)
        for count in crops:
            cache.crop(-count)
            kept = kept[:, : kept.shape[1] - count]
            assert cache.get_seq_length() == kept.shape[1]
        cache.crop(0)


@every_variant
@torch.no_grad()
def test_single_tokens_after_a_prompt_are_taken_back_into_the_prompt(name):
    student, ids, others = variant_of("gpt2", name), tokens(2, 20), tokens(2, 20, seed=2)
    for left in (13, 12, 11, 5, 1, 0):
        cache = student.new_cache()
        cache.activate_past_recording()
        feed(student, ids[:, :12], cache)
        for token in ids[:, 12:17].split(1, 1):
            feed(student, token, cache)
        cache.crop(left - 17)
        text = torch.cat([ids[:, :left], others], 1)
        found = [feed(student, part, cache) for part in others.split([1, 1, 1, 1, 1, 3, 1, 11], 1)]
        expected = student(text, use_cache=False).logits[:, left:]
        torch.testing.assert_close(torch.cat(found, 1), expected, **TOLERANCE)


@every_variant
@torch.no_grad()
def test_crop_after_rows_were_reordered_repeated_and_selected(name):
    student, ids, others = variant_of("gpt2", name), tokens(3, 24), tokens(4, 9, seed=2)
    cache = student.new_cache()
    cache.activate_past_recording()
    feed(student, ids[:, :10], cache)
    feed(student, ids[:, 10:15], cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 1, 4, 5]))
    cache.crop(-1)
    rows = ids[[2, 2, 1, 1], :12]
    found = [feed(student, part, cache) for part in others.split([1, 4, 4], 1)]
    expected = student(torch.cat([rows, others], 1), use_cache=False).logits[:, 12:]
    torch.testing.assert_close(torch.cat(found, 1), expected, **TOLERANCE)


@every_variant
@torch.no_grad()
def test_crop_of_rows_with_padding_before_them(name):
    student, others, lengths = variant_of("gpt2", name), tokens(3, 8, seed=2), [9, 5, 2]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 9 - length :], mask[row, 9 - length :] = tokens(length, seed=row), 1
    cache = student.new_cache()
    cache.activate_past_recording()
    student(ids, attention_mask=mask, cache=cache, use_cache=True)
    ones = torch.ones(3, 20, dtype=torch.long)
    student(tokens(3, 4, seed=9), attention_mask=torch.cat([mask, ones[:, :4]], 1), cache=cache, use_cache=True)
    cache.crop(-5)  # one token of the prompts, too
    found, mask = [], mask[:, :8]
    for part in others.split([1, 3, 4], 1):
        mask = torch.cat([mask, ones[:, : part.shape[1]]], 1)
        found.append(student(part, attention_mask=mask, cache=cache, use_cache=True).logits)
    for row, length in enumerate(lengths):
        text = torch.cat([tokens(length, seed=row)[: length - 1], others[row]])[None]
        torch.testing.assert_close(torch.cat(found, 1)[row], student(text).logits[0, length - 1 :], **TOLERANCE)


@every_variant
@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused_and_changes_nothing(name):
    student, ids = variant_of("gpt2", name), tokens(1, 30)
    cache = student.new_cache()
    cache.activate_past_recording()
    feed(student, ids[:, :11], cache)
    cache.crop(0)
    feed(student, ids[:, 11:15], cache)
    for count, message in ((3, "negative number"), (-16, "from a cache of 15")):
        with pytest.raises(ValueError, match=message):
            cache.crop(count)
    if name in ("softmax", "masks-dense"):  # all tokens are kept
        cache.crop(-8)
        feed(student, ids[:, 7:15], cache)
    else:
        with pytest.raises(ValueError, match=r"8 tokens cannot be removed.*since the last crop only, which are 4"):
            cache.crop(-8)
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        found = feed(student, ids[:, 15:], each)
        torch.testing.assert_close(found, student(ids).logits[:, 15:], **TOLERANCE)


@torch.no_grad()
def test_without_a_record_only_what_is_still_there_can_be_taken_back():
    for name, most in (("performer", 0), ("masks", 7), ("softmax", 30)):
        student, ids = variant_of("gpt2", name), tokens(1, 40)
        for length in (6, 30):
            cache = student.new_cache()
            feed(student, ids[:, :length], cache)
            assert all(state.record is None for state in cache.layers)
            if length > most:
                with pytest.raises(ValueError, match=r"Call activate_past_recording\(\)"):
                    cache.crop(-2)
            else:
                cache.crop(-2)
                found = feed(student, ids[:, length - 2 :], cache)
                torch.testing.assert_close(found, student(ids).logits[:, length - 2 :], **TOLERANCE)


@torch.no_grad()
def test_padding_after_the_tokens_cannot_be_taken_back():
    student, ids, mask = variant_of("gpt2", "softmax"), tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    cache = student.new_cache()
    student(ids, attention_mask=mask, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="the first 6 columns"):
        cache.crop(-1)
    cache.crop(-6)
    torch.testing.assert_close(feed(student, ids, cache), student(ids).logits, **TOLERANCE)


@torch.no_grad()
def test_an_assistant_that_leaves_early_is_the_model_itself():
    student, prompt = variant_of("llama", "performer"), tokens(1, 7)
    plain = student.generate(prompt, **GREEDY)
    assert torch.equal(student.generate(prompt, assistant_early_exit=1, **GREEDY), plain)


@torch.no_grad()
def test_recording_ends_with_the_flag():
    student, ids = variant_of("gpt2", "mix"), tokens(1, 12)
    cache = student.new_cache()
    cache.activate_past_recording()
    for part in ids.split(4, 1):
        feed(student, part, cache)
    assert [state.record.columns for state in cache.layers] == [12, 12]
    held = cache.layers[0].nbytes()
    for state in cache.layers:
        state.record_past = False
    feed(student, ids[:, :1], cache)
    assert [state.record for state in cache.layers] == [None, None]
    assert cache.layers[0].nbytes() < held
