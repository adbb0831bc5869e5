"""LLaVA-Med 1.5's tokens, prompt and image processing as one ``LlavaProcessor``.

Everything is as in the original's own inference: the ids of a prompt, one id aside that stands for the image, and the
pixels. Sources: `llava/conversation.py` (`mistral_instruct`), `tokenizer_image_token` and `process_images` in
`llava/mm_utils.py` of github.com/microsoft/LLaVA-Med.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedpo_ray.convert.json_files import (
    LIST,
    OBJECT,
    TEXT,
    Kind,
    bad_setting,
    is_vector,
    maybe,
    one_line,
    one_of,
    read_object,
    take,
    whole,
)
from mmedpo_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import LlavaProcessor

IMAGE = "<image>"
# No UTF-8 text holds the byte 0xFF, so no text was ever tokenised to its id: it is free to stand for images. Nothing is
# added to the vocabulary, so logits and log-probabilities stay those of the original to the last bit.
_FREE_TOKEN = "<0xFF>"

# The original tokenises what stands before and after the image on its own, and SentencePiece puts a blank before each
# piece of text: "\nIs there" begins with a blank token. Newer readers of the same files put one before the first only.
_BLANK_BEFORE_EACH_PIECE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}

# As `mistral_instruct` writes a conversation: blanks on both sides of an answer, no blank after its end token. A system
# message, which LLaVA-Med does without, goes into the first question as that style has it.
CHAT_TEMPLATE = """{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
  {%- if message.content is string %}
    {%- set text = message.content | trim %}
    {%- set images = 0 %}
  {%- else %}
    {%- set parts = namespace(text='', images=0) %}
    {%- for part in message.content %}
      {%- if part.type in ('image', 'image_url') %}
        {%- set parts.images = parts.images + 1 %}
      {%- elif part.type == 'text' %}
        {%- set parts.text = parts.text + part.text %}
      {%- endif %}
    {%- endfor %}
    {%- set text = parts.text | trim %}
    {%- set images = parts.images %}
  {%- endif %}
  {%- if message.role == 'system' %}
    {%- set system.text = '<<SYS>>\\n' + text + '\\n<</SYS>>\\n\\n' %}
  {%- elif message.role == 'assistant' %}
    {{- ' ' + text + ' ' + eos_token }}
  {%- else %}
    {{- '[INST] ' + system.text + '<image>\\n' * images + text + ' [/INST]' }}
    {%- set system.text = '' %}
  {%- endif %}
{%- endfor %}"""

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_PIXELS = {
    "image_mean": maybe(Kind(lambda value: is_vector(value, 3), "three numbers")),
    "image_std": maybe(Kind(lambda value: is_vector(value, 3, above=0.0), "three numbers above 0")),
}

_ID = whole(0, 2**24)
_VOCABULARY = Kind(
    lambda value: (
        isinstance(value, dict)
        and all(map(_ID.fits, value.values()))
        and len(set(value.values())) == len(value)
    ),
    "an object that gives each token an id of its own",
)
_SPECIAL = maybe(
    Kind(
        lambda token: TEXT.fits(token.get("content") if isinstance(token, dict) else token),
        "a text, or an object with content, a text",
    )
)
# What is read of tokenizer_config.json. Without a limit transformers writes 10^30.
_SETTINGS = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _SPECIAL),
    "model_max_length": maybe(whole(1, 10**31)),
}


def make_processor(
    source: Path, vision: Any, *, tower: Path | None, pad: bool, vocab_size: int
) -> LlavaProcessor:
    """Tokenizer, chat template and image processing of a checkpoint.

    Args:
        source: the original checkpoint.
        vision: the tower's ``CLIPVisionConfig``.
        tower: folder of the tower, whose ``preprocessor_config.json`` gives mean and deviation; OpenAI CLIP's without.
        pad: widen images to squares in the mean colour (``image_aspect_ratio`` "pad"), else crop the centre.
        vocab_size: rows of the embedding.

    Raises:
        UserError: the tokenizer is missing, damaged or not Mistral's.
    """
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    mean, deviation = _normalisation(tower)
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=pad,
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
            image_mean=mean,
            image_std=deviation,
        ),
        tokenizer=_tokenizer(source, vocab_size),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(source: Path, vocab_size: int) -> Any:
    """The original's tokenizer with an id for the image; adds no beginning token of its own, the template does."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content, settings, path = _read_tokenizer(source)
    known = _check_vocabulary(content, path)
    special = _special_tokens(settings, known, source / "tokenizer_config.json")
    image_id = _place_image(content, vocab_size, path)
    content["normalizer"] = _BLANK_BEFORE_EACH_PIECE
    content["pre_tokenizer"] = content["post_processor"] = content["padding"] = content["truncation"] = None
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        # tokenizers raises Exception itself.
        raise UserError(f"{path} cannot be understood: {one_line(error)}. Download it again.") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=settings.get("model_max_length") or 2048,
        clean_up_tokenization_spaces=False,
    )
    found = tokenizer.convert_tokens_to_ids(IMAGE)
    if found != image_id or len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {source} has {len(tokenizer)} tokens, the embedding of the model {vocab_size}. Are they of "
            "the same checkpoint?"
        )
    return tokenizer


