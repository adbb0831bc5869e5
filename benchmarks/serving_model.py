"""A random LLaVA with 576 tokens for an image, for the benchmarks of serving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from mmedpo_ray.models.saving import save_model
from mmedpo_ray.phantom.tokenizer import make_processor, train_tokenizer

IMAGE_SIZE, PATCH_SIZE = 336, 14


def build_model(folder: Path, hidden: int, layers: int) -> Path:
    """Saves the model.

    Args:
        folder: where to.
        hidden: width of the language model, a multiple of 64.
        layers: its layers.
    """
    tokenizer = train_tokenizer(["Is there a nodule in the left lung? Yes, there is. No."], 512)
    processor = make_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=32,
            max_position_embeddings=1024,
            sliding_window=None,
            **special,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        **special,
    )
    torch.manual_seed(0)
    save_model(LlavaForConditionalGeneration(config).float(), processor, folder)
    return folder


def draw_image(generator: np.random.Generator, side: int = IMAGE_SIZE) -> Image.Image:
    """A grey image of noise, which no cache has seen."""
    return Image.fromarray(generator.integers(0, 255, (side, side), dtype=np.uint8))
