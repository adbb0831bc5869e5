"""Loading a LLaVA and writing its prompts, the same way for training, reference and inference.

The token ids made here are those of transformers' own ``apply_chat_template``: the processor's chat template with the image
where it puts it, one beginning token where the template writes it or the tokenizer adds it, and the image placeholder widened to
as many ids as the vision tower yields features. A chat request to the vLLM endpoint is answered from the same ids where the
template writes the beginning.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mmedpo_ray.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

EMBEDDED_NAME = "phantom"
# Between vision tower and language model, as LlavaModel names it.
PROJECTOR = "multi_modal_projector"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "phantom" / "phantom_llava"

# Their features come in a fixed number per image, which the planning of a training run relies on.
_SUPPORTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_NEEDED_FOR_ANOTHER = (
    "Another architecture would need: a fixed number of image tokens an image, 4-D attention masks and position ids in its "
    "forward pass (tree packing), LoRA names of its language model (align), and a spelling of its weights that vLLM loads "
    "(export)."
)
_MEND_THE_PROCESSOR = (
    "Mend patch_size, num_additional_image_tokens (1 for a tower with a class token such as CLIP, 0 for SigLIP) and "
    "vision_feature_select_strategy (that of config.json) in processor_config.json."
)
# Questions whose prompts are kept (each with all its image tokens), and the same of answers.
_CACHED_PROMPTS = 4_096
_CACHED_RESPONSES = 16_384
# Below this a model is identified by all its bytes, above by samples of its weights.
_HASH_WHOLE_BYTES = 256 * 1024**2
# Blocks of a large file, evenly spread from its first byte to its last, and the same of every tensor.
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_TENSOR_BYTES = 4 * 1024
_WEIGHTS = (".safetensors", ".bin")
# Configuration, template, image processing and tokenizer.
_TEXTS = (".json", ".jinja", ".model")
_TOKENIZER_TEXTS = ("vocab.txt", "merges.txt")
# Beside a model, and of no effect on what it computes.
_NOT_OF_THE_MODEL = ("scores.json", "training_args.bin")


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
                f"the embedded model is missing from this installation ({EMBEDDED_FOLDER}). Reinstall the package or "
                "build it with `mmedpo phantom build`."
            )
        return str(EMBEDDED_FOLDER)
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_architecture(_read_config(folder), str(folder))
        return str(folder.absolute())
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"there is no model folder {path}. Set model.path to 'phantom', a folder, or a hub name."
        )
    return path


def check_available(path: str) -> None:
    """Finds out whether ``model.path`` can be had, before anything is started for it; of a hub name the configuration is fetched.

    Raises:
        UserError: there is no such model, or it is of another architecture.
    """
    source = resolve_model(path)
    if Path(source).is_dir():
        return
    from huggingface_hub import hf_hub_download

    try:
        _check_architecture(_read_config(Path(hf_hub_download(source, "config.json")).parent), path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the model {path}: there is no such folder here, and the Hugging Face hub does not give it "
            f"({type(error).__name__}). Correct model.path; for a hub name, check the network, HF_HUB_OFFLINE, HF_TOKEN and "
            "whether its licence has to be accepted, or download it and give the folder."
        ) from error


def load_processor(path: str) -> LlavaProcessor:
    """Loads image processing, tokenizer and chat template.

    Raises:
        UserError: another architecture, the model has no processor or no chat template, or processor and model do not agree on
            the images.
    """
    from transformers import LlavaProcessor

    source = _checked(path)
    try:
        processor = LlavaProcessor.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot load the processor of {path}: {_first_line(error)}. A LLaVA needs its tokenizer and "
            "preprocessor_config.json beside the weights."
        ) from error
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise UserError(
            f"{path} has no chat template, so its prompts cannot be written. Add chat_template.jinja to it."
        )
    _check_images(processor, source, path)
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

    source = _checked(path)
    try:
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        # AttributeError: a language model without the parts that transformers' LLaVA reads of it, such as OPT.
        raise UserError(f"cannot load the model {path}: {_first_line(error)}.") from error
    model.requires_grad_(False)
    return model.eval()


def model_fingerprint(path: str) -> str:
    """A hash that changes when the model's weights, template or processing do; 16 hex digits."""
    return hashlib.sha256(json.dumps(model_files(path), sort_keys=True).encode()).hexdigest()[:16]


def model_files(path: str) -> dict[str, str]:
    """The files that say what a model computes and how its input is made, each with a hash of 16 hex digits.

    Small local models are hashed whole; of large ones the weights by samples, so that a copy is the same model. A hub name
    counts as its own hash: a published revision does not change under its name.
    """
    source = resolve_model(path)
    folder = Path(source)
    if not folder.is_dir():
        return {source: hashlib.sha256(source.encode()).hexdigest()[:16]}
    files = sorted(
        file
        for file in folder.iterdir()
        if (file.suffix in (*_WEIGHTS, *_TEXTS) or file.name in _TOKENIZER_TEXTS)
        and file.name not in _NOT_OF_THE_MODEL
    )
    whole = sum(file.stat().st_size for file in files) <= _HASH_WHOLE_BYTES
    return {file.name: _hash_file(file, whole=whole or file.suffix not in _WEIGHTS) for file in files}


