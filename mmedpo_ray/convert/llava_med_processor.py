"""LLaVA-Med 1.5's tokens, prompt and image processing as one ``LlavaProcessor``.

Everything is as in the original's own inference: the ids of a prompt (except the id that stands for the
image) and the pixels. ``chat_template.jinja`` writes a conversation as ``mistral_instruct`` does: blanks on
both sides of an answer, no blank after its end token. A system message, which LLaVA-Med does not use, goes
into the first question in that style. Sources: `llava/conversation.py` (`mistral_instruct`),
`tokenizer_image_token` and `process_images` in `llava/mm_utils.py` of github.com/microsoft/LLaVA-Med.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mmedpo_ray.convert.json_files import JsonSettings, bad_setting, checked, read_object
from mmedpo_ray.convert.llava_med_config import Share, Token
from mmedpo_ray.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import LlavaProcessor

IMAGE = "<image>"
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
# No UTF-8 text holds the byte 0xFF, so no text was ever tokenised to its id: it is free to stand for images.
# Nothing is added to the vocabulary, so logits and log-probabilities stay those of the original to the last
# bit.
_FREE_TOKEN = "<0xFF>"

# The original tokenises what stands before and after the image on its own, and SentencePiece puts a blank
# before each piece of text: "\nIs there" begins with a blank token. Newer readers of the same files put one
# before the first only.
_BLANK_BEFORE_EACH_PIECE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}

Mean = Annotated[list[Share], Field(min_length=3, max_length=3)]
Deviation = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
# The file gives a special token as text, or as an object with its text and flags.
SpecialToken = Annotated[
    str | None,
    BeforeValidator(lambda token: token.get("content", token) if isinstance(token, dict) else token),
]


class Normalisation(JsonSettings):
    """What is read of a tower's ``preprocessor_config.json``; the default is OpenAI CLIP's."""

    image_mean: Mean | None = None
    image_std: Deviation | None = None


class TokenizerSettings(JsonSettings):
    """What is read of ``tokenizer_config.json``."""

    bos_token: SpecialToken = None
    eos_token: SpecialToken = None
    unk_token: SpecialToken = None
    pad_token: SpecialToken = None
    # Without a limit transformers writes 10^30.
    model_max_length: Annotated[int, Field(ge=1, le=10**31)] | None = None


class _AddedToken(JsonSettings):
    id: Token
    content: str


class _BpeModel(JsonSettings):
    type: Literal["BPE"]
    vocab: dict[str, Token]
    merges: list[Any]

    @field_validator("vocab")
    @classmethod
    def _has_unique_ids(cls, value: dict[str, int]) -> dict[str, int]:
        if len(set(value.values())) < len(value):
            raise ValueError("two tokens have the same id")
        return value


class TokenizerFile(JsonSettings):
    """What is checked of ``tokenizer.json``: a byte-fallback BPE."""

    model: _BpeModel
    added_tokens: list[_AddedToken]


def make_processor(
    source: Path, vision: Any, *, tower: Path | None, pad: bool, vocab_size: int
) -> LlavaProcessor:
    """Tokenizer, chat template and image processing of a checkpoint.

    Args:
        source: the original checkpoint.
        vision: the tower's ``CLIPVisionConfig``.
        tower: folder of the tower, whose ``preprocessor_config.json`` gives mean and deviation; OpenAI CLIP's
            without.
        pad: widen images to squares in the mean colour (``image_aspect_ratio`` "pad"), else crop the centre.
        vocab_size: rows of the embedding.

    Raises:
        UserError: the tokenizer is missing, damaged or not Mistral's.
    """
    from transformers import LlavaProcessor
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    path = tower / "preprocessor_config.json" if tower is not None else None
    content = read_object(path) if path is not None and path.exists() else {}
    pixels = checked(Normalisation, content, path or source)
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=pad,
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
            image_mean=pixels.image_mean or OPENAI_CLIP_MEAN,
            image_std=pixels.image_std or OPENAI_CLIP_STD,
        ),
        tokenizer=_tokenizer(source, vocab_size),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(source: Path, vocab_size: int) -> Any:
    """The original's tokenizer with an id for the image; the template adds the beginning token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings_path = source / "tokenizer_config.json"
    settings = checked(
        TokenizerSettings, read_object(settings_path) if settings_path.exists() else {}, settings_path
    )
    content, path = _read_tokenizer(source)
    file = checked(TokenizerFile, content, path)
    known = file.model.vocab | {token.content: token.id for token in file.added_tokens}
    special = _special_tokens(settings, known, settings_path)
    image_id = _place_image(content, known, vocab_size, path)
    content["normalizer"] = _BLANK_BEFORE_EACH_PIECE
    content["pre_tokenizer"] = content["post_processor"] = content["padding"] = content["truncation"] = None
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        # tokenizers raises Exception itself.
        raise UserError(f"{path} cannot be understood: {first_line(error)}. Download it again.") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=settings.model_max_length or 2048,
        clean_up_tokenization_spaces=False,
    )
    if tokenizer.convert_tokens_to_ids(IMAGE) != image_id or len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {source} has {len(tokenizer)} tokens, the embedding of the model "
            f"{vocab_size}. Are they of the same checkpoint?"
        )
    return tokenizer


