"""Moving the weights of a checkpoint to new names, a shard at a time.

First only the headers are read: which tensors there are, their shapes and precisions. From these the whole
move is planned and checked. Then tensors are read in the order in which they lie in the files and written as
soon as a shard is full, so memory holds about one shard however large the model is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import Field, StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmedpo_ray.convert.json_files import JsonSettings, check_not_lfs_pointer, checked, read_object
from mmedpo_ray.convert.weight_names import is_recomputed, original_name
from mmedpo_ray.errors import UserError, first_line
from mmedpo_ray.models.saving import INDEX

MAX_SHARD_BYTES = 2 * 1024**3

# In this order, as transformers looks for them: an index of shards, or a single file.
_LAYOUTS = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 5

Progress = Callable[[int, int], None]
"""Called as progress(tensors written, tensors in all)."""


class ShardIndex(JsonSettings):
    """An index of shards; every shard lies beside it."""

    weight_map: Annotated[
        dict[str, Annotated[str, StringConstraints(pattern=r"^[^/\x00]+\.(safetensors|bin)$")]],
        Field(min_length=1),
    ]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, by what the header says.

    Attributes:
        name: in the file.
        file: where it is.
        shape: as saved.
        dtype: as saved; floating point, except for tables that are recomputed.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Move:
    """A tensor and its new name, empty if it has none."""

    target: str
    tensor: Tensor


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any layout, complete or not."""
    return any((folder / name).is_file() for name in _LAYOUTS)


def list_tensors(folder: Path) -> list[Tensor]:
    """Every tensor of a checkpoint in the order of its files; reads headers only.

    Raises:
        UserError: no weights, shards missing or damaged, an index that does not fit the files, or quantised
            weights.
    """
    layout = next((name for name in _LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        raise UserError(
            f"there are no weights in {folder}. Expected is one of {', '.join(_LAYOUTS)}; download the "
            "checkpoint again."
        )
    if not layout.endswith(".json"):
        return _read_header(folder / layout)
    weight_map = checked(ShardIndex, read_object(folder / layout), folder / layout).weight_map
    files = sorted(set(weight_map.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} is incomplete: {layout} names files that are missing ({_some(missing)}). Download the "
            "checkpoint again."
        )
    tensors = [tensor for name in files for tensor in _read_header(folder / name)]
    found = {tensor.name: tensor.file.name for tensor in tensors}
    wrong = sorted(
        name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name)
    )
    if wrong or len(found) != len(tensors):
        raise UserError(
            f"{layout} in {folder} does not fit its files: other tensors lie in them than it says "
            f"({_some(wrong)}). Download the checkpoint again."
        )
    return tensors


def check_moves(
    moves: list[Move], expected: Mapping[str, tuple[int, ...]], folder: Path, *, optional: frozenset[str]
) -> None:
    """Checks that every weight of the model comes from exactly one tensor of the right shape.

    Args:
        moves: what would be written.
        expected: name and shape of every weight of the converted model.
        folder: where they come from, for messages.
        optional: names that may be absent from ``moves``.

    Raises:
        UserError: weights are missing, superfluous or of another shape; names are those of the original.
    """
    found = {move.target: move.tensor for move in moves}
    if superfluous := [move.tensor.name for move in moves if move.target not in expected]:
        raise UserError(
            f"{folder} has tensors that the model of its config.json has no place for "
            f"({_some(superfluous)}). Is config.json of another checkpoint?"
        )
    if missing := sorted(expected.keys() - found.keys() - optional):
        names = [original_name(name) or name for name in missing]
        raise UserError(
            f"{folder} is incomplete: none of its files holds these tensors ({_some(sorted(names))})."
        )
    wrong = [
        f"{tensor.name} is {_shape(tensor.shape)}, not {_shape(expected[target])}"
        for target, tensor in found.items()
        if tensor.shape != tuple(expected[target])
    ]
    if wrong:
        raise UserError(
            f"weights in {folder} have another shape than config.json and the tower's configuration say: "
            f"{_some(wrong)}."
        )


def write_shards(
    moves: list[Move],
    folder: Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> int:
    """Writes the tensors under their new names as safetensors: one file, or shards with an index.

    Args:
        moves: what to write; read in this order.
        folder: exists.
        dtype: of everything written.
        max_shard_bytes: size of a shard; a larger tensor has its own shard.
        progress: called after every shard.

    Returns:
        Bytes of all weights.
    """
    sources = {move.target: move.tensor for move in moves}
    split = split_state_dict_into_shards_factory(
        sources,
        get_storage_size=lambda tensor: tensor.size * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    num_written = 0
    for file, names in split.filename_to_tensors.items():
        save_file(_read({name: sources[name] for name in names}, dtype), folder / file, {"format": "pt"})
        # safetensors makes files that only their owner can read.
        (folder / file).chmod(0o644)
        num_written += len(names)
        if progress is not None:
            progress(num_written, len(moves))
    total = split.metadata["total_size"]
    if split.is_sharded:
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _read(sources: dict[str, Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a shard by their new names; each file is opened once.

    Raises:
        UserError: one holds values that are no numbers, or too large for ``dtype``.
    """
    tensors = {}
    for file in dict.fromkeys(tensor.file for tensor in sources.values()):
        with _opened(file) as get:
            for target, tensor in sources.items():
                if tensor.file == file:
                    saved = get(tensor.name)
                    tensors[target] = saved.to(dtype).contiguous()
                    _check_finite(saved, tensors[target], tensor)
    return tensors


def _check_finite(saved: torch.Tensor, written: torch.Tensor, tensor: Tensor) -> None:
    if bool(torch.isfinite(written).all()):
        return
    if bool(torch.isfinite(saved).all()):
        raise UserError(
            f"{tensor.name} in {tensor.file} has values beyond the range of {written.dtype}; choose --dtype "
            "bfloat16."
        )
    raise UserError(
        f"{tensor.name} in {tensor.file} holds NaN or infinite values: the checkpoint is damaged. Get it "
        "again."
    )


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads a tensor of the file by its name."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            yield opened.get_tensor
    else:
        content = _load_bin(file)
        # Copies: tensors of a torch file may share their storage, which safetensors refuses to write.
        yield lambda name: content[name].clone(memory_format=torch.contiguous_format)


def _read_header(file: Path) -> list[Tensor]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
                found = {
                    name: (part.get_shape(), _DTYPES.get(part.get_dtype())) for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    else:
        found = {name: (list(value.shape), value.dtype) for name, value in _load_bin(file).items()}
    for name, (_, dtype) in found.items():
        if not is_recomputed(name) and (dtype is None or not dtype.is_floating_point):
            raise UserError(
                f"{name} in {file} is not floating point. Quantised checkpoints cannot be converted; take "
                "the original."
            )
    return [Tensor(name, file, tuple(shape), dtype or torch.int64) for name, (shape, dtype) in found.items()]


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    """A torch file whose tensors stay on disk until they are used."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Zip, pickle and torch raise their own kinds of errors on damaged files.
        raise _damaged(file, error) from error
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"{file} does not hold named tensors, so it is no checkpoint of weights.")
    return content


def _damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that cannot be opened."""
    with suppress(OSError), file.open("rb") as opened:
        check_not_lfs_pointer(file, opened.read(64))
    return UserError(
        f"cannot read {file}: {first_line(error)}. It is damaged or not completely downloaded; download it "
        "again."
    )


def _some(items: list[str]) -> str:
    """The first few of many."""
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single value"
