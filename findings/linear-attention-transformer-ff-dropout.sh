#!/usr/bin/env bash
# linear-attention-transformer 0.19.1, torch 2.13.0: LinearAttentionTransformerLM(ff_dropout=..., ff_glu=...).
#
# Neither reaches the feedforward layers of an ordinary model: they are built without, so that training with
# ff_dropout=0.9 drops nothing, and ff_glu=True has the parameters of ff_glu=False. Both work in the additional layers
# of attend_axially=True and of receives_context=True, but not in the main ones of those models. One would expect them
# to have an effect, or to be refused. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 local-attention==1.11.2 linear-attention-transformer==0.19.1
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from linear_attention_transformer import LinearAttentionTransformerLM

small = {"num_tokens": 97, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "max_seq_len": 64}


def effects(**options):
    """By how much two outputs in training differ with ff_dropout=0.9, and how many parameters ff_glu=True adds."""
    torch.manual_seed(0)
    model = LinearAttentionTransformerLM(**small, local_attn_window_size=8, ff_dropout=0.9, **options).train()
    ids = torch.randint(0, 97, (2, 64))
    difference = (model(ids) - model(ids)).abs().max().item()
    sizes = []
    for glu in (False, True):
        other = LinearAttentionTransformerLM(**small, local_attn_window_size=8, ff_glu=glu, **options)
        sizes.append(sum(weight.numel() for weight in other.parameters()))
    return difference, sizes[1] - sizes[0]


found = {}
for axially in (False, True):
    for causal in (False, True):
        found[axially, causal] = effects(attend_axially=axially, causal=causal)
        difference, added = found[axially, causal]
        print(
            f"attend_axially={axially}, causal={causal}: two outputs with ff_dropout=0.9 differ by {difference:.1e}; "
            f"ff_glu=True adds {added} parameters"
        )
as_stated = all((d > 0.01 and p > 0) if axially else (d == 0 and p == 0) for (axially, _), (d, p) in found.items())
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
