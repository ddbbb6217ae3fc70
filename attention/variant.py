"""The seam between a mechanism and any causal language model of transformers, without code of the model's family.

The mechanism is a child, `mechanism`, of each attention module. The attention module computes queries, keys and values
as always, and then calls the attention function that its config names: `mix`, which calls the mechanism. Hooks before
the attention module hand over the layer's input and state; hooks around the body lay out padded and packed rows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import cache as memoised
from inspect import signature
from math import isclose
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .errors import BrokenCheckpointError, NotAModelError
from .examine import refuse_numbers, refusing
from .hub import HubOptions
from .mechanism import LayerShape, Mechanism, MechanismConfig, is_mechanism, traced
from .padding import Rows
from .pushing import push_model
from .registry import config_from_dict
from .saving import SHARD_SIZE, save_model
from .state import State, StateCache
from .stored import VARIANT, VARIANTS, Stored, building, is_tied, matrix_names, open_stored, whole_weights

ATTENTION = "mechanism"  # the name of `mix` among the attention functions of transformers
SPARE_ROWS = 2  # of a table of positions, for padding
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")  # the last ones before transformers 5.24


class Call(NamedTuple):
    """What one forward pass of the body tells the mechanisms.

    Attributes:
        rows: how padded or packed rows are laid out; None: as given.
        tokens: (B, T) ids as laid out; None if the model was given embeddings alone.
        maps: whether the attention's dense matrices are wanted.
    """

    rows: Rows | None
    tokens: Tensor | None
    maps: bool


ALONE = Call(None, None, False)  # for an attention module that is called without its body


class VariantConfig(PreTrainedConfig):
    """The config of a variant: that of the base's family, with the attention's and the base's beside.

    `VariantConfig.from_dict` and `from_pretrained` give one of the subclasses that `config_class` makes for a family.

    Attributes:
        family: the base's `model_type`.
        attention: `MechanismConfig.to_dict`.
        base: {"id", "revision", "sha256"} of the base's weights; the id is a folder or a name on the Hub. None if
            the variant's own files hold all weights.
        versions: of the libraries that wrote the variant.
    """

    model_type = VARIANT
    auto_map: ClassVar[dict[str, str]] = {}  # of a pushed variant; others ask every config of an unknown class for it

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, as the config of the family that the content names.

        Raises:
            attention.errors.NotAModelError: if the installed transformers has no such family.
        """
        if "family" in vars(cls):  # a family's own already
            return super().from_dict(config_dict, **kwargs)
        content = dict(config_dict)
        content["family"] = family = VARIANTS[content.pop("model_type", VARIANT)] or content.get("family")
        return config_class(str(family)).from_dict(content, **kwargs)

    def mechanisms(self) -> list[MechanismConfig]:
        """The attention's config for each layer."""
        return config_from_dict(self.attention).by_layer(self.num_hidden_layers)


class GPT2VariantConfig(VariantConfig):
    """What the first variants, all of them of GPT-2, call their config."""

    model_type = "gpt2-variant"


@memoised
def config_class(family: str) -> type[VariantConfig]:
    """The variant's config for a family, by its `model_type`; its model is known to `AutoModelForCausalLM`, too.

    Raises:
        attention.errors.NotAModelError: if the installed transformers has no causal language model of that type.
    """
    models = causal_models(family)
    if CONFIG_MAPPING[family].model_type != family:  # another name for a family, as gpt-sw3 is for gpt2
        return config_class(CONFIG_MAPPING[family].model_type)
    fields = {"family": str | None, "attention": dict | None, "base": dict | None, "versions": dict | None}
    content = {
        "__module__": __name__,
        "__doc__": VariantConfig.__doc__,
        "__annotations__": fields,
        **dict.fromkeys(fields),
        "family": family,
        "model_type": VARIANT,
    }
    base = CONFIG_MAPPING[family]
    created = strict(type(f"{base.__name__}Variant", (VariantConfig, base), content))
    model = _model_class(models[0], created)
    AutoModelForCausalLM.register(created, model)
    AutoModel.register(created, type(f"{model.__name__}Body", (_Body,), {"config_class": created, "model": model}))
    return created


