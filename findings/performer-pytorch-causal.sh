#!/usr/bin/env bash
# performer-pytorch 1.1.4, torch 2.13.0: FastAttention(causal=True).
#
# A token's output should not depend on later tokens. With the default kernel, that of softmax, it does: the features of
# the keys are scaled by a maximum over all positions, and 1e-4 is added after that, so that earlier keys count for less
# beside what is added where a later one is large. The outputs of a text's start change when a later key grows, and when
# the rest is cut off. With generalized_attention=True they do not change at all. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 setuptools==80.9.0 performer-pytorch==1.1.4
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from performer_pytorch import FastAttention

START, LENGTH, HEAD = 40, 64, 16
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 4, LENGTH, HEAD)
larger = k.clone()
larger[:, :, -1] *= 3

found = {}
for generalized in (False, True):
    torch.manual_seed(0)
    layer = FastAttention(HEAD, causal=True, generalized_attention=generalized).eval()
    whole = layer(q, k, v)[:, :, :START]
    alone = layer(*(tensor[:, :, :START] for tensor in (q, k, v)))
    changes = [(other - whole).abs().max().item() for other in (layer(q, larger, v)[:, :, :START], alone)]
    found[generalized] = changes
    print(
        f"generalized_attention={generalized}: of {LENGTH} tokens the outputs of the first {START} change by "
        f"{changes[0]:.1e} when the last key is 3 times as large, by {changes[1]:.1e} when the rest is cut off"
    )
as_stated = min(found[False]) > 1e-2 and max(found[True]) < 1e-5
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
