#!/usr/bin/env bash
# recurrent-memory-transformer-pytorch 0.7.0, torch 2.13.0: RecurrentMemoryTransformerWrapper and the XL memories.
#
# The XL memories (keys and values of the segment before) are on by default. The wrapper's forward drops them: its
# logits and its loss are those of segments read without, even if xl_memories is passed to it. generate reads them, and
# so does the same forward with memory_replay_backprop=True, the way the README trains. That is documented as a way to
# save memory; one would expect it to train on the very loss return_loss=True gives, but a model trained with it is
# evaluated as another one. With use_xl_memories=False the two losses are equal. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 packaging==25.0 \
    hyper-connections==0.4.11 recurrent-memory-transformer-pytorch==0.7.0
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

SEGMENT = 16
small = {"num_tokens": 97, "dim": 32, "depth": 3, "heads": 2, "dim_head": 16, "num_memory_tokens": 4}


@torch.no_grad()
def by_hand(model, text, pass_on):
    """The logits of the text's segments, one read after the other, with or without the XL memories passed on."""
    memories, xl_memories, logits = None, None, []
    for segment in text.split(SEGMENT, dim=1):
        some, memories, xl_memories = model(segment, memories, xl_memories=xl_memories if pass_on else None)
        logits.append(some)
    return torch.cat(logits, dim=1)


found = {}
for use_xl_memories in (False, True):
    torch.manual_seed(0)
    model = RecurrentMemoryTransformer(**small, seq_len=SEGMENT, use_xl_memories=use_xl_memories).eval()
    wrapper = RecurrentMemoryTransformerWrapper(model)
    text = torch.randint(0, 97, (2, 4 * SEGMENT + 1))
    loss = wrapper(text, return_loss=True)[0].item()
    replayed = wrapper(text, memory_replay_backprop=True).item()
    found[use_xl_memories] = abs(loss - replayed)
    print(f"use_xl_memories={use_xl_memories}: loss {loss:.6f}, with memory_replay_backprop {replayed:.6f}")
_, memories, xl_memories = model(text[:, :SEGMENT])
rest = text[:, SEGMENT : 2 * SEGMENT]
with torch.no_grad():
    logits = wrapper(text[:, :-1])[0]
    given = (wrapper(rest, memories, xl_memories=xl_memories)[0] - wrapper(rest, memories)[0]).abs().max().item()
dropped, read = ((logits - by_hand(model, text[:, :-1], pass_on)).abs().max().item() for pass_on in (False, True))
print(f"the wrapper's logits are off by {dropped:.1e} from segments without XL memories, by {read:.1e} from with them")
print(f"passing xl_memories to the wrapper changes its logits by {given:.1e}")
as_stated = found[False] < 1e-5 and found[True] > 1e-3 and dropped < 1e-5 and read > 0.05 and given == 0
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
