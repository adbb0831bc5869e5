#!/usr/bin/env bash
# TRL's DPO with a likelihood term (loss_type "sft") trains something else when the same batch is cut into other micro-batches.
#
# Guess:   two pairs in one batch, or one by one with two accumulation steps, give one gradient: transformers has counted tokens over the
#          whole accumulated batch since 4.46, and a preference loss is a mean over pairs anyway.
# Seen:    so it is for "sigmoid" alone. The "sft" term is a mean over the tokens of each micro-batch, then a mean over micro-batches: cut into
#          single pairs, every answer weighs the same, in one batch every token does. For an answer of a word beside a report the
#          gradients differ by most of their length. No warning.
# Matters: MPO-like mixes (sigmoid + sft) are what keeps medical answers likely, and VQA sets hold "Yes." beside whole reports. A
#          smaller GPU, with more accumulation steps, moves the weight from reports to one-word answers.
# Versions: trl 1.16.0, transformers 5.19.0, torch 2.13.0, datasets 5.2.0, accelerate 1.15.0, Python 3.11; a random Llama of two layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 trl==1.16.0 transformers==5.19.0 datasets==5.2.0 accelerate==1.15.0 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" venv/bin/python - <<'PYTHON' 2>log.txt || { tail -20 log.txt; exit 1; }
import copy
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

print(*(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")))
byte_level = Tokenizer(models.BPE())
byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special, alphabet = ["<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
byte_level.train_from_iterator([], trainers.BpeTrainer(vocab_size=259, special_tokens=special, initial_alphabet=alphabet))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
pairs = [
    {"prompt": "Nodule?", "chosen": "No.", "rejected": "Yes."},
    {
        "prompt": "Report:",
        "chosen": "The heart is not enlarged. The lungs are clear. There is no effusion and no pneumothorax.",
        "rejected": "The heart is enlarged. There is a large effusion on the left and a pneumothorax.",
    },
]
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
start = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes))


def update(loss_types, batch, accumulation):
    """What one step of plain gradient descent at learning rate 1 changes, as one vector."""
    model = copy.deepcopy(start)
    arguments = DPOConfig(
        output_dir="out", max_steps=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=1e9,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, loss_type=loss_types,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, start, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    changes = [after.detach() - before.detach() for after, before in zip(model.parameters(), start.parameters(), strict=True)]
    return torch.cat([change.flatten() for change in changes])


errors = {}
for loss_types in (["sigmoid"], ["sigmoid", "sft"]):
    whole, cut = update(loss_types, 2, 1), update(loss_types, 1, 2)
    errors[len(loss_types)] = ((whole - cut).norm() / whole.norm()).item()
    print(f"{' + '.join(loss_types)}: expected one gradient for 2 x 1 and 1 x 2 pairs; seen a difference of {errors[len(loss_types)]:.1%}")
assert errors[1] < 1e-3 and errors[2] > 0.3
PYTHON
