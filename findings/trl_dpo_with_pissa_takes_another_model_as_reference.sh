#!/usr/bin/env bash
# TRL's DPO with a LoRA that is initialised by PiSSA or OLoRA measures against a reference that is not the model before alignment.
#
# Guess:   without `ref_model`, and with a `peft_config`, the reference is the model with its adapter switched off, that is the one the
#          training starts from: before the first step both rewards are 0 and the loss is log 2.
# Seen:    these initialisations take the adapter's first value out of the base weights. The adapter switched off leaves the remainder, a
#          damaged model whose logits are far off. At a learning rate of 0 rewards are not 0 and the loss is not 0.6931, for
#          `precompute_ref_log_probs` too. Nothing warns; with the default initialisation all is as guessed.
# Matters: peft offers PiSSA for faster convergence. A trainer that takes the switched-off adapter for its reference then ties the model to
#          one that nobody has looked at, and its rewards, margins and KL are measured from there.
# Versions: trl 1.16.0, peft 0.21.2, transformers 5.19.0, torch 2.13.0, datasets 5.2.0, accelerate 1.15.0, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 trl==1.16.0 peft==0.21.2 transformers==5.19.0 datasets==5.2.0 \
    accelerate==1.15.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" venv/bin/python - <<'PYTHON' 2>log.txt || { tail -20 log.txt; exit 1; }
import math
from importlib.metadata import version

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "peft", "transformers", "torch")))
alphabet = pre_tokenizers.ByteLevel.alphabet()
byte_level = Tokenizer(models.BPE())
byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special = ["<s>", "</s>", "<pad>"]
byte_level.train_from_iterator([], trainers.BpeTrainer(vocab_size=259, special_tokens=special, initial_alphabet=alphabet))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
pair = {"prompt": "Is there a nodule?", "chosen": "No nodule is seen.", "rejected": "Yes, on the left."}


def first_step(initialisation, precomputed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes))
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=initialisation)
    arguments = DPOConfig(
        output_dir="out", max_steps=1, logging_steps=1, learning_rate=0.0, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4, precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list([pair] * 4), processing_class=tokenizer, peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]


for initialisation in (True, "pissa", "olora"):
    for precomputed in (False, True):
        log = first_step(initialisation, precomputed)
        loss, chosen, rejected = log["loss"], log["rewards/chosen"], log["rewards/rejected"]
        print(
            f"init_lora_weights={initialisation}, precomputed {precomputed}: expected loss 0.6931, rewards 0 and 0; "
            f"seen {loss:.4f}, {chosen:+.4f} and {rejected:+.4f}"
        )
        if initialisation is True:
            assert abs(loss - math.log(2)) < 1e-5 and abs(chosen) < 1e-4 and abs(rejected) < 1e-4
        else:
            assert abs(loss - math.log(2)) > 1e-3 and max(abs(chosen), abs(rejected)) > 0.01
PYTHON
