"""An original LLaVA-Med 1.5 checkpoint (``llava_mistral``) → a ``LlavaForConditionalGeneration``.

    mmedpo convert --source llava-med-v1.5-mistral-7b --out llava-med-v1.5-hf

The weights get other names and, if wanted, another precision; nothing is trained, added or changed.
Everything is checked from the headers before the first byte is written, and the folder gets its name only
when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, LlavaConfig

from mmedpo_ray import __version__
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.convert.llava_med_config import (
    MODEL_TYPE,
    LlavaMedSettings,
    expected_shapes,
    llava_config,
    read_original,
    vision_config,
)
from mmedpo_ray.convert.llava_med_processor import make_processor
from mmedpo_ray.convert.weight_names import converted_name, is_clip_text, is_recomputed, tower_name
from mmedpo_ray.convert.weights import (
    MAX_SHARD_BYTES,
    Move,
    Progress,
    check_moves,
    has_weights,
    list_tensors,
    write_shards,
)
from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.models.architectures.base import TOWER
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.models.saving import check_new_folder, replaced_folder

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LM_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        out: folder of the converted model.
        tensors: how many weights it has.
        bytes: their size.
        dtype: their precision.
        notes: what to know about this conversion, one or two sentences each.
    """

    out: Path
    tensors: int
    bytes: int
    dtype: str
    notes: list[str]


def convert_command(source: Path, out: Path, *, vision_tower: str | None, dtype: str | None) -> None:
    """``mmedpo convert``: converts with a progress bar, prints what to know and what to do next.

    Raises:
        UserError: as :func:`convert`.
    """
    tower = Path(vision_tower).expanduser() if vision_tower else None
    with progress_bar() as bar:
        task = bar.add_task("convert", total=None, note="reading headers", unit="tensors")

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, note="tensors")

        done = convert(
            source.expanduser(), out.expanduser(), vision_tower=tower, dtype=dtype, progress=report
        )
    for note in done.notes:
        console.print(f"- {note}", soft_wrap=True, markup=False)
    size = f"{done.tensors} tensors, {done.bytes / 2**30:.2f} GiB in {done.dtype}"
    console.print(f"the model is in {done.out} ({size})", soft_wrap=True, markup=False)
    console.print(f"next: mmedpo run --config FILE model.path={done.out}", soft_wrap=True, markup=False)


