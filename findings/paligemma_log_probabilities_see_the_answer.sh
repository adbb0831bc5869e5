#!/usr/bin/env bash
# PaliGemma in transformers: an answer that is scored as part of the text is seen by its own first token; the log-probabilities are no likelihoods.
#
# Guess:   processor(images=image, text=prompt + answer) and one forward pass give the log-probabilities of the answer's tokens, each from what
#          stands before it, as for LLaVA and every other generative model: the sum equals that of generate()'s steps.
# Seen:    the processor calls every token of `text` prefix (token_type_ids 0), and PaliGemma's prefix attends in both directions: position t sees
#          token t + 1, which it is to predict. The same without token_type_ids, in training and in evaluation. Only with the answer as
#          `suffix` is it causal and equal to generate(). Training on random digits shows it: the loss falls far below log 10, the entropy
#          that no model can beat. No error, no warning.
# Matters: log-ratios of DPO, likelihood scores of closed answers, and perplexities of PaliGemma (a usual base of radiology VLMs) are
#          then those of a model that copies the answer: margins say nothing, and what was trained cannot be generated.
# Versions: transformers 5.19.0, torch 2.13.0, pillow 13.0.0, Python 3.11; a random PaliGemma of two layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.3.5 transformers==5.19.0 pillow==13.0.0 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
import math
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


def make_model():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    text |= {"model_type": "gemma", "vocab_size": len(tokenizer), "num_key_value_heads": 1}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=image_token, projection_dim=64, hidden_size=64
        )
    )


def inputs(answers, as_suffix):
    """The processor's output for prompt and answers; the prompt ends in a line break, as PaliGemma's does."""
    prompt = "<image>Accession number?"
    if as_suffix:
        encoded = processor(images=[image] * len(answers), text=[prompt] * len(answers), suffix=answers, return_tensors="pt")
    else:
        texts = [f"{prompt}\n{answer}" for answer in answers]
        encoded = processor(images=[image] * len(answers), text=texts, return_tensors="pt")
    encoded.pop("labels", None)
    return encoded


def answer_logps(model, encoded, length, as_suffix):
    """Log-probabilities of the answers' digits, (answers, length)."""
    # A suffix ends with <eos>; without, the processor closes the text with the line break that ends every prompt.
    end = encoded["input_ids"].shape[1] - 1
    logps = torch.log_softmax(model(**encoded).logits.float(), -1)[:, end - length - 1 : end - 1]
    return logps.gather(2, encoded["input_ids"][:, end - length : end, None])[..., 0]


model = make_model().eval()
answer = "4711"
for as_suffix in (True, False):
    encoded, other = inputs([answer], as_suffix), inputs(["4719"], as_suffix)
    with torch.no_grad():
        first = answer_logps(model, encoded, 4, as_suffix)[0, :3]
        changed = answer_logps(model, other, 4, as_suffix)[0, :3]
    moved = (first - changed).abs().max().item()
    print(f"answer as {'suffix' if as_suffix else 'text'}: types {encoded['token_type_ids'][0].tolist()}")
    print(f"  log-probabilities of the first 3 digits move when the 4th changes: expected 0, seen {moved:.1e}")
    assert (moved < 1e-6) == as_suffix

DIGITS = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
generator = torch.Generator().manual_seed(0)
for as_suffix in (True, False):
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    encoded, losses = inputs(["000000"] * 16, as_suffix), []
    end = encoded["input_ids"].shape[1] - 1
    for _ in range(200):
        encoded["input_ids"][:, end - 6 : end] = DIGITS[torch.randint(0, 10, (16, 6), generator=generator)]
        loss = -answer_logps(model, encoded, 6, as_suffix).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seen = sum(losses[-20:]) / 20
    print(f"trained on random digits as {'suffix' if as_suffix else 'text'}: expected loss at least {math.log(10):.2f}, seen {seen:.2f}")
    assert seen > 2.25 if as_suffix else seen < 1.5
PYTHON
