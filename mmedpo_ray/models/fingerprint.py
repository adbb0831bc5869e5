"""Hashes of a model's files: equal for a copy, different after a change to what it computes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from mmedpo_ray.models.loading import resolve_model

# Up to this total size every file is hashed whole; above it, weights are hashed by samples.
_HASH_WHOLE_BYTES = 256 * 1024**2
# Blocks of a large file, evenly spread from its first byte to its last, and of the middle of every tensor.
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 1024
_TENSOR_BYTES = 4 * 1024
_WEIGHTS = (".safetensors", ".bin")
# Configuration, template, image processing and tokenizer.
_TEXT_SUFFIXES = (".json", ".jinja", ".model")
_TOKENIZER_FILES = ("vocab.txt", "merges.txt")
# These lie beside a model and do not change what it computes.
_IGNORED = ("scores.json", "training_args.bin")


def model_fingerprint(path: str) -> str:
    """A hash that changes when the model's weights, template or processing do; 16 hex digits."""
    return hashlib.sha256(json.dumps(model_files(path), sort_keys=True).encode()).hexdigest()[:16]


def model_files(path: str) -> dict[str, str]:
    """A hash (16 hex digits) of each file that decides what a model computes or how its input is made.

    Small local models are hashed whole, the weights of large ones by samples, so that a copy is the same
    model. A hub name counts as its own hash: a published revision does not change under its name.
    """
    source = resolve_model(path)
    folder = Path(source)
    if not folder.is_dir():
        return {source: hashlib.sha256(source.encode()).hexdigest()[:16]}
    files = sorted(
        file
        for file in folder.iterdir()
        if (file.suffix in (*_WEIGHTS, *_TEXT_SUFFIXES) or file.name in _TOKENIZER_FILES)
        and file.name not in _IGNORED
    )
    is_small = sum(file.stat().st_size for file in files) <= _HASH_WHOLE_BYTES
    return {file.name: _hash_file(file, whole=is_small or file.suffix not in _WEIGHTS) for file in files}


def _hash_file(file: Path, *, whole: bool) -> str:
    """16 hex digits of the whole content, or of size, safetensors header, sampled blocks and tensors.

    The last block of a ``.bin`` is the directory of a zip, which has a checksum of every tensor.
    """
    if whole:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
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
    """The header of a safetensors file and the offset of each tensor's middle; empty for a damaged file."""
    length = int.from_bytes(content.read(8), "little")
    if length > size:
        return b"", []
    header = content.read(length)
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return header, sorted(8 + length + sum(entry["data_offsets"]) // 2 for entry in entries)
    except (ValueError, AttributeError, TypeError, KeyError):
        return header, []
