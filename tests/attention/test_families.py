"""Every tested family with every method: the seam, padding, caches, generation, saving; what is refused, and why."""

import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

import attention
from attention.families import TESTED, prove, seam_difference
from attention.variant import cache_name

from .checkpoints import tiny_tokenizer
from .families import SCALED, tiny
from .models import ALL_METHODS, small_config

every_family = pytest.mark.parametrize("family", TESTED)
every_method = pytest.mark.parametrize("method", [*ALL_METHODS, "layers"])
TOLERANCE = {"atol": 2e-4, "rtol": 2e-4}


def config_of(method, layers=2):
    if method != "layers":
        return small_config(method)
    choices = [{"layers": [number], **small_config(ALL_METHODS[number]).to_dict()} for number in range(layers)]
    return attention.config_from_dict({"method": "layers", "layers": choices})


def variant(family, method, **options):
    base = tiny(family, **options)
    return attention.convert(base, config_of(method, base.config.num_hidden_layers))


def tokens(*shape, seed=1):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(seed))


@every_family
def test_softmax_through_the_seam_is_the_base(family):
    assert seam_difference(tiny(family)) < 2e-6


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rotary_embeddings(scaling):
    base = tiny("llama", rope_parameters=SCALED[scaling])
    assert seam_difference(base) < 2e-6


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("method", ["masks", "performer", "nsa"])
@torch.no_grad()
def test_scaled_positions_in_a_padded_row_and_with_a_cache(scaling, method):
    """Features of rotated vectors depend on the position, so a padded row's start at its first token."""
    student, ids = variant("llama", method, rope_parameters=SCALED[scaling]), tokens(1, 30)
    expected = student(ids, use_cache=False).logits
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 30)], 1).long()
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, 9:], expected, **TOLERANCE)
    first = student(ids[:, :17], use_cache=True)
    cache = getattr(first, cache_name(type(student)))
    rest = student(ids[:, 17:], **{cache_name(type(student)): cache}, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
        ("olmo2", {"attention_bias": True}),
        ("gpt2", {"num_attention_heads": 1, "hidden_size": 15}),
        ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False, "rotary_pct": 1.0}),
        ("opt", {"enable_bias": False, "do_layer_norm_before": False}),
        ("phi3", {"partial_rotary_factor": 0.5}),
    ],
    ids=str,
)
def test_options_of_a_family_that_its_attention_depends_on(family, options):
    base = tiny(family, **options)
    assert seam_difference(base) < 2e-6
    for method in ALL_METHODS:
        student = attention.convert(base, small_config(method))
        student(tokens(2, 9)).logits.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_a_head_stays_tied_or_not(family, tied, tmp_path):
    student = attention.convert(tiny(family, tie_word_embeddings=tied), small_config("masks"))
    attention.save(student, tmp_path / "variant", dtype=None)
    loaded, _ = attention.load(tmp_path / "variant")
    for model in (student, loaded):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(tokens(1, 9)).logits, student(tokens(1, 9)).logits)


@pytest.mark.parametrize("config", [{"method": "softmax"}, {"method": "masks", "candidates": ["window(5)"]}], ids=str)
@torch.no_grad()
def test_a_compiled_forward_gives_the_same(config):
    student, ids = attention.convert(tiny("llama"), attention.config_from_dict(config)), tokens(2, 12)
    expected = student(ids, use_cache=False).logits
    compiled = torch.compile(student, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, **TOLERANCE)
    torch.compiler.reset()


def test_a_chat_template_travels_with_the_tokenizer(tmp_path):
    tokenizer, base = tiny_tokenizer(), tiny("llama")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}"
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, tokenizer = attention.load(tmp_path / "base")
    attention.save(attention.convert(base, small_config("masks")), tmp_path / "variant", tokenizer=tokenizer)
    _, loaded = attention.load(tmp_path / "variant")
    talk = [{"role": "user", "content": "the cat"}]
    assert loaded.apply_chat_template(talk, tokenize=False) == "<user> the cat "


