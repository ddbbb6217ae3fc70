#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0: SFTTrainer(model="FOLDER").
#
# A model class of one's own that AutoConfig.register and AutoModelForCausalLM.register make known is loaded by
# AutoModelForCausalLM.from_pretrained("FOLDER"). SFTTrainer, given the same folder, raises AttributeError: it asks the
# config for auto_map, which only a checkpoint with code of its own has. Given the loaded model, it trains.
# Ends with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 trl==1.16.0
HF_HUB_OFFLINE=1 "$folder/bin/python" - "$folder/model" <<'PYTHON'
import sys

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


AutoConfig.register("own-llama", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)
words = ["<end>", "the", "cat", "sat", "on", "a", "mat"]
split = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>", pad_token="<end>", unk_token="<end>")
small = {"vocab_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
place = sys.argv[1]
torch.manual_seed(0)
OwnForCausalLM(OwnConfig(**small)).save_pretrained(place)
tokenizer.save_pretrained(place)
loaded = AutoModelForCausalLM.from_pretrained(place)
print(f"AutoModelForCausalLM.from_pretrained gives a {type(loaded).__name__}")


def trained(model):
    options = {"output_dir": f"{place}-out", "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": []}
    data = Dataset.from_dict({"text": ["the cat sat on a mat"] * 2})
    trainer = SFTTrainer(model, SFTConfig(**options, disable_tqdm=True), train_dataset=data, processing_class=tokenizer)
    return trainer.train().training_loss


try:
    said = f"trains, loss {trained(place):.2f}"
except AttributeError as error:
    said = f"AttributeError: {error}"
print(f"SFTTrainer with the folder: {said}")
loss = trained(loaded)
print(f"SFTTrainer with the model: trains, loss {loss:.2f}")
as_stated = isinstance(loaded, OwnForCausalLM) and "auto_map" in said and loss > 0
print("as stated above" if as_stated else "this has changed")
sys.exit(not as_stated)
PYTHON