def causal_models(family: str) -> tuple[type[PreTrainedModel], ...]:
    """The classes of transformers that are causal language models of a family, the usual one first.

    Raises:
        attention.errors.NotAModelError: if there is none.
    """
    try:
        models = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    except KeyError as error:
        raise NotAModelError(f"the installed transformers has no causal language model {family!r}") from error
    return models if isinstance(models, tuple) else (models,)


class _Body:
    """What `AutoModel` asks for a variant's body: the part below the logits, a module of the base's own class."""

    config_class: ClassVar[type[VariantConfig]]
    model: ClassVar[type[Variant]]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = cls.model.from_pretrained(*args, **kwargs)
        return (loaded[0].base_model, *loaded[1:]) if isinstance(loaded, tuple) else loaded.base_model

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return cls.model._from_config(*args, **kwargs).base_model


@memoised
def _model_class(base: type[PreTrainedModel], config: type[VariantConfig]) -> type[Variant]:
    content = {"__module__": __name__, "__doc__": Variant.__doc__, "config_class": config, "family_class": base}
    return type(f"{base.__name__}Variant", (Variant, base), content)


def model_class(base: type[PreTrainedModel]) -> type[Variant]:
    """The variant's class for a model's class; a variant's own for a variant's."""
    if issubclass(base, Variant):
        return base
    return _model_class(base, config_class(base.config_class.model_type))


def __getattr__(name: str) -> Any:
    """Classes of families by name, `LlamaForCausalLMVariant` for one, so that pickled models find theirs."""
    wanted = name.removesuffix("Variant")
    for family, model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if wanted != name else ():
        if wanted in ((model,) if isinstance(model, str) else model):
            return model_class(getattr(transformers, wanted))
        if family in CONFIG_MAPPING_NAMES and CONFIG_MAPPING_NAMES[family] == wanted:
            return config_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Variant(PreTrainedModel, GenerationMixin):
    """A causal language model whose attention was swapped; works with `generate`.

    Attributes:
        family_class: the base's class.
        new_parameters: names of the parameters and buffers that the base does not have.
    """

    family_class: ClassVar[type[PreTrainedModel]]
    config: Any

    def __init__(self, config: VariantConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        attach(self)
        self.loss_type = "ForCausalLM"  # transformers finds it by the class's name, which it does not know

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The mechanism of every layer, first layer first."""
        return mechanisms_of(self)

    @property
    def new_parameters(self) -> tuple[str, ...]:
        return tuple(name for name in self.state_dict() if is_mechanism(name))

    def new_cache(self) -> Cache:
        """An empty cache: one decode state a layer."""
        return new_cache(self)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuses another attention than the mechanisms'.

        Raises:
            ValueError: for anything but what the variant has.
        """
        if attn_implementation != ATTENTION:
            raise ValueError(
                f"a variant's attention is its own mechanism; it cannot be {attn_implementation!r}, also not for "
                "continuous batching (generate_batch): use generate"
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with the base's weights put under the variant's own.

        Raises:
            attention.errors.CheckpointError: if the variant is damaged or does not fit together, or its base is missing
                or another.
            ImportError, ValueError: for options that cannot be had.
        """
        name = pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        with refusing(name):
            stored, arguments = _arguments(name, config, kwargs)
        own = cls if "family_class" in vars(cls) else model_class(causal_models(arguments["config"].family)[0])
        with building, refusing(name, but=(ImportError, ValueError)):
            arguments["output_loading_info"] = True
            model, report = super(Variant, own).from_pretrained(None, *model_args, **arguments)
        if missing := sorted(report["missing_keys"]):  # to which transformers gives random values
            raise BrokenCheckpointError(stored.folder, [f"the tensor {each} is missing" for each in missing])
        settle(model)
        model.config.name_or_path = model.name_or_path = str(name)
        if kwargs.get("generation_config") is None:
            read_generation_config(model, stored.folder)
        if place := adapter.pop("_adapter_model_path", None):  # the Auto classes were given the folder of an adapter
            model.load_adapter(place, adapter_kwargs=adapter)
        return (model, report) if kwargs.get("output_loading_info") else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Config and weights as `attention.save` writes them, in the model's dtype; with adapters, these alone.

        Raises:
            ValueError: for `push_to_hub=True`; the method of that name does it.
            attention.errors.CheckpointError: if the weights are not those of such a model any more, as after
                quantizing it.
        """
        if push_to_hub:
            raise ValueError("save_pretrained only saves; use model.push_to_hub(repo) or attention.push(folder, repo)")
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if is_main_process:
            save_model(self, save_directory, state_dict, max_shard_size or SHARD_SIZE)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Pushes config, weights and code as `attention.push` does; returns the commit's address.

        Raises:
            TypeError: for options that `attention.push` does not have.
        """
        if kwargs:
            raise TypeError(f"push_to_hub of a variant has no options {sorted(kwargs)}; see attention.push")
        return push_model(self, repo_id, commit_message, bool(private), token, revision)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; ids given beside embeddings stay, for mechanisms that look at them."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and input_ids.shape == embeds.shape[:2]:
            inputs["input_ids"] = input_ids
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} is for keys and values; a variant has decode states of its own: "
                "leave the option out"
            )
        given = take_cache(model_kwargs)
        if given is None and not generation_config.use_cache:
            return
        cache = own_cache(self, given)
        if generation_config.is_assistant:  # whose drafts are taken back
            cache.activate_past_recording()
        model_kwargs[cache_name(type(self))] = cache


def is_variant(model: object) -> bool:
    """Whether a model is a variant."""
    return isinstance(model, Variant)


# Finding what to attach to.


@memoised
def cache_name(module: type[nn.Module]) -> str:
    """How a module's `forward` calls its cache; "" if it takes none."""
    known = signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in known), "")


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call of a module with all of its arguments by name.

    Raises:
        ValueError: for more arguments than it has.
    """
    return dict(zip(_argument_names(type(module))[: len(args)], args, strict=True)) | kwargs


@memoised
def _argument_names(module: type[nn.Module]) -> tuple[str, ...]:
    return tuple(signature(module.forward).parameters)[1:]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules of a model by name, first layer first; those of a variant have a `mechanism`."""
    found = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
        and not getattr(module, "is_cross_attention", False)
        and not is_mechanism(name)
    }
    return dict(sorted(found.items(), key=lambda item: item[1].layer_idx))


