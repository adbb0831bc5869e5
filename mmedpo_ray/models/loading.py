"""Loading a LLaVA and writing its prompts, the same way for training, reference and inference.

The token ids made here are those of transformers' own ``apply_chat_template``: the processor's chat template
with the image at its place, one beginning token if the template writes it or the tokenizer adds it,
and the image placeholder repeated once for each feature of the vision tower. A chat request to the vLLM
endpoint is answered from the same ids if the template writes the beginning token.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.models.image_tokens import check_images, count_image_tokens

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

EMBEDDED_NAME = "phantom"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "phantom" / "phantom_llava"
# Between vision tower and language model, as LlavaModel names it.
PROJECTOR = "multi_modal_projector"

# These give a fixed number of features per image, which the planning of a training run relies on.
_SUPPORTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_NEEDED_FOR_ANOTHER = (
    "Another architecture would need: a fixed number of image tokens per image, 4-D attention masks and "
    "position ids in its forward pass (tree packing), LoRA names of its language model (align), and weight "
    "names that vLLM loads (export)."
)
# Prompts (each with all its image tokens) and responses that are kept.
_CACHED_PROMPTS = 4_096
_CACHED_RESPONSES = 16_384


def resolve_model(path: str) -> str:
    """Turns ``model.path`` into what ``from_pretrained`` takes.

    Args:
        path: ``phantom`` (the embedded model), a local folder, or a hub name.

    Returns:
        An absolute folder, or the hub name.

    Raises:
        UserError: a local folder holds no model, or one of another architecture.
    """
    if path == EMBEDDED_NAME:
        if not (EMBEDDED_FOLDER / "config.json").is_file():
            raise UserError(
                f"the embedded model is missing from this installation ({EMBEDDED_FOLDER}). Reinstall the "
                "package or build it with `mmedpo phantom build`."
            )
        return str(EMBEDDED_FOLDER)
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_architecture(read_model_config(folder) or {}, str(folder))
        return str(folder.absolute())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"there is no model folder {path}. Set model.path to 'phantom', a folder, or a hub name."
        )
    return path


def check_available(path: str) -> str:
    """:func:`resolve_model` that also checks a hub name: its configuration is fetched.

    Raises:
        UserError: there is no such model, or it has another architecture.
    """
    source = resolve_model(path)
    if Path(source).is_dir():
        return source
    from transformers import PreTrainedConfig

    try:
        # The file as it is: transformers may know no class for its type, such as llava_mistral.
        config, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model {path}: there is no such folder here, and the Hugging Face hub does not "
            f"give it ({type(error).__name__}). Correct model.path; for a hub name, check the network, "
            "HF_HUB_OFFLINE, HF_TOKEN and whether its licence has to be accepted, or download it and give "
            "the folder."
        ) from error
    _check_architecture(config, path)
    return source


def read_model_config(model: str | Path) -> dict[str, Any] | None:
    """The model's ``config.json``; ``None`` for a hub name that is not in the local cache.

    Raises:
        UserError: the folder exists but holds no readable ``config.json``, or there is no such model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is no model: it has no config.json. Give a folder that save_pretrained wrote, or "
                "a hub name."
            ) from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not valid JSON ({error}). The model is damaged; export it again."
            ) from error
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError as error:
        raise UserError(
            f"there is no model {model}: neither a folder here nor a hub name (owner/model)."
        ) from error
    return json.loads(Path(cached).read_text(encoding="utf-8")) if isinstance(cached, str) else None


def load_processor(path: str) -> LlavaProcessor:
    """Loads image processing, tokenizer and chat template.

    Raises:
        UserError: another architecture, the model has no processor or no chat template, or processor and
            model disagree about the images.
    """
    from transformers import LlavaProcessor

    source = check_available(path)
    try:
        processor = LlavaProcessor.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot load the processor of {path}: {first_line(error)}. A LLaVA needs its tokenizer and "
            "preprocessor_config.json beside the weights."
        ) from error
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise UserError(
            f"{path} has no chat template, so its prompts cannot be written. Add chat_template.jinja to it."
        )
    check_images(processor, source, path)
    return processor


