"""Fingerprints of a model's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_llava import build_tiny_llava

from mmedpo_ray.models import fingerprint
from mmedpo_ray.models.fingerprint import model_fingerprint


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "llava")


def test_the_fingerprint_follows_weights_and_template(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    assert model_fingerprint(str(other)) == model_fingerprint(str(model_folder))
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    assert model_fingerprint(str(other)) != model_fingerprint(str(model_folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "merges.txt", "vocab.txt", "tokenizer.model"])
def test_the_fingerprint_follows_every_file_of_a_model(model_folder: Path, tmp_path: Path, name: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    (other / "README.txt").write_text("notes")
    assert model_fingerprint(str(other)) == model_fingerprint(str(model_folder))
    found = set()
    for content in ("one", "two"):
        (other / name).write_text(content)
        found.add(model_fingerprint(str(other)))
    assert len(found - {model_fingerprint(str(model_folder))}) == 2


def test_large_weights_are_known_by_their_content(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is the same model; other values in any tensor are not, nor other shapes of the same bytes."""
    monkeypatch.setattr(fingerprint, "_HASH_WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "_SAMPLE_BYTES", 64)
    original = model_fingerprint(str(model_folder))
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    path = other / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert model_fingerprint(str(other)) == original
    tensors = load_file(path)
    names = sorted(tensors)
    changes = [{name: tensors[name] + 1} for name in names[:: len(names) // 8]]
    matrix = next(name for name in names if tensors[name].ndim == 2)
    changes.append({matrix: tensors[matrix].reshape(-1)})
    for change in changes:
        save_file({**tensors, **change}, path, {"format": "pt"})
        assert model_fingerprint(str(other)) != original
    save_file(tensors, path, {"format": "pt"})
    content = path.read_bytes()
    for damaged in (content[:-1], content[:4], b"\xff" * 64):
        path.write_bytes(damaged)
        assert model_fingerprint(str(other)) != original
