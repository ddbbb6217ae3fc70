#!/usr/bin/env bash
# native-sparse-attention-pytorch 0.2.3, torch 2.13.0: SparseAttention(causal=True) with a cache.
#
# In a forward of several tokens each reads the layer's memory, compress_mem_kv, beside the compressed blocks. A single
# token after a cache does not as long as the cache has no compressed block, so that after a prompt shorter than the
# stride of the blocks it gives another output than in one forward. The memory is a parameter that is zero in a new
# layer, which hides this. With a block in the cache, from the stride on, both ways agree. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 native-sparse-attention-pytorch==0.2.3
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from native_sparse_attention_pytorch import SparseAttention

STRIDE, LENGTH = 4, 24
torch.manual_seed(0)
blocks = {"compress_block_size": 8, "compress_block_sliding_stride": STRIDE, "selection_block_size": 8}
layer = SparseAttention(
    dim=32, dim_head=8, heads=4, sliding_window_size=8, num_selected_blocks=2, causal=True, **blocks
).eval()
x = torch.randn(1, LENGTH, 32)


@torch.no_grad()
def apart():
    """The largest difference of single tokens after one from one forward: before the stride, and from it on."""
    whole, found = layer(x), []
    _, cache = layer(x[:, :1], return_cache=True)
    for place in range(1, LENGTH):
        output, cache = layer(x[:, place : place + 1], cache=cache, return_cache=True)
        found.append((output[:, 0] - whole[:, place]).abs().max().item())
    return max(found[: STRIDE - 1]), max(found[STRIDE - 1 :])


new = apart()
torch.nn.init.normal_(layer.compress_mem_kv)
filled = apart()
for memory, (before, after) in (("zero, as new", new), ("random", filled)):
    print(f"memory {memory}: single tokens are {before:.1e} off before the stride of {STRIDE}, {after:.1e} from it on")
as_stated = max(*new, filled[1]) < 1e-5 and filled[0] > 1e-2
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