def _hash_file(file: Path, *, whole: bool) -> str:
    if whole:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return _hash_samples(file)


def _hash_samples(file: Path) -> str:
    """16 hex digits of a large file's size, its safetensors header, blocks spread over it and the middle of every tensor.

    The last block of a ``.bin`` is the directory of a zip, which has a checksum of every tensor.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        header, middles = _read_header(content, size) if file.suffix == ".safetensors" else (b"", [])
        digest.update(header)
        last = max(0, size - _SAMPLE_BYTES)
        blocks = [(last * number // (_SAMPLES - 1), _SAMPLE_BYTES) for number in range(_SAMPLES)]
        blocks += [(max(0, middle - _TENSOR_BYTES // 2), _TENSOR_BYTES) for middle in middles]
        for start, length in blocks:
            content.seek(start)
            digest.update(content.read(length))
    return digest.hexdigest()[:16]


def _read_header(content: BinaryIO, size: int) -> tuple[bytes, list[int]]:
    """The header of a safetensors file and where the middles of its tensors are; nothing of a damaged one."""
    length = int.from_bytes(content.read(8), "little")
    if length > size:
        return b"", []
    header = content.read(length)
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return header, sorted(8 + length + sum(entry["data_offsets"]) // 2 for entry in entries)
    except (ValueError, AttributeError, TypeError, KeyError):
        return header, []


class PromptWriter:
    """Writes (image, question) prompts and their responses as token ids.

    Attributes:
        num_image_tokens: ids that stand for one image.
        image_token_id: that id.
        eos_token_id: id that ends every response.
        pad_token_id: id to fill rows with.

    Raises:
        UserError: the template does not place exactly one image, the tokenizer has no end token, or the processor does not say
            how many ids an image has.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._template = processor.chat_template or self._tokenizer.chat_template
        self._render = functools.lru_cache(_CACHED_PROMPTS)(self._encode_prompt)
        self._response = functools.lru_cache(_CACHED_RESPONSES)(self._encode_response)
        self.image_token_id: int = processor.image_token_id
        self._adds_bos = _adds_bos(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so an answer would never end. Add it to the model."
            )
        self.eos_token_id: int = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad_token_id: int = pad if pad is not None else self.eos_token_id
        self.num_image_tokens = _count_image_tokens(processor)
        if self.prompt("?") is None:
            raise UserError(
                "the chat template does not write the image placeholder for {'type': 'image'} content exactly once. "
                "Use a template that places the image, such as those of the llava-hf models."
            )

    def prompt(self, question: str) -> list[int] | None:
        """Token ids up to where the answer begins, image ids included.

        Returns:
            The ids, or ``None`` where the text itself holds an image placeholder, so that images and features would
            not match.
        """
        _, single, wide = self._render(question)
        return wide if single.count(self.image_token_id) == 1 else None

    def response(self, question: str, answer: str) -> list[int] | None:
        """Token ids of an answer that continue :meth:`prompt`, ended by the end token.

        The answer is written by the chat template as well, so that blanks around it are those of inference. Where the
        tokenizer keeps the prompt's ids as they are, the ids are those of the whole turn; else the answer is tokenised
        on its own. Either way ``prompt + response`` is the exact input.

        Returns:
            The ids, or ``None`` where the answer itself holds an image placeholder.
        """
        ids = self._response(question, answer)
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

    def _encode_response(self, question: str, answer: str) -> list[int]:
        prompt_text, single, _ = self._render(question)
        whole = self._apply(_messages(question, answer), generation_prompt=False)
        eos = self._tokenizer.eos_token
        text = whole.removeprefix(prompt_text) if whole.startswith(prompt_text) else f" {answer.strip()}"
        # Only the template's own end token counts: what follows it (a newline) is never generated.
        head, separator, _ = text.rpartition(eos)
        text = (head if separator else text.rstrip()) + eos
        joint = self._encode(prompt_text + text)
        if joint[: len(single)] == single:
            return joint[len(single) :]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_prompt(self, question: str) -> tuple[str, list[int], list[int]]:
        """Prompt text, its ids with one id an image, and with all of them."""
        text = self._apply(_messages(question), generation_prompt=True)
        single = self._encode(text)
        return text, single, self.widen(single)

    def _encode(self, text: str) -> list[int]:
        """Ids of a text that stands at the beginning, with one beginning token if the tokenizer adds one."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._adds_bos and not text.startswith(self._tokenizer.bos_token):
            return [self._tokenizer.bos_token_id, *ids]
        return ids

    def _apply(self, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generation_prompt
        )


def _adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins a text with its beginning token by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("?")["input_ids"][:1] == [bos]


def template_with_bos(processor: LlavaProcessor) -> str | None:
    """The chat template that begins as the tokenizer begins its texts; ``None`` where the model's own does.

    A tokenizer that adds the beginning token by itself needs no template that writes it, but an endpoint adds none to a chat,
    and its prompts would not be those of training.
    """
    tokenizer = processor.tokenizer
    template: Any = processor.chat_template or tokenizer.chat_template
    text = tokenizer.apply_chat_template(_messages("?"), chat_template=template, tokenize=False)
    if not _adds_bos(tokenizer) or text.startswith(tokenizer.bos_token):
        return None
    return "{{- bos_token }}" + template


def image_mismatch(ids: int, features: int) -> UserError:
    """What to say where prompts have another number of ids for an image than the vision tower gives features."""
    return UserError(
        f"a prompt has {ids} ids for an image, but the vision tower gives {features} features for it. {_MEND_THE_PROCESSOR}"
    )


def _check_images(processor: LlavaProcessor, source: str, name: str) -> None:
    """Compares what the processor makes of an image with what the configured model takes.

    Args:
        processor: of the model.
        source: folder or hub name of the model.
        name: the same for messages.

    Raises:
        UserError: they differ in the image's size, in its number of ids or in the id.
    """
    from transformers import LlavaConfig

    try:
        config: Any = LlavaConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {_first_line(error)}.") from error
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"the processor of {name} writes an image as id {processor.image_token_id} ({processor.image_token}), but the "
            f"model's image_token_index is {config.image_token_id}. Set image_token in processor_config.json, or "
            "image_token_index in config.json."
        )
    ids = _count_image_tokens(processor)
    side = config.vision_config.image_size
    made = tuple(processor.image_processor(_blank_image(), return_tensors="pt")["pixel_values"].shape[-2:])
    if made != (side, side):
        raise UserError(
            f"the image processor of {name} makes images of {made[0]} x {made[1]} pixels, but its vision tower takes "
            f"{side} x {side}. Mend size and crop_size in preprocessor_config.json (or in image_processor of "
            "processor_config.json)."
        )
    if ids != (features := _count_features(config)):
        raise image_mismatch(ids, features)


def _count_image_tokens(processor: LlavaProcessor) -> int:
    """Asks the processor itself, with a blank image.

    Raises:
        UserError: it cannot tell.
    """
    try:
        encoded = processor(images=_blank_image(), text=processor.image_token)
    except TypeError as error:
        missing = [
            name for name in ("patch_size", "num_additional_image_tokens") if getattr(processor, name) is None
        ]
        if not missing:
            raise _unusable_processor(error) from error
        raise UserError(
            f"the processor lacks {' and '.join(missing)}, so it cannot tell how many ids an image has. {_MEND_THE_PROCESSOR}"
        ) from error
    except Exception as error:
        # Numbers of any size and kind may stand in its configuration, and most are only met by an image.
        raise _unusable_processor(error) from error
    return list(encoded["input_ids"][0]).count(processor.image_token_id)


def _unusable_processor(error: Exception) -> UserError:
    return UserError(
        f"the image processor cannot process an image ({type(error).__name__}). Mend the numbers in preprocessor_config.json (or "
        "in image_processor of processor_config.json)."
    )


def _count_features(config: Any) -> int:
    """Features of an image that the model of a ``LlavaConfig`` puts in the places of its ids."""
    tower = config.vision_config
    has_class_token = tower.model_type == "clip_vision_model"
    dropped = config.vision_feature_select_strategy == "default"
    return (tower.image_size // tower.patch_size) ** 2 + has_class_token - dropped


def _blank_image() -> Image.Image:
    """Not square, so that processing that keeps the sides of an image shows."""
    from PIL import Image

    return Image.new("RGB", (48, 32))


def _messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _checked(path: str) -> str:
    """:func:`resolve_model` of a path whose architecture is known to be right, hub names too."""
    from transformers import PreTrainedConfig

    source = resolve_model(path)
    if not Path(source).is_dir():
        try:
            # As written, before transformers looks for a class of that type: it may be a llava_mistral.
            settings, _ = PreTrainedConfig.get_config_dict(source)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the model {path}: {_first_line(error)}.") from error
        _check_architecture(settings, path)
    return source


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is no model: it has no config.json. Set model.path to 'phantom', to a folder that "
            "save_pretrained wrote, or to a hub name."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). The model is damaged; export it again."
        ) from error


def _check_architecture(config: dict[str, Any], name: str) -> None:
    kind = config.get("model_type")
    if kind in ("llava_mistral", "llava_llama"):
        raise UserError(
            f"{name} is a {kind} checkpoint, which neither transformers nor vLLM loads. Convert it to "
            "LlavaForConditionalGeneration first (`mmedpo convert`)."
        )
    if kind != "llava":
        raise UserError(
            f"{name} is a {kind or 'model of unknown type'}. Supported is LlavaForConditionalGeneration (model_type llava). "
            f"{_NEEDED_FOR_ANOTHER}"
        )
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if tower not in _SUPPORTED_TOWERS:
        raise UserError(f"{name} has a {tower} tower. Supported are {' and '.join(_SUPPORTED_TOWERS)}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
