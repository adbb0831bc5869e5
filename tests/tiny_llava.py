"""A LLaVA small enough for unit tests: random weights, real code paths.

    folder = build_tiny_llava(tmp_path / "llava")

CLIP tower, projector and Mistral of about 0.1 million parameters with a byte-level BPE and an image-first
chat template of Mistral's form, saved in the spelling of the hub, so that transformers, vLLM and Ray Serve
load it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
)

from mmedpo_ray.phantom.tokenizer import make_processor, train_tokenizer

IMAGE_SIZE = 32
PATCH_SIZE = 8
HEAD_SIZE = 32  # the smallest that vLLM supports on CPU


def build_tiny_llava(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Saves model and processor under ``folder`` and returns it; the same seed gives the same weights."""
    tokenizer = train_tokenizer(["Is there a nodule in the left lung? Yes, there is. No."], 512)
    processor = make_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=2 * HEAD_SIZE,
            intermediate_size=64,
            projection_dim=2 * HEAD_SIZE,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=2 * HEAD_SIZE,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=HEAD_SIZE,
            max_position_embeddings=512,
            sliding_window=None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(torch.float32)
        # Several times the usual initial scale: a fresh model is so flat that mistakes would hide in
        # rounding.
        with torch.no_grad():
            for parameter in model.model.language_model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)
            model.model.multi_modal_projector.linear_2.weight.mul_(20.0)
            model.lm_head.weight.mul_(4.0)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({_hub_name(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def put_the_image_last(folder: Path) -> None:
    """Gives a saved model a chat template that writes the question before the image."""
    (folder / "chat_template.jinja").write_text(
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% for c in m.content %}{% if "
        "c.type == 'text' %}{{ c.text }}\n{% endif %}{% endfor %}{% for c in m.content %}{% if "
        "c.type == 'image' %}<image>{% endif %}{% endfor %} [/INST]{% else %} {{ m.content[0].text "
        "}}</s>{% endif %}{% endfor %}"
    )


def leave_the_beginning_to_the_tokenizer(folder: Path) -> None:
    """The beginning token no longer comes from the chat template, as in the models of llava-hf."""
    processor = LlavaProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    processor.chat_template = processor.chat_template.replace("{{- bos_token }}", "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    processor.save_pretrained(folder)


def _hub_name(name: str) -> str:
    """transformers 5 leaves out ``vision_model`` when it saves; checkpoints on the hub have it."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return f"{tower}vision_model.{name.removeprefix(tower)}"
    return name
