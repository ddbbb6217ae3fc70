"""Softmax attention, the baseline, through the interface of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .mechanism import LayerShape, Mechanism, MechanismConfig, repeat_heads
from .reference import softmax_weights
from .state import KeyValueState, State


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(MechanismConfig):
    """Softmax attention has no options."""

    method: ClassVar[str] = "softmax"
    description: ClassVar[str] = "Every token looks at every token before it: exact, and quadratic in length."

    def build(self, layer: LayerShape) -> SoftmaxAttention:
        return SoftmaxAttention(self, layer)


class SoftmaxAttention(Mechanism):
    """softmax(q kᵀ / √D) v over the tokens up to the query (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1)."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        grouped = k.shape[1] != q.shape[1]
        if state is None or state.seen == 0:
            if state is not None:
                state.append(k, v, lengths)
            return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        mask = None
        if q.shape[2] > 1 or state.lengths is not None or lengths is not None:
            mask = self._visible(q, state)
        k, v = state.append(k, v, lengths)
        return scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, enable_gqa=grouped)

    @staticmethod
    def _visible(q: Tensor, state: State) -> Tensor:
        """(B, 1, T, S) which stored tokens each new query may read, before the new ones are stored."""
        length = q.shape[2]
        queries = state.positions(q.shape[0], q.device)[:, None] + torch.arange(length, device=q.device)
        return (torch.arange(state.seen + length, device=q.device) <= queries[..., None])[:, None]

    def attention_map(self, q: Tensor, k: Tensor, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        return softmax_weights(q, repeat_heads(k, q.shape[1]))

    def new_state(self) -> KeyValueState:
        return KeyValueState()

    def keys_read(self, position: int) -> int:
        return position + 1

    def operations(self, length: int) -> int:
        return 2 * 2 * self.layer.num_heads * self.layer.head_dim * length * (length + 1) // 2
