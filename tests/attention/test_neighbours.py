"""Variants in the hands of other libraries: adapters by peft, bodies by `AutoModel`, embeddings, quantizers."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import attention
from attention.families import TESTED
from attention.variant import CACHE_NAMES

from .checkpoints import make_variant, save_base
from .families import tiny
from .models import ALL_METHODS, small_config, tiny_gpt2

every_method = pytest.mark.parametrize("method", ALL_METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`")
IDS = torch.randint(1, 60, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    """The folder of a masks variant whose last layer looks at tokens, beside its base."""
    base = save_base(tmp_path / "base", torch.float32)
    attention.save(make_variant(base), tmp_path / "variant", dtype=None)
    return tmp_path / "variant"


def lora(**options) -> LoraConfig:
    """With random numbers in both of its matrices, so that it changes what the model gives from the start."""
    return LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)


@torch.no_grad()
def one_by_one(model, start: int = 9) -> torch.Tensor:
    output = model(IDS[:, :start], use_cache=True)
    name = next(name for name in CACHE_NAMES if name in output)
    logits = [output.logits]
    for place in range(start, IDS.shape[1]):
        output = model(IDS[:, place : place + 1], use_cache=True, **{name: output[name]})
        logits.append(output.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def logits(model, ids: torch.Tensor | None = IDS, **inputs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


# Adapters


@pytest.mark.parametrize("family", [family for family in TESTED if family in LORA])
def test_by_default_an_adapter_is_put_where_peft_puts_it_in_the_base(family):
    base = tiny(family)
    variant = attention.convert(base, small_config("nsa"))
    expected, found = (
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).base_model.targeted_module_names
        for model in (base, variant)
    )
    assert found == expected
    assert found


@every_method
def test_a_model_with_an_adapter_is_the_same_cached_and_merged(method):
    variant = attention.convert(tiny_gpt2(), small_config(method))
    before = logits(variant)
    model = get_peft_model(variant, lora()).eval()
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(one_by_one(model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_an_adapter_finds_the_variant_that_it_was_fitted_to(saved, tmp_path):
    model = get_peft_model(attention.load(saved)[0], lora()).eval()
    model.save_pretrained(tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(saved)
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(logits(loader.from_pretrained(tmp_path / "adapter").eval()), logits(model))


def test_what_was_just_converted_does_not_go_by_the_name_of_its_base(saved):
    base = attention.load(saved.parent / "base")[0]
    assert base.name_or_path == base.config.name_or_path == str(saved.parent / "base")
    variant = attention.convert(base, small_config("nsa"))
    assert variant.name_or_path == variant.config.name_or_path == ""
    assert variant.config.base["id"] == str(saved.parent / "base")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("masks", {"target_parameters": ["mechanism.alpha"]}),
        ("nsa", {"target_parameters": ["mechanism.gate_weight"]}),
        ("nsa", {"target_parameters": ["compression.to_weights"]}),
        ("performer", {"modules_to_save": ["mechanism"], "target_modules": ["c_attn"]}),
        ("nsa", {"modules_to_save": ["mechanism"], "target_modules": ["c_attn"]}),
    ],
)
def test_adapters_on_a_mechanism_work_with_its_state(method, options):
    variant = attention.convert(tiny_gpt2(), small_config(method))
    before = logits(variant)
    model = get_peft_model(variant, lora(**{"target_modules": [], **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "mechanism" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(one_by_one(model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


# Others that load models


@every_method
def test_auto_model_gives_the_body_with_its_mechanisms(method, tmp_path):
    variant = attention.convert(tiny_gpt2(), small_config(method))
    attention.save(variant, tmp_path / "variant", dtype=None)
    body, report = AutoModel.from_pretrained(tmp_path / "variant", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(body(IDS).last_hidden_state, variant.base_model(IDS).last_hidden_state, rtol=0, atol=0)
    assert type(AutoModel.from_config(variant.config)) is type(body)


def test_a_config_names_no_code_until_it_is_pushed(saved):
    variant = attention.load(saved)[0]
    assert variant.config.auto_map == {}
    assert "auto_map" not in variant.config.to_dict()
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


# Embeddings


def test_ids_beside_embeddings_are_for_the_mechanism(saved):
    variant = attention.load(saved)[0]
    embeds = variant.get_input_embeddings()(IDS).detach()
    torch.testing.assert_close(logits(variant, inputs_embeds=embeds), logits(variant), rtol=0, atol=0)
    assert (logits(variant, inputs_embeds=2 * embeds) - logits(variant)).abs().max() > 1e-2
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(
        variant.generate(IDS, inputs_embeds=embeds, **options)[:, -6:], variant.generate(IDS, **options)[:, -6:]
    )


def test_embeddings_of_other_tokens_or_alone_are_refused_where_ids_are_needed(saved):
    variant = attention.load(saved)[0]
    embeds = variant.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="of other tokens than inputs_embeds"):
        logits(variant, IDS[:, 1:], inputs_embeds=embeds)
    with pytest.raises(ValueError, match="give their input_ids, too"):
        logits(variant, None, inputs_embeds=embeds)


# Quantizers


@every_method
def test_conv1d_becomes_linear_and_computes_the_same(method):
    variant = attention.convert(base := tiny_gpt2(), small_config(method), share=True)
    before = logits(variant)
    model = attention.conv1d_to_linear(variant)
    assert model is variant
    assert sum(isinstance(layer, nn.Linear) for layer in model.transformer.modules()) == 4 * 2
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one(model), before, rtol=0, atol=1e-5)
    assert base.transformer.h[0].attn.c_attn.weight.shape == (16, 48)


def quantized(model):
    torch.ao.quantization.quantize_dynamic(attention.conv1d_to_linear(model), {nn.Linear}, inplace=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (attention.conv1d_to_linear, "c_attn is a Linear, where a GPT2LMHeadModelVariant has a Conv1D"),
        (quantized, "where a GPT2LMHeadModelVariant has a Conv1D"),
        (lambda model: get_peft_model(model, lora()), "Conv1D"),
        (lambda model: get_peft_model(model, lora(target_modules=["c_fc"], modules_to_save=["mechanism"])), "and"),
    ],
)
def test_weights_that_are_no_variants_any_more_are_neither_saved_nor_converted(change, named, saved):
    variant = attention.load(saved)[0]
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    change(variant)
    for write in (attention.save, lambda model, folder: model.save_pretrained(folder)):
        with pytest.raises(attention.CheckpointError, match="Save before quantizing") as refused:
            write(variant, saved)
        assert named in str(refused.value)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    with pytest.raises(attention.UnsupportedModelError, match="convert it before quantizing"):
        attention.convert(variant, small_config("nsa"))


def test_a_base_with_other_layers_is_neither_converted_nor_shared(saved):
    base = attention.conv1d_to_linear(attention.load(saved.parent / "base")[0])
    with pytest.raises(attention.UnsupportedModelError, match="has a Conv1D"):
        attention.convert(base, small_config("nsa"))
    with pytest.raises(attention.CheckpointError, match="has a Conv1D"):
        attention.load(saved, base=base)


def test_a_base_whose_config_says_quantized_is_refused(saved):
    base = copy.deepcopy(attention.load(saved.parent / "base")[0])
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(attention.UnsupportedModelError, match="its weights are quantized; load it without"):
        attention.convert(base, small_config("nsa"))
