#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1, torch 2.13.0: RotaryEmbedding, after it has been used in bfloat16 once.
#
# rotate_queries_or_keys counts positions in the dtype of what it rotates; bfloat16 rounds those above 256, so that
# neighbours get the same angle. The angles are kept (cache_if_possible, the default) and serve every later call of that
# length or less, in any dtype. So the very same call in float32 gives one result on a new RotaryEmbedding and another,
# as far off as vectors turned anyhow, after one call in bfloat16. The other way round a call in float32 first makes
# later ones in bfloat16 right, to its usual precision. One would expect a call not to change what later ones give.
# With cache_if_possible=False, or up to 256 positions, float32 stays as it was. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 einops==0.8.2 rotary-embedding-torch==0.9.1
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from rotary_embedding_torch import RotaryEmbedding


def off(length, first, dtype, **options):
    """By how much the rotation in a dtype, after one in another, differs from that in float32 on a new module."""
    torch.manual_seed(0)
    queries = torch.randn(1, 2, length, 32)
    right = RotaryEmbedding(dim=32).rotate_queries_or_keys(queries)
    rotary = RotaryEmbedding(dim=32, **options)
    if first is not None:
        rotary.rotate_queries_or_keys(queries.to(first))
    return (rotary.rotate_queries_or_keys(queries.to(dtype)).float() - right).abs().max().item()


full, half = torch.float32, torch.bfloat16
found = {
    "float32 after bfloat16": off(1024, half, full),
    "float32 after bfloat16, without the cache": off(1024, half, full, cache_if_possible=False),
    "float32 after bfloat16, 256 positions": off(256, half, full),
    "bfloat16 after bfloat16": off(1024, half, half),
    "bfloat16 after float32": off(1024, full, half),
    "bfloat16 on a new module": off(1024, None, half),
}
for name, difference in found.items():
    print(f"{name}: off by up to {difference:.1e}")
spoilt, uncached, short, again, after, new = found.values()
as_stated = min(spoilt, again, new) > 1 and max(uncached, short) < 1e-5 and after < 0.05
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
