#!/usr/bin/env bash
# tptt 0.12.1, transformers 5.24.0, torch 2.13.0: a Llama that get_tptt_model has given linear attention.
#
# It is computed in chunks, each as long as the largest divisor of the text's length that is at most max_chunk_size, 64
# by default: 64 for 128 tokens, 63 for 126, 1 for 127. Chunks should be a way to compute the same; here the result
# depends on where they end, so that one more token at the end of a text changes the logits of those before it. Nothing
# changes while the chunks stay as they are: with max_chunk_size=1, or for the first 64 of 128 tokens. Nor does it in
# the Llama as it was. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 tptt==0.12.1
"$folder/bin/python" - <<'PYTHON'
import copy
import sys

import torch
import transformers
from tptt import TpttConfig, get_tptt_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(**small, initializer_range=0.2)
torch.manual_seed(0)
llama, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 97, (1, 128))
options = TpttConfig(base_model_config=config, base_model_name="none")
models = {"Llama as it was": llama}
for size in (1, 64):
    models[f"max_chunk_size={size}"] = get_tptt_model(copy.deepcopy(llama), options, max_chunk_size=size)[0].eval()


@torch.no_grad()
def apart(model, length):
    """The largest difference of the logits of the first tokens alone from theirs in the whole text."""
    whole = model(ids, use_cache=False).logits[:, :length]
    return (model(ids[:, :length], use_cache=False).logits - whole).abs().max().item()


found = {}
for name, model in models.items():
    found[name] = {length: apart(model, length) for length in (64, 126, 127)}
    differences = ", ".join(f"{length}: {difference:.1e}" for length, difference in found[name].items())
    print(f"{name}: the first tokens of 128, alone, are off by, for {differences}")
usual = found.pop("max_chunk_size=64")
same = [usual[64], *(difference for lengths in found.values() for difference in lengths.values())]
as_stated = max(same) < 1e-4 and min(usual[126], usual[127]) > 0.1
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
