"""Other people's attention layers and models in the form that the contract asks: see `PEERS`.

All are tiny and random, with options under which they should be causal; none is a dependency of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attention.contract import check
from attention.contract_checks import (
    DoesNotApply,
    Inputs,
    Mixing,
    Result,
    Subject,
    examine,
    module_in_float64,
    nudged,
    zeros_filled,
)

WIDTH, HEADS, HEAD, VOCABULARY = 32, 4, 8, 97
USUAL_HEAD = 64  # of a head in most models
BLOCK = 8  # tokens in a block, a bucket or a window


@dataclass(frozen=True)
class Peer:
    """A library and how to make something to ask of it.

    Attributes:
        package: its name on PyPI.
        module: what it is imported as.
        what: what is asked, in words.
        make: gives a `Layer` or `Heads`, or a module whose forward takes ids and gives logits, for texts of a length.
    """

    package: str
    module: str
    what: str
    make: Callable[[Any, int], Layer | Heads | nn.Module]


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def keeps(peer: Peer, length: int, seed: int = 0) -> dict[str, Result]:
    """What a peer keeps of the contract; parameters that are zero are filled."""
    torch.manual_seed(seed)
    made = peer.make(import_module(peer.module), length)
    if isinstance(made, nn.Module):
        return check(made, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    inputs, others = (
        tuple(torch.randn(3, length, *size, generator=generator) for size in made.sizes) for _ in range(2)
    )
    with torch.no_grad(), zeros_filled(made.module.eval(), seed):
        return examine(made, inputs, others)


class Language(nn.Module):
    """A model of ids (B, T) to logits (B, T, V) whose own forward has other arguments."""

    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor] = lambda output: output):
        super().__init__()
        self.model, self.read = model, read
        self.config = SimpleNamespace(vocab_size=VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.read(self.model(input_ids))


class Layer(Subject):
    """A layer from (B, T, E) to (B, T, E); one with options for it goes on after what it gave back as its cache."""

    sizes = ((WIDTH,),)

    def __init__(self, module: nn.Module, **cached: Any):
        self.module, self.cached = module, cached

    def run(self, inputs: Inputs, memory: Any = None, *, mask: Any = None, positions: Any = None) -> Tensor:
        if mask is not None:
            raise DoesNotApply("it takes no mask of padding")
        x = inputs[0].to(next(self.module.parameters()).dtype)
        if memory is None:
            return self.module(x)
        output, memory["cache"] = self.module(x, cache=memory.get("cache"), **self.cached)
        return output

    def memory(self) -> dict[str, Any]:
        return {} if self.cached else super().memory()

    def float64(self) -> AbstractContextManager[None]:
        return module_in_float64(self.module)

    def nudged(self) -> AbstractContextManager[None]:
        return nudged(self.module)


class Heads(Subject):
    """A module of q, k, v (B, H, T, D) to (B, H, T, D)."""

    sizes = ((HEADS, USUAL_HEAD),) * 3

    def __init__(self, module: nn.Module):
        self.module, self.dtype = module, torch.float32

    def run(self, inputs: Inputs, memory: Any = None, *, mask: Any = None, positions: Any = None) -> Tensor:
        if mask is not None:
            raise DoesNotApply("it takes no mask of padding")
        return self._mix(inputs).out.transpose(1, 2)

    def mixing(self, inputs: Inputs) -> list[Mixing]:
        return [self._mix(inputs)]

    def _mix(self, inputs: Inputs) -> Mixing:
        q, k, v = (tensor.to(self.dtype).transpose(1, 2).contiguous() for tensor in inputs)
        return Mixing(q, k, v, self.module(q, k, v), USUAL_HEAD**-0.5)

    @contextmanager
    def float64(self) -> Iterator[None]:
        self.dtype = torch.float64
        try:
            with module_in_float64(self.module):
                yield
        finally:
            self.dtype = torch.float32

    def nudged(self) -> AbstractContextManager[None]:
        return nudged(self.module)


def performer(library: Any, length: int) -> Heads:
    return Heads(library.FastAttention(USUAL_HEAD, causal=True))


def nsa(library: Any, length: int) -> Layer:
    layer = library.SparseAttention(
        dim=WIDTH,
        dim_head=HEAD,
        heads=HEADS,
        sliding_window_size=BLOCK,
        compress_block_size=BLOCK,
        compress_block_sliding_stride=BLOCK // 2,
        selection_block_size=BLOCK,
        num_selected_blocks=2,
        causal=True,
    )
    return Layer(layer, return_cache=True)


def converted(library: Any, length: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        initializer_range=0.2,
    )
    options = library.TpttConfig(base_model_config=config, base_model_name="none")
    return library.get_tptt_model(LlamaForCausalLM(config), options)[0].eval()


def rwkv(library: Any, length: int) -> nn.Module:
    config = library.RWKV7Config(
        vocab_size=VOCABULARY, hidden_size=2 * WIDTH, num_hidden_layers=2, head_dim=16, initializer_range=0.2
    )
    return library.RWKV7ForCausalLM(config).eval()


SMALL = {"num_tokens": VOCABULARY, "dim": WIDTH, "heads": HEADS, "dim_head": HEAD, "causal": True}
"""Options that some of these libraries share."""


def reformer(library: Any, length: int) -> nn.Module:
    return Language(library.ReformerLM(**SMALL, depth=2, max_seq_len=512, bucket_size=BLOCK, n_hashes=2))


def routing(library: Any, length: int) -> nn.Module:
    model = library.RoutingTransformerLM(**SMALL, depth=2, max_seq_len=length, window_size=BLOCK)
    return Language(model, lambda output: output[0])


def hierarchical(library: Any, length: int) -> nn.Module:
    return Language(library.HTransformer1D(**SMALL, depth=1, max_seq_len=512, block_size=BLOCK))


def linformer(library: Any, length: int) -> nn.Module:
    model = library.LinformerLM(
        num_tokens=VOCABULARY, input_size=length, channels=WIDTH, dim_k=16, nhead=HEADS, depth=2, causal=True
    )
    return Language(model)


PEERS = {
    peer.package: peer
    for peer in (
        Peer("performer-pytorch", "performer_pytorch", "FastAttention(causal=True)", performer),
        Peer("native-sparse-attention-pytorch", "native_sparse_attention_pytorch", "SparseAttention(causal=True)", nsa),
        Peer("tptt", "tptt", "a Llama through get_tptt_model", converted),
        Peer("rwkv7-hf", "rwkv7_hf", "RWKV7ForCausalLM", rwkv),
        Peer("reformer-pytorch", "reformer_pytorch", "ReformerLM(causal=True)", reformer),
        Peer("routing-transformer", "routing_transformer", "RoutingTransformerLM(causal=True)", routing),
        Peer("linformer-pytorch", "linformer_pytorch", "LinformerLM(causal=True)", linformer),
        Peer("h-transformer-1d", "h_transformer_1d", "HTransformer1D(causal=True), one layer", hierarchical),
    )
}
