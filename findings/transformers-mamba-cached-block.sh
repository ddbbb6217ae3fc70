#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: MambaForCausalLM, JambaForCausalLM and ZambaForCausalLM.
#
# A text is read in one forward, and again as two: some tokens with use_cache=True, then the rest, several at once, with
# the cache that came back. The second way forgets: the scan of the block starts from a state of zeros, though the cache
# holds one (the convolution does go on after it). One token at a time is right. Nothing is raised or logged.
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
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM, ZambaConfig, ZambaForCausalLM

transformers.logging.set_verbosity_error()
small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "initializer_range": 0.2}
hybrid = {**small, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
kinds = ["linear_attention", "hybrid"] * 2
configs = {
    MambaForCausalLM: MambaConfig(**small),
    JambaForCausalLM: JambaConfig(**hybrid, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_dt_rank=4),
    ZambaForCausalLM: ZambaConfig(**hybrid, layers_block_type=kinds, n_mamba_heads=2, mamba_dt_rank=4),
}


@torch.no_grad()
def apart(model, ids, parts):
    """The largest difference of the logits of a text in parts from those of the whole."""
    whole, cache, start, found = model(ids, use_cache=False).logits, None, 0, 0.0
    for length in parts:
        output = model(ids[:, start : start + length], cache=cache, use_cache=True)
        found = max(found, (output.logits - whole[:, start : start + length]).abs().max().item())
        cache, start = output.cache, start + length
    return found


as_stated = True
for kind, config in configs.items():
    torch.manual_seed(0)
    model, ids = kind(config).eval(), torch.randint(3, 97, (1, 16))
    single, block = apart(model, ids, [9] + [1] * 7), apart(model, ids, [9, 7])
    print(f"{kind.__name__}: after 9 tokens, 7 single ones are {single:.1e} off and a block of 7 is {block:.1e} off")
    as_stated &= single < 1e-4 and block > 1e-2
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
