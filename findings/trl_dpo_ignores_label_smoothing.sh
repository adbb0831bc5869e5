#!/usr/bin/env bash
# TRL's DPO ignores `label_smoothing` with its default loss: what is meant to be conservative DPO is plain DPO.
#
# Guess:   DPOConfig(label_smoothing=0.3) with loss_type "sigmoid" is cDPO, (1 - e) l(m) + e l(-m), as it was in TRL for years and is in the
#          note that introduced it; or it is refused.
# Seen:    losses and gradients with 0 and with 0.3 are equal to the last bit. Only "robust", "exo_pair", "aot" and "aot_unpaired" read the
#          setting, and "robust" subtracts where cDPO adds: its gradient grows with e. There is no cDPO any more, and no warning.
# Matters: medical preference pairs are noisy (in one released set a quarter of the chosen answers differ from the ground truth), which is what label
#          smoothing is for. A comparison of "DPO" with "cDPO" compares a run with itself.
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
import torch.nn.functional as F
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
pair = {"prompt": "Is there a nodule?", "chosen": "No nodule is seen.", "rejected": "Yes, on the left."}
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
reference = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **sizes))
policy = copy.deepcopy(reference)
with torch.no_grad():  # a policy that has moved, so that margins are not 0
    for weight in policy.parameters():
        weight += 0.02 * torch.randn_like(weight)


def first_step(loss_type, smoothing):
    """Loss, norm of the gradient and margin (times beta) of one step at learning rate 0."""
    arguments = DPOConfig(
        output_dir="out", max_steps=1, logging_steps=1, learning_rate=0.0, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, max_grad_norm=1e9, beta=0.1,
        loss_type=[loss_type], label_smoothing=smoothing,
    )  # fmt: skip
    trainer = DPOTrainer(
        copy.deepcopy(policy), reference, args=arguments, train_dataset=Dataset.from_list([pair] * 2), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], log["grad_norm"], log["rewards/margins"]


loss, norm, margin = first_step("sigmoid", 0.0)
smoothed, smoothed_norm, _ = first_step("sigmoid", 0.3)
robust, robust_norm, _ = first_step("robust", 0.3)
plain, flipped = -F.logsigmoid(torch.tensor(margin)).item(), -F.logsigmoid(torch.tensor(-margin)).item()
cdpo = 0.7 * plain + 0.3 * flipped
print(f"margin {margin:.4f}; sigmoid, label_smoothing 0: loss {loss:.6f}, gradient {norm:.6f}")
print(f"sigmoid, label_smoothing 0.3: expected loss {cdpo:.6f} and a smaller gradient; seen {smoothed:.6f} and {smoothed_norm:.6f}")
print(f"robust, label_smoothing 0.3: expected loss {(0.7 * plain - 0.3 * flipped) / 0.4:.6f}; seen {robust:.6f}, gradient {robust_norm:.6f}")
assert abs(loss - plain) < 1e-5 and abs(plain - cdpo) > 0.01
assert (smoothed, smoothed_norm) == (loss, norm)
assert abs(robust - (0.7 * plain - 0.3 * flipped) / 0.4) < 1e-5 and robust_norm > norm
PYTHON