def mechanisms_of(model: nn.Module) -> list[Mechanism]:
    """The mechanisms of a variant, or of its body, first layer first; none for other models."""
    found = {mechanism.layer.layer_idx: mechanism for mechanism in _mechanisms_in(model)}
    return [found[layer_idx] for layer_idx in sorted(found)]


def _mechanisms_in(module: nn.Module) -> Iterator[Mechanism]:
    """Those that are no part of another one; an adapter may wrap one, and puts its copy of one behind the original."""
    if isinstance(module, Mechanism):
        yield module
    else:
        for child in module.children():
            yield from _mechanisms_in(child)


def settle(model: nn.Module) -> None:
    """Has every mechanism read what it must know of its weights, unless these are on the meta device."""
    for mechanism in mechanisms_of(model):
        if not any(tensor.is_meta for tensor in (*mechanism.parameters(), *mechanism.buffers())):
            mechanism.settle()


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads embeddings through its layers: the innermost model around its attention."""
    place = next(iter(attention_modules(model))).split(".")  # "model.layers.0.self_attn" for one
    around = [model.get_submodule(".".join(place[:depth])) for depth in range(len(place))]
    return [part for part in around if isinstance(part, PreTrainedModel)][-1]


def layer_shape(module: nn.Module, config: Any, layer_idx: int) -> LayerShape:
    """What a mechanism must know of an attention module.

    Args:
        module: of `attention_modules`.
        config: of the model; its names are those that transformers gives to all families.
        layer_idx: from 0.
    """
    heads = config.num_attention_heads
    width = next((getattr(module, name) for name in ("head_dim", "head_size") if hasattr(module, name)), None)
    dropouts = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    return LayerShape(
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=width or getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        max_length=config.max_position_embeddings,
        layer_idx=layer_idx,
        dropout=next((float(getattr(config, name)) for name in dropouts if hasattr(config, name)), 0.0),
    )


def attach(model: Variant) -> None:
    """Puts mechanisms and hooks on a model that was just built from a `VariantConfig`."""
    modules = attention_modules(model)
    for module, config in zip(modules.values(), model.config.mechanisms(), strict=True):
        with torch.device("cpu"):  # on the meta device a mechanism could not compute its starting values
            module.mechanism = config.build(layer_shape(module, model.config, module.layer_idx))
        for part in module.mechanism.modules():
            part._is_hf_initialized = True  # a mechanism starts itself; transformers must not start it again
        module.register_forward_pre_hook(_enter_attention, with_kwargs=True)
    body = body_of(model)
    body.variant_limit = position_limit(body)
    body.register_forward_pre_hook(_enter_body, with_kwargs=True)
    body.register_forward_hook(_leave_body, with_kwargs=True)
    fuse_activations(model)
    model.config._attn_implementation = ATTENTION


def fuse_activations(model: nn.Module) -> None:
    """Has GPT-2's GELU, which is nine operations, computed by one that is equal up to rounding."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


