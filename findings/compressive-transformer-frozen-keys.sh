#!/usr/bin/env bash
# compressive-transformer-pytorch 0.4.0, torch 2.13.0: what training leaves untrained.
#
# When a model in training compresses a memory for the first time, each of its attention layers that has one sets its
# own weights for keys and values (to_kv) to need no gradient, for good. That is at the second segment of the first
# text. From there on they stay as they were drawn, but for what the first segment gave, while all other weights are
# trained. Nothing says so, and model.train() does not undo it. One would expect the auxiliary loss alone, about the
# compression, to leave them out. A model trained on texts of one segment, which compresses nothing, does train them.
# Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 mogrifier==0.0.5 compressive-transformer-pytorch==0.4.0
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
from compressive_transformer_pytorch import AutoregressiveWrapper, CompressiveTransformer

SEGMENT = 16


def trained(segments):
    """How far to_q and to_kv have moved, and whether they need a gradient, after each of three texts."""
    torch.manual_seed(0)
    model = CompressiveTransformer(
        num_tokens=97, dim=32, depth=2, seq_len=SEGMENT, mem_len=SEGMENT, cmem_len=SEGMENT // 4, heads=2
    )
    wrapper = AutoregressiveWrapper(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    weights = {
        name: [weight for full, weight in model.named_parameters() if full.endswith(f"{name}.weight")]
        for name in ("to_q", "to_kv")
    }
    steps = []
    for _ in range(3):
        before = {name: [weight.detach().clone() for weight in some] for name, some in weights.items()}
        for loss, auxiliary_loss, _ in wrapper(torch.randint(0, 97, (2, SEGMENT * segments + 1)), return_loss=True):
            (loss + auxiliary_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(
            {
                name: (
                    max((now - old).abs().max().item() for now, old in zip(some, before[name])),
                    all(weight.requires_grad for weight in some),
                )
                for name, some in weights.items()
            }
        )
    return steps


found = {}
for segments in (1, 4):
    found[segments] = trained(segments)
    for number, step in enumerate(found[segments], 1):
        said = ", ".join(f"{name} by {moved:.0e} (to be trained: {needs})" for name, (moved, needs) in step.items())
        print(f"texts of {segments} segments, text {number} moves {said}")
short = all(moved > 0 and needs for step in found[1] for moved, needs in step.values())
queries = all(moved > 0 and needs for moved, needs in (step["to_q"] for step in found[4]))
stuck = all(moved == 0 for moved, _ in (step["to_kv"] for step in found[4][1:]))
frozen = not any(needs for _, needs in (step["to_kv"] for step in found[4]))
as_stated = short and queries and stuck and frozen
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
