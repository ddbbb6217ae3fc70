#!/usr/bin/env bash
# local-attention 1.11.2, torch 2.13.0: LocalTransformer with its cache, which generate uses unless told not to.
#
# A step with the cache hands on the keys as they are after their rotation by position (rotary embeddings, the default),
# and the next step rotates them again. The first step after the prompt is right, its cache is not yet touched; every
# later one gives other logits than the same tokens without a cache, all within one window. Greedy generation may thus
# go another way than with use_kv_cache=False. One would expect the cache to change the time taken only, as it does with
# use_dynamic_pos_bias=True, where nothing is rotated. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 hyper-connections==0.4.11 local-attention==1.11.2
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from local_attention import LocalTransformer

PROMPT, LENGTH = 8, 48
small = {"num_tokens": 97, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16}


@torch.no_grad()
def apart(**options):
    """By how much each step's logits differ from those without a cache, and how many greedy tokens do."""
    torch.manual_seed(0)
    model = LocalTransformer(**small, max_seq_len=64, local_attn_window_size=64, **options).eval()
    for name, weight in model.named_parameters():
        if name.endswith("to_qkv.weight"):
            weight *= 4  # as new, attention is nearly even
    ids = torch.randint(0, 97, (1, LENGTH))
    whole = model(ids)
    logits, cache = model(ids[:, :PROMPT], return_cache=True)
    differences = []
    for length in range(PROMPT + 1, LENGTH + 1):
        logits, cache = model(ids[:, :length], cache=cache, return_cache=True)
        differences.append((logits[:, -1] - whole[:, length - 1]).abs().max().item())
    greedy = [model.generate(ids[:, :PROMPT], 40, temperature=0.0, use_kv_cache=cached) for cached in (True, False)]
    return differences, (greedy[0] != greedy[1]).sum().item()


found = {}
for name, options in (("rotary (default)", {}), ("use_dynamic_pos_bias", {"use_dynamic_pos_bias": True})):
    (first, *later), tokens = apart(**options)
    found[name] = first, min(later), max(later)
    print(
        f"{name}: the first step with the cache is off by {first:.1e}, later ones by {min(later):.1e} to "
        f"{max(later):.1e}; of 40 greedy tokens {tokens} are others"
    )
first, least, _ = found["rotary (default)"]
as_stated = first < 1e-4 and least > 1e-3 and max(found["use_dynamic_pos_bias"]) < 1e-4
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