def convert(
    source: Path,
    out: Path,
    *,
    vision_tower: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a checkpoint. Memory holds about one shard of the output.

    Args:
        source: the original: ``config.json``, tokenizer, and weights as safetensors or torch files.
        out: folder to write; must not exist or be empty.
        vision_tower: folder of a CLIP whose tower takes the place of the checkpoint's, or supplies it if the
            checkpoint has none.
        dtype: bfloat16, float16 or float32; by default the precision of the original's embedding.
        max_shard_bytes: size of an output shard.
        progress: called after every shard.

    Raises:
        UserError: ``source`` is no complete LLaVA-Med 1.5, or ``out`` cannot be written; nothing is left
            behind.
    """
    original, settings = read_original(source)
    check_new_folder(out)
    tower, vision = vision_config(settings.tower, source, vision_tower)
    config = llava_config(original, vision, source)
    moves, notes = _plan(source, settings, config, tower, replace_tower=vision_tower is not None)
    target = _target_dtype(dtype, moves)
    num_wider = sum(move.tensor.dtype.itemsize > target.itemsize for move in moves)
    if num_wider:
        notes.append(
            f"{num_wider} of {len(moves)} tensors were saved in higher precision than {_name(target)}."
        )
    pad = settings.image_aspect_ratio == "pad"
    notes.append(
        "images: widened to squares in CLIP's mean colour, as in the original."
        if pad
        else "images: the shortest edge is resized and the centre cropped (image_aspect_ratio is not 'pad')."
    )
    text: Any = config.text_config
    processor = make_processor(source, vision, tower=tower, pad=pad, vocab_size=text.vocab_size)
    _check_special_tokens(source, processor.tokenizer, text)
    config.image_token_index = processor.image_token_id
    config.dtype = target
    with _completed(out) as folder:
        _check_space(out.parent, sum(move.tensor.size for move in moves) * target.itemsize)
        config.save_pretrained(folder)
        # Only where answers end: the caller chooses the sampling, not the checkpoint.
        GenerationConfig(**{key: getattr(text, key) for key in _SPECIAL_TOKENS}).save_pretrained(folder)
        processor.save_pretrained(folder)
        size = write_shards(moves, folder, target, max_shard_bytes=max_shard_bytes, progress=progress)
        _write_record(folder, settings, moves, target)
        _verify(folder, config, moves)
    return Conversion(out, len(moves), size, _name(target), notes)


def _plan(
    source: Path, settings: LlavaMedSettings, config: LlavaConfig, tower: Path | None, *, replace_tower: bool
) -> tuple[list[Move], list[str]]:
    """Which tensor becomes which weight, and what to tell the user about it."""
    tensors = list_tensors(source)
    moves = [
        Move(converted_name(tensor.name) or "", tensor)
        for tensor in tensors
        if not is_recomputed(tensor.name)
    ]
    notes = []
    if left_out := len(tensors) - len(moves):
        notes.append(f"{left_out} saved tables were left out: the model computes them itself.")
    own_tower = [move for move in moves if move.target.startswith(TOWER)]
    name = settings.mm_vision_tower
    if own_tower and not replace_tower:
        notes.append(
            f"vision tower: the checkpoint's own. LLaVA-Med's published code ignores it and loads {name} "
            "instead; --vision-tower with a folder of that does the same here."
        )
    elif tower is not None and (replace_tower or has_weights(tower)):
        moves = [move for move in moves if not move.target.startswith(TOWER)] + _tower_moves(tower)
        without = f"; the checkpoint's own ({len(own_tower)} tensors) was left out" if own_tower else ""
        notes.append(f"vision tower: {tower}{without}.")
    else:
        raise UserError(
            f"{source} has no weights of the vision tower; the original takes them from {name}. Download "
            "that and name its folder with --vision-tower."
        )
    optional = frozenset([_LM_HEAD] if config.tie_word_embeddings else [])
    check_moves(moves, expected_shapes(config), source, optional=optional)
    return moves, notes


def _tower_moves(folder: Path) -> list[Move]:
    """The weights of a CLIP's tower; the text side of a whole CLIP is not needed."""
    moves = []
    for tensor in list_tensors(folder):
        if is_recomputed(tensor.name) or is_clip_text(tensor.name):
            continue
        target = tower_name(tensor.name)
        if target is None:
            raise UserError(f"{folder} is no CLIP: it has a tensor {tensor.name}.")
        moves.append(Move(target, tensor))
    return moves


def _check_special_tokens(source: Path, tokenizer: Any, text: Any) -> None:
    """Checks that tokenizer and model mean the same tokens by the beginning and the end of a text."""
    for key in ("bos_token", "eos_token"):
        token, expected = getattr(tokenizer, f"{key}_id"), getattr(text, f"{key}_id")
        if expected is not None and token not in (expected if isinstance(expected, list) else [expected]):
            raise UserError(
                f"the tokenizer ({source / 'tokenizer_config.json'}) has the {key} "
                f"{getattr(tokenizer, key)}, id {token}, but {source / 'config.json'} says "
                f"{key}_id={expected}. Correct one or download both again."
            )


def _target_dtype(dtype: str | None, moves: list[Move]) -> torch.dtype:
    if dtype is None:
        return next(move.tensor.dtype for move in moves if move.target == _EMBEDDING)
    if dtype not in _DTYPES:
        raise UserError(f"there is no precision {dtype} to convert to; choose from {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _write_record(folder: Path, settings: LlavaMedSettings, moves: list[Move], dtype: torch.dtype) -> None:
    """``conversion.json``: what the model was made from, for whoever finds the folder later."""
    sources = {f"{move.tensor.file.parent.name}/{move.tensor.file.name}": move.tensor.file for move in moves}
    record = {
        "mmedpo_ray": __version__,
        "model_type": MODEL_TYPE,
        "mm_vision_tower": settings.mm_vision_tower,
        "tower_from": next(move.tensor.file.parent.name for move in moves if move.target.startswith(TOWER)),
        "dtype": _name(dtype),
        "files": {name: file.stat().st_size for name, file in sources.items()},
    }
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _verify(folder: Path, config: LlavaConfig, moves: list[Move]) -> None:
    """Reads back what was written: every weight in its shape, and a processor that writes prompts."""
    written = {tensor.name: tensor.shape for tensor in list_tensors(folder)}
    planned = {move.target: move.tensor.shape for move in moves}
    writer = PromptWriter(load_processor(str(folder)))
    if written != planned or writer.num_image_tokens != config.image_seq_length:
        raise RuntimeError(f"the model written to {folder} is not the one planned")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the converted model needs {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB free. "
            "Make room or name another folder with --out."
        )


@contextmanager
def _completed(out: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``out`` once it is complete.

    After an error nothing is left: the folders above ``out`` that were made for it are removed too.

    Raises:
        UserError: it cannot be made or written to.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        with replaced_folder(out) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out}: {first_line(error)}. Correct that or name another folder with --out."
        ) from error
    finally:
        for folder in made:
            # Not empty after a success, or if somebody else has put something there meanwhile.
            with suppress(OSError):
                folder.rmdir()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
