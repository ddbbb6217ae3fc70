#!/usr/bin/env bash
# h-transformer-1d 0.1.9, torch 2.13.0: how far a token reaches in HTransformer1D, an encoder for long contexts.
#
# Attention is in both directions (causal=False, the default), near tokens one by one and far ones in coarser and
# coarser groups. The coarsest level, which would join the first and the second half of the text (padded to a power of
# 2), is missing: no token of one half has any influence on the other, however many layers there are. Of 8000 tokens,
# padded to 8192, the first 4096 are read alone. One would expect every token to reach every other; with causal=True, of
# which one would expect less, the first does reach the second half. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 rotary-embedding-torch==0.9.1 h-transformer-1d==0.1.9
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from h_transformer_1d import HTransformer1D

small = {"num_tokens": 97, "dim": 32, "heads": 2, "dim_head": 16}


@torch.no_grad()
def reached(length, token, **options):
    """The first and the last token whose logits change if one token becomes another."""
    torch.manual_seed(0)
    model = HTransformer1D(**small, max_seq_len=512, block_size=16, **options).eval()
    ids = torch.randint(0, 97, (1, length))
    other = ids.clone()
    other[0, token] = (ids[0, token] + 1) % 97
    mask = torch.ones(1, length, dtype=torch.bool)
    changed = (model(ids, mask=mask) != model(other, mask=mask)).any(dim=-1)[0].nonzero().flatten()
    return changed.min().item(), changed.max().item()


as_stated = True
for length, half in ((512, 256), (500, 256), (128, 64)):
    for depth in (1, 6):
        first, second = (reached(length, token, depth=depth, causal=False) for token in (half - 1, half))
        causal = reached(length, 0, depth=depth, causal=True)
        print(
            f"{length} tokens, {depth} layers: token {half - 1} reaches {first[0]} to {first[1]}, token {half} "
            f"{second[0]} to {second[1]}; with causal=True token 0 reaches {causal[0]} to {causal[1]}"
        )
        halves = first == (0, half - 1) and second == (half, length - 1)
        as_stated = as_stated and halves and causal[1] >= half
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
