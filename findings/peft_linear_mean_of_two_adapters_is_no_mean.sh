#!/usr/bin/env bash
# peft: the "linear" combination of two LoRA adapters with weights 1/2 is not the mean of what they do.
#
# Guess:   add_weighted_adapter(["a", "b"], [0.5, 0.5], combination_type="linear") gives W + (dA + dB) / 2, as "cat" does with twice the rank.
# Seen:    the matrices A and B are averaged apart, each with the root of its weight, so that the product has cross terms of one run's A
#          with the other's B: the error is as large as the mean itself. "svd", the default type, cuts to the larger of the
#          two ranks and is off by 40 %. Only "cat" is the mean. No warning.
# Matters: adapters of several seeds, of text and of visual pairs, or of SFT and DPO are averaged against overfitting. A worse average is
#          then blamed on the adapters.
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 peft==0.21.2 transformers==5.19.0 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")))
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), config, adapter_name="a")
model.add_adapter("b", config)
layer = model.base_model.model.model.layers[0].self_attn.q_proj
mean = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2

errors = {}
for kind in ("cat", "linear", "svd"):
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], kind, combination_type=kind)
    errors[kind] = ((layer.get_delta_weight(kind) - mean).norm() / mean.norm()).item()
    print(f"{kind}: expected the mean of both updates; seen an error of {errors[kind]:.0%} of it")
cross = layer.lora_B["a"].weight @ layer.lora_A["b"].weight + layer.lora_B["b"].weight @ layer.lora_A["a"].weight
scale = layer.scaling["a"] / 2
left = layer.get_delta_weight("linear") - mean - scale * cross
print(f"linear less mean less cross terms: {(left.norm() / mean.norm()).item():.1e}")

assert errors["cat"] < 1e-5
assert errors["linear"] > 0.7 and (left.norm() / mean.norm()).item() < 1e-5
assert errors["svd"] > 0.2
PYTHON
