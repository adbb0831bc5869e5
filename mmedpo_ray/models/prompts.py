"""Writing prompts and answers as token ids, the same way for training, reference and inference.

The ids are those of transformers' own processor: its chat template with the image at its place, one beginning
token if the template writes it or the tokenizer adds it, and one image token for each feature of the vision
tower. How many those are may depend on the size of the image, so prompts are written with one image token
(*narrow*) and widened for an image. A chat request to the vLLM endpoint is answered from the same ids if the
template writes the beginning token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.architectures.base import Architecture, Inputs

if TYPE_CHECKING:
    from PIL import Image

# Prompts and responses that are kept.
_CACHED_PROMPTS = 4_096
_CACHED_RESPONSES = 16_384
_CACHED_SIZES = 4_096
# No template writes these.
_PROBES = "?", "answer-probe"


class PromptWriter:
    """Writes (image, question) prompts and their responses as token ids.

    Args:
        processor: of :func:`~mmedpo_ray.models.loading.load_processor`.

    Attributes:
        architecture: of the model.
        image_token_id: id that stands for one feature of an image.
        end: text of the token that ends every response, as the chat template writes it.
        pad_token_id: id to fill rows with.
        num_image_tokens: ids that stand for an image; ``None``: its size decides.

    Raises:
        UserError: the template does not place exactly one image, an answer would have no end, or the
            processor does not say how many ids an image has.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template or self._tokenizer.chat_template
        self.architecture: Architecture = _architecture_of_processor(processor)
        self._placeholder = self.architecture.placeholder(processor)
        self._written_image = self.architecture.written_image(processor)
        self._cached_prompt = functools.lru_cache(_CACHED_PROMPTS)(self._encode_prompt)
        self._cached_response = functools.lru_cache(_CACHED_RESPONSES)(self._encode_response)
        self._cached_count = functools.lru_cache(_CACHED_SIZES)(self._count_image_tokens)
        self.image_token_id: int = self.architecture.image_token_id(processor)
        self._placeholder_id: int = self._tokenizer.convert_tokens_to_ids(self._placeholder)
        self._adds_bos = _adds_bos(self._tokenizer)
        self.num_image_tokens = self._cached_count((1, 1)) if self.architecture.one_image_size else None
        if self.narrow_prompt("?") is None:
            raise UserError(
                "the chat template does not write the image placeholder for {'type': 'image'} content "
                "exactly once. Use a template that places the image, such as the model's own on the hub."
            )
        self.end: str = self._find_end()
        self.end_token_id: int = self._tokenizer.convert_tokens_to_ids(self.end)
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self.end_token_id

    def narrow_prompt(self, question: str) -> list[int] | None:
        """Token ids up to where the answer begins, with a single image token.

        Returns:
            The ids, or ``None`` if the question itself holds an image placeholder, so that images and
            features would not match.
        """
        _, template_ids, narrow = self._cached_prompt(question)
        return narrow if self._is_one_image(template_ids, narrow) else None

    def prompt(self, question: str, size: tuple[int, int] | None = None) -> list[int] | None:
        """:meth:`narrow_prompt` with all the tokens of an image.

        Args:
            question: about the image.
            size: width and height of the image; needed where it decides on the number of tokens.
        """
        narrow = self.narrow_prompt(question)
        return None if narrow is None else self.widen(narrow, self.count_image_tokens(size))

    def engine_prompt(self, question: str) -> list[int] | None:
        """The prompt for vLLM, which puts the image's tokens in the placeholder's place itself."""
        _, template_ids, narrow = self._cached_prompt(question)
        return template_ids if self._is_one_image(template_ids, narrow) else None

    def prompt_text(self, question: str) -> str:
        """The prompt as the chat template writes it."""
        return self._cached_prompt(question)[0]

    def response(self, question: str, answer: str) -> list[int] | None:
        """Token ids of an answer that continue :meth:`prompt`, ended by the end token.

        The chat template writes the answer as well, so that blanks around it are those of inference. If the
        tokenizer keeps the prompt's ids as they are, the ids are those of the whole turn; else the answer is
        tokenised on its own. Either way ``prompt + response`` is the exact input.

        Returns:
            The ids, or ``None`` if the answer itself holds an image placeholder.
        """
        ids = self._cached_response(question, answer)
        return None if self.image_token_id in ids or self._placeholder_id in ids else ids

    def count_image_tokens(self, size: tuple[int, int] | None) -> int:
        """How many tokens an image of this width and height has."""
        if self.num_image_tokens is not None:
            return self.num_image_tokens
        if size is None:
            raise ValueError(f"the number of image tokens of {self.architecture.title} depends on the size")
        return self._cached_count(size)

    def widen(self, narrow: Sequence[int], image_tokens: int) -> list[int]:
        """Repeats the image token of a narrow prompt."""
        at = narrow.index(self.image_token_id)
        return [*narrow[:at], *[self.image_token_id] * image_tokens, *narrow[at + 1 :]]

    def pixels(self, images: Sequence[Image.Image]) -> Inputs:
        """What the vision tower takes of RGB images, by keyword."""
        return self.architecture.inputs(self._processor, images)

    def _count_image_tokens(self, size: tuple[int, int]) -> int:
        return self.architecture.image_tokens(self._processor, size)

    def _is_one_image(self, template_ids: list[int], narrow: list[int]) -> bool:
        return template_ids.count(self._placeholder_id) == 1 and narrow.count(self.image_token_id) == 1

    def _find_end(self) -> str:
        """The first special token that the template writes behind an answer; else the tokenizer's last."""
        turn = self._apply_template(chat_messages(*_PROBES), generation_prompt=False)
        behind = turn.rpartition(_PROBES[1])[2]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        for token in self._tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in special and not self._tokenizer.decode([token]).isspace():
                return self._tokenizer.convert_ids_to_tokens(token)
        if self._tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has no eos_token, so an answer would never end. Add it to the model."
            )
        return self._tokenizer.eos_token

    def _encode_prompt(self, question: str) -> tuple[str, list[int], list[int]]:
        """Prompt text, its ids as the template writes it, and its ids as the processor does, narrow."""
        text = self._apply_template(chat_messages(question), generation_prompt=True)
        template_ids = self._encode(text)
        if self._written_image == self._placeholder:
            return text, template_ids, template_ids
        # In the text: what the processor writes around an image may be one token with what is beside it.
        return text, template_ids, self._encode(self._with_image(text))

    def _encode_response(self, question: str, answer: str) -> list[int]:
        prompt_text, _, narrow = self._cached_prompt(question)
        turn = self._apply_template(chat_messages(question, answer), generation_prompt=False)
        text = turn.removeprefix(prompt_text) if turn.startswith(prompt_text) else f" {answer.strip()}"
        # The response ends at the template's own end token: what follows it (a newline) is never generated.
        head, separator, _ = text.rpartition(self.end)
        text = (head if separator else text.rstrip()) + self.end
        joint = self._encode(self._with_image(prompt_text) + text)
        if joint[: len(narrow)] == narrow:
            return joint[len(narrow) :]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_image(self, text: str) -> str:
        return text.replace(self._placeholder, self._written_image, 1)

    def _encode(self, text: str) -> list[int]:
        """Ids of a text that stands at the beginning, with one beginning token if the tokenizer adds one."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._adds_bos and not text.startswith(self._tokenizer.bos_token):
            return [self._tokenizer.bos_token_id, *ids]
        return ids

    def _apply_template(self, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
        )


def chat_messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """One turn about one image as OpenAI-style messages; without an answer it is a prompt."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def template_with_bos(processor: Any) -> str | None:
    """The chat template with the beginning token added; ``None`` if the model's own needs none.

    A tokenizer that adds the beginning token by itself needs no template that writes it. An endpoint,
    however, adds no token to a chat, so its prompts would differ from those of training.
    """
    tokenizer = processor.tokenizer
    template: Any = processor.chat_template or tokenizer.chat_template
    text = tokenizer.apply_chat_template(chat_messages("?"), chat_template=template, tokenize=False)
    if not _adds_bos(tokenizer) or text.startswith(tokenizer.bos_token):
        return None
    return "{{- bos_token }}" + template


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself adds the beginning token to a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("?")["input_ids"][:1] == [bos]


def _architecture_of_processor(processor: Any) -> Architecture:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    names = [kind for kind, name in PROCESSOR_MAPPING_NAMES.items() if name == type(processor).__name__]
    return next(ARCHITECTURES[kind]() for kind in names if kind in ARCHITECTURES)