def _read_tokenizer(source: Path) -> tuple[dict[str, Any], Path]:
    """The content that ``tokenizer.json`` has or would have, and the file it was read from."""
    saved, pieces = source / "tokenizer.json", source / "tokenizer.model"
    if saved.exists():
        return read_object(saved), saved
    if not pieces.is_file():
        raise UserError(
            f"{source} has no tokenizer (tokenizer.model or tokenizer.json). Download the checkpoint again."
        )
    from transformers import LlamaTokenizer

    try:
        tokenizer = LlamaTokenizer.from_pretrained(str(source))
    except Exception as error:
        # SentencePiece and protobuf raise their own kinds on a damaged file.
        raise UserError(
            f"cannot read the tokenizer in {source}: {first_line(error)}. Download it again."
        ) from error
    return json.loads(tokenizer.backend_tokenizer.to_str()), pieces


def _special_tokens(settings: TokenizerSettings, known: dict[str, int], path: Path) -> dict[str, str]:
    """The special tokens by what they are for; Mistral's where ``tokenizer_config.json`` names none.

    Raises:
        UserError: one is not in the vocabulary.
    """
    unknown = settings.unk_token or "<unk>"
    special = {
        "bos_token": settings.bos_token or "<s>",
        "eos_token": settings.eos_token or "</s>",
        "unk_token": unknown,
        "pad_token": settings.pad_token or unknown,
    }
    for key, token in special.items():
        if token not in known:
            raise bad_setting(path, key, getattr(settings, key), f"the vocabulary has no token {token}")
    return special


def _place_image(content: dict[str, Any], known: dict[str, int], vocab_size: int, path: Path) -> int:
    """Gives the image a token id that no text has, in ``content``; returns the id."""
    vocabulary = content["model"]["vocab"]
    if IMAGE in known:
        image_id = known[IMAGE]
    elif _FREE_TOKEN in vocabulary:
        image_id = vocabulary.pop(_FREE_TOKEN)
        vocabulary[IMAGE] = image_id
    else:
        raise UserError(
            f"the tokenizer in {path} has no token {_FREE_TOKEN} to stand for images; it is not Mistral's. "
            "Download the checkpoint's own."
        )
    if image_id >= vocab_size:
        raise UserError(
            f"the tokenizer in {path} gives {IMAGE} the id {image_id}, but the embedding has {vocab_size} "
            "rows (vocab_size). Are they of the same checkpoint?"
        )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    others = [token for token in content["added_tokens"] if token["content"] != IMAGE]
    image = {"id": image_id, "content": IMAGE, **flags}
    content["added_tokens"] = sorted([*others, image], key=lambda token: token["id"])
    return image_id
