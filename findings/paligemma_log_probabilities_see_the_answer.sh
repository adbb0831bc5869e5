#!/usr/bin/env bash
# PaliGemma in transformers: an answer that is scored as part of the text is seen by its own first token; the log-probabilities are no likelihoods.
#
# Guess:   processor(images=image, text=prompt + answer) and one forward pass give the log-probabilities of the answer's tokens, each from what
#          stands before it, as for LLaVA and every other generative model: the sum equals that of generate()'s steps.
# Seen:    the processor calls every token of `text` prefix (token_type_ids 0), and PaliGemma's prefix attends in both directions: position t sees
#          token t + 1, which it is to predict. The same without token_type_ids, in training and in evaluation. Only with the answer as
#          `suffix` do sums equal those of generate(). No error, no warning.
# Matters: log-ratios of DPO, likelihood scores of closed answers, and perplexities of PaliGemma (radiology models are built on it) are
#          then those of a model that copies the answer: margins say nothing, and what was trained cannot be generated.
# Versions: transformers 5.19.0, torch 2.13.0, pillow 13.0.0, Python 3.11; a random PaliGemma of two layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 transformers==5.19.0 pillow==13.0.0 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

print(*(f"{name} {version(name)}" for name in ("transformers", "torch")))
torch.set_num_threads(1)
byte_level = Tokenizer(models.BPE())
byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special, alphabet = ["<bos>", "<eos>", "<pad>", "<image>"], pre_tokenizers.ByteLevel.alphabet()
byte_level.train_from_iterator([], trainers.BpeTrainer(vocab_size=260, special_tokens=special, initial_alphabet=alphabet))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
images.image_seq_length = 4
processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
image = Image.new("RGB", (40, 40), (90, 90, 90))
PROMPT = "<image>How many nodules?"


def make_model():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    text |= {"model_type": "gemma", "vocab_size": len(tokenizer), "num_key_value_heads": 1}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"projection_dim": 64, "hidden_size": 64}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=image_token, **sizes)
    model = PaliGemmaForConditionalGeneration(config)
    for weight in model.parameters():  # large enough for attention to matter, as in a trained model
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def inputs(answer, as_suffix):
    """The processor's output for the prompt, which it ends with a line break, and an answer."""
    if as_suffix:
        encoded = processor(images=image, text=PROMPT, suffix=answer, return_tensors="pt")
    else:
        encoded = processor(images=image, text=f"{PROMPT}\n{answer}", return_tensors="pt")
    encoded.pop("labels", None)
    return encoded


def answer_logps(model, encoded, length):
    """Log-probabilities of the answer's tokens but for the last of the text, which is <eos> or a line break, (length,)."""
    with torch.no_grad():
        logps = torch.log_softmax(model(**encoded).logits[0].float(), -1)
    end = encoded["input_ids"].shape[1] - 1
    return logps[end - length - 1 : end - 1].gather(1, encoded["input_ids"][0, end - length : end, None])[:, 0]


model = make_model()
for as_suffix in (True, False):
    for training in (False, True):
        model.train(training)
        first = answer_logps(model, inputs("4711", as_suffix), 4)[:3]
        changed = answer_logps(model, inputs("4719", as_suffix), 4)[:3]
        moved = (first - changed).abs().max().item()
        print(
            f"answer as {'suffix' if as_suffix else 'text'}, {'training' if training else 'evaluation'}: log-probabilities of "
            f"the first 3 digits move when the 4th changes; expected 0, seen {moved:.1e}"
        )
        assert moved < 1e-5 if as_suffix else moved > 1e-2

model.eval()
prompt = processor(images=image, text=PROMPT, return_tensors="pt")
prompt.pop("labels", None)
drawn = model.generate(
    **prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
)
answer = drawn.sequences[:, -6:]
steps = torch.log_softmax(torch.cat(drawn.logits).float(), -1).gather(1, answer[0, :, None]).sum().item()
sums = {}
for kind, type_id in {"suffix": 1, "text": 0, "nothing": None}.items():
    whole = {"input_ids": torch.cat([prompt["input_ids"], answer], 1), "pixel_values": prompt["pixel_values"]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if type_id is not None:
        whole["token_type_ids"] = torch.cat([prompt["token_type_ids"], torch.full_like(answer, type_id)], 1)
    with torch.no_grad():
        logps = torch.log_softmax(model(**whole).logits[0, -7:-1].float(), -1)
    sums[kind] = logps.gather(1, answer[0, :, None]).sum().item()
    print(f"sum over the generated answer, its types as of {kind}: expected {steps:.3f} as in generate(), seen {sums[kind]:.3f}")
assert abs(sums["suffix"] - steps) < 1e-3
assert abs(sums["text"] - steps) > 0.1 and sums["text"] == sums["nothing"]
PYTHON
