"""Variants of GPT-2 with every method: conversion, padding, caches, generation, limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

import attention
from attention.variant import cache_name, fuse_activations

from .models import ALL_METHODS, small_config, tiny_gpt2

CACHE = cache_name(GPT2LMHeadModel)
every_method = pytest.mark.parametrize("method", ALL_METHODS)
TOLERANCE = {"atol": 3e-5, "rtol": 3e-5}


def variant(method, **options):
    return attention.convert(tiny_gpt2(**options), small_config(method))


def tokens(*shape, seed=1):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"n_head": 4, "n_layer": 3, "n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [{"method": "softmax"}, {"method": "masks", "candidates": ["causal"]}], ids=str)
@torch.no_grad()
def test_exact_methods_give_the_logits_of_the_base(config, options):
    base, ids = tiny_gpt2(**options), tokens(2, 40)
    student = attention.convert(base, attention.config_from_dict(config))
    torch.testing.assert_close(student(ids).logits, base(ids).logits, atol=1e-5, rtol=0)


@every_method
def test_convert_copies_every_weight_and_names_the_new_ones(method):
    base = tiny_gpt2()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    student = attention.convert(base, small_config(method))
    state = student.state_dict()
    assert set(state) - set(before) == set(student.new_parameters)
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the base changed with the student"


def test_shared_tensors_are_the_same_memory():
    base = tiny_gpt2()
    student = attention.convert(base, attention.SoftmaxConfig(), share=True)
    for name, tensor in base.state_dict().items():
        assert student.state_dict()[name].data_ptr() == tensor.data_ptr(), name


def test_a_model_without_memory_is_converted():
    with torch.device("meta"):
        base = tiny_gpt2()
    student = attention.convert(base, small_config("nsa"))
    assert {p.device.type for p in student.parameters()} == {"meta"}
    assert student.lm_head.weight is student.transformer.wte.weight
    assert {n: p.shape for n, p in base.named_parameters()}.items() <= {
        n: p.shape for n, p in student.named_parameters()
    }.items()


@pytest.mark.parametrize("base", [None, "gpt2", torch.nn.Linear(2, 2)], ids=str)
def test_what_is_no_model_is_refused(base):
    with pytest.raises(TypeError, match="a causal language model of transformers, and got"):
        attention.convert(base, small_config("masks"))


def test_head_stays_tied():
    student = attention.convert(tiny_gpt2(), attention.SoftmaxConfig())
    assert student.lm_head.weight is student.transformer.wte.weight


def test_a_variant_can_be_converted_again():
    base, ids = tiny_gpt2(), tokens(1, 12)
    student = attention.convert(attention.convert(base, small_config("masks")), attention.SoftmaxConfig())
    fuse_activations(base)  # as in every variant
    assert torch.equal(student(ids).logits, base(ids).logits)


def test_other_families_are_refused():
    with pytest.raises(attention.UnsupportedModelError, match=r"GPT2Model.*no causal language model"):
        attention.convert(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=5)), small_config("masks"))
    with pytest.raises(attention.UnsupportedModelError, match="cross-attention"):
        attention.convert(tiny_gpt2(add_cross_attention=True), small_config("masks"))


@every_method
@settings(max_examples=10)
@given(cut=st.integers(1, 39), seed=st.integers(0, 99))
@torch.no_grad()
def test_strictly_causal(method, cut, seed):
    student, ids = variant(method), tokens(1, 40, seed=seed)
    changed = torch.cat([ids[:, :cut], tokens(1, 40 - cut, seed=seed + 1)], 1)
    assert torch.equal(student(ids).logits[:, :cut], student(changed).logits[:, :cut])


@every_method
@settings(max_examples=10)
@given(cuts=st.sets(st.integers(1, 47), max_size=6))
@torch.no_grad()
def test_cached_equals_uncached_up_to_the_last_position(method, cuts):
    student, ids = variant(method), tokens(2, 48)
    expected = student(ids, use_cache=False).logits
    cache, logits = None, []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 48], strict=True):
        output = student(ids[:, start:stop], **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)


@every_method
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(method, lengths, side):
    student, width = variant(method), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens(length, seed=row), 1
    output = student(ids, attention_mask=mask, output_hidden_states=True)
    for row, length in enumerate(lengths):
        alone = student(tokens(1, length, seed=row), output_hidden_states=True)
        real = mask[row].bool()
        torch.testing.assert_close(output.logits[row, real], alone.logits[0], **TOLERANCE)
        torch.testing.assert_close(output.hidden_states[-1][row, real], alone.hidden_states[-1][0], **TOLERANCE)


@every_method
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
def test_left_padded_batches_generate_what_each_row_generates_alone(method, options):
    student, lengths = variant(method), [3, 17, 9]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 17 - length :], mask[row, 17 - length :] = tokens(length, seed=row), 1
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    batch = student.generate(ids, attention_mask=mask, **settings, **options)
    for row, length in enumerate(lengths):
        alone = student.generate(tokens(1, length, seed=row), **settings, **options)
        assert batch[row, 17:].tolist() == alone[0, length:].tolist()


@every_method
def test_generate_with_a_cache_equals_generate_without(method):
    student, ids = variant(method), tokens(2, 5)
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **settings), student.generate(ids, use_cache=False, **settings))


@every_method
@torch.no_grad()
def test_a_row_of_padding_only_gives_no_nan(method):
    student, mask = variant(method), torch.ones(2, 8, dtype=torch.long)
    mask[1] = 0
    output = student(tokens(2, 8), attention_mask=mask, use_cache=True)
    assert torch.isfinite(output.logits).all()
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    output = student(tokens(2, 1), attention_mask=mask, **{CACHE: output[CACHE]}, use_cache=True)
    assert torch.isfinite(output.logits).all()


@every_method
@torch.no_grad()
def test_past_the_last_position_is_a_clear_error(method):
    student = variant(method)
    assert student(tokens(1, 48)).logits.shape[1] == 48
    with pytest.raises(ValueError, match="holds 48 tokens"):
        student(tokens(1, 49))
    cache = student(tokens(1, 48), use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="holds 48 tokens"):
        student(tokens(1, 1), **{CACHE: cache})
    with pytest.raises(ValueError, match="holds 48 tokens"):
        student(tokens(1, 1), position_ids=torch.tensor([[48]]))


@torch.no_grad()
def test_left_padding_does_not_use_up_positions():
    student, mask = variant("softmax"), torch.ones(1, 60, dtype=torch.long)
    mask[:, :20] = 0
    padded = student(torch.cat([torch.zeros(1, 20, dtype=torch.long), tokens(1, 40)], 1), attention_mask=mask)
    torch.testing.assert_close(padded.logits[:, 20:], student(tokens(1, 40)).logits, **TOLERANCE)


def test_masks_with_holes_and_wrong_shapes_are_refused():
    student = variant("softmax")
    with pytest.raises(ValueError, match="between real tokens"):
        student(tokens(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="batch, length"):
        student(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        student()


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_and_generates(method, dtype):
    student, ids = variant(method, dtype=dtype), tokens(1, 20)
    assert all(p.dtype == dtype for p in student.parameters())
    logits = student(ids).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    assert student.generate(ids, max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (1, 24)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_model_that_upcasts_its_attention_writes_in_any_precision(method, dtype):
    """Also in rows that complete a compressed block at different steps, and under autocast."""
    student, ids = variant(method, dtype=dtype, reorder_and_upcast_attn=True), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 14, "min_new_tokens": 14, "pad_token_id": 0}
    assert student.generate(ids, **options).shape == (2, 26)
    assert attention.attention_maps(student, ids)[0].dtype.is_floating_point
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student.float().generate(ids, **options).shape == (2, 26)


@every_method
def test_gradients_flow_through_a_cache_as_without(method):
    student, ids = variant(method), tokens(2, 20)
    student(ids).logits.square().mean().backward()
    whole = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    cache, logits = None, []
    for part in ids.split([9, 1, 1, 6, 1, 1, 1], 1):
        output = student(part, use_cache=True, **{CACHE: cache})
        cache = output.get(CACHE)
        logits.append(output.logits)
    torch.cat(logits, 1).square().mean().backward()
    for name, parameter in student.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], atol=2e-4, rtol=2e-4)


@every_method
def test_a_cache_of_inference_mode_goes_on_outside_of_it(method):
    student, ids = variant(method), tokens(2, 30)
    with torch.inference_mode():
        cache = student(ids[:, :12], use_cache=True).get(CACHE)
        student(ids[:, 12:13], use_cache=True, **{CACHE: cache})
    with torch.no_grad():
        steps = [student(ids[:, i : i + 1], use_cache=True, **{CACHE: cache}).logits for i in range(13, 30)]
        torch.testing.assert_close(torch.cat(steps, 1), student(ids).logits[:, 13:], **TOLERANCE)


@every_method
def test_trains_with_dropout_and_gradient_checkpointing(method):
    student, ids = variant(method, attn_pdrop=0.2, resid_pdrop=0.1), tokens(2, 24)
    student.train()
    torch.manual_seed(3)
    plain = student(ids, labels=ids)
    assert plain.get(CACHE) is None
    plain.loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    student(ids, labels=ids).loss.backward()
    assert gradients
    for name, parameter in student.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], **TOLERANCE)


@every_method
@pytest.mark.parametrize("length", [1, 100, 128, 500])
def test_trains_at_lengths_of_any_number_of_blocks(method, length):
    student, ids = variant(method, n_positions=512).train(), tokens(2, length)
    student(ids).logits.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@every_method
def test_maps_of_a_model(method):
    student, ids = variant(method), tokens(2, 10)
    maps = attention.attention_maps(student, ids)
    assert [m.shape for m in maps] == [(2, 2, 10, 10)] * 2


@torch.no_grad()
def test_maps_of_a_base_are_its_own():
    base, ids = tiny_gpt2(attn_implementation="eager"), tokens(1, 10)
    for ours, theirs in zip(
        attention.attention_maps(base, ids), base(ids, output_attentions=True).attentions, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
