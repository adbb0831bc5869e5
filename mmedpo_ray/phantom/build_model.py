"""Building the embedded model: a tiny LLaVA that knows the phantom world, trained in a few minutes.

    scores = build_phantom_llava(Path("out"), PhantomBuildConfig(), report)

A CLIP tower, a two-layer projector and a Mistral, as in LLaVA-Med 1.5, with 2 million parameters. The tower
learns to localise lesions in images without priors and is then frozen, as a general medical image encoder
would be; projector and language model then learn to answer from images of the *biased* world (`findings.py`).
So the model sees, and still guesses from the text, which preference alignment is meant to correct. The result
loads in transformers and vLLM; the one in `phantom_llava/` is part of the package.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import TaskID
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
)

from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.models.saving import check_new_folder, save_model
from mmedpo_ray.phantom.model_scores import score_model
from mmedpo_ray.phantom.tokenizer import make_processor, train_tokenizer
from mmedpo_ray.phantom.training import Report, train_language, train_tower
from mmedpo_ray.phantom.world import generate

logger = logging.getLogger(__name__)

MAX_POSITIONS = 1024


@dataclass(frozen=True)
class PhantomBuildConfig:
    """How the embedded model is built. The defaults make the shipped one; tests shrink them.

    Attributes:
        seed: Of data, initial weights and batches.
        image_size: Pixels per side; `patch_size` divides it.
        patch_size: Pixels per side of one patch; (image_size / patch_size)² image tokens.
        vision_width, vision_layers: The tower; heads are 32 wide.
        text_width, text_layers, text_mlp: The language model; heads are 32 wide, which vLLM supports on CPU.
        vocab_size: Upper bound of the vocabulary.
        tower_images, tower_steps, tower_batch, tower_rate: Tower training (uniform world).
        train_images, train_steps, train_batch, train_rate: Instruction tuning (biased world); a batch is a
            number of images, each with all its questions.
        score_images: Test images for the scores in the model card, in each world.
    """

    seed: int = 0
    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 96
    vision_layers: int = 4
    text_width: int = 160
    text_layers: int = 4
    text_mlp: int = 448
    vocab_size: int = 1024
    tower_images: int = 3000
    tower_steps: int = 300
    tower_batch: int = 32
    tower_rate: float = 1e-3
    train_images: int = 2500
    train_steps: int = 650
    train_batch: int = 8
    train_rate: float = 2e-3
    score_images: int = 200

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size {self.patch_size}, not {self.image_size}"
            )
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name} must be a multiple of 32, the head size, not {getattr(self, name)}")


def build_phantom_llava(folder: Path, config: PhantomBuildConfig, report: Report) -> dict:
    """Build the embedded model on one thread and save it with its processor and scores.

    The same configuration gives the same weights on the same machine and torch version.

    Args:
        folder: Where to save; created, existing files of the same names are overwritten.
        config: Sizes, amounts and seed.
        report: Called after every training step and scored batch.

    Returns:
        What `scores.json` in the folder holds: {"config", "parameters", "biased": {…}, "uniform": {…}}, see
        `model_scores.score_model`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: reproducible; and other processes share the cores
    try:
        torch.manual_seed(config.seed)
        train = list(generate("train", config.train_images, config.seed, size=config.image_size))
        texts = [text for phantom in train for q in phantom.questions for text in (q.question, q.answer)]
        tokenizer = train_tokenizer(texts, config.vocab_size)
        processor = make_processor(tokenizer, config.image_size, config.patch_size)
        model = LlavaForConditionalGeneration(llava_config(config, processor))
        logger.info("building a LLaVA of %d parameters", model.num_parameters())
        tower_scores = train_tower(model, processor, config, report)
        train_language(model, processor, train, config, report)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        save_model(model, processor, folder)
        scores: dict = {"config": asdict(config), "parameters": model.num_parameters(), "tower": tower_scores}
        for world in ("biased", "uniform"):
            phantoms = list(generate("test", config.score_images, config.seed, world, config.image_size))
            scores[world] = score_model(model, processor, phantoms, report)
    finally:
        torch.set_num_threads(threads)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def build_command(out: Path, seed: int = 0) -> None:
    """`mmedpo phantom build`: build the shipped size with a progress bar and print the scores.

    Raises:
        UserError: `out` is a file, or a folder that holds something already.
    """
    check_new_folder(out)
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks or done <= (bar.tasks[tasks[what]].completed or 0):
                tasks[what] = bar.add_task(what, total=total, note="", unit="steps")
            bar.update(tasks[what], completed=done)

        scores = build_phantom_llava(out, PhantomBuildConfig(seed=seed), report)
    for world in ("biased", "uniform"):
        values = ", ".join(
            f"{name} {score['value']:.3f} (n={score['n']})" for name, score in scores[world].items()
        )
        console.print(f"{world} world: {values}")
    console.print(f"the model is in {out}", soft_wrap=True, markup=False)


def llava_config(config: PhantomBuildConfig, processor: LlavaProcessor) -> LlavaConfig:
    """The architecture for a tokenizer's vocabulary."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        projection_dim=config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_width // 32,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=config.text_mlp,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_width // 32,
        num_key_value_heads=config.text_width // 32,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
        image_seq_length=(config.image_size // config.patch_size) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
