#!/usr/bin/env bash
# infini-transformer-pytorch 0.2.1, torch 2.13.0: InfiniTransformerWrapper.generate, its prompt longer than a segment.
#
# The model is there to carry what came before the current segment along in a memory. generate starts at the prompt's
# last segment, with an empty memory, and never reads what comes before: of a prompt of 80 tokens, in segments of 32, it
# reads the last 16. Two prompts which share only those are continued alike, token by token, with the same seed. One
# would expect the earlier segments to be read into the memory first, as they are when the wrapper computes a loss. Read
# into it by hand, one segment after the other, they do change the logits of the last. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet \
    torch==2.13.0 numpy==2.2.6 einops==0.8.2 rotary-embedding-torch==0.9.1 infini-transformer-pytorch==0.2.1
TQDM_DISABLE=1 "$folder/bin/python" - <<'PYTHON'
import sys

import torch
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

SEGMENT = 32
torch.manual_seed(0)
model = InfiniTransformer(num_tokens=97, dim=32, depth=2, dim_head=16, heads=2, use_mem_delta_rule=True).eval()
for attention, _ in model.layers:
    # As new, nearly all weight is on the current segment; here it is shared with the memory, half and half.
    torch.nn.init.zeros_(attention.fastweight_mem.head_gates)
torch.nn.init.normal_(model.to_logits.weight)
wrapper = InfiniTransformerWrapper(model, segment_length=SEGMENT)
prompt = torch.randint(0, 97, (1, 80))
other_start, other_end = prompt.clone(), prompt.clone()
other_start[:, :64] = torch.randint(0, 97, (1, 64))
other_end[:, 64:] = torch.randint(0, 97, (1, 16))


def continued(text):
    torch.manual_seed(1)
    return wrapper.generate(prompt=text, seq_len=140)


@torch.no_grad()
def last_logits(text):
    """The logits of the last segment, after the earlier ones have been read into the memory."""
    *earlier, last = text.split(SEGMENT, dim=1)
    memory = None
    for segment in earlier:
        memory = model(segment, past_memories=memory, return_new_memories=True).past_memories
    return model(last, past_memories=memory).logits


def alike(text):
    return (continued(text) == continued(prompt)).sum().item()


by_start, by_end = alike(other_start), alike(other_end)
difference = (last_logits(other_start) - last_logits(prompt)).abs().max().item()
print(f"of 60 tokens sampled: {by_start} are the same if the prompt's first 64 are others, {by_end} if its last 16 are")
print(f"by hand, other first 64 tokens change the last segment's logits by up to {difference:.1e}")
as_stated = by_start == 60 and by_end < 30 and difference > 0.01
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
