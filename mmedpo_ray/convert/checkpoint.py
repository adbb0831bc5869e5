"""An original LLaVA-Med 1.5 checkpoint (``llava_mistral``) → a ``LlavaForConditionalGeneration`` that everything loads.

    mmedpo convert --source llava-med-v1.5-mistral-7b --out llava-med-v1.5-hf

The weights get other names and, if asked for, another precision; nothing is trained, added or changed. Everything is
checked from the headers before the first byte is written, and the folder gets its name only when it is complete.
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
from transformers import LlavaConfig

from mmedpo_ray import __version__
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.convert.json_files import one_line
from mmedpo_ray.convert.llava_med_config import (
    expected_shapes,
    generation_config,
    llava_config,
    read_original,
    vision_config,
)
from mmedpo_ray.convert.llava_med_processor import make_processor
from mmedpo_ray.convert.weight_names import TOWER, converted_name, is_clip_text, is_recomputed, tower_name
from mmedpo_ray.convert.weights import (
    MAX_SHARD_BYTES,
    Move,
    Progress,
    has_weights,
    list_tensors,
    plan_moves,
    write_shards,
)
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter, load_processor

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
        notes: what to know about this conversion, one sentence or two each.
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
    with progress_bar() as bar:
        task = bar.add_task("convert", total=None, note="reading headers", unit="tensors")

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, note="tensors")

        tower = Path(vision_tower).expanduser() if vision_tower else None
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
        vision_tower: folder of a CLIP whose tower takes the place of the checkpoint's, or supplies it where the
            checkpoint has none.
        dtype: bfloat16, float16 or float32; the precision of the original's embedding without.
        max_shard_bytes: size of an output shard.
        progress: told after every shard.

    Raises:
        UserError: what is there is no complete LLaVA-Med 1.5, or cannot be written; nothing is left behind.
    """
    original = read_original(source)
    _check_out(out)
    tower, vision = vision_config(original, source, vision_tower)
    config = llava_config(original, vision, source)
    moves, notes = _plan(source, original, config, tower, replace_tower=vision_tower is not None)
    target = _target_dtype(dtype, moves)
    wider = [move for move in moves if move.tensor.dtype.itemsize > target.itemsize]
    if wider:
        notes.append(
            f"{len(wider)} of {len(moves)} tensors were saved in higher precision than {_name(target)}."
        )
    pad = original.get("image_aspect_ratio") == "pad"
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
        generation_config(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        size = write_shards(moves, folder, target, max_shard_bytes=max_shard_bytes, progress=progress)
        _write_record(folder, original, moves, target)
        _verify(folder, config, moves)
    return Conversion(out, len(moves), size, _name(target), notes)


def _plan(
    source: Path, original: dict[str, Any], config: LlavaConfig, tower: Path | None, *, replace_tower: bool
) -> tuple[list[Move], list[str]]:
    """Which tensor becomes which weight, and what to tell about it."""
    tensors = list_tensors(source)
    kept = [tensor for tensor in tensors if not is_recomputed(tensor.name)]
    notes = []
    if len(kept) < len(tensors):
        notes.append(
            f"{len(tensors) - len(kept)} saved tables were left out: the model computes them itself."
        )
    moves = [Move(converted_name(tensor.name) or "", tensor) for tensor in kept]
    own_tower = [move for move in moves if move.target.startswith(TOWER)]
    name = original.get("mm_vision_tower")
    if own_tower and not replace_tower:
        notes.append(
            f"vision tower: the checkpoint's own. LLaVA-Med's published code passes it over and loads {name} instead; "
            "--vision-tower with a folder of that does the same here."
        )
    elif tower is not None and (replace_tower or has_weights(tower)):
        moves = [move for move in moves if not move.target.startswith(TOWER)] + _tower_moves(tower)
        left_out = f"; the checkpoint's own ({len(own_tower)} tensors) was left out" if own_tower else ""
        notes.append(f"vision tower: {tower}{left_out}.")
    else:
        raise UserError(
            f"{source} has no weights of the vision tower; the original takes them from {name}. Download that and name "
            "its folder with --vision-tower."
        )
    optional = frozenset([_LM_HEAD] if config.tie_word_embeddings else [])
    return plan_moves(moves, expected_shapes(config), source, optional=optional), notes


def _tower_moves(folder: Path) -> list[Move]:
    """The weights of a CLIP's tower; the text side of a whole CLIP is not needed."""
    moves = []
    for tensor in list_tensors(folder):
        target = tower_name(tensor.name)
        if is_recomputed(tensor.name) or is_clip_text(tensor.name):
            continue
        if target is None:
            raise UserError(f"{folder} is no CLIP: it has a tensor {tensor.name}.")
        moves.append(Move(target, tensor))
    return moves


def _check_special_tokens(source: Path, tokenizer: Any, text: Any) -> None:
    """That tokenizer and model mean the same tokens by the beginning and the end of a text."""
    for key in ("bos_token", "eos_token"):
        token, expected = getattr(tokenizer, f"{key}_id"), getattr(text, f"{key}_id")
        if expected is not None and token not in (expected if isinstance(expected, list) else [expected]):
            raise UserError(
                f"the tokenizer ({source / 'tokenizer_config.json'}) has the {key} {getattr(tokenizer, key)}, "
                f"id {token}, but {source / 'config.json'} says {key}_id={expected}. Correct one or download both again."
            )


def _target_dtype(dtype: str | None, moves: list[Move]) -> torch.dtype:
    if dtype is None:
        return next(move.tensor.dtype for move in moves if move.target == _EMBEDDING)
    if dtype not in _DTYPES:
        raise UserError(f"there is no precision {dtype} to convert to; choose from {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _write_record(folder: Path, original: dict[str, Any], moves: list[Move], dtype: torch.dtype) -> None:
    """``conversion.json``: what the model was made from, for whoever finds the folder later."""
    files: dict[str, int] = {}
    for move in moves:
        files[f"{move.tensor.file.parent.name}/{move.tensor.file.name}"] = move.tensor.file.stat().st_size
    record = {
        "mmedpo_ray": __version__,
        "model_type": original["model_type"],
        "mm_vision_tower": original.get("mm_vision_tower"),
        "tower_from": next(move.tensor.file.parent.name for move in moves if move.target.startswith(TOWER)),
        "dtype": _name(dtype),
        "files": files,
    }
    (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _verify(folder: Path, config: LlavaConfig, moves: list[Move]) -> None:
    """Reads back what was written: every weight in its shape, and a processor that writes prompts."""
    written = {tensor.name: tensor.shape for tensor in list_tensors(folder)}
    planned = {move.target: move.tensor.shape for move in moves}
    writer = PromptWriter(load_processor(str(folder)))
    if written != planned or writer.num_image_tokens != config.image_seq_length:
        raise RuntimeError(f"the model written to {folder} is not the one planned")


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder. Name a new folder with --out.")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the converted model needs {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB free. Make room or "
            "name another folder with --out."
        )


@contextmanager
def _completed(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` once it is complete; if it never is, all that was made for it is removed.

    Raises:
        UserError: it cannot be made or written to.
    """
    temporary = out.with_name(f".{out.name}.converting")
    made: list[Path] = []
    try:
        for folder in [folder for folder in reversed(out.parents) if not folder.exists()]:
            folder.mkdir()
            made.append(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {out}: {one_line(error)}. Mend that or name another folder with --out."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not out.exists():
            for folder in reversed(made):
                # Somebody else may have put something there meanwhile.
                with suppress(OSError):
                    folder.rmdir()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
