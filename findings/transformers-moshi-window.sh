#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: MoshiForCausalLM.
#
# Its config has a sliding_window (3000 by default). The cache that its forward makes keeps that many tokens; the mask of
# its forward is a full causal one. So a text longer than the window gives other logits in one forward, where every token
# reads all before it, than token by token, where each reads the window; generate() writes from the second. Nothing is
# raised or logged. MistralForCausalLM, with the same window, gives the same both ways.
# Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM, MoshiConfig, MoshiForCausalLM

transformers.logging.set_verbosity_error()
WINDOW = 8
small = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
}


@torch.no_grad()
def apart(model, ids):
    """For each token, the largest difference of its logits token by token from those of one forward."""
    whole, cache, found = model(ids, use_cache=False).logits, None, []
    for place in range(ids.shape[1]):
        output = model(ids[:, place : place + 1], cache=cache, use_cache=True)
        found.append((output.logits[:, 0] - whole[:, place]).abs().max().item())
        cache = output.cache
    return found


found = {}
mistral, moshi = MistralConfig(**small, intermediate_size=48), MoshiConfig(**small, ffn_dim=64)
for kind, config in ((MistralForCausalLM, mistral), (MoshiForCausalLM, moshi)):
    torch.manual_seed(0)
    model, ids = kind(config).eval(), torch.randint(3, 97, (1, 24))
    each = apart(model, ids)
    found[kind] = within, beyond = max(each[:WINDOW]), max(each[WINDOW:])
    print(f"{kind.__name__}, a window of {WINDOW}: token by token is {within:.1e} off within it, {beyond:.1e} beyond")
as_stated = max(found[MistralForCausalLM]) < 1e-4 and found[MoshiForCausalLM][0] < 1e-4
as_stated &= found[MoshiForCausalLM][1] > 1e-2
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
