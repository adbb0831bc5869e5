"""Tiny random models of every supported architecture: random weights, real code paths.

    folder = build_tiny("qwen2_5_vl", tmp_path / "model")

Made from configurations, with tokenizer, image processing and a chat template of the form that the models of
this architecture have on the hub. Weights are several times as large as usual, so that logits are far from
uniform, position and image matter, and a mistake does not hide in rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_llava import build_tiny_llava
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.saving import rename_weights

TEXTS = [
    "Is there a nodule in the left lung? Yes, there is a nodule.",
    "What modality is shown? A chest radiograph. No, the lungs are clear.",
] * 4
# Of the language model; heads of the smallest size that vLLM supports on CPU.
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.12,
    "vocab_size": 512,
}

# With Qwen2's default system prompt where SYSTEM is true.
CHATML = """{%- for m in messages -%}
{%- if loop.first and m.role != 'system' and SYSTEM -%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}\
{% if c.type in ('image', 'image_url') %}IMAGE{% elif c.type == 'text' %}\
{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

GEMMA = """{{ bos_token }}{%- for m in messages -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.content is string -%}{{ m.content | trim }}{%- else -%}{%- for c in m.content -%}
{%- if c.type in ('image', 'image_url') -%}{{ '<start_of_image>' }}
{%- elif c.type == 'text' -%}{{ c.text | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

Parts = tuple[Any, Any, list[int]]


def build_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """Saves a model of the ``model_type`` and its processor; the same seed gives the same weights."""
    if kind == "llava":
        return build_tiny_llava(folder, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor, ends = BUILDERS[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif not parameter.any():
                    # Zero, it would hide the image.
                    parameter.normal_(0, 0.1)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, do_sample=False)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    # As checkpoints on the hub spell them.
    rename_weights(folder, ARCHITECTURES[kind]().saved_name)
    return folder


def _tokenizer(
    specials: list[str], roles: dict[str, str], template: str, **named: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        extra_special_tokens=roles,
        **named,
    )


def _chatml(image: str, *, system: bool) -> str:
    return CHATML.replace("SYSTEM", str(system).lower()).replace("IMAGE", image)


def _qwen_tokenizer(*, system: bool) -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    roles = {"vision_start_token": vision[0], "vision_end_token": vision[1]}
    roles |= {"vision_bos_token": vision[0], "vision_eos_token": vision[1]}
    roles |= {"image_token": vision[2], "video_token": vision[3]}
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>", system=system)
    return _tokenizer(
        [*specials, *vision], roles, template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _qwen2_5_vl() -> Parts:
    tokenizer = _qwen_tokenizer(system=True)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.12,
        },
        **_qwen_ids(tokenizer),
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 24},
    )
    processor = Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor, [tokenizer.eos_token_id]


def _gemma3() -> Parts:
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    vision = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    roles = {"boi_token": vision[0], "eoi_token": vision[1], "image_token": vision[2]}
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = _tokenizer([*specials, *vision], roles, GEMMA, **named)
    # As in Gemma's vocabulary, where newlines around an image become one token.
    tokenizer.add_tokens(["\n", "\n\n", "\n\n\n", "\n\n\n\n"])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (*specials, *vision)]
    config = Gemma3Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 3,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            # Shorter than the sequences, longer than an image.
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "pad_token_id": ids[0],
            "eos_token_id": ids[1],
            "bos_token_id": ids[2],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16,
        boi_token_index=ids[5],
        eoi_token_index=ids[6],
        image_token_index=ids[7],
    )
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=16, chat_template=GEMMA)
    return Gemma3ForConditionalGeneration(config), processor, [ids[4], ids[1]]


def _qwen3_vl() -> Parts:
    tokenizer = _qwen_tokenizer(system=False)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=TEXT
        | {"num_hidden_layers": 3, "head_dim": 32, "rope_parameters": rope}
        | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.12,
        },
        **_qwen_ids(tokenizer),
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 24},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    videos = Qwen3VLVideoProcessor()
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    return Qwen3VLForConditionalGeneration(config), processor, [tokenizer.eos_token_id]


def _internvl() -> Parts:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    roles = {"start_image_token": "<img>", "end_image_token": "</img>"}
    roles |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    template = _chatml("<IMG_CONTEXT>\n", system=False)
    tokenizer = _tokenizer(specials, roles, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = InternVLConfig(
        text_config=TEXT
        | {"model_type": "qwen2", "tie_word_embeddings": False}
        | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "attention_bias": True,
            "initializer_range": 0.12,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    videos = InternVLVideoProcessor()
    processor = InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)
    return InternVLForConditionalGeneration(config), processor, [tokenizer.eos_token_id]


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
GRIDS = [[56, 56], [56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]


def _llava_next() -> Parts:
    template = """{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'assistant' -%}
{{ ' ' + m.content[0].text + eos_token }}{%- else -%}[INST] {% for c in m.content %}
{%- if c.type in ('image', 'image_url') %}{{ '<image>\\n' }}{% elif c.type == 'text' %}{{ c.text }}{% endif %}
{%- endfor %} [/INST]{%- endif -%}{%- endfor -%}"""
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = _tokenizer(specials, {"image_token": "<image>"}, template, **named)
    config = LlavaNextConfig(
        text_config=TEXT
        | {"model_type": "mistral", "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=3,
        image_grid_pinpoints=GRIDS[1:],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=GRIDS[1:]
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return LlavaNextForConditionalGeneration(config), processor, [2]


def _llava_onevision() -> Parts:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    template = _chatml("<image>\n", system=False)
    roles = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = _tokenizer(specials, roles, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = LlavaOnevisionConfig(
        text_config=TEXT
        | {"model_type": "qwen2", "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        vision_config=SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRIDS,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 56, "width": 56}, image_grid_pinpoints=GRIDS)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor, [tokenizer.eos_token_id]


BUILDERS: dict[str, Callable[[], Parts]] = {
    "gemma3": _gemma3,
    "internvl": _internvl,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