@every_family
@every_method
@settings(max_examples=3)
@given(cut=st.integers(1, 39), seed=st.integers(0, 99))
@torch.no_grad()
def test_strictly_causal(family, method, cut, seed):
    student, ids = variant(family, method), tokens(1, 40, seed=seed)
    changed = torch.cat([ids[:, :cut], tokens(1, 40 - cut, seed=seed + 1)], 1)
    assert torch.equal(student(ids).logits[:, :cut], student(changed).logits[:, :cut])


@every_family
@every_method
@settings(max_examples=3)
@given(cuts=st.sets(st.integers(1, 39), max_size=5))
@torch.no_grad()
def test_cached_equals_uncached(family, method, cuts):
    student, ids = variant(family, method), tokens(2, 40)
    expected, cache, logits = student(ids, use_cache=False).logits, None, []
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        output = student(ids[:, start:stop], **{cache_name(type(student)): cache}, use_cache=True)
        cache = getattr(output, cache_name(type(student)))
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **TOLERANCE)


@every_family
@every_method
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(family, method, side):
    student, lengths = variant(family, method), [3, 17, 9]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(17 - length, 17) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens(length, seed=row), 1
    output = student(ids, attention_mask=mask, output_hidden_states=True)
    for row, length in enumerate(lengths):
        alone, real = student(tokens(1, length, seed=row), output_hidden_states=True), mask[row].bool()
        torch.testing.assert_close(output.logits[row, real], alone.logits[0], **TOLERANCE)
        torch.testing.assert_close(output.hidden_states[-1][row, real], alone.hidden_states[-1][0], **TOLERANCE)


@every_family
@every_method
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_left_padded_batches_generate_what_each_row_generates_alone(family, method, options):
    student, lengths = variant(family, method), [3, 11]
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 11 - length :], mask[row, 11 - length :] = tokens(length, seed=row), 1
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    batch = student.generate(ids, attention_mask=mask, **how)
    for row, length in enumerate(lengths):
        alone = student.generate(tokens(1, length, seed=row), **how)
        uncached = student.generate(tokens(1, length, seed=row), **how, use_cache=False)
        assert batch[row, 11:].tolist() == alone[0, length:].tolist() == uncached[0, length:].tolist()


@every_family
@every_method
@torch.no_grad()
def test_embeddings_in_place_of_ids(family, method):
    if method in ("masks", "layers"):
        # masks with induction look at ids; see test_masks.py
        config = attention.MasksConfig(candidates=("window(5)", "first(1)"))
        student = attention.convert(tiny(family), config)
    else:
        student = variant(family, method)
    ids = tokens(2, 15)
    embeds = student.get_input_embeddings()(ids)
    torch.testing.assert_close(student(inputs_embeds=embeds).logits, student(ids).logits, **TOLERANCE)


@every_family
@every_method
def test_every_parameter_has_a_finite_gradient_also_when_recomputed(family, method):
    gradients = []
    for recompute in (False, True):
        student = variant(family, method).train()
        if recompute:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :6] = 0
        student(tokens(2, 20), attention_mask=mask, use_cache=False).logits.square().mean().backward()
        chosen = {id(p) for mechanism in student.mechanisms for p in mechanism.choosing_parameters()}
        for name, parameter in student.named_parameters():
            if id(parameter) not in chosen and not name.endswith(("to_scores", "alpha")):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@every_family
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_near_full(family, method, dtype):
    base = tiny(family)
    config = config_of(method, base.config.num_hidden_layers)
    expected = attention.convert(base, config)(tokens(1, 20)).logits
    half = attention.convert(tiny(family, dtype), config)
    found = half(tokens(1, 20)).logits
    assert found.dtype == dtype
    assert found.isfinite().all()
    if method not in ("nsa", "layers", "masks"):  # their choices of keys may differ
        assert (found.float() - expected).abs().mean() < 0.15 * expected.abs().mean()


