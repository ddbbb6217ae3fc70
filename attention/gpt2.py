"""GPT-2 with its attention swapped: the adapter between a mechanism and the transformers model."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from .mechanism import LayerShape, Mechanism
from .registry import config_from_dict
from .rows import Rows


@strict
class GPT2VariantConfig(GPT2Config):
    """A GPT-2 config that also names the attention method, its options, and the base it was made from.

    Attributes:
        attention: `MechanismConfig.to_dict` of the mechanism in every layer.
        base: {"id", "revision", "sha256"} of the base's weights; the id is a folder or a name on the Hub. None if
            the variant's own files hold all weights.
        versions: of the libraries that wrote the variant.
    """

    model_type = "gpt2-variant"

    attention: dict | None = None
    base: dict | None = None
    versions: dict | None = None


class GPT2VariantAttention(GPT2Attention):
    """GPT-2's projections around a mechanism; the weights keep the names and the layout that GPT-2 gives them."""

    def __init__(self, config: GPT2VariantConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        shape = LayerShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            hidden_size=self.embed_dim,
            max_length=config.n_positions,
            layer_idx=layer_idx,
            dropout=config.attn_pdrop,
        )
        self.mechanism: Mechanism = config_from_dict(config.attention).build(shape)
        for module in self.mechanism.modules():
            module._is_hf_initialized = True  # a mechanism starts itself; transformers must not start it again
        # Mechanisms scale by D^(−1/2); whatever else GPT-2's options ask for goes into the queries.
        self.query_scale = self.scaling * self.head_dim**0.5

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mixes (B, T, E); `lengths` (B,) are the real tokens of each row, padding comes after them; `tokens` are ids.

        `attention_mask` is GPT-2's, for softmax; causality is the mechanism's own, so it is not read.
        """
        batch, length, _ = hidden_states.shape
        parts = self.c_attn(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        dtype = v.dtype
        if self.query_scale != 1.0:
            q = q * self.query_scale
        if self.reorder_and_upcast_attn:
            q, k, v = q.float(), k.float(), v.float()
        state = None if cache is None else cache.layers[self.layer_idx]
        mixed = self.mechanism(q, k, v, hidden_states, state, lengths, tokens).to(dtype)
        mixed = mixed.transpose(1, 2).reshape(batch, length, self.embed_dim).contiguous()  # Conv1D views its input
        return self.resid_dropout(self.c_proj(mixed)), None


def fuse_activations(model: nn.Module) -> None:
    """Has GPT-2's GELU, which is nine operations, computed by one that is equal up to rounding."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


class GPT2VariantModel(GPT2Model):
    """GPT-2's body with a mechanism in every block; rows with padding are moved to the left and back."""

    config_class = GPT2VariantConfig

    def __init__(self, config: GPT2VariantConfig):
        super().__init__(config)
        for layer_idx, block in enumerate(self.h):
            block.attn = GPT2VariantAttention(config, layer_idx)
        fuse_activations(self)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The mechanism of every layer, first layer first."""
        return [block.attn.mechanism for block in self.h]

    def new_cache(self) -> Cache:
        """An empty cache: one decode state a layer."""
        return Cache(layers=[mechanism.new_state() for mechanism in self.mechanisms])

    def forward(
        self,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """GPT-2's forward.

        Args:
            attention_mask: (B, T) or (B, past + T), 1 for real tokens; a padded row gives what it gives alone.

        Raises:
            ValueError: for positions past `n_positions`, or padding between real tokens.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("give either input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = self.new_cache()
        rows = Rows.from_mask(attention_mask, length)
        position_ids = self._position_ids(position_ids, cache, rows, batch, length, tokens.device)
        if rows is not None:
            input_ids, inputs_embeds, token_type_ids = (
                None if part is None else rows.align(part) for part in (input_ids, inputs_embeds, token_type_ids)
            )
        output = super().forward(
            input_ids=input_ids,
            cache=cache,
            attention_mask=position_ids.new_empty(0, 0, 0, 0),  # of four dimensions, so that GPT-2 builds none
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            lengths=None if rows is None else rows.lengths,
            tokens=input_ids,
            **{**kwargs, "return_dict": True},
        )
        if rows is not None:
            output.last_hidden_state = rows.restore(output.last_hidden_state)
            if output.hidden_states is not None:
                output.hidden_states = tuple(rows.restore(hidden) for hidden in output.hidden_states)
        return output

    def _position_ids(
        self,
        position_ids: Tensor | None,
        cache: Cache | None,
        rows: Rows | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Tensor:
        """(B or 1, T) positions, aligned like the tokens; checked only where they might be too large."""
        state = None if cache is None else cache.layers[0]
        seen = 0 if state is None else state.seen
        if position_ids is not None:
            given = True
            position_ids = position_ids if rows is None else rows.align(position_ids)
        else:
            given = False
            start = seen if state is None or state.lengths is None else state.lengths[:, None]
            position_ids = torch.arange(length, device=device)[None] + start
        if not given and seen + length <= self.config.n_positions:
            return position_ids
        real = position_ids
        if rows is not None:
            real = position_ids.masked_fill(torch.arange(length, device=device) >= rows.lengths[:, None], 0)
        if (last := int(real.max())) >= self.config.n_positions:
            raise ValueError(
                f"position {last} is past the last one, {self.config.n_positions - 1}: the model holds "
                f"n_positions={self.config.n_positions} tokens; shorten the prompt or generate fewer tokens"
            )
        return real


class GPT2VariantLMHeadModel(GPT2LMHeadModel):
    """A GPT-2 language model whose attention was swapped; works with `generate`.

    Attributes:
        new_parameters: names of the parameters and buffers that the base does not have.
    """

    config_class = GPT2VariantConfig
    config: GPT2VariantConfig
    supports_gradient_checkpointing: ClassVar[bool] = True

    def __init__(self, config: GPT2VariantConfig):
        super().__init__(config)
        self.transformer = GPT2VariantModel(config)
        self.loss_type = "ForCausalLM"  # transformers finds it by the class's name, which it does not know
        self.post_init()

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The mechanism of every layer, first layer first."""
        return self.transformer.mechanisms

    @property
    def new_parameters(self) -> tuple[str, ...]:
        return tuple(name for name in self.state_dict() if ".mechanism." in name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> GPT2VariantLMHeadModel:
        """As in transformers, with the base's weights put under the variant's own.

        Raises:
            attention.errors.CheckpointError: if the variant is damaged, or its base is missing or another.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        from .loading import pretrained_arguments, read_generation_config

        folder, arguments = pretrained_arguments(pretrained_model_name_or_path, config, kwargs)
        loaded = super().from_pretrained(None, *model_args, **arguments)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        if kwargs.get("generation_config") is None:
            read_generation_config(model, folder)
        return loaded

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        # On the meta device a mechanism could not compute its starting values.
        return [context for context in super().get_init_context(*args, **kwargs) if context != torch.device("meta")]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Config and weights as `attention.save` writes them, in the model's dtype.

        Raises:
            ValueError: for `push_to_hub=True`; the method of that name does it.
        """
        if push_to_hub:
            raise ValueError("save_pretrained only saves; use model.push_to_hub(repo) or attention.push(folder, repo)")
        from .saving import SHARD_SIZE, save_model

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
        from .pushing import push_model

        return push_model(self, repo_id, commit_message, bool(private), token, revision)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = self.transformer.new_cache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
