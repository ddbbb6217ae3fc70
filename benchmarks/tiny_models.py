"""Tiny random models of any family of transformers, with every kind of layer that the family has.

A family's own default config is shrunk by what its options are called, which are nearly the same words everywhere; what
that does not reach is in `EXTRA`.
"""

from __future__ import annotations

import inspect
import re
import sys
from itertools import product
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WIDTH, HEADS, HEAD, VOCABULARY, POSITIONS = 32, 4, 8, 97, 256
WINDOW = 8  # tokens in a window, a block or a chunk: fewer than a text has
SCALE = 0.2  # of the weights; the usual 0.02 would leave all tokens nearly alike
INDEX_HEADS = 16  # scores of a few heads are often exactly 0 for many keys, and ties say nothing about a model

AT_MOST: tuple[tuple[str, int], ...] = (  # the first pattern that matches the whole name of an option
    (r"(output_|unpadded_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(n|max)_position(s|_embeddings)|n_ctx|context_length", POSITIONS),
    (r"hidden_size|d_model|n_embd|embedding_(dim|size)|emb_dim|lru_width|dim_model|ple_embed_dim", WIDTH),
    (r"(swa_)?num_attention_heads|n_heads?|(decoder_)?attention_heads|num_heads", HEADS),
    (r"(swa_|global_)?num_(global_)?(key_value|kv)_heads|num_query_groups", 2),
    (r"(swa_|global_)?(v_|qk_rope_|qk_nope_)?head_(dim|size)|attention_head_(dim|size)|d_head", HEAD),
    (r"qk_head_dim|index_head_dim", 2 * HEAD),
    (r"rotary_dim", HEAD // 2),
    (r"\w+_lora_rank|\w+_rank|router_hidden_size|hc_lowrank|rel_extent|d_rel", 16),
    (r"(\w+_)?intermediate_size|(\w+_)?ffn_(hidden_size|dim)|d_inner|n_inner|feed_forward_size", 48),
    (r"num_(local_|routed_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?", 2),
    (r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|(mamba_)?n_?groups|mamba_n_groups", 1),
    (r"n_mamba_heads|mamba_n(um)?_heads", 8),
    (r"mamba_(d_head|head_?dim)", HEAD),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(mamba_d_|ssm_)?state(_size)?|mamba_dt_rank|time_step_rank", 16),
    (r"(mamba_)?chunk_size|(index_)?block_size|attention_chunk_size|(lsh|local)_attn_chunk_length", WINDOW),
    (r"linear_num_(key_)?heads|index_topk_blocks", 2),
    (r"index_n_heads", INDEX_HEADS),
    (r"linear_num_value_heads", 4),
    (r"linear_(key_|value_)?head_dim", HEAD),
    (r"(attention_|sliding_|keep_)*window(_size)?|index_topk|local_attention", WINDOW),
    (r"first_k_dense_replace|num_kv_shared_layers|num_nextn_predict_layers|max_window_layers", 0),
    (r"pad_token_id", 0),
    (r"\w+_token_id", 1),
)
EXACTLY: dict[str, Any] = {
    "sliding_window": WINDOW,
    "initializer_range": SCALE,
    "init_std": SCALE,
    "use_sliding_window": True,
    "is_decoder": True,
    "per_layer_config": None,
}
PLAIN_OPTIONS = EXACTLY | {"sliding_window": None, "use_sliding_window": False}
FULL = ("full_attention",)
LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|num_blocks")
TYPES = re.compile(r"layer_types|layers_block_type|block_types|attn_layers")
UNUSUAL = re.compile(
    r".*(window|mamba|ssm_|state_size|conv_|lru_|lsh_|index_topk|attention_chunk|block_size|local_attention).*"
    r"|linear_.*head.*|gate_soft_cap|rescale_every"
)
"""Names of options of what is not plain softmax attention over all earlier tokens."""
PLAIN = {"full_attention", "attention", "mlp", "moe", "dense", "sparse"}

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
EXTRA: dict[str, dict[str, Any]] = {  # by model_type; a family whose layers have no list of types says where they are
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 2 * HEAD},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "nemotron": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD},
    "qwen4_exp_text": {
        "indexer_n_heads": INDEX_HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 2 * HEAD,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
}


def families() -> dict[str, type[PreTrainedModel]]:
    """The causal language models of the installed transformers, a class under the name of its own family.

    Without those that need pictures, sound, an encoder, or the states of the model that they assist.
    """
    found: dict[type[PreTrainedModel], str] = {}
    for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        model = getattr(transformers, name)
        if not name.endswith(("ForConditionalGeneration", "AssistantForCausalLM")) and not encodes(model):
            own = CONFIG_MAPPING[family] is model.config_class
            found[model] = family if own else found.get(model, family)
    return {family: model for model, family in found.items()}


def encodes(model: type[PreTrainedModel]) -> bool:
    """Whether a class is the decoder of a model that has an encoder, too."""
    return "encoder_layers" in inspect.signature(model.config_class).parameters


def default_config(model: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that a family's text model has by default."""
    return model.config_class().get_text_config(decoder=True)


def unusual(model: type[PreTrainedModel]) -> list[str]:
    """What a family has besides softmax attention over all earlier tokens: layer types, else names of options."""
    config = default_config(model)
    kinds = [kind for kind in layer_types(model, config) if kind not in PLAIN]
    return kinds or sorted(name for name in config.to_dict() if UNUSUAL.fullmatch(name))


def layer_types(model: type[PreTrainedModel], config: PreTrainedConfig) -> list[str]:
    """The kinds of layer that a family has: its default config's, or, where that has one, its code's."""
    default = [kind for name, value in config.to_dict().items() if TYPES.fullmatch(name) for kind in value or ()]
    default = list(dict.fromkeys(default))
    if len(default) > 1 or not hasattr(config, "layer_types"):
        return default
    code = inspect.getsource(sys.modules[model.__module__]) + inspect.getsource(sys.modules[type(config).__module__])
    return list(dict.fromkeys([*default, *(kind for kind in ALLOWED_ATTN_LAYER_TYPES if f'"{kind}"' in code)]))


def tiny_model(model: type[PreTrainedModel], seed: int = 0, plain: bool = False) -> PreTrainedModel:
    """A random model of a family, in evaluation mode, with each of its kinds of layer at least twice.

    Args:
        plain: instead with softmax attention over all earlier tokens in every layer, where the family's options allow.

    Raises:
        Exception: whatever the family's own code raises for the first of the configs that were tried.
    """
    default = default_config(model)
    problem: Exception | None = None
    own = dict.fromkeys((tuple(layer_types(model, default)), ()))
    choices = []
    if plain:
        choices += [(kinds, grouped, PLAIN_OPTIONS) for kinds, grouped in product([FULL, ()], (True, False))]
        choices += [(FULL, grouped, EXACTLY) for grouped in (True, False)]
    choices += [(kinds, grouped, EXACTLY) for kinds, grouped in product(own, (True, False))]
    for kinds, grouped, exactly in choices:
        try:
            torch.manual_seed(seed)
            made = model(type(default)(**shrunk(default, list(kinds), grouped, exactly))).eval()
            made.set_experts_implementation("eager")  # the fast one has no float64
            with torch.no_grad():
                made(torch.arange(5, 25)[None])
        except Exception as error:  # the next config may fit
            problem = problem or error
        else:
            return made
    raise problem or ValueError(f"{model.__name__} has no config")


def shrunk(
    config: PreTrainedConfig, kinds: list[str], grouped: bool, exactly: dict[str, Any] = EXACTLY
) -> dict[str, Any]:
    """Options for a small config of the same family.

    Args:
        config: the family's default.
        kinds: of layer, each to come twice or more; none for those of the default's first layers.
        grouped: whether heads share keys where the family lets them.
        exactly: options with values that are not only a most.
    """
    count = max(4, 2 * len(kinds))
    options: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if LAYERS.fullmatch(name):
            options[name] = count
        elif TYPES.fullmatch(name) and (kinds or value):
            options[name] = (kinds * count or value)[:count]
        elif name in exactly:
            options[name] = exactly[name]
        elif (most := _at_most(name)) is not None and isinstance(value, int | list) and not isinstance(value, bool):
            options[name] = min(value, most) if isinstance(value, int) else most
    if not grouped and "num_key_value_heads" in options:
        options["num_key_value_heads"] = HEADS
    return options | EXTRA.get(config.model_type, {})


def _at_most(name: str) -> int | None:
    return next((most for pattern, most in AT_MOST if re.fullmatch(pattern, name)), None)
