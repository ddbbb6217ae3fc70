#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1, torch 2.13.0: RotaryEmbedding(use_xpos=True), stepping with cached keys.
#
# xPos scales queries and keys by their position, counted from the middle of the sequence, so that in a score only their
# distance is left. rotate_queries_with_cached_keys, the README's way to generate with a cache of keys, counts the query
# from the middle of the queries given, one as a rule, but the keys from the middle of all keys. So the scores of a
# step are not those of the same query in the whole sequence by rotate_queries_and_keys, and are the further off the
# longer the text. One would expect the same scores, as without xPos, or when all queries are given. Ends with 1 if that
# changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 einops==0.8.2 rotary-embedding-torch==0.9.1
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from rotary_embedding_torch import RotaryEmbedding


def off(length, given, use_xpos):
    """The share by which the last query's scores of all keys change if only the last queries are given."""
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 1, 2, length, 32)
    rotary = RotaryEmbedding(dim=32, use_xpos=use_xpos)
    if use_xpos:
        whole = rotary.rotate_queries_and_keys(queries, keys)
    else:
        whole = rotary.rotate_queries_or_keys(queries), rotary.rotate_queries_or_keys(keys)
    step = RotaryEmbedding(dim=32, use_xpos=use_xpos).rotate_queries_with_cached_keys(queries[..., -given:, :], keys)
    right, scores = (rotated[..., -1:, :] @ others.transpose(-1, -2) for rotated, others in (whole, step))
    return ((scores - right).norm() / right.norm()).item()


as_stated = True
for length in (64, 256, 1024):
    plain, step, all_given = off(length, 1, False), off(length, 1, True), off(length, length, True)
    print(f"{length} keys: one query is off by {step:.1%}; without xPos by {plain:.1%}; all given by {all_given:.1%}")
    as_stated = as_stated and max(plain, all_given) < 1e-4 and step > length / 5000
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
