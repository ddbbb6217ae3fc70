#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: BambaForCausalLM.
#
# position_ids may be left out of a forward; with a cache the tokens then go on where it ends, as in LlamaForCausalLM.
# Bamba counts from 0 again at every call, whatever the cache holds, so that its rotary embeddings place the new tokens
# beside the first ones. Nothing is raised or logged; with position_ids, which generate() gives, it is right.
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
from transformers import BambaConfig, BambaForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
small = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
}
mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1, 3]}


@torch.no_grad()
def apart(model, ids, given):
    """The largest difference of the logits of single tokens after a cache of 9 from those of one forward."""
    whole, found = model(ids, use_cache=False).logits, 0.0
    cache = model(ids[:, :9], use_cache=True).cache
    for place in range(9, ids.shape[1]):
        positions = {"position_ids": torch.tensor([[place]])} if given else {}
        output = model(ids[:, place : place + 1], cache=cache, use_cache=True, **positions)
        found, cache = max(found, (output.logits[:, 0] - whole[:, place]).abs().max().item()), output.cache
    return found


found = {}
for kind, config in ((LlamaForCausalLM, LlamaConfig(**small)), (BambaForCausalLM, BambaConfig(**small, **mamba))):
    torch.manual_seed(0)
    model, ids = kind(config).eval(), torch.randint(3, 97, (1, 24))
    found[kind] = given, left_out = apart(model, ids, True), apart(model, ids, False)
    print(f"{kind.__name__}: single tokens after 9 are {given:.1e} off with position_ids, {left_out:.1e} without")
llama, bamba = found[LlamaForCausalLM], found[BambaForCausalLM]
as_stated = max(llama) < 1e-4 and bamba[0] < 1e-4 and bamba[1] > 1e-2
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