# What runs in a forward pass. Hooks refer to nothing but their arguments, so that copies of a model are on their own.


def mix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    variant_call: Call = ALONE,
    variant_input: Tensor | None = None,
    variant_state: State | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of variants: what transformers calls with the projections of an attention module.

    Args:
        query: (B, H, T, D).
        key, value: (B, H_kv, T, D), of the new tokens alone.
        attention_mask: not read; causality is the mechanism's own.
        scaling: of the scores; mechanisms scale by D^(−1/2), and whatever else is asked for goes into the queries.
        variant_call, variant_input, variant_state: what the hooks hand over.

    Returns:
        (B, T, H, D), and the dense map (B, H, T, T) where it is wanted and the tokens are the first ones.
    """
    mechanism, dtype = module.mechanism, value.dtype
    if scaling is not None and not isclose(factor := scaling * query.shape[-1] ** 0.5, 1.0):
        query = query * factor
    if module.__dict__.get("reorder_and_upcast_attn") and mechanism.takes_float32:  # of GPT-2
        query, key, value = query.float(), key.float(), value.float()
    else:  # under autocast rotation leaves queries and keys in float32 beside values in bfloat16
        query, key = query.to(dtype), key.to(dtype)
    rows, tokens, maps = variant_call
    first = variant_state is None or variant_state.seen == 0
    lengths = None if rows is None else rows.lengths
    if not (variant_state is None or traced() or torch.is_inference_mode_enabled()):
        variant_state.leave_inference_mode()
    mixed = mechanism(query, key, value, variant_input, variant_state, lengths, tokens).to(dtype)
    weights = mechanism.attention_map(query, key, variant_input, tokens) if maps and first else None
    mixed = mixed.transpose(1, 2).contiguous()  # some families take a view of it
    if traced():  # what a graph's later passes make of the mechanism may lie otherwise in memory, and views would fail
        mixed = mixed.clone(memory_format=torch.contiguous_format)
    return mixed, weights


def _enter_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hands the layer's input and state to `mix`, through the options that attention modules pass on."""
    cache = kwargs.get(cache_name(type(module)))
    kwargs["variant_input"] = args[0] if args else kwargs["hidden_states"]
    kwargs["variant_state"] = None if cache is None else cache.layers[module.layer_idx]
    return args, kwargs


