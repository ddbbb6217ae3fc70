#!/usr/bin/env bash
# transformers 5.24.0, peft 0.21.2, torch 2.13.0: PreTrainedModel.add_adapter.
#
# The documented way to put an adapter on a model of transformers. It asks for peft 0.22.0 or newer, when 0.21.2 was the
# newest on PyPI (November 2026), so that add_adapter and set_adapter raised ValueError whatever was installed. The same
# adapter by peft's own get_peft_model works.
# Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
ids = torch.arange(3, 20)[None]
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**small)).eval()
before = model(ids).logits
try:
    model.add_adapter(adapter)
    said = ""
except ValueError as error:
    said = str(error)
print(f"add_adapter: {said or 'accepted'}")
moved = (get_peft_model(model, adapter)(ids).logits - before).abs().max().item()
print(f"get_peft_model with the same adapter moves the logits by {moved:.1e}")
as_stated = ">= 0.22.0" in said and moved > 1e-3
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