@every_family
@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_is_near_full_and_has_gradients(family, method, dtype):
    student, ids = variant(family, method).eval(), tokens(2, 20)
    expected = student(ids, use_cache=False).logits
    with torch.autocast("cpu", dtype):
        found = student(ids, use_cache=False).logits
        found.float().square().mean().backward()
        with torch.no_grad():
            cached = student(ids[:, :15], use_cache=True)
            last = student(ids[:, 15:], past_key_values=cached.past_key_values, use_cache=True).logits
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert all(p.grad is not None for mechanism in student.mechanisms for p in mechanism.parameters() if p.ndim < 2)
    if method not in ("nsa", "layers", "masks"):  # their choices of keys may differ
        assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
        assert (last.float() - expected[:, 15:]).abs().mean() < 0.1 * expected.abs().mean()


@every_family
@every_method
@torch.no_grad()
def test_saved_and_loaded_in_every_way(family, method, tmp_path):
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    base, _ = attention.load(tmp_path / "base")
    student = attention.convert(base, config_of(method, base.config.num_hidden_layers))
    attention.save(student, tmp_path / "variant", dtype=None)
    expected = student(tokens(2, 20)).logits
    ways = [
        attention.load(tmp_path / "variant")[0],
        attention.load(tmp_path / "variant", base=base)[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "variant"),
        pickle.loads(pickle.dumps(student)),
    ]
    for loaded in ways:
        assert torch.equal(loaded(tokens(2, 20)).logits, expected)
        assert type(loaded) is type(student)
    shared = ways[1].get_input_embeddings().weight
    assert shared.data_ptr() == base.get_input_embeddings().weight.data_ptr()


