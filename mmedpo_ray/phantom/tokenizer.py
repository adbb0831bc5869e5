"""Tokenizer, chat template and processor of the embedded LLaVA.

A byte-level BPE trained on the phantom world's own text plus a list of common radiology words: each word of
the phantom world is one token, and any other text can still be written byte by byte, so there is no unknown
token.

Training and inference have one format, `<s>[INST] <image>\\nquestion [/INST] answer</s>`. Only the template
(`chat_template.jinja`) writes the beginning token, the tokenizer adds none, so it can never come twice.
Content may be text or OpenAI-style parts; images come first wherever the parts put them, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BOS, EOS, PAD, IMAGE, USER_START, USER_END = "<s>", "</s>", "<pad>", "<image>", "[INST]", "[/INST]"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER_START, USER_END)

_FOLDER = Path(__file__).parent
CHAT_TEMPLATE = (_FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
# Words that real questions about radiology images use, so that they need not be spelled byte by byte.
RADIOLOGY_WORDS = (_FOLDER / "radiology_words.txt").read_text(encoding="utf-8").splitlines()


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE.

    Args:
        texts: Corpus of the phantom world.
        vocab_size: Upper bound, special tokens and the 256 bytes included.

    Raises:
        ValueError: If `vocab_size` cannot hold the bytes and special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f" {text}\n{text}" for text in texts] + [f" {line}" for line in RADIOLOGY_WORDS] * 3
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, "user_start": USER_START, "user_end": USER_END},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    """Image processing, tokenizer and template in one, as LLaVA models on the hub have it."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
