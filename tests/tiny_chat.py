"""A chat model with random weights: real vLLM, real tokenizer and chat template, no knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "<|end|>", "<|user|>", "<|assistant|>")


def save_tokenizer(folder: Path, *, max_positions: int = 2048, template: bool = True) -> Any:
    """Saves and returns a byte-level tokenizer (one token a byte) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate((*SPECIAL, *letters))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=max_positions,
    )
    if template:
        tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_tiny_chat(folder: Path, *, seed: int = 0, max_positions: int = 2048, template: bool = True) -> Path:
    """Saves a Llama of 2 layers × 64 with the byte-level tokenizer and returns its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = len(save_tokenizer(folder, max_positions=max_positions, template=template))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=max_positions,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            # Spread the output, so that a judge made of chance uses the whole grid.
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder)
    return folder
