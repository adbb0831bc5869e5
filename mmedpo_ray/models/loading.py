"""Loading a model and its processor, the same way for training, reference and inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.models.architectures import find_architecture
from mmedpo_ray.models.architectures.base import loading_error

if TYPE_CHECKING:
    import torch

EMBEDDED_NAME = "phantom"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "phantom" / "phantom_llava"


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
        find_architecture(read_model_config(folder) or {}, str(folder))
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
    find_architecture(config, path)
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


def load_config(path: str) -> Any:
    """The model's configuration as transformers reads it.

    Raises:
        UserError: another architecture, or transformers does not read it.
    """
    from transformers import AutoConfig

    source = check_available(path)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise loading_error(path, error) from error


def load_processor(path: str) -> Any:
    """Loads image processing, tokenizer and chat template.

    Raises:
        UserError: another architecture, the model has no processor or no chat template, or processor and
            model disagree about the images.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config, source = load_config(path), resolve_model(path)
    # Not AutoProcessor: it takes a tokenizer for the processor where a file is missing.
    kind: Any = PROCESSOR_MAPPING[type(config)]
    try:
        processor = kind.from_pretrained(source)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"cannot load the processor of {path}: {first_line(error)}. A model needs its tokenizer and "
            "preprocessor_config.json beside the weights."
        ) from error
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise UserError(
            f"{path} has no chat template, so its prompts cannot be written. Add chat_template.jinja to it."
        )
    find_architecture(config.to_dict(), path).check_processor(processor, config, path)
    return processor


def load_model(path: str, dtype: torch.dtype) -> Any:
    """Loads the weights on CPU, for evaluation (no dropout) and with every parameter frozen.

    Args:
        path: as ``model.path``.
        dtype: of all weights.

    Raises:
        UserError: another architecture, or its files are missing or damaged.
    """
    from transformers import AutoModelForImageTextToText

    source = check_available(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        # AttributeError: a language model without the parts that transformers' LLaVA reads of it, such as
        # OPT.
        raise loading_error(path, error) from error
    model.requires_grad_(False)
    return model.eval()