def _check_vocabulary(content: dict[str, Any], path: Path) -> dict[str, int]:
    """The ids of all tokens in the content of a ``tokenizer.json``.

    Raises:
        UserError: it is not that of a byte-fallback BPE, or parts of it are missing or damaged.
    """
    parts = take(content, {"model": OBJECT, "added_tokens": LIST}, path, required=["model", "added_tokens"])
    kinds = {"type": one_of("BPE"), "vocab": _VOCABULARY, "merges": LIST}
    model = take(parts["model"], kinds, path, required=kinds, within="model.")
    known = dict(model["vocab"])
    for number, token in enumerate(parts["added_tokens"]):
        if (
            not isinstance(token, dict)
            or not TEXT.fits(token.get("content"))
            or not _ID.fits(token.get("id"))
        ):
            raise bad_setting(
                path, f"added_tokens[{number}]", token, "an object with content, a text, and id"
            )
        known[token["content"]] = token["id"]
    return known


def _special_tokens(settings: dict[str, Any], known: dict[str, int], path: Path) -> dict[str, str]:
    """The special tokens by what they are for, those of Mistral where ``tokenizer_config.json`` names none.

    Raises:
        UserError: one is no text, or not in the vocabulary.
    """
    given = {key: _text_of(settings.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    unknown = given["unk_token"] or "<unk>"
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown, "pad_token": unknown}
    special = {key: given[key] or default for key, default in defaults.items()}
    for key, token in special.items():
        if token not in known:
            raise bad_setting(path, key, settings.get(key), f"a token of the vocabulary ({token} is none)")
    return special


def _place_image(content: dict[str, Any], vocab_size: int, path: Path) -> int:
    """Gives the image a token id that no text has, in place; returns the id."""
    vocabulary = content["model"]["vocab"]
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    known = {**vocabulary, **added}
    if IMAGE in known:
        image_id = known[IMAGE]
    elif _FREE_TOKEN in vocabulary:
        image_id = vocabulary.pop(_FREE_TOKEN)
        vocabulary[IMAGE] = image_id
    else:
        raise UserError(
            f"the tokenizer in {path} has no token {_FREE_TOKEN} to stand for images; it is not Mistral's. Download "
            "the checkpoint's own."
        )
    if image_id >= vocab_size:
        raise UserError(
            f"the tokenizer in {path} gives {IMAGE} the id {image_id}, but the embedding has {vocab_size} rows "
            "(vocab_size). Are they of the same checkpoint?"
        )
    content["added_tokens"] = sorted(
        [token for token in content["added_tokens"] if token["content"] != IMAGE] + [_added(image_id)],
        key=lambda token: token["id"],
    )
    return image_id


def _added(token_id: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": IMAGE, **flags}


def _read_tokenizer(source: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """The tokenizer as ``tokenizer.json`` has it, the settings beside it, and the file it was read from.

    ``tokenizer.json`` itself goes before ``tokenizer.model``. A missing ``tokenizer_config.json`` has no settings.
    """
    path = source / "tokenizer_config.json"
    settings = take(read_object(path), _SETTINGS, path) if path.exists() else {}
    saved, pieces = source / "tokenizer.json", source / "tokenizer.model"
    if saved.exists():
        return read_object(saved), settings, saved
    if not pieces.is_file():
        raise UserError(
            f"{source} has no tokenizer (tokenizer.model or tokenizer.json). Download the checkpoint again."
        )
    from transformers import LlamaTokenizer

    try:
        read = LlamaTokenizer.from_pretrained(str(source))
    except Exception as error:
        # SentencePiece and protobuf raise their own kinds on a damaged file.
        first = str(error).strip().split("\n", 1)[0]
        raise UserError(f"cannot read the tokenizer in {source}: {first}. Download it again.") from error
    return json.loads(read.backend_tokenizer.to_str()), settings, pieces


def _normalisation(tower: Path | None) -> tuple[list[float], list[float]]:
    path = tower / "preprocessor_config.json" if tower is not None else None
    settings = take(read_object(path), _PIXELS, path) if path is not None and path.exists() else {}
    return settings.get("image_mean") or _CLIP_MEAN, settings.get("image_std") or _CLIP_STD


def _text_of(token: Any) -> str | None:
    """A special token, which ``tokenizer_config.json`` gives as text or with its flags."""
    return token["content"] if isinstance(token, dict) else token
