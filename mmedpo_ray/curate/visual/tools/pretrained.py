"""The models of visual tools: loaded whole or not at all, and identified by what is in their files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmedpo_ray.errors import UserError

# Up to here a file is identified by its bytes, above by its size and time.
_HASH_WHOLE_BYTES = 256 * 1024**2
_MODEL_FILES = (".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".pth", ".pt")


def load_pretrained(model_class: Any, source: str, setting: str, **options: Any) -> Any:
    """Loads a model of transformers in float32, for evaluation, with every weight from the file.

    Args:
        model_class: its class.
        source: folder or hub name.
        setting: the key that names it, for the message.
        **options: more for ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, or lacks weights, which transformers would make up at random.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, state = model_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"cannot load {source}: {first_line(error)} Check {setting} and the files there."
        ) from error
    missing = sorted(state["missing_keys"])
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} weights of a {model_class.__name__}, which would be made up at "
            f"random ({', '.join(missing[:3])}, …). Set {setting} to a model trained for this task."
        )
    return model.eval()


def load_companion(loader: Any, source: str, what: str, **options: Any) -> Any:
    """Loads what belongs to a model of transformers, such as its tokenizer.

    Args:
        loader: class with ``from_pretrained``.
        source: folder or hub name.
        what: what it is, for the message.
        **options: more for ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot load the {what} of {source}: {first_line(error)} It belongs beside the weights."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    return (str(error).strip().split("\n") or [""])[0].rstrip(". ") + "."


def check_vocabulary(tokenizer: Any, pieces: int, source: str) -> None:
    """Checks that a tokenizer found its vocabulary: without the file it loads too, and knows no word.

    Args:
        tokenizer: of transformers.
        pieces: size of the model's own vocabulary.
        source: folder or hub name, for the message.

    Raises:
        UserError: it knows less than half of them.
    """
    if 2 * len(tokenizer) < pieces:
        raise UserError(
            f"the tokenizer of {source} knows {len(tokenizer)} pieces, its model {pieces}. Put the model's "
            "own tokenizer files (tokenizer.json or vocab.txt) beside its weights."
        )


def path_fingerprint(path: str) -> str:
    """A hash that changes when a model file or folder does; 16 hex digits.

    Small files count by their bytes, large ones by size and time. A hub name counts by itself: a
    published revision does not change under its name.
    """
    place = Path(path).expanduser()
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in _MODEL_FILES)
    elif not place.is_file():
        return hashlib.sha256(path.encode()).hexdigest()[:16]
    state = hashlib.sha256()
    for file in files:
        info = file.stat()
        state.update(f"{file.name} {info.st_size} ".encode())
        state.update(
            file.read_bytes() if info.st_size <= _HASH_WHOLE_BYTES else str(info.st_mtime_ns).encode()
        )
    return state.hexdigest()[:16]
