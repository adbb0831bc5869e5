"""Moving the weights of a checkpoint to new names, a shard at a time.

First only the headers are read: which tensors there are, their shapes and precisions. From these the whole move is
planned and checked. Then tensors are read in the order in which they lie in the files and written as soon as a shard is
full, so memory holds about one shard however large the model is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmedpo_ray.convert.json_files import is_lfs_pointer, lfs_message, read_object, shorten
from mmedpo_ray.convert.weight_names import is_recomputed, original_name
from mmedpo_ray.errors import UserError

MAX_SHARD_BYTES = 2 * 1024**3

_INDEX = "model.safetensors.index.json"
# In this order, as transformers looks for them: an index of shards, or a single file.
_LAYOUTS = (_INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 5

Progress = Callable[[int, int], None]
"""Called as progress(tensors written, tensors in all)."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, by what the header says.

    Attributes:
        name: in the file.
        file: where it is.
        shape: as saved.
        dtype: as saved; floating point, save for tables that are recomputed.
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
    """A tensor and its new name, empty where it has none."""

    target: str
    tensor: Tensor


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights of any layout, complete or not."""
    return any((folder / name).is_file() for name in _LAYOUTS)


def list_tensors(folder: Path) -> list[Tensor]:
    """Every tensor of a checkpoint in the order of its files; reads headers only.

    Raises:
        UserError: no weights, shards missing or damaged, an index that does not fit the files, or quantised weights.
    """
    layout = next((name for name in _LAYOUTS if (folder / name).is_file()), None)
    if layout is None:
        raise UserError(
            f"there are no weights in {folder}. Expected is one of {', '.join(_LAYOUTS)}; download the checkpoint again."
        )
    weight_map = _read_index(folder / layout) if layout.endswith(".json") else None
    files = sorted(set(weight_map.values())) if weight_map is not None else [layout]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is incomplete: {_some(missing, 'file')} named in {layout} {_are(missing)} missing. Download the "
            "checkpoint again."
        )
    tensors = [tensor for name in files for tensor in _read_header(folder / name)]
    if weight_map is not None:
        found = {tensor.name: tensor.file.name for tensor in tensors}
        wrong = sorted(
            name for name in found.keys() | weight_map.keys() if found.get(name) != weight_map.get(name)
        )
        if wrong or len(found) != len(tensors):
            raise UserError(
                f"{layout} in {folder} does not fit its files: {_some(wrong, 'tensor')} lie elsewhere than it says. "
                "Download the checkpoint again."
            )
    return tensors


def plan_moves(
    moves: Iterable[Move], expected: Mapping[str, tuple[int, ...]], folder: Path, *, optional: frozenset[str]
) -> list[Move]:
    """Checks that every weight of the model comes from exactly one tensor of the right shape.

    Args:
        moves: what would be written.
        expected: name and shape of every weight of the converted model.
        folder: where they come from, for messages.
        optional: names that may be absent from ``moves``.

    Returns:
        The moves, in their order.

    Raises:
        UserError: weights are missing, superfluous or of another shape; names are those of the original.
    """
    planned = list(moves)
    found = {move.target: move.tensor for move in planned}
    superfluous = [move.tensor.name for move in planned if move.target not in expected]
    if superfluous:
        raise UserError(
            f"{folder} has {_some(superfluous, 'tensor')} that the model of its config.json has no place for. Is "
            "config.json of another checkpoint?"
        )
    missing = sorted(
        original_name(name) or name for name in expected.keys() - found.keys() if name not in optional
    )
    if missing:
        raise UserError(
            f"{folder} is incomplete: {_some(missing, 'tensor')} {_are(missing)} in none of its files."
        )
    wrong = [
        f"{tensor.name} is {_shape(tensor.shape)}, not {_shape(expected[target])}"
        for target, tensor in found.items()
        if tensor.shape != tuple(expected[target])
    ]
    if wrong:
        raise UserError(
            f"weights in {folder} have another shape than config.json and the tower's configuration say: {_some(wrong)}."
        )
    return planned


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
        max_shard_bytes: size of a shard; a larger tensor is a shard of its own.
        progress: told after every shard.

    Returns:
        Bytes of all weights.
    """
    shards = list(_split(moves, dtype.itemsize, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_read(shard, dtype), folder / name, {"format": "pt"})
        # safetensors writes files for the owner alone.
        (folder / name).chmod(0o644)
        weight_map.update({move.target: name for move in shard})
        if progress is not None:
            progress(len(weight_map), len(moves))
    total = sum(move.tensor.size for move in moves) * dtype.itemsize
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _split(moves: list[Move], itemsize: int, max_bytes: int) -> Iterator[list[Move]]:
    shard: list[Move] = []
    filled = 0
    for move in moves:
        size = move.tensor.size * itemsize
        if shard and filled + size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(move)
        filled += size
    if shard:
        yield shard


def _read(moves: list[Move], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a shard, each file opened once."""
    tensors = {}
    files = list(dict.fromkeys(move.tensor.file for move in moves))
    for file in files:
        with _opened(file) as get:
            for move in moves:
                if move.tensor.file == file:
                    weight = get(move.tensor.name)
                    tensors[move.target] = weight.to(dtype).contiguous()
                    _check_finite(weight, tensors[move.target], move.tensor)
    return tensors


def _check_finite(weight: torch.Tensor, written: torch.Tensor, tensor: Tensor) -> None:
    """Refuses weights that are no numbers, which a model would carry into every answer."""
    if bool(torch.isfinite(written).all()):
        return
    if bool(torch.isfinite(weight).all()):
        raise UserError(
            f"{tensor.name} in {tensor.file} has values beyond the range of {written.dtype}; choose --dtype bfloat16."
        )
    raise UserError(
        f"{tensor.name} in {tensor.file} holds NaN or infinite values: the checkpoint is damaged. Get it again."
    )


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[str], torch.Tensor]]:
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
            raise UserError(_damaged(file, error)) from error
    else:
        found = {name: (list(value.shape), value.dtype) for name, value in _load_bin(file).items()}
    tensors = []
    for name, (shape, dtype) in found.items():
        if not is_recomputed(name) and (dtype is None or not dtype.is_floating_point):
            raise UserError(
                f"{name} in {file} is not floating point. Quantised checkpoints cannot be converted; take the original."
            )
        tensors.append(Tensor(name, file, tuple(shape), dtype or torch.int64))
    return tensors


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    """A torch file whose tensors stay on disk until they are used."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Zip, pickle and torch raise kinds of their own on damaged files.
        raise UserError(_damaged(file, error)) from error
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise UserError(f"{file} holds something else than named tensors; it is no checkpoint of weights.")
    return content


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
    if not isinstance(weight_map, dict) or not weight_map:
        raise _no_index(path, f"weight_map={shorten(weight_map)}, expected is an object of names")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or Path(name).suffix != f".{suffix}"
            or "\0" in name
        ):
            raise _no_index(
                path,
                f"weight_map has {shorten(tensor)}: {shorten(name)}, expected is a .{suffix} file beside the index",
            )
    return weight_map


def _no_index(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is no index of shards ({reason}). Download the checkpoint again.")


def _damaged(file: Path, error: Exception) -> str:
    """What to say about a file that cannot be opened."""
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError:
        start = b""
    if is_lfs_pointer(start):
        return lfs_message(file)
    first = str(error).strip().split("\n", 1)[0].rstrip(".")
    return f"cannot read {file}: {first}. It is damaged or not wholly downloaded; download it again."


def _some(items: list[str], noun: str = "") -> str:
    """The first few of many, with their number in front."""
    shown = ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'} ({shown})" if noun else shown


def _are(items: list[str]) -> str:
    return "is" if len(items) == 1 else "are"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single value"