def _enter_body(body: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Lays rows out, sets positions, and gives the mechanisms what they need; see `Call`.

    Raises:
        ValueError: for positions past the last of a model that has a table of them, padding between real tokens,
            packed rows with a cache, and a cache that another model filled.
    """
    kwargs = named_arguments(body, args, kwargs)
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if ids is None and embeds is None:
        raise ValueError("give input_ids or inputs_embeds, or both of the same tokens")
    if ids is not None and embeds is not None and ids.shape != embeds.shape[:2]:
        raise ValueError(f"input_ids {tuple(ids.shape)} are of other tokens than inputs_embeds {tuple(embeds.shape)}")
    given = ids if ids is not None else embeds
    cache = take_cache(kwargs)
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = body.config.use_cache and not body.training
    if use_cache or cache is not None:
        cache = own_cache(body, cache)
    rows = Rows.from_mask(kwargs.get("attention_mask"), given.shape[1])
    positions = kwargs.get("position_ids")
    if rows is None and positions is not None and given.shape[1] > 1 and not torch.compiler.is_compiling():
        rows = Rows.from_positions(positions.expand(given.shape[:2]))
        if rows is not None and cache is not None:
            if cache.get_seq_length():
                raise ValueError("position_ids jump; several texts in a row can only be read without a cache")
            cache = None
            use_cache = False
    if rows is not None and cache is not None:
        _fix_columns(cache, kwargs["attention_mask"], given.shape[1])
    kwargs["position_ids"] = position_ids = positions_of(body, positions, cache, rows, given)
    if rows is not None:
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = rows.align(kwargs[name])
        kwargs["return_dict"] = True
    kwargs["attention_mask"] = position_ids.new_empty(0, 0, 0, 0)  # of four dimensions, so that none is built
    kwargs["use_cache"] = use_cache
    kwargs[cache_name(type(body))] = cache
    maps = bool(kwargs.get("output_attentions", body.config.output_attentions))
    kwargs["variant_call"] = Call(rows, kwargs.get("input_ids"), maps)
    if embeds is not None:
        kwargs["input_ids"] = None  # the embeddings are read; the ids are for methods that look at them
    return (), kwargs


def _fix_columns(cache: Cache, attention_mask: Tensor, length: int) -> None:
    """Bars `crop` from new columns, `length` of them and some padding, unless they are padding and then tokens."""
    seen = cache.get_seq_length()
    if seen or not attention_mask[:, -1].all():
        cache.fixed = seen + length


def _leave_body(body: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Puts what comes out in the order of the batch."""
    rows = kwargs["variant_call"].rows
    if rows is None:
        return output
    output.last_hidden_state = rows.restore(output.last_hidden_state)
    if output.hidden_states is not None:
        output.hidden_states = tuple(rows.restore(hidden) for hidden in output.hidden_states)
    if output.attentions is not None:
        output.attentions = tuple(None if maps is None else rows.restore_maps(maps) for maps in output.attentions)
    return output


def positions_of(
    body: PreTrainedModel, given: Tensor | None, cache: Cache | None, rows: Rows | None, tokens: Tensor
) -> Tensor:
    """(B or 1, T) positions, laid out like the tokens; checked only where a table might be too short for them."""
    state = None if cache is None else cache.layers[0]
    seen, length = 0 if state is None else state.seen, tokens.shape[1]
    if given is None:
        start = seen if state is None or state.lengths is None else state.lengths[:, None]
        positions = torch.arange(length, device=tokens.device)[None] + start
    else:
        positions = given if rows is None else rows.align(given)
    limit = body.variant_limit
    if limit is None or (given is None and seen + length <= limit):
        return positions
    real = positions if rows is None else rows.real(positions, 0)
    if not torch.compiler.is_compiling() and (last := int(real.max())) >= limit:
        raise ValueError(
            f"position {last} is past the last one, {limit - 1}: the model holds {limit} tokens "
            "(max_position_embeddings); shorten the prompt or generate fewer tokens"
        )
    return real


def position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """A model's table (P, E) of learned positions, None for a model without one.

    It is what has a row for each position that the config names, and, in some families, up to `SPARE_ROWS` before them.
    """
    words, last = model.get_input_embeddings(), getattr(model.config, "max_position_embeddings", None)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    return next((table for table in tables if last and 0 <= table.num_embeddings - last <= SPARE_ROWS), None)


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions a model's table of learned ones has; None for a model without such a table."""
    return None if position_table(model) is None else model.config.max_position_embeddings


def new_cache(body: nn.Module) -> StateCache:
    """An empty cache for a variant or its body: one decode state a layer."""
    return StateCache(layers=[mechanism.new_state() for mechanism in mechanisms_of(body)])


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Takes the cache out of a call's arguments, whatever it is called there."""
    given = [kwargs.pop(name) for name in CACHE_NAMES if name in kwargs]
    return next((cache for cache in given if cache is not None), None)


def own_cache(body: nn.Module, cache: Any) -> Cache:
    """The cache given if it is of decode states, else a new one.

    Raises:
        ValueError: if another model has filled it.
    """
    if cache is not None and cache.layers and all(isinstance(layer, State) for layer in cache.layers):
        return cache
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"the {type(cache).__name__} given holds keys and values of another model; a variant continues from the "
            "cache that it gave itself, or from none"
        )
    return new_cache(body)