@every_family
@pytest.mark.parametrize("method", ["masks", "performer", "nsa"])
@torch.no_grad()
def test_packed_rows_are_read_as_if_alone(family, method):
    student, lengths = variant(family, method), [7, 4, 9]
    texts = [tokens(1, length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = student(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([student(text).logits for text in texts], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@every_method
@torch.no_grad()
def test_output_attentions_are_the_maps(family, method):
    student = variant(family, method)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    ids = tokens(2, 12)
    found = student(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    alone = attention.attention_maps(student, ids[1:])
    for layer, maps in enumerate(alone):
        torch.testing.assert_close(found[layer][1:], maps, **TOLERANCE)
    for layer, maps in enumerate(attention.attention_maps(student, ids[:1, 5:])):
        torch.testing.assert_close(found[layer][:1, :, 5:, 5:], maps, **TOLERANCE)


@every_method
@torch.no_grad()
def test_rotary_models_have_no_table_to_outgrow(method):
    student = variant("llama", method)
    cache, sizes = student.new_cache(), []
    for _ in range(3):
        logits = student(tokens(1, 200), **{cache_name(type(student)): cache}, use_cache=True).logits
        sizes.append(sum(layer.nbytes() for layer in cache.layers))
    assert logits.isfinite().all()
    if method == "performer":
        assert sizes[0] == sizes[2]


@pytest.mark.long
@pytest.mark.parametrize("config", [{"method": "masks", "candidates": ["window(8)", "first(2)"]}, "performer"], ids=str)
@torch.no_grad()
def test_decoding_to_4096_keeps_the_state_small(config):
    config = small_config(config) if isinstance(config, str) else attention.config_from_dict(config)
    student = attention.convert(tiny("llama"), config)
    cache, sizes = student.new_cache(), set()
    for position in range(4096):
        output = student(tokens(1, 1, seed=position), **{cache_name(type(student)): cache}, use_cache=True)
        if position > 100:
            sizes.add(sum(layer.nbytes() for layer in cache.layers))
    assert output.logits.isfinite().all()
    assert len(sizes) == 1


@torch.no_grad()
def test_a_cache_of_the_callers_own():
    student, ids = variant("gpt2", "nsa"), tokens(1, 12)
    expected = student.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for name in {cache_name(type(student)), "past_key_values"}:
        found = student.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **{name: DynamicCache()})
        assert torch.equal(found, expected)
        empty = student(ids, **{name: DynamicCache()}, use_cache=True)
        assert torch.equal(empty.logits, student(ids).logits)
        state = student.base_model(ids[:, :9], use_cache=True)
        again = student.base_model(ids[:, 9:], **{name: getattr(state, cache_name(type(student)))}, use_cache=True)
        torch.testing.assert_close(again.last_hidden_state, student.base_model(ids).last_hidden_state[:, 9:])
    filled = DynamicCache()
    tiny("gpt2")(ids, **{cache_name(type(student)): filled}, use_cache=True)
    with pytest.raises(ValueError, match="another model"):
        student(ids, **{cache_name(type(student)): filled})
    with pytest.raises(ValueError, match="static"):
        student.generate(ids, max_new_tokens=5, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ValueError, match="generate"):
        student.set_attn_implementation("sdpa")


REFUSED = {
    "sliding": ("mistral", {"sliding_window": 8}, "last 8 tokens alone"),
    "layer types": ("gemma2", {"head_dim": 8, "intermediate_size": 24}, "capped softly|sliding"),
    "encoder": ("bert", {"is_decoder": False}, "encoder"),
    "no attention": ("mamba", {"state_size": 4}, "no attention module|no softmax attention|attention functions"),
    "own code": ("bloom", {"n_head": 2}, "attention functions|differs|fails|no attention module"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, "cross-attention"),
    "sinks": ("gpt_oss", {"head_dim": 8, "intermediate_size": 16, "num_local_experts": 2}, "sinks|sliding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_swapped_is_refused_with_its_reason(case):
    family, options, reason = REFUSED[case]
    with pytest.raises(attention.UnsupportedModelError, match=reason):
        attention.convert(tiny(family, **options), small_config("masks"))


@pytest.mark.parametrize("family", ["gemma", "cohere", "granite", "starcoder2"])
def test_other_families_convert_once_the_seam_is_proven(family):
    heads = {"num_key_value_heads": 2, "head_dim": 8} if family == "gemma" else {}
    base = tiny(family, intermediate_size=24, **heads)
    prove(base)
    student = attention.convert(base, small_config("nsa"))
    assert student(tokens(1, 9)).logits.isfinite().all()


def test_models_are_built_in_two_threads_at_once():
    """Building switches initialisation off for the whole process; it must be on again afterwards."""
    base = tiny("gpt2")

    def build():
        for _ in range(10):
            attention.convert(base, small_config("masks"))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    layer = torch.empty(8, 8)
    torch.nn.init.ones_(layer)
    assert (layer == 1).all()
    assert torch.nn.Linear(4, 4).weight.abs().sum() > 0


def test_a_base_that_has_read_far_gives_a_variant_that_reads_short_texts():
    """Rotation by dynamic NTK has grown in the base, and shrinks in both."""
    base = tiny("llama", max_position_embeddings=32, rope_parameters=SCALED["dynamic"])
    ids = torch.randint(3, 61, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = base(ids[:, :20]).logits
        base(ids)
        student = attention.convert(base, attention.SoftmaxConfig())
        torch.testing.assert_close(student(ids[:, :20]).logits, expected, atol=1e-5, rtol=1e-5)


def test_every_mistake_of_a_mix_is_listed():
    choices = [{"layers": [0, 0, 9], "method": "softmax"}, {"layers": [0], "method": "masks"}]
    with pytest.raises(attention.ConfigError) as caught:
        attention.convert(tiny("llama"), attention.config_from_dict({"method": "layers", "layers": choices}))
    for words in ("[0] are named more than once", "[1] are not named", "[9] do not exist"):
        assert words in str(caught.value)
