#!/usr/bin/env bash
# mambapy 1.2.0, torch 2.13.0: the first step sizes of a JambaLM, and JambaLMConfig(dt_min=..., dt_max=...).
#
# The Mamba layers of a new model draw the bias of their step sizes so that these lie between dt_min and dt_max, 0.001
# and 0.1 by default, give or take what the text adds: so it is in Jamba, the same model without embedding and head.
# JambaLM then draws the weights of all linear layers anew and sets their biases to zero, this one among them. Every
# step starts near softplus(0) = 0.69, seven times dt_max, and dt_min, dt_max, dt_init and dt_scale have no effect at
# all. One would expect the step sizes of the configuration in either model. Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 mambapy==1.2.0
"$folder/bin/python" - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from mambapy.jamba import Jamba, JambaLM, JambaLMConfig

small = {"d_model": 32, "n_layers": 2, "mlp_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def step_sizes(kind, **options):
    """The least, median and largest step size of the first layer of a new model, over a text."""
    torch.manual_seed(0)
    config = JambaLMConfig(**small, num_experts=1, num_experts_per_tok=1, vocab_size=97, **options)
    model = kind(config).eval()
    layer = (model.jamba if kind is JambaLM else model).layers[0].mamba
    seen = []
    layer.dt_layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 64)) if kind is JambaLM else torch.randn(1, 64, 32))
        steps = F.softplus(layer.dt_proj(seen[0]))
    return steps.min().item(), steps.median().item(), steps.max().item()


found = {}
for kind in (Jamba, JambaLM):
    for least, largest in ((0.001, 0.1), (0.0001, 0.001)):
        found[kind, largest] = step_sizes(kind, dt_min=least, dt_max=largest)
        said = " / ".join(f"{size:.1e}" for size in found[kind, largest])
        print(f"{kind.__name__}, dt_min={least}, dt_max={largest}: least / median / largest step {said}")
right = all(found[Jamba, largest][1] < largest for largest in (0.1, 0.001))
lost = found[JambaLM, 0.1], found[JambaLM, 0.001]
as_stated = right and lost[0] == lost[1] and min(lost[0]) > 0.6 and max(lost[0]) < 0.8
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