def load_model(path: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Loads the weights on CPU, for evaluation (no dropout) and with every parameter frozen.

    Args:
        path: as ``model.path``.
        dtype: of all weights.

    Raises:
        UserError: not a ``LlavaForConditionalGeneration``, or its files are missing or damaged.
    """
    from transformers import LlavaForConditionalGeneration

    source = check_available(path)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        # AttributeError: a language model without the parts that transformers' LLaVA reads of it, such as
        # OPT.
        raise UserError(f"cannot load the model {path}: {first_line(error)}.") from error
    model.requires_grad_(False)
    return model.eval()


class PromptWriter:
    """Writes (image, question) prompts and their responses as token ids.

    Attributes:
        num_image_tokens: ids that stand for one image.
        image_token_id: that id.
        eos_token_id: id that ends every response.
        pad_token_id: id to fill rows with.

    Raises:
        UserError: the template does not place exactly one image, the tokenizer has no end token, or the
            processor does not say how many ids an image has.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template or self._tokenizer.chat_template
        self._cached_prompt = functools.lru_cache(_CACHED_PROMPTS)(self._encode_prompt)
        self._cached_response = functools.lru_cache(_CACHED_RESPONSES)(self._encode_response)
        self.image_token_id: int = processor.image_token_id
        self._adds_bos = _adds_bos(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so an answer would never end. Add it to the model."
            )
        self.eos_token_id: int = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self.eos_token_id
        self.num_image_tokens = count_image_tokens(processor)
        if self.prompt("?") is None:
            raise UserError(
                "the chat template does not write the image placeholder for {'type': 'image'} content "
                "exactly once. Use a template that places the image, such as those of the llava-hf models."
            )

    def prompt(self, question: str) -> list[int] | None:
        """Token ids up to where the answer begins, image ids included.

        Returns:
            The ids, or ``None`` if the question itself holds an image placeholder, so that images and
            features would not match.
        """
        _, narrow, wide = self._cached_prompt(question)
        return wide if narrow.count(self.image_token_id) == 1 else None

    def response(self, question: str, answer: str) -> list[int] | None:
        """Token ids of an answer that continue :meth:`prompt`, ended by the end token.

        The chat template writes the answer as well, so that blanks around it are those of inference. If the
        tokenizer keeps the prompt's ids as they are, the ids are those of the whole turn; else the answer is
        tokenised on its own. Either way ``prompt + response`` is the exact input.

        Returns:
            The ids, or ``None`` if the answer itself holds an image placeholder.
        """
        ids = self._cached_response(question, answer)
        return None if self.image_token_id in ids else ids

    def widen(self, narrow: Sequence[int]) -> list[int]:
        """Repeats the image token as often as an image has tokens."""
        wide: list[int] = []
        for token in narrow:
            wide += [token] * (self.num_image_tokens if token == self.image_token_id else 1)
        return wide

    def narrow(self, wide: Sequence[int]) -> list[int]:
        """A prompt with a single image token; :meth:`widen` undoes it."""
        start = wide.index(self.image_token_id)
        return [*wide[: start + 1], *wide[start + self.num_image_tokens :]]

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Image processing of RGB images; (I, 3, H, W) float32."""
        return self._processor.image_processor(list(images), return_tensors="pt")["pixel_values"]

    def _encode_prompt(self, question: str) -> tuple[str, list[int], list[int]]:
        """Prompt text, its ids with one id per image, and its ids with all of them."""
        text = self._apply_template(chat_messages(question), generation_prompt=True)
        narrow = self._encode(text)
        return text, narrow, self.widen(narrow)

    def _encode_response(self, question: str, answer: str) -> list[int]:
        prompt_text, narrow, _ = self._cached_prompt(question)
        turn = self._apply_template(chat_messages(question, answer), generation_prompt=False)
        eos = self._tokenizer.eos_token
        text = turn.removeprefix(prompt_text) if turn.startswith(prompt_text) else f" {answer.strip()}"
        # The response ends at the template's own end token: what follows it (a newline) is never generated.
        head, separator, _ = text.rpartition(eos)
        text = (head if separator else text.rstrip()) + eos
        joint = self._encode(prompt_text + text)
        if joint[: len(narrow)] == narrow:
            return joint[len(narrow) :]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

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


def template_with_bos(processor: LlavaProcessor) -> str | None:
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


def _check_architecture(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind in ("llava_mistral", "llava_llama"):
        raise UserError(
            f"{name} is a {kind} checkpoint, which neither transformers nor vLLM loads. Convert it to "
            "LlavaForConditionalGeneration first (`mmedpo convert`)."
        )
    if kind != "llava":
        raise UserError(
            f"{name} is a {kind or 'model of unknown type'}. Supported is LlavaForConditionalGeneration "
            f"(model_type llava). {_NEEDED_FOR_ANOTHER}"
        )
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if tower not in _SUPPORTED_TOWERS:
        raise UserError(f"{name} has a {tower} tower. Supported are {' and '.join(_SUPPORTED_TOWERS)}.")
