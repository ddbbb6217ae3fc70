#!/usr/bin/env bash
# local-attention 1.11.2, torch 2.13.0: LocalAttention(causal=True, exact_windowsize=True).
#
# The README says that each query then sees at most as many keys as the window size. It sees one more: itself and
# window_size keys before it, 9 for window_size=8. So do LocalMHA and LocalTransformer, where exact_windowsize is the
# default. One would expect 8, itself among them, as a sliding window of 8 is counted elsewhere. With look_backward=2 it
# is 17, where one would expect 16. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 hyper-connections==0.4.11 local-attention==1.11.2
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from local_attention import LocalAttention
from local_attention.transformer import LocalMHA

LENGTH = 64


def most_seen(window_size, look_backward):
    """The largest number of keys a query takes values from, and the same told from the gradient of LocalMHA."""
    options = {"window_size": window_size, "look_backward": look_backward, "causal": True, "exact_windowsize": True}
    equal = torch.zeros(1, LENGTH, 16)
    shares = LocalAttention(**options)(equal, equal, torch.eye(LENGTH)[None])[0]
    torch.manual_seed(0)
    block = LocalMHA(dim=32, heads=2, dim_head=16, **options)
    x = torch.randn(1, LENGTH, 32, requires_grad=True)
    block(x)[0, -1].sum().backward()
    return (shares > 0).sum(dim=-1).max().item(), (x.grad[0].abs().sum(dim=-1) > 0).sum().item()


as_stated = True
for window_size, look_backward in ((8, 1), (16, 1), (8, 2)):
    seen, read = most_seen(window_size, look_backward)
    print(f"window_size={window_size}, look_backward={look_backward}: a query sees {seen} keys; in LocalMHA, {read}")
    as_stated = as_stated and seen == read == window_size * look_backward + 1
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
