#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: MiniMaxForCausalLM with generate(num_beams=...).
#
# When beams change places, generate calls reorder_cache of the cache. MiniMax's cache keeps the states of its linear
# attention apart from the layers that DynamicCache reorders, and leaves them where they are: a beam goes on with the
# state of another. So the score that comes back is not that of the tokens that come back, and a better beam is missed.
# Nothing is raised or logged. With use_cache=False it is right; BambaForCausalLM, which also has layers of both kinds,
# is right both ways. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

transformers.logging.set_verbosity_error()
PROMPT = 5
small = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
kinds = ["linear_attention", "full_attention"] * 2
minimax = MiniMaxConfig(**small, head_dim=8, layer_types=kinds, num_local_experts=2, block_size=8)
mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1, 3]}
options = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def scores(model, ids, use_cache):
    """The score that comes with the best beam, and the sum of its tokens' log-probabilities in one forward."""
    wanted = {"use_cache": use_cache, "output_scores": True, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **wanted)
    read = model(output.sequences, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return output.sequences_scores.item(), read.gather(2, output.sequences[:, PROMPT:, None]).sum().item()


found = {}
for kind, config in ((BambaForCausalLM, BambaConfig(**small, **mamba)), (MiniMaxForCausalLM, minimax)):
    torch.manual_seed(0)
    model, ids = kind(config).eval(), torch.randint(3, 97, (1, PROMPT))
    for use_cache in (True, False):
        said, real = found[kind, use_cache] = scores(model, ids, use_cache)
        print(f"{kind.__name__}, use_cache={use_cache}: score of the best beam {said:.3f}, of its tokens {real:.3f}")
wrong = found.pop((MiniMaxForCausalLM, True))
as_stated = all(abs(said - real) < 1e-3 for said, real in found.values()) and abs(wrong[0] - wrong[1]) > 0.1
as_stated &= wrong[1] < found[MiniMaxForCausalLM, False][1] - 0.1
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