# Reading from files.


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the generation defaults that its folder holds."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def _arguments(
    name: str | os.PathLike, config: VariantConfig | None, kwargs: dict[str, Any]
) -> tuple[Stored, dict[str, Any]]:
    """Turns arguments of `from_pretrained` into the checkpoint they mean and arguments that need no files."""
    rest = dict(kwargs)
    hub = HubOptions(
        api=HfApi(token=rest.pop("token", None)),
        cache_dir=rest.pop("cache_dir", None),
        local_files_only=rest.pop("local_files_only", False),
        force_download=rest.pop("force_download", False),
    )
    stored = open_stored(name, hub, subfolder=rest.pop("subfolder", ""), revision=rest.pop("revision", None))
    if not stored.is_variant:
        raise NotAModelError(f"{name} is a plain model, not a variant; attention.convert makes one of it")
    stored.method.by_layer(stored.plain_config().num_hidden_layers)
    refuse_numbers(stored.folder, stored.magnitudes, torch.float64)  # in which all numbers that are some are finite
    rest.pop("attn_implementation", None)
    if config is None:
        config, rest = VariantConfig.from_dict(stored.config, return_unused_kwargs=True, **rest)
    config.base = stored.base
    return stored, {**rest, "config": config, "state_dict": whole_weights(stored, hub)}


# Building from a model in memory.


def assemble(
    base: PreTrainedModel, attention: MechanismConfig, origin: dict[str, Any] | None, *, share: bool
) -> Variant:
    """A variant with the weights of a model in memory, whose own mechanisms, if it has any, are left behind.

    Args:
        base: the model; untouched.
        attention: the method and its options.
        origin: `VariantConfig.base`.
        share: use the base's tensors instead of copies.

    Raises:
        ConfigError: if the layers that the config names are not the base's.
    """
    config = _config_of(base, attention, origin)
    config.mechanisms()
    with building, no_init_weights():
        variant = model_class(type(base))(config)
    for mechanism in variant.mechanisms:
        mechanism.to(device=base.device, dtype=base.dtype)
    weights = {name: tensor for name, tensor in base.state_dict().items() if not is_mechanism(name)}
    load_weights(variant, weights if share else _clone(weights))
    for name, buffer in base.named_buffers():
        if name not in weights and not is_mechanism(name):
            _set_buffer(variant, name, buffer if share else buffer.clone())
    _copy_reach(base, variant)
    variant.generation_config = copy.deepcopy(base.generation_config)
    return variant.eval()


def _config_of(base: PreTrainedModel, attention: MechanismConfig, origin: dict[str, Any] | None) -> VariantConfig:
    options = base.config.to_dict()
    # What was swapped lies nowhere yet: an adapter fitted to it would name the base, and be put on the base.
    for key in ("_name_or_path", "model_type", "family", "architectures", "attention", "base", "versions", "auto_map"):
        options.pop(key, None)
    family = base.config.family if is_variant(base) else base.config.model_type
    options |= {"family": family, "attention": attention.to_dict(), "base": origin}
    return config_class(family).from_dict(options | {"tie_word_embeddings": is_tied(base)})


def load_weights(variant: Variant, weights: dict[str, Tensor]) -> None:
    """Puts tensors into a variant, without copying; its mechanisms may keep the values they have.

    Raises:
        ValueError: naming every tensor that is missing or that the variant has no place for.
    """
    if variant.config.tie_word_embeddings:
        words, output = matrix_names(variant)
        weights = weights | {output: weights[words]}
    result = variant.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in result.missing_keys if not is_mechanism(name)]
    if missing or result.unexpected_keys:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {result.unexpected_keys}")
    variant.tie_weights()
    settle(variant)


def _clone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    clones: dict[Any, Tensor] = {}  # tied weights stay tied

    def place(name: str, tensor: Tensor) -> Any:
        """What tied weights share; on the meta device nothing has an address, and `load_weights` ties them again."""
        return (tensor.data_ptr(), tensor.shape) if tensor.data_ptr() else name

    return {name: clones.setdefault(place(name, tensor), tensor.clone()) for name, tensor in weights.items()}


def _copy_reach(base: nn.Module, variant: nn.Module) -> None:
    """How far a text has reached so far, by which rotations that grow with it know that they have grown."""
    places = dict(variant.named_modules())
    for name, module in base.named_modules():
        for attribute, value in vars(module).items():
            if attribute.endswith("max_seq_len_cached") and name in places:
                setattr(places[name], attribute, value)


def _set_buffer(model: nn.Module, name: str, buffer: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    if leaf in (buffers := model.get_submodule(owner)._buffers):
        buffers[leaf] = buffer


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, mix)
AutoConfig.register(VariantConfig.model_type, VariantConfig)
AutoConfig.register(GPT2VariantConfig.model_type, GPT2VariantConfig)
